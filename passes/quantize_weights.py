"""Store and multiply dense layers in few bits: format x block x rounding x low rank x budget, in one pass.

Matches   linear(x, w) and embedding(w, ids), by module pattern
Produces  linear_int8 (int8 weights, one scale per output and one per activation row), linear_blocks (int4 or int8 in blocks), linear_lookup
          (places in a table, in blocks), with `low_rank` plus two skinny products; embedding_int8
Refuses   weights with NaN or infinity; blocks that do not divide; a budget that nothing fits; a pattern that matches no module
Paper     int8: per-row and per-token scales as in LLM.int8 and SmoothQuant; blocks: GGUF and MatMulNBits; nf: QLoRA; low_rank and budget: LQ-LoRA
          (Guo et al. 2023); codebook: JLCM (joint.py); rounding gptq: Frantar et al. 2023
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.fx import Node

from planc.compiler.allocation import allocate
from planc.compiler.block_formats import gguf_blocks
from planc.compiler.calibration import Gram32, Moments, calibration_text, collect, propagate
from planc.compiler.codebooks import bits_of
from planc.compiler.dialect import OPS
from planc.compiler.joint import learned
from planc.compiler.low_rank import LowRank, decompose
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Editor, Program, describe, module_matches, module_paths
from planc.compiler.rounding import second_moments
from planc.compiler.training import sensitivities
from planc.compiler.weight_forms import Format, Stored, blocks, int8_rows, store, tabled
from planc.runtime.errors import CompileError

aten = torch.ops.aten
Choice = Literal[Format, "keep", "none"]

#: What `budget` chooses from: (bits, block) of NormalFloat.
GRID = tuple((bits, block) for bits in (2, 3, 4) for block in (16, 32, 64))
_SEQUENCES = 8  # of the text, on which the gradients of the loss are taken
_SAMPLE = 256  # rows on which the error of an option is estimated


@dataclass(frozen=True)
class _Product:
    """A product to be quantised."""

    node: Node
    name: str  # of its weight
    form: Format
    block: int
    rows: Tensor | None = None  # [N]: by what errors of its outputs are weighed


class QuantizeWeights(Pass):
    """Quantise dense layers (and the embedding with `int8`)."""

    stage: ClassVar[Stage] = Stage.NUMERICS
    after: ClassVar[tuple[str, ...]] = ("smooth",)
    demands: ClassVar[tuple[str, ...]] = ("fuse_projections",)
    format: Choice = Field(
        default="int8",
        description="int8: one scale per output and activation row; int8_blocks, int4_blocks: scales per block; nf2, nf3, nf4: NormalFloat in "
        "blocks; codebook2, codebook3, codebook4: learned tables in blocks; keep: the blocks that a GGUF already has; none: float",
    )
    block: Literal[16, 32, 64, 128] = Field(default=32, description="weights per scale for the formats in blocks")
    modules: dict[str, Choice] = Field(default_factory=dict, description="module pattern -> format, first match wins over `format`")
    rounding: Literal["nearest", "gptq"] = Field(
        default="nearest", description="gptq: on calibration text, later weights make good what rounding did to earlier ones"
    )
    scales: Literal["peak", "search"] = Field(
        default="peak",
        description="peak: a block's largest magnitude is the end of its range; search: the scale of least squared error, weighed by the inputs "
        "where calibration text is used; not for the codebooks, which fit their tables",
    )
    low_rank: int = Field(default=0, ge=0, le=512, description="rank of a float16 correction beside the formats in blocks; 0: none")
    budget: float | None = Field(
        default=None,
        gt=0.0,
        le=8.0,
        description="mean bits per weight of the nf formats, scales included: bits and block are chosen per matrix",
    )
    weigh: bool = Field(
        default=False,
        description="weigh errors of low_rank, budget and codebooks by the inputs that calibration text makes, "
        "those of low_rank and budget also by the gradients of its loss (Fisher)",
    )
    tables: int = Field(default=8, ge=1, le=256, description="tables of a codebook format: rows of like distribution share one")
    learn: int = Field(
        default=0, ge=0, le=2000, description="steps in which tables and places of a codebook are learned on calibration text"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        formats = {self.format, *self.modules.values()}
        for option, used, kinds in (
            ("budget", self.budget is not None, ("nf2", "nf3", "nf4")),
            ("learn", self.learn > 0, ("codebook2", "codebook3", "codebook4")),
            ("scales", self.scales == "search", tuple(f for f in get_args(Format) if not f.startswith("codebook"))),
            ("low_rank", self.low_rank > 0, tuple(f for f in get_args(Format) if f != "int8")),
        ):
            if used and not formats & set(kinds):
                raise ValueError(f"{option} needs one of the formats {', '.join(kinds)}")
        return self

    def apply(self, program: Program, context: Context) -> Program:
        """Quantise what the patterns choose; a second run finds only quantised layers and changes nothing."""
        self._check_patterns(program)
        edit, matched, done, served, notes = program.edit(self.key), 0, 0, 0, list[str]()
        kept = gguf_blocks(program) if "keep" in {self.format, *self.modules.values()} else {}
        products = list[_Product]()
        for node in program.main.nodes:
            if node.target is aten.linear.default and node.args[1].op == "get_attr":
                matched += 1
                name = str(node.args[1].target)
                _check_finite(program.params[name], node)
                form = self._format(name)
                if form == "keep" and name not in kept:
                    notes.append(f"{name} is not in the GGUF as blocks: float kept")
                elif form == "keep":
                    packed, scales, zeros, bits = kept[name]
                    self._exchange(edit, node, blocks(packed, scales, zeros, bits, 32))
                    served, done = served + 1, done + 1
                elif form != "none":
                    products.append(self._product(node, name, form, program))
            elif node.target is aten.embedding.default and self._format(str(node.args[0].target)) == "int8":
                matched += 1
                done += self._embedding(edit, edit[node])
        if notes and not served and not any(c.pass_name == self.key for c in program.history):
            raise CompileError(
                "pass-refused",
                "there are no GGUF blocks to keep: the model is not from a GGUF file, or another pass has changed the weights",
                where=f"pass {self.key}",
                fix="use format int4_blocks, or remove smooth",
            )
        if self.weigh and (self.low_rank or self.budget):
            products = self._sensitive(program, products, context)
        if self.budget is not None:
            products = self._allocate(program, products, context, notes)
        if any(map(self._calibrated, products)):
            text = calibration_text(context, self.key)
            grams = dict[Node, Tensor]()
            propagate(program, {p.node: self._calibrate(edit, p, grams) for p in products}, text, context.progress)
        else:
            for product in products:
                self._replace(edit, product, None)
        done += len(products)
        return edit.done(matched, done, notes) if done else program

    # ---- which product takes which form

    def _product(self, node: Node, name: str, form: Format, program: Program) -> _Product:
        inputs = program.params[name].shape[1]
        if form != "int8" and inputs % self.block:
            raise CompileError(
                "pass-refused", f"{inputs} inputs do not divide into blocks of {self.block}", node=describe(node), fix="use another `block`"
            )
        return _Product(node, name, form, self.block)

    def _sensitive(self, program: Program, products: list[_Product], context: Context) -> list[_Product]:
        """The products with how much the loss of some of the text depends on their outputs; int8 ones, which nothing weighs, as they are."""
        weighed = [p for p in products if p.form != "int8"]
        found = sensitivities(program, (p.node for p in weighed), calibration_text(context, self.key)[:_SEQUENCES]) if weighed else {}
        return [replace(p, rows=found.get(p.node)) for p in products]

    def _allocate(self, program: Program, products: list[_Product], context: Context, notes: list[str]) -> list[_Product]:
        """NormalFloat products with bits and block chosen for the least error under the budget."""
        assert self.budget is not None
        free = [p for p in products if p.form.startswith("nf")]
        if not free:
            return products
        seen = None
        if self.weigh:
            text = calibration_text(context, self.key)
            seen = collect(program, {p.node.args[0]: {Moments} for p in free}, text, context.progress)
        costs, sizes, options = list[list[float]](), list[list[int]](), list[list[tuple[int, int]]]()
        for product in free:
            weight = program.params[product.name]
            options.append([(bits, block) for bits, block in GRID if weight.shape[1] % block == 0])
            columns = seen[product.node.args[0], Moments].mean_square.sqrt().float() if seen else None
            costs.append([_cost(weight, bits, block, columns, product.rows) for bits, block in options[-1]])
            sizes.append([bits_of(weight.shape[0], weight.shape[1], bits, block) for bits, block in options[-1]])
        total = sum(program.params[p.name].numel() for p in free)
        try:
            chosen = allocate(costs, sizes, int(self.budget * total))
        except CompileError as error:
            least = sum(map(min, sizes)) / total
            message = f"no choice of formats has {self.budget:g} bits per weight; the smallest has {least:.3f}"
            raise CompileError(
                "pass-refused", message, where=f"pass {self.key}", fix=f"set `budget: {least + 0.0005:.3f}` or more"
            ) from error
        forms = {p.name: o[j] for p, o, j in zip(free, options, chosen, strict=True)}
        spent = sum(row[j] for row, j in zip(sizes, chosen, strict=True))
        mix = {bits: sum(found[0] == bits for found in forms.values()) for bits in (2, 3, 4)}
        notes.append(f"{spent / total:.4f} bits per weight of {self.budget:g}; matrices by bits: {mix}")
        return [replace(p, form=f"nf{forms[p.name][0]}", block=forms[p.name][1]) if p.name in forms else p for p in products]  # type: ignore[arg-type]

    # ---- statistics of inputs

    def _calibrated(self, product: _Product) -> bool:
        return (
            self.rounding == "gptq" or (product.form != "int8" and self.weigh) or (product.form.startswith("codebook") and self.learn > 0)
        )

    def _calibrate(self, edit: Editor, product: _Product, grams: dict[Node, Tensor]) -> Callable[[Sequence[Tensor]], Callable[..., Tensor]]:
        """What `propagate` asks when it comes to the product: it is quantised for the inputs that the quantised products before it make."""
        x = product.node.args[0]

        def change(inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
            if self._calibrated(product) and x not in grams:
                grams.clear()  # only neighbours share an input
                grams[x] = _second_moments(inputs)
            weight = self._replace(edit, product, grams[x] if self._calibrated(product) else None)
            return lambda x, _, *bias: torch.nn.functional.linear(x, weight, *bias)

        return change

    # ---- one matrix

    def _replace(self, edit: Editor, product: _Product, gram: Tensor | None) -> Tensor:
        """Quantise one product in the graph; gives the matrix [N,K] that it multiplies with now."""
        stored, split = self._quantize(edit.program.params[product.name], product, gram)
        self._exchange(edit, product.node, stored, split)
        return stored.weight if split is None else stored.weight + split.left.float() @ split.right.float()

    def _quantize(self, weight: Tensor, product: _Product, gram: Tensor | None) -> tuple[Stored, LowRank | None]:
        rounding, importance = gram if self.rounding == "gptq" else None, self._importance(weight, gram)

        def stored(value: Tensor, rounding: Tensor | None = None) -> Stored:
            if product.form.startswith("codebook"):
                weights = gram if self.weigh or self.learn else None
                return tabled(learned(value, int(product.form[-1]), product.block, self.tables, weights, self.learn, rounding))
            return store(value, product.form, product.block, rounding, importance)

        if not self.low_rank or product.form == "int8":
            return stored(weight, rounding), None
        rank = min(self.low_rank, *weight.shape)
        split = decompose(weight, rank, stored, _columns(gram) if self.weigh else None, product.rows)
        if rounding is not None:  # once, for the factors that are kept
            split = replace(split, stored=stored(weight - split.left.float() @ split.right.float(), rounding))
        return split.stored, split

    def _importance(self, weight: Tensor, gram: Tensor | None) -> Tensor | None:
        """By what the search of scales weighs errors, [K]; None where scales are peaks."""
        if self.scales == "peak":
            return None
        if gram is None:
            return torch.ones(weight.shape[1])
        return gram.diagonal().clamp(min=float(gram.diagonal().mean()) * 1e-3)  # a channel that calibration hardly saw counts, too

    def _exchange(self, edit: Editor, node: Node, stored: Stored, split: LowRank | None = None) -> None:
        old = edit[node]
        x, name = old.args[0], str(old.args[1].target)
        bias = old.args[2] if len(old.args) > 2 else None
        with edit.before(old):
            new = stored.product(edit, name, x, bias)
            if split is not None:
                for suffix, factor in (("right", split.right), ("left", split.left)):
                    wide = edit.call(aten.to.dtype, edit.param(full := f"{name}.{suffix}", edit.params.get(full, factor)), torch.float32)
                    x = edit.call(aten.linear.default, x, wide)
                new = edit.call(aten.add.Tensor, new, x)
        edit.replace(old, new)

    def _embedding(self, edit: Editor, node: Node) -> int:
        table, ids = node.args[:2]
        name = str(table.target)
        stored = int8_rows(edit.params[name])
        with edit.before(node):
            new = edit.call(OPS.embedding_int8.default, *stored.parameters(edit, name), ids)
        edit.replace(node, new)
        return 1

    # ---- patterns

    def _format(self, name: str) -> Choice:
        return next((form for pattern, form in self.modules.items() if module_matches(name, pattern)), self.format)

    def _check_patterns(self, program: Program) -> None:
        paths = {path for name in program.params for path in module_paths(name)}
        for pattern in self.modules:
            if not any(module_matches(name, pattern) for name in program.params):
                raise CompileError(
                    "pass-no-match",
                    f"the pattern {pattern!r} matches no module",
                    where=f"pass {self.key}",
                    fix="module paths look like " + ", ".join(sorted(paths)[:3]),
                )


def _second_moments(inputs: Sequence[Tensor]) -> Tensor:
    gram = Gram32()
    for x in inputs:
        gram.add(x)
    return second_moments(gram)


def _columns(gram: Tensor | None) -> Tensor | None:
    """Root mean square of every input channel."""
    return None if gram is None else gram.diagonal().sqrt()


def _cost(weight: Tensor, bits: int, block: int, columns: Tensor | None, rows: Tensor | None) -> float:
    """Squared error of a NormalFloat, weighed by input and output, estimated on evenly spread rows."""
    some = slice(None, None, max(1, len(weight) // _SAMPLE))
    error = weight[some] - store(weight[some], f"nf{bits}", block).weight  # type: ignore[arg-type]
    error = error if columns is None else error * columns
    error = error if rows is None else error * rows[some, None]
    return float(error.pow(2).sum()) * len(weight) / len(error)


def _check_finite(weight: Tensor, node: Node) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise CompileError("pass-refused", "the weights hold NaN or infinity", node=describe(node), fix="check the checkpoint")
