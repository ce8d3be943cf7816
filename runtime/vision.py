"""Images in, labels out: what an image classifier expects of its input, and the executable that classifies. No torch; Pillow only to read files
and to resize.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from planc.runtime.artifact import Manifest, copy_artifact
from planc.runtime.contract import Contract
from planc.runtime.engine import Floats
from planc.runtime.errors import ArtifactError, InputError

Pixels = NDArray[np.uint8]
BATCH = 8  #: images that go through one pass together


class ImageSpec(BaseModel):
    """How an image becomes the input of a model: RGB, resized by its shorter side, cropped in the middle, (pixel - mean) / std.

    `size` is (rows, columns) of the input; one number means a square. `resize` is the shorter side before the crop; None resizes straight to
    `size`, aspect ratio or not. `mean` and `std` are per channel, in units of a pixel (0 to 255).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[int, int] = Field(description="rows and columns of the model's input")
    resize: int | None = Field(None, ge=1, description="shorter side before the crop")
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    layout: Literal["NCHW", "NHWC"] = "NCHW"

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"size": value} if isinstance(value, int | list | tuple) else value

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.size) < 1 or min(self.std) <= 0:
            raise ValueError("size and std must be positive")
        if self.resize is not None and self.resize < max(self.size):
            raise ValueError(f"resize {self.resize} is smaller than the crop {self.size}")
        return self

    def scaled(self, size: tuple[int, int]) -> ImageSpec:
        """The same for another size of input; the crop keeps its share of the picture."""
        share = None if self.resize is None else max(size) * self.resize / max(self.size)
        return self.model_copy(update={"size": size, "resize": None if share is None else round(share)})

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image as the model takes it."""
        rows, columns = self.size
        return (3, rows, columns) if self.layout == "NCHW" else (rows, columns, 3)

    def pixels(self, image: Any) -> Floats:
        """One image as the model takes it, float32. `image`: a path, a Pillow image, or uint8 [Y,X,3] (or [Y,X] grey).

        Raises InputError[input-invalid] for what is no image, and [backend-missing] where Pillow is needed and not installed.
        """
        array = self._cut(image)
        scaled = (array.astype(np.float32) - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1) if self.layout == "NCHW" else scaled, dtype=np.float32)

    def _cut(self, image: Any) -> Pixels:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or not image.size:
                raise InputError(
                    "input-invalid", f"an array must be uint8 [rows, columns, 3], this one is {image.dtype} {list(image.shape)}"
                )
            image = np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image
            if image.shape[:2] == self.size and self.resize in (None, min(self.size)):
                return np.asarray(image, dtype=np.uint8)
        return self._crop(_open(image))

    def _crop(self, image: Any) -> Pixels:
        width, height = image.size
        rows, columns = self.size
        if self.resize is None:
            new = (columns, rows)
        else:
            share = self.resize / min(width, height)
            new = (max(columns, round(width * share)), max(rows, round(height * share)))
        kind = _pillow().Resampling[self.interpolation.upper()]
        for step in ((new[0], height), new):  # across, then down: which axis Pillow takes first differs between its releases
            if step != image.size:
                image = image.resize(step, kind)
        left, top = (new[0] - columns) // 2, (new[1] - rows) // 2
        return np.asarray(image.crop((left, top, left + columns, top + rows)), dtype=np.uint8)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        message = "reading and resizing images needs Pillow, which is not installed"
        raise InputError("backend-missing", message, fix="pip install 'planc[vision]'") from error
    return Image


def _open(image: Any) -> Any:
    """A Pillow image in RGB, upright."""
    library = _pillow()
    from PIL import ImageOps

    if isinstance(image, np.ndarray):
        return library.fromarray(image)
    if not isinstance(image, str | Path | library.Image):
        raise InputError("input-invalid", f"a {type(image).__name__} is no image", fix="give a path, a Pillow image, or uint8 [Y,X,3]")
    try:
        opened = library.open(Path(image).expanduser()) if isinstance(image, str | Path) else image
        return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError as error:
        raise InputError("input-invalid", f"there is no file {image}", where=str(image), fix="name an image file") from error
    except (OSError, ValueError, library.DecompressionBombError) as error:
        raise InputError("input-invalid", f"the image cannot be read: {error}", where=str(image)) from error


class ImageEngine(Protocol):
    """A loaded classifier. Stateless."""

    batches: bool  # more than one image a pass

    def forward(self, pixels: Floats) -> Floats:
        """Logits [B,N] of images [B,...] as `ImageSpec.pixels` makes them."""


@dataclass(frozen=True)
class Prediction:
    """A class that an image may show."""

    label: str
    index: int
    probability: float


class Classifier:
    """Classifies images; made by `planc.load` and `planc.compile`.

    Args:
        engine: runs passes.
        image: what the model expects of an image.
        labels: a name for every class; empty where there are none, and numbers stand in for them.
        contract: what was changed and measured.
        manifest, directory: the artifact that this came from, if any.
    """

    def __init__(
        self,
        engine: ImageEngine,
        image: ImageSpec,
        labels: Sequence[str] = (),
        contract: Contract | None = None,
        manifest: Manifest | None = None,
        directory: Path | None = None,
    ) -> None:
        self.engine, self.image, self.labels = engine, image, tuple(labels)
        self.contract = contract if contract is not None else manifest.contract if manifest is not None else Contract()
        self.manifest, self.directory = manifest, directory
        self.seconds = 0.0  # of the engine in the last call

    def classify(self, images: Any, *, top: int = 5) -> Any:
        """The likeliest classes, best first: a list of `Prediction` for one image, a list of such lists for a list of images.

        An image is a path, a Pillow image, or uint8 [Y,X,3]. Raises InputError for what is none.
        """
        if top < 1:
            raise InputError("input-invalid", f"top must be at least 1 (got {top})")
        many = isinstance(images, list | tuple)
        found = [self._best(row, top) for row in self.logits(images if many else [images])]
        return found if many else found[0]

    def logits(self, images: Sequence[Any]) -> Floats:
        """Logits [B,N] of images, a few at a time."""
        if not images:
            raise InputError("input-invalid", "there is no image to classify")
        step, rows = BATCH if self.engine.batches else 1, []
        self.seconds = 0.0
        for start in range(0, len(images), step):
            pixels = np.stack([self.image.pixels(image) for image in images[start : start + step]])
            begin = perf_counter()
            rows.append(self.engine.forward(pixels))
            self.seconds += perf_counter() - begin
        return np.concatenate(rows)

    def _best(self, logits: Floats, top: int) -> list[Prediction]:
        shifted = np.exp(logits.astype(np.float64) - logits.max())
        share = shifted / shifted.sum()
        order = np.argsort(-logits, kind="stable")[:top]
        return [Prediction(self.labels[i] if i < len(self.labels) else str(i), int(i), float(share[i])) for i in order]

    def report(self) -> dict[str, Any]:
        """What this classifier is and promises, as plain data."""
        report: dict[str, Any] = {
            "task": "classification",
            "image": self.image.model_dump(mode="json"),
            "classes": len(self.labels),
            "exactness": None,
            "exactness_line": "every pass as its effect says",
            "contract": self.contract.model_dump(mode="json"),
        }
        if self.manifest is not None:
            files = {name: entry.bytes for name, entry in self.manifest.files.items()}
            report |= {"model": self.manifest.model, "plan": self.manifest.plan, "backend": self.manifest.backend}
            report |= {"target": self.manifest.target, "memory": self.manifest.extra.get("memory")}
            report |= {"files": files, "bytes": sum(files.values())}
        return report

    def save(self, directory: str | Path) -> Path:
        """Copy the artifact."""
        if self.manifest is None or self.directory is None:
            raise ArtifactError("artifact-write", "this classifier has no artifact to copy", fix="compile with `backend: onnx`")
        return copy_artifact(self.manifest, self.directory, Path(directory))
