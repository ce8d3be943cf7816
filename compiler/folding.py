"""Scales per channel that are folded through the graph: what makes a channel is divided by its scale, the products that read it are multiplied."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.calibration import Statistic, calibration_text, collect
from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context
from planc.compiler.program import Editor, Program

aten = torch.ops.aten

S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class Site:
    """Products that read one value, and the parameters that scale its channels."""

    x: Node
    products: tuple[Node, ...]
    rows: tuple[tuple[Node, int], ...]  # (node, argument) of parameters whose first axis runs over the channels
    heads: tuple[int, int, int] | None = None  # (kv heads, queries per kv head, width) where channels are tied across heads
    offset: int = 0  # first row of the value product inside a joined weight

    def shared(self, channels: Tensor) -> Tensor:
        """The largest of the channels that must share a scale: query heads of a group share the value channels."""
        if self.heads is None:
            return channels
        return channels.reshape(self.heads).amax(1).reshape(-1)

    def spread(self, scale: Tensor) -> Tensor:
        """The scale of every input channel of the products."""
        if self.heads is None:
            return scale
        groups, queries, width = self.heads
        return scale.reshape(groups, 1, width).expand(groups, queries, width).reshape(-1)


def fold_scales(
    program: Program,
    context: Context,
    key: str,
    statistic: type[S],
    scale: Callable[[Site, Sequence[Tensor], S], Tensor | None],
) -> Program:
    """The program with scales folded at every site, as the pass `key`.

    `scale` is given a site, the weights [N,K] of its products and the statistic of their input on calibration text; it answers with the scales as
    `Site.shared` gives them, or None to leave the site alone. A second run of the pass changes nothing.
    """
    if any(change.pass_name == key for change in program.history):
        return program
    text, sites = calibration_text(context, key), find_sites(program)
    statistics = collect(program, {site.x: {statistic} for site in sites}, text, context.progress)
    edit, folded = program.edit(key), 0
    for site in sites:
        weights = [edit.params[str(edit[p].args[1].target)] for p in site.products]
        found = scale(site, weights, statistics[site.x, statistic])
        if found is not None:
            fold(edit, site, found)
            folded += 1
    return edit.done(len(_inputs(program)), folded) if folded else program


def find_sites(program: Program) -> list[Site]:
    """Where scales can be folded: the inputs of dense products that a norm, a gated product or an attention makes."""
    return [s for s in map(_site, _inputs(program)) if s is not None]


def fold(edit: Editor, site: Site, scale: Tensor) -> None:
    """Multiply the columns of a site's products by `scale` and divide what makes their channels; `scale` as `Site.shared` gives it."""
    for product in site.products:
        weight = edit.params[str(edit[product].args[1].target)]
        edit.swap(edit[product], 1, weight * site.spread(scale), "*s")
    for owner, index in site.rows:
        parameter = edit.params[str(edit[owner].args[index].target)]
        edit.swap(edit[owner], index, _divide(parameter, scale, site.offset), "/s")


def _divide(parameter: Tensor, scale: Tensor, offset: int) -> Tensor:
    out = parameter.clone()
    rows = slice(offset, offset + len(scale))
    out[rows] = out[rows] / (scale[:, None] if out.dim() == 2 else scale)
    return out


def _inputs(program: Program) -> list[Node]:
    """Values that dense products read, in order."""
    return list(dict.fromkeys(n.args[0] for n in program.main.nodes if n.target is aten.linear.default))


def _site(x: Node) -> Site | None:
    users = list(x.users)
    products = tuple(u for u in users if u.target is aten.linear.default and u.args[0] is x)
    if len(products) != len(users):
        return None
    if x.target in (OPS.rms_norm.default, aten.layer_norm.default):
        first = 1 if x.target is OPS.rms_norm.default else 2
        return _sited(x, products, x, first)
    if x.target is OPS.glu.default:
        return _produced(x, products, x.args[1])
    if x.target is aten.reshape.default and getattr(x.args[0], "target", None) is OPS.attention.default:
        attention = x.args[0]
        value = attention.args[2]
        if value.target is not aten.view.default:
            return None
        heads, groups = attention.args[0].meta["val"].shape[2], value.meta["val"].shape[2]
        return _produced(x, products, value.args[0], (int(groups), int(heads // groups), int(value.meta["val"].shape[3])))
    return None


def _produced(x: Node, products: tuple[Node, ...], source: Any, heads: tuple[int, int, int] | None = None) -> Site | None:
    """The site whose channels come from a product, whole or as one part of a joined one."""
    if len(source.users) != 1:
        return None
    offset = 0
    if source.target is operator.getitem and source.args[0].target in (
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.split.Tensor,
    ):
        parts = source.args[0].meta["val"]
        offset = sum(int(p.shape[-1]) for p in parts[: source.args[1]])
        source = source.args[0].args[0]
    elif source.target is aten.slice.Tensor and source.args[1] == 2:
        offset, source = source.args[2], source.args[0]
    if getattr(source, "target", None) is not aten.linear.default:
        return None
    return _sited(x, products, source, 1, heads, offset)


def _sited(
    x: Node, products: tuple[Node, ...], owner: Node, first: int, heads: tuple[int, int, int] | None = None, offset: int = 0
) -> Site | None:
    """The site whose channels are scaled by the parameters of `owner` from argument `first` on; None when another node reads them too."""
    rows = tuple((owner, first + i) for i, a in enumerate(owner.args[first : first + 2]) if isinstance(a, Node))
    free = rows and all(len(owner.args[i].users) == 1 for _, i in rows)
    return Site(x, products, rows, heads, offset) if free else None
