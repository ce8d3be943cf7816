"""H6: Learn2PD's filter. A small network reads the confidences of a block and says which proposals are final already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, PrivateAttr

from planc.runtime.engine import Floats
from planc.runtime.errors import ArtifactError, InputError
from planc.runtime.masked.canvas import Canvas, Mask, Slots
from planc.runtime.masked.hooks import SelectHook, Shape, refuse
from planc.runtime.masked.selections import surest

NAMES = ("first.weight", "first.bias", "second.weight", "second.bias")


class LearnedFilter(SelectHook):
    """Commit what a filter over the block's confidences holds for final, and the surest slot in any case (papers/09).

    The filter is fitted by `planc fit` for one model and one size of block: sigmoid(W2 relu(W1 c + b1) + b2) of the confidences c [size], where slots
    that were cut off count as sure.
    """

    file: str = Field(description="safetensors file of the filter")
    theta: float = Field(0.96, ge=0.0, description="least output; 1 and above one slot a pass")
    _weights: tuple[Floats, ...] | None = PrivateAttr(None)

    def bind(self, folder: Path) -> Self:
        """The part with its weights, read from `folder`."""
        bound = self.model_copy()
        bound._weights = read_filter(folder / self.file)
        return bound

    @property
    def size(self) -> int:
        """Slots of the block that the filter was fitted for."""
        assert self._weights is not None
        return int(self._weights[0].shape[1])

    def check(self, shape: Shape) -> None:
        if self._weights is not None and shape.field != self.size * shape.blocks:
            raise refuse(
                f"the filter is for blocks of {self.size} slots, the field has {shape.field} in {shape.blocks}", "fit it for this window"
            )

    def select(self, canvas: Canvas, slots: Slots, confidence: Floats) -> Mask:
        assert self._weights is not None, "bind before use"
        block = np.ones(self.size, dtype=np.float32)
        seen = canvas.confidence[canvas.start : canvas.stop]
        block[: len(seen)] = seen
        return (accepts(self._weights, block)[slots - canvas.start] > self.theta) | surest(confidence, 1)


def accepts(weights: tuple[Floats, ...], confidence: Floats) -> Floats:
    """[..., size] what the filter says about confidences [..., size]."""
    first, bias, second, offset = weights
    hidden = np.maximum(confidence @ first.T + bias, 0.0)
    return np.asarray(1.0 / (1.0 + np.exp(-(hidden @ second.T + offset))), dtype=np.float32)


def read_filter(path: Path) -> tuple[Floats, ...]:
    """The four tensors of a filter. Raises InputError[input-invalid] for a file that is not there, ArtifactError for one that is no filter."""
    fix = "make it with `planc fit`"
    weights = read_tensors(path, NAMES, "filter", fix)
    if weights[0].shape[0] != weights[2].shape[1] or weights[0].shape[1] != weights[2].shape[0]:
        raise ArtifactError("artifact-corrupt", f"{path.name} is not a filter: its layers do not fit together", where=str(path), fix=fix)
    return weights


def read_tensors(path: Path, names: tuple[str, ...], what: str, fix: str) -> tuple[Floats, ...]:
    """Named float32 tensors of a file. Raises InputError[input-invalid] where it is not there, ArtifactError where it is something else."""
    try:
        tensors = read_safetensors(path)
        return tuple(tensors[name] for name in names)
    except FileNotFoundError as error:
        raise InputError("input-invalid", f"there is no {what} {path.name}", where=str(path), fix=fix) from error
    except (OSError, ValueError, LookupError) as error:
        raise ArtifactError("artifact-corrupt", f"{path.name} is not a {what}: {error}", where=str(path), fix=fix) from error


def read_safetensors(path: Path) -> dict[str, Floats]:
    """The float32 tensors of a safetensors file, without the library: a length, a header in JSON, and the bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise ValueError("the header is longer than the file")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} is {entry['dtype']}, not F32")
        begin, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[8 + size + begin : 8 + size + end], np.float32).reshape(entry["shape"])
    return tensors
