"""Let a vision transformer read patches of another size: more tokens, or fewer, with the same layers.

Matches   conv2d(images, w [N,C,p,p], b) with stride p and no padding, flattened to tokens; add(tokens, positions [1,T,K])
Produces  the same with w resampled to q x q by the pseudo-inverse of bilinear resizing, stride q, and positions interpolated bicubically; the
          class token, in front or behind, keeps its position
Keeps     embeddings of patches that are enlarged with q >= p; for q < p the answer of least squares
Refuses   programs without a patch embedding; sizes that leave no patch; reshapes that mix tokens with other dimensions
Paper     patch scaling (3); FlexiViT (Beyer et al. 2023) for the resampling
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.patch_embedding import Grid, resample_patches, resample_positions
from planc.compiler.program import Editor, Program, describe
from planc.runtime.errors import CompileError

aten = torch.ops.aten
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}


class PatchSize(Pass):
    """Resample the patch embedding and the positions of a vision transformer to another patch size."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    conflicts: ClassVar[tuple[str, ...]] = ("patch_size",)
    size: int = Field(ge=1, description="rows and columns of a patch in pixels")

    def apply(self, program: Program, context: Context) -> Program:
        """Replace weight and positions, then work out the shapes of everything behind them."""
        conv = self._embedding(program)
        old: Any = conv.meta["val"].shape
        if list(conv.args[3]) == [self.size, self.size]:  # type: ignore[call-overload]
            return program
        edit = program.edit(self.key)
        shapes = {node: node.meta["val"].shape for node in edit.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
        new = edit[conv]
        weight = edit.params[str(conv.args[1].target)]  # type: ignore[union-attr]
        edit.swap(new, 1, resample_patches(weight, (self.size, self.size)), f".patch{self.size}")
        new.args = (*new.args[:3], [self.size, self.size], *new.args[4:])
        edit.compute(new)
        before, after = ((int(shape[2]), int(shape[3])) for shape in (old, new.meta["val"].shape))
        moved = _Tokens(edit, shapes, before, after).follow(new)
        tokens = f"{before[0]}x{before[1]} -> {after[0]}x{after[1]} patches"
        return edit.done(1, 1, (tokens, f"{moved} position tables interpolated"))

    def _embedding(self, program: Program) -> Node:
        """The convolution that cuts the image into patches."""
        images = next(iter(program.inputs.values()))
        for node in images.users:
            if node.target is not OPS.conv2d.default or node.args[1].op != "get_attr":  # type: ignore[union-attr]
                continue
            kernel, (stride, pads, dilation, groups) = list(node.args[1].meta["val"].shape[2:]), node.args[3:7]  # type: ignore[union-attr]
            if (kernel, pads, dilation, groups) == (stride, [0, 0, 0, 0], [1, 1], 1):
                if self.size > min(images.meta["val"].shape[2:]):
                    raise CompileError(
                        "pass-refused",
                        f"a patch of {self.size} x {self.size} is larger than the image",
                        node=describe(node),
                        fix=f"use at most {min(images.meta['val'].shape[2:])}",
                    )
                return node
        raise CompileError(
            "pass-refused",
            "no convolution whose stride is its kernel reads the image, so there are no patches",
            where=f"pass {self.key}",
            fix="remove patch_size, or name a vision transformer",
        )


class _Tokens:
    """Follows a changed number of tokens through a graph, node by node."""

    def __init__(self, edit: Editor, shapes: dict[Node, Any], before: Grid, after: Grid) -> None:
        self.edit, self.shapes, self.before, self.after = edit, shapes, before, after
        self.moved = 0

    def follow(self, start: Node) -> int:
        """Recompute everything behind a node; how many position tables were interpolated."""
        stale = {start}
        for node in list(self.edit.graph.nodes):
            if node.op != "call_function" or not stale.intersection(node.all_input_nodes):
                continue
            if node.target in _RESHAPES:
                self._reshape(node)
            elif node.target is aten.add.Tensor:
                self._positions(node)
            try:
                self.edit.compute(node)
            except Exception as error:  # whatever shapes that do not fit make torch raise
                raise _refused(node, str(error).splitlines()[0]) from error
            stale.add(node)
        return self.moved

    def _reshape(self, node: Node) -> None:
        """The target of a reshape, with the sizes of the tokens' axes as they are now."""
        source, sizes = node.args[0], list(node.args[1])  # type: ignore[arg-type]
        if node.target is aten.expand.default:
            made = [new if _plain(old) == _plain(was) else old for old, was, new in zip(*self._aligned(node), strict=True)]
        else:
            found = reshaped(self.shapes[source], source.meta["val"].shape, self.shapes[node])  # type: ignore[index,union-attr]
            if found is None:
                raise _refused(node, "it mixes tokens with other dimensions")
            made = found
        fixed = (isinstance(size, int) and size >= 0 and isinstance(new, int) for size, new in zip(sizes, made, strict=True))
        node.args = (source, [new if is_fixed else size for is_fixed, size, new in zip(fixed, sizes, made, strict=True)])

    def _aligned(self, node: Node) -> tuple[Any, Any, Any]:
        """Sizes of an expansion, and of what it expands before and after, from the last axis."""
        source: Any = node.args[0]
        made, was, now = list(self.shapes[node]), list(self.shapes[source]), list(source.meta["val"].shape)
        missing = [1] * (len(made) - len(was))
        return made, missing + was, missing + now

    def _positions(self, node: Node) -> None:
        """A table [1,T,K] that is added to tokens."""
        for i, table in enumerate(node.args[:2]):
            other: Any = node.args[1 - i]
            if not isinstance(table, Node) or table.op != "get_attr" or not isinstance(other, Node):
                continue
            size, (count, places) = table.meta["val"].shape, (int(other.meta["val"].shape[-2]), math.prod(self.after))
            if len(size) == 3 and size[1] == self.shapes[other][-2] and count != size[1]:
                front = _in_front(other, math.prod(self.before), self.shapes)
                value = resample_positions(self.edit.params[str(table.target)], self.before, self.after, front)
                assert value.shape[1] == count == places + size[1] - math.prod(self.before)
                self.edit.swap(node, i, value, f".{self.after[0]}x{self.after[1]}")
                self.moved += 1


def _in_front(node: Node, places: int, shapes: dict[Node, Any]) -> int:
    """Tokens in front of those of the image in a concatenation; none where there are no others."""
    while node.target is not aten.cat.default and node.all_input_nodes and shapes[node][-2] != places:
        node = node.all_input_nodes[0]
    if node.target is not aten.cat.default:
        return 0
    sizes = [int(shapes[part][1]) for part in node.args[0]]  # type: ignore[union-attr,index]
    return sum(sizes[: sizes.index(places)])


def _plain(size: Any) -> Any:
    """A size for comparison: symbols by name."""
    return size if isinstance(size, int) else str(size)


def reshaped(old: Sequence[Any], new: Sequence[Any], made: Sequence[Any]) -> list[Any] | None:
    """The shape that a reshape from `old` to `made` gives for `new`; None where an axis that changed is cut in parts that cannot be told.

    Both shapes fall into runs of axes of the same product. In a run without change all stays; one that becomes a single axis has the new product;
    and an axis that keeps its size beside others keeps its place.
    """
    result: list[Any] = []
    i = j = 0
    while j < len(made):
        a, b = [i], [j]
        while _product(old, a) != _product(made, b):
            (symbols, number), (others, other) = _product(old, a), _product(made, b)
            if (len(symbols), number) < (len(others), other):
                a.append(a[-1] + 1)
            else:
                b.append(b[-1] + 1)
            if a[-1] >= len(old) or b[-1] >= len(made):
                return None
        changed = [k for k in a if _plain(old[k]) != _plain(new[k])]
        if not changed:
            result += [made[k] for k in b]
        elif len(b) == 1 and len(a) == 1:
            result.append(new[a[0]])
        elif len(b) == 1 and all(isinstance(new[k], int) for k in a):
            result.append(math.prod(new[k] for k in a))
        elif len(changed) == 1 and (kept := [k for k in b if _plain(made[k]) == _plain(old[changed[0]])]) and len(kept) == 1:
            result += [new[changed[0]] if k == kept[0] else made[k] for k in b]
        else:
            return None
        i, j = a[-1] + 1, b[-1] + 1
    return result if all(size == 1 for size in old[i:]) else None


def _product(shape: Sequence[Any], axes: Sequence[int]) -> tuple[tuple[str, ...], int]:
    """Symbols of some axes, sorted, and the product of their numbers."""
    symbols = tuple(sorted(part for k in axes if not isinstance(shape[k], int) for part in str(shape[k]).split("*") if not part.isdigit()))
    numbers = [shape[k] for k in axes if isinstance(shape[k], int)]
    numbers += [int(part) for k in axes if not isinstance(shape[k], int) for part in str(shape[k]).split("*") if part.isdigit()]
    return symbols, math.prod(numbers)


def _refused(node: Node, why: str) -> CompileError:
    return CompileError(
        "pass-refused",
        f"the number of tokens cannot change here: {why}",
        node=describe(node),
        fix="use the patch size that the model was made for",
    )
