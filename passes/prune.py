"""Prune weights, heads or channels: a score, a granularity, an allocation and a repair.

Matches   dense layers and convolutions, and for heads and channels their dependency groups (see compiler/groups)
Produces  the same products with weights that are zero where something was removed, and biases where the repair adds them;
          `realise` then makes heads and channels that are zero in all their readers disappear
Refuses   weights with NaN; N:M that does not divide; a budget that cannot be met; patterns of modules with nothing to remove
          with a schedule, step by step; with `tune`, trained after each step, the dense program being the teacher
Paper     40 DSnoT: wanda, weights, rows, swap. 22 FLAP: fluctuation, units, everywhere, mean_bias. SparseGPT: obs, weights, rows, obs_update.
          58 gradual pruning: magnitude, weights, uniform, cubic, tune. 78 UDFC: magnitude, channels, uniform, least_squares without data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.fx import Node

from planc.compiler.calibration import Statistics, calibration_text, collect, collect_sequentially
from planc.compiler.dialect import OPS
from planc.compiler.groups import Group, find_groups
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Change, Editor, Program, describe, module_matches
from planc.compiler.tuning import tuned
from planc.passes.pruning import Allocation, AtOnce, Everywhere, Layer, Magnitude, Nothing, Rows, Swap, Uniform
from planc.runtime.errors import CompileError, PlanError
from planc.runtime.registry import item_of

aten = torch.ops.aten
PRODUCTS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, OPS.conv2d.default)
UNITS: dict[str, tuple[str, ...]] = {"heads": ("heads",), "channels": ("channels",), "units": ("heads", "channels")}
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Tune(BaseModel):
    """Training of all weights towards the dense program's outputs on what is calibrated on, with Adam."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    every: int = Field(default=20, ge=0, description="steps after each step of the schedule but the last")
    last: int = Field(default=100, ge=0, description="steps after the last; the rate falls to zero on the way")
    rate: float = Field(default=1e-4, gt=0, description="Adam's learning rate")
    batch: int = Field(default=4, ge=1, description="sequences or images of a step")
    seed: int = Field(default=0, description="of the order in which they come")


class Prune(Pass):
    """Zero the least important weights, heads or channels."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    score: item_of("score") = Field(default=Magnitude(), description="what a weight or unit is worth")  # type: ignore[valid-type]
    granularity: str = Field(
        default="weights",
        pattern=r"^(weights|heads|channels|units|[1-9]\d*:[1-9]\d*)$",
        description="what is removed at once: weights, heads (with their keys and values), hidden channels, units (both), or N:M: all but N of M "
        "neighbouring inputs of an output",
    )
    allocation: item_of("allocation") = Field(default=Uniform(), description="how the budget is shared out")  # type: ignore[valid-type]
    sparsity: Share | dict[str, Share] | None = Field(
        default=None,
        description="share of the parameters in reach that is removed; or of single matrices, by module pattern, the first match wins and others "
        "stay whole; N:M says it by itself",
    )
    repair: item_of("repair") = Field(default=Nothing(), description="what makes up for the loss")  # type: ignore[valid-type]
    schedule: item_of("schedule") = Field(default=AtOnce(), description="how much is removed when")  # type: ignore[valid-type]
    tune: Tune | None = Field(default=None, description="short training after every step")
    propagate: bool = Field(
        default=False, description="single weights: calibrate every layer on what the pruned layers before it give, not on the dense model"
    )
    realise: bool = Field(default=True, description="heads and channels: make the matrices smaller; otherwise they only become zero")
    modules: tuple[str, ...] = Field(
        default=(),
        description="patterns of module paths that are pruned (heads and channels: that read them); default: all but the last product",
    )

    @model_validator(mode="after")
    def _check(self) -> Prune:
        if (":" in self.granularity) == (self.sparsity is not None):
            message = "N:M says how much is removed" if self.sparsity is not None else "prune needs a sparsity"
            raise PlanError("plan-bad-value", message, fix="remove `sparsity`" if self.sparsity is not None else "add `sparsity`")
        if ":" in self.granularity and self.pattern[0] >= self.pattern[1]:
            raise PlanError("plan-bad-value", f"{self.granularity} removes nothing", fix="N must be smaller than M")
        if self.propagate and (self.granularity in UNITS or isinstance(self.allocation, Everywhere)):
            raise PlanError(
                "plan-bad-value",
                "propagate prunes layer by layer, which needs a budget for every matrix",
                fix="use allocation rows or uniform, and granularity weights or N:M",
            )
        if self.granularity in UNITS and isinstance(self.sparsity, dict):
            raise PlanError(
                "plan-bad-value", "heads and channels share one sparsity", fix="give a number, and name the readers by `modules`"
            )
        if self.granularity in UNITS and isinstance(self.repair, Swap):
            raise PlanError("plan-bad-value", "swap exchanges single weights", fix="use repair mean_bias with heads and channels")
        if ":" in self.granularity and not isinstance(self.schedule, AtOnce):
            raise PlanError(
                "plan-bad-value", "a schedule leads to a sparsity, and N:M has none", fix="remove `schedule`, or give a sparsity"
            )
        return self

    @property
    def pattern(self) -> tuple[int, int]:
        """N and M; (0, 0) without a pattern."""
        match = re.fullmatch(r"(\d+):(\d+)", self.granularity)
        return (int(match[1]), int(match[2])) if match else (0, 0)

    @property
    def demands(self) -> tuple[str, ...]:  # type: ignore[override]
        """Smaller matrices where units go."""
        return ("realise",) if self.realise and self.granularity in UNITS else ()

    def apply(self, program: Program, context: Context) -> Program:
        """Score, choose, repair."""
        note = str(self.item())
        if any(c.pass_name == self.key and note in c.notes for c in program.history):
            return program
        shares = self._shares()
        current, pruned = program, 0
        for number, share in enumerate(shares, 1):
            current, keep = self._step(current, share, context)
            current = self._tuned(current, program, keep, context, last=number == len(shares))
            pruned = max(pruned, len(keep))
        if not pruned:
            return program
        edit = _shortened(current.edit(self.key))
        return edit.done(0, 0).replace(history=(*program.history, Change(self.key, len(self._products(program)), pruned, (note,))))

    def _shares(self) -> list[float | dict[str, float] | None]:
        """What is gone after each step."""
        if not isinstance(self.sparsity, dict):
            return [None] if self.sparsity is None else list(self.schedule.shares(self.sparsity))
        steps = {pattern: self.schedule.shares(share) for pattern, share in self.sparsity.items()}
        return [{pattern: shares[i] for pattern, shares in steps.items()} for i in range(len(self.schedule.shares(0.0)))]

    def _step(self, program: Program, share: float | dict[str, float] | None, context: Context) -> tuple[Program, dict[str, Tensor]]:
        """Score, choose and repair once; the program with `share` of its weights gone, and masks of those that stay by parameter."""
        products = self._products(program)
        groups = self._groups(program, products) if self.granularity in UNITS else []
        if groups:
            products = [p for p in products if any(site.reader is p for group in groups for site in group.read)]
        if self.propagate:
            found = self._one_by_one(program, products, share, context)
        else:
            layers = self._layers(program, products, context)
            masks = self._unit_masks(program, groups, layers, share) if groups else self._weight_masks(layers, share)  # type: ignore[arg-type]
            found = {layers[name].node: self._repaired(layers[name], keep) for name, keep in masks.items() if not bool(keep.all())}
        edit, kept = program.edit(self.key), dict[str, Tensor]()
        for node, (weight, lost) in found.items():
            new = edit.swap(edit[node], 1, weight, "*m")
            kept[str(new.target)] = weight != 0
            if lost is not None:
                edit.add_bias(edit[node], lost, "*m")
        return (edit.done(1, 1) if kept else program), kept

    def _repaired(self, layer: Layer, keep: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, lost = self.repair.repaired(layer, keep, self.pattern[1])
        return weight, lost

    def _one_by_one(
        self, program: Program, products: list[Node], share: float | dict[str, float] | None, context: Context
    ) -> dict[Node, tuple[Tensor, Tensor | None]]:
        """New weights, and what is added to biases, of layers that each see the ones before them pruned."""
        found: dict[Node, tuple[Tensor, Tensor | None]] = {}

        def then(node: Node, seen: Statistics) -> tuple[Tensor, Tensor | None]:
            name = str(node.args[1].target)  # type: ignore[union-attr]
            layer = Layer(node, program.params[name], seen, program.params)
            [keep] = self._weight_masks({name: layer}, share).values()
            old = program.params[str(node.args[2].target)] if len(node.args) > 2 and isinstance(node.args[2], Node) else None
            if bool(keep.all()):
                return layer.weight, old
            weight, lost = found[node] = self._repaired(layer, keep)
            return weight, lost if old is None else old if lost is None else old + lost

        _check_finite(program, products)
        if conv := next((p for p in products if p.target is not aten.linear.default), None):
            raise CompileError(
                "pass-refused", "propagate needs dense layers", node=describe(conv), fix="leave convolutions out by `modules`"
            )
        needs = self.score.needs | self.repair.needs
        collect_sequentially(program, products, needs, calibration_text(context, self.key), then)
        return found

    def _tuned(self, program: Program, dense: Program, keep: Mapping[str, Tensor], context: Context, *, last: bool) -> Program:
        """The program trained for a while."""
        steps = 0 if self.tune is None else self.tune.last if last else self.tune.every
        if self.tune is None or not steps:
            return program
        samples = calibration_text(context, self.key)
        params = tuned(program, dense, samples, keep, steps=steps, decay=last, **self.tune.model_dump(include={"rate", "batch", "seed"}))
        edit = program.edit(self.key)
        for node in [n for n in edit.graph.nodes if n.op == "get_attr" and n.target in params]:
            with edit.before(node):
                edit.replace(node, edit.param(f"{node.target}*t", params[str(node.target)]))
        return edit.done(1, 1)

    def _products(self, program: Program) -> list[Node]:
        """Products with weights of their own, those that the patterns name or all but the last."""
        found = [n for n in program.main.nodes if n.target in PRODUCTS and n.args[1].op == "get_attr"]
        for pattern in (*self.modules, *(self.sparsity if isinstance(self.sparsity, dict) else ())):
            if not any(module_matches(str(n.args[1].target), pattern) for n in found):
                paths = ", ".join(str(n.args[1].target).partition(".weight")[0] for n in found[:3])
                message = f"the pattern {pattern!r} matches no dense layer or convolution"
                raise CompileError("pass-no-match", message, where=f"pass {self.key}", fix=f"module paths look like {paths}")
        if self.modules:
            return [n for n in found if any(module_matches(str(n.args[1].target), p) for p in self.modules)]
        return found[:-1]

    def _groups(self, program: Program, products: Iterable[Node]) -> list[Group]:
        """The groups of the wanted kinds whose readers are all among the products."""
        wanted, among = find_groups(program), set(products)
        groups = [g for g in wanted.groups if g.kind in UNITS[self.granularity] and all(site.reader in among for site in g.read)]
        if not groups:
            why = {wanted.frozen[at] for n in among if (at := (str(n.args[1].target), 1)) in wanted.frozen}  # type: ignore[union-attr]
            by = f"; they are needed whole by {', '.join(sorted(why)[:3])}" if why else ""
            message = f"there are no {self.granularity} that could be removed{by}"
            raise CompileError("prune-frozen", message, where=f"pass {self.key}", fix="use granularity `weights`, or other modules")
        return groups

    def _layers(self, program: Program, products: Iterable[Node], context: Context) -> dict[str, Layer]:
        """What calibration has to say, if anything is asked of it, and the weights."""
        _check_finite(program, products)
        needs = self.score.needs | self.repair.needs
        inputs = {p.args[0]: needs for p in products}
        axes = {p.args[0]: 1 for p in products if p.target is not aten.linear.default}
        seen = Statistics({})
        if needs:
            seen = collect(program, inputs, calibration_text(context, self.key), context.progress, axes=axes)  # type: ignore[arg-type]
        layers = {str(p.args[1].target): Layer(p, program.params[str(p.args[1].target)], seen, program.params) for p in products}  # type: ignore[union-attr]
        return layers

    def _unit_masks(self, program: Program, groups: list[Group], layers: Mapping[str, Layer], share: float | None) -> dict[str, Tensor]:
        """Which weights stay, shaped like them: all that reads a unit goes with it."""
        scores = [self.score.units(group, layers, program.params) for group in groups]
        gone = self.allocation.units(scores, [torch.from_numpy(g.costs) for g in groups], share)
        masks: dict[str, Tensor] = {}
        for group, units in zip(groups, gone, strict=True):
            for site in group.read:
                layer = layers[site.param]
                keep = ~torch.cat((units, torch.zeros(1, dtype=torch.bool)))[torch.from_numpy(site.units)]
                masks[site.param] = masks.get(site.param, torch.ones_like(layer.weight, dtype=torch.bool)) & layer.along_inputs(keep).bool()
        return masks

    def _weight_masks(self, layers: Mapping[str, Layer], share: float | dict[str, float] | None) -> dict[str, Tensor]:
        """Which weights stay, shaped like them."""
        n, m = self.pattern
        scores = []
        for layer in layers.values():
            score = self.score.weights(layer).flatten(1)
            if m and score.shape[1] % m:
                message = f"{score.shape[1]} inputs do not divide into groups of {m}"
                raise CompileError("prune-pattern", message, node=describe(layer.node), fix="use another M, or leave it out by `modules`")
            scores.append(score.reshape(-1, m) if m else score)
        if isinstance(share, dict):  # every matrix for itself
            own = [next((v for p, v in share.items() if module_matches(name, p)), 0.0) for name in layers]
            gone = [self.allocation.weights([score], v)[0] for score, v in zip(scores, own, strict=True)]
        else:
            allocation: Allocation = Rows() if m else self.allocation  # in every M inputs the same number: rows of M
            gone = allocation.weights(scores, (m - n) / m if m else share)  # type: ignore[arg-type]
        return {name: ~g.reshape(layer.weight.shape) for (name, layer), g in zip(layers.items(), gone, strict=True)}


def _check_finite(program: Program, products: Iterable[Node]) -> None:
    for node in products:
        if not bool(torch.isfinite(program.params[str(node.args[1].target)]).all()):  # type: ignore[union-attr]
            raise CompileError("pass-refused", "the weights hold NaN or infinity", node=describe(node), fix="check the checkpoint")


def _shortened(edit: Editor) -> Editor:
    """Parameters that went through several steps get one mark: *m where weights went, *t where they were trained alone."""
    for node in edit.graph.nodes:
        if node.op == "get_attr" and (marks := re.search(r"(\*[mt])+$", name := str(node.target))):
            short = name[: marks.start()] + ("*m" if "*m" in marks[0] else "*t")
            edit.params[short], node.target = edit.params[name], short
    return edit
