"""The external weight file of an artifact: every tensor once, shared by all ONNX files beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx
from onnx import TensorProto

_PAGE = 4096


class WeightFile:
    """Appends tensors to one file; equal bytes are stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._places: dict[tuple[str, int], int] = {}

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

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
        proto = TensorProto(name=name, data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        proto.data_location = TensorProto.EXTERNAL
        for k, v in (("location", self.path.name), ("offset", self._places[key]), ("length", array.nbytes)):
            proto.external_data.add(key=k, value=str(v))
        return proto
