"""Keys as a few numbers each, in a basis of the prompt's keys before they were turned (papers/76, "ShadowKV"; papers/A4 section 5.4)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from planc.runtime.engine import Floats
from planc.runtime.kv.stores.base import Part, Payload, Store
from planc.runtime.kv.stores.dense import Dense
from planc.runtime.kv.stores.int8 import Int8


class LowRank(Store):
    """All heads' keys of a token in the `rank` strongest directions of the prompt's; values dense or in int8.

    The basis comes from the eigenvectors of the keys' Gram matrix, which is small, instead of a decomposition of all of them; what follows the
    prompt is expressed in the same basis.
    """

    before_rope: ClassVar[bool] = True
    in_graph: ClassVar[bool] = False
    rank: int = Field(ge=1, description="numbers that are kept of a token's keys, of all heads together")
    values: Literal["float32", "float16", "int8"] = Field(
        "float16", description="format of the values; float32 is that of the keys' numbers, too"
    )

    def fit(self, rows: Floats, part: Part) -> Payload:
        """`basis` [G,rank,D] of keys."""
        if part == "value":
            return {}
        count, heads, tokens, width = rows.shape
        flat = rows.transpose(0, 2, 1, 3).reshape(count * tokens, heads * width).astype(np.float64)
        vectors = np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, : self.rank]
        return {"basis": np.ascontiguousarray(vectors.T.reshape(-1, heads, width).swapaxes(0, 1), np.float32)}

    def encode(self, rows: Floats, part: Part, fitted: Payload) -> Payload:
        """`left` [N,1,T,rank] of keys; values as their format has them."""
        if part == "value":
            return self._values.encode(rows, part, {})
        wide = self.values == "float32"  # to the last bit, then, of keys as well
        return {"left": np.einsum("ngtd,grd->ntr", rows, fitted["basis"])[:, None].astype(np.float32 if wide else np.float16)}

    def decode(self, payload: Payload, part: Part, fitted: Payload) -> Floats:
        """Keys before they are turned."""
        if part == "value":
            return self._values.decode(payload, part, {})
        rows: Floats = payload["left"].astype(np.float32) @ fitted["basis"]
        return rows

    @property
    def _values(self) -> Store:
        return Int8() if self.values == "int8" else Dense(dtype=self.values)
