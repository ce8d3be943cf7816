"""The external weight files of an artifact: every tensor once, shared by all ONNX files beside them.

Tensors lie as they are in `model.weights`. Entropy-coded matrices (`runtime/entropy.py`) lie in `model.coded.npz` under the names of the
initializers that they become when an engine opens the graph.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx
from onnx import TensorProto

from planc.backends.onnx.coded import CODED_FILE

_PAGE = 4096


class WeightFile:
    """Appends tensors to one file; equal bytes are stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._places: dict[tuple[str, int], int] = {}
        self._coded: dict[str, np.ndarray] = {}

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self._coded and kind is None:
            np.savez(self.path.with_name(CODED_FILE), allow_pickle=False, **self._coded)

    def coded(self, name: str, container: np.ndarray, shape: tuple[int, ...]) -> TensorProto:
        """A float32 tensor proto for what a container becomes; the file has no place for it, so only an engine that decodes can open it."""
        self._coded[name] = container
        return _external(name, TensorProto.FLOAT, shape, CODED_FILE, 0, 4 * int(np.prod(shape)))

    def tensor(self, name: str, array: np.ndarray) -> TensorProto:
        """A tensor proto that points into the file."""
        array = np.ascontiguousarray(array)
        data = array.reshape(-1).view(np.uint8).data
        key = (hashlib.blake2b(data, digest_size=20).hexdigest(), array.nbytes)
        if key not in self._places:
            if gap := -self._file.tell() % (_PAGE if array.nbytes >= _PAGE else 64):
                self._file.write(bytes(gap))
            self._places[key] = self._file.tell()
            self._file.write(data)
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        return _external(name, kind, array.shape, self.path.name, self._places[key], array.nbytes)


def _external(name: str, kind: int, shape: tuple[int, ...], file: str, offset: int, length: int) -> TensorProto:
    proto = TensorProto(name=name, data_type=kind, dims=shape)
    proto.data_location = TensorProto.EXTERNAL
    for k, v in (("location", file), ("offset", offset), ("length", length)):
        proto.external_data.add(key=k, value=str(v))
    return proto
