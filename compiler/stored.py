"""How a graph reads the blocks that a cache stored: inputs `body.i.*` for the arrays of a store, and the operations that decode them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.program import Editor
from planc.runtime.kv import LayerSpec
from planc.runtime.kv.stores import BLOCK, PARTS, Bitmap, Dense, Gear, Int8, Part, Quantized, Store

aten = torch.ops.aten

Arrays = dict[str, Node]


def stored_rows(edit: Editor, spec: LayerSpec, store: Store) -> list[Node]:
    """Keys and values [1,G,S,D] of all stored blocks of one layer."""
    blocks, rows = edit.symbol(), []
    for part in PARTS:
        width = spec.width(part)
        empty = store.encode(np.zeros((1, spec.heads, BLOCK, width), np.float32), part, {})
        arrays = {
            name: edit.input(f"body.{spec.name.partition('.')[2]}.{part}.{name}", dtype_of(array), blocks, *array.shape[1:])
            for name, array in empty.items()
        }
        node = _DECODERS[type(store)](edit, store, arrays, part)  # [N,G,64,D]
        turned = edit.call(aten.transpose.int, node, 0, 1)
        rows.append(edit.call(aten.reshape.default, turned, [1, spec.heads, -1, width]))
    return rows


def dtype_of(array: np.ndarray) -> torch.dtype:
    """That of a graph's input; bfloat16, which numpy does not have, stands in uint16."""
    return torch.bfloat16 if array.dtype == np.uint16 else torch.from_numpy(array[:0]).dtype


def _dense(edit: Editor, store: Store, arrays: Arrays, part: Part) -> Node:
    return edit.call(aten.to.dtype, arrays["rows"], torch.float32)


def _int8(edit: Editor, store: Store, arrays: Arrays, part: Part) -> Node:
    return edit.call(OPS.stored_int8.default, arrays["codes"], arrays["scale"])


def _quantized(edit: Editor, store: Store, arrays: Arrays, part: Part) -> Node:
    assert isinstance(store, Quantized)
    own = [arrays[name] for name in ("codes", "scale", "zero")]
    return edit.call(OPS.stored_quantized.default, *own, store.bits, store.group, part == "key")


def _gear(edit: Editor, store: Store, arrays: Arrays, part: Part) -> Node:
    rows = _quantized(edit, store, arrays, part)
    extra = [arrays.get(name) for name in ("left", "right", "places", "deltas")]
    if not any(extra):
        return rows
    if "left_scale" in arrays:
        extra[:2] = [_scaled(edit, arrays[name], arrays[f"{name}_scale"]) for name in ("left", "right")]
    return edit.call(OPS.stored_corrected.default, rows, *extra, 2 if part == "key" else 3)


def _bitmap(edit: Editor, store: Store, arrays: Arrays, part: Part) -> Node:
    rows = edit.call(OPS.stored_bitmap.default, arrays["bits"], arrays["values"])
    return _scaled(edit, rows, arrays["scale"]) if "scale" in arrays else rows


def _scaled(edit: Editor, codes: Node, scale: Node) -> Node:
    return edit.call(OPS.stored_int8.default, codes, scale)


_DECODERS: dict[type[Store], Callable[[Editor, Store, Arrays, Part], Node]] = {
    Dense: _dense,
    Int8: _int8,
    Quantized: _quantized,
    Gear: _gear,
    Bitmap: _bitmap,
}
