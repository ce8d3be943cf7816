"""Statistics of values inside a program: one streamed pass of the reference backend over calibration inputs gathers all that is wanted.

    statistics = collect(program, {x: {Moments, Gram}, y: {RowPeaks}}, batches, progress)
    statistics[x, Moments].variance

`propagate` is for passes that change a program from its first product to its last and want to know what the changed prefix makes of the text.
A statistic is a mergeable accumulator: parts of a text, or several workers, give the same result as one run over all of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from planc.backends.reference import execute
from planc.compiler.passbase import Context
from planc.compiler.program import Program, describe
from planc.runtime.errors import CompileError

Batch = Mapping[str, Tensor]  # inputs of the program by name
LEAST = 2  # rows without which nothing can be said about a value


class Statistic(ABC):
    """What is known about a value [..., K] from the `count` rows seen so far."""

    def __init__(self) -> None:
        self.count = 0

    @abstractmethod
    def add(self, x: Tensor) -> None:
        """Take in the rows of x [S, T, K]: S sequences of T rows."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what `other` has seen; associative up to rounding, and the order only matters where rows keep theirs."""

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """The accumulated tensor."""


class Moments(Statistic):
    """Mean and variance per channel, by the pairwise update of Chan, Golub and LeVeque (1979), in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(())  # [K]
        self._squares = torch.zeros(())  # [K], sum of squared distances from the mean

    def add(self, x: Tensor) -> None:
        rows = x.double().flatten(0, -2)
        part = Moments()
        part.count, part.mean = len(rows), rows.mean(0)
        part._squares = (rows - part.mean).pow_(2).sum(0)
        self.merge(part)

    def merge(self, other: Self | Moments) -> None:
        if not self.count:
            self.count, self.mean, self._squares = other.count, other.mean, other._squares
        elif other.count:
            total, distance = self.count + other.count, other.mean - self.mean
            self._squares = self._squares + other._squares + distance.pow(2) * (self.count * other.count / total)
            self.mean = self.mean + distance * (other.count / total)
            self.count = total

    @property
    def variance(self) -> Tensor:
        """E[(x - mean)^2] over all rows, [K] float64."""
        return self._squares / self.count

    @property
    def mean_square(self) -> Tensor:
        """E[x^2], [K] float64."""
        return self.variance + self.mean.pow(2)

    @property
    def value(self) -> Tensor:
        return self.mean_square


class WithinVariance(Statistic):
    """Variance per channel inside a sequence, averaged over the sequences by their rows: [K] float64."""

    def __init__(self) -> None:
        super().__init__()
        self._sum = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        self._sum = self._sum + x.double().var(1, correction=0).sum(0) * x.shape[1]
        self.count += x.shape[0] * x.shape[1]

    def merge(self, other: Self) -> None:
        self._sum = self._sum + other._sum
        self.count += other.count

    @property
    def value(self) -> Tensor:
        return self._sum / self.count


class Gram(Statistic):
    """X^T X over the rows, [K, K]: products and sums in float64, 8 K^2 bytes."""

    dtype: ClassVar[torch.dtype] = torch.float64

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.zeros(())

    def add(self, x: Tensor) -> None:
        rows = x.to(self.dtype).flatten(0, -2)
        if not self.count:
            self.matrix = torch.zeros(rows.shape[1], rows.shape[1], dtype=self.dtype)
        self.matrix.addmm_(rows.t(), rows)
        self.count += len(rows)

    def merge(self, other: Self) -> None:
        if other.count:
            self.matrix = other.matrix.clone() if not self.count else self.matrix.add_(other.matrix)
            self.count += other.count

    @property
    def value(self) -> Tensor:
        return self.matrix


class Gram32(Gram):
    """X^T X in float32, half the memory and time: enough for a damped inverse, not for small eigenvalues."""

    dtype = torch.float32


class NormedGram(Gram):
    """X^T X of rows scaled to a root mean square of one, so that large rows count no more than others; a row of zeros counts as it is."""

    def add(self, x: Tensor) -> None:
        wide = x.double()
        super().add(wide / wide.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-30))


class Peaks(Statistic):
    """Largest |x| per channel, [K] float32."""

    def __init__(self) -> None:
        super().__init__()
        self._peaks = torch.zeros(())

    def add(self, x: Tensor) -> None:
        rows = x.float().abs().flatten(0, -2)
        self._peaks = torch.maximum(self._peaks, rows.amax(0))
        self.count += len(rows)

    def merge(self, other: Self) -> None:
        self._peaks = torch.maximum(self._peaks, other._peaks)
        self.count += other.count

    @property
    def value(self) -> Tensor:
        return self._peaks


class RowPeaks(Statistic):
    """Largest |x| of every row, [rows] float32 in the order of the text."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self._parts.append(x.float().abs().amax(-1).flatten())
        self.count += len(self._parts[-1])

    def merge(self, other: Self) -> None:
        self._parts = [*self._parts, *other._parts]
        self.count += other.count

    @property
    def value(self) -> Tensor:
        return torch.cat(self._parts)


class Histogram(Statistic):
    """How often values occur, channels together: [BINS] float64, bins of equal width around zero whose span is the least power of two that fits."""

    BINS: ClassVar[int] = 4096

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = 0.0, 0.0  # of the values seen, and zero
        self.span = 2.0**-20
        self.counts = torch.zeros(self.BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        values = x.float().flatten()
        low, high = (float(v) for v in values.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            self.counts = self.counts + torch.nan
        else:
            self.low, self.high = min(self.low, low), max(self.high, high)
            self._reach(max(-self.low, self.high))
            self.counts += torch.histc(values, self.BINS, -self.span, self.span).double()
        self.count += len(values)

    def _reach(self, largest: float) -> None:
        while self.span < largest:  # two bins become one, and there is room for as many again on both sides
            half = torch.zeros(self.BINS // 4, dtype=torch.float64)
            self.counts = torch.cat((half, self.counts.reshape(-1, 2).sum(1), half))
            self.span *= 2

    def merge(self, other: Self) -> None:
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        copy = Histogram()
        copy.counts, copy.span = other.counts, other.span
        self._reach(copy.span)
        copy._reach(self.span)
        self.counts = self.counts + copy.counts
        self.count += other.count

    @property
    def centres(self) -> Tensor:
        """The middle of every bin, [BINS] float64."""
        return (torch.arange(self.BINS, dtype=torch.float64) + 0.5) * (2 * self.span / self.BINS) - self.span

    @property
    def value(self) -> Tensor:
        return self.counts


class CodeCounts(Statistic):
    """How often each of 256 codes occurs in every sequence or image: [images, 256] float64."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self._rows += [torch.bincount(image.flatten().int(), minlength=256).double() for image in x]
        self.count += x.shape[0] * x.shape[1]

    def merge(self, other: Self) -> None:
        self._rows = [*self._rows, *other._rows]
        self.count += other.count

    @property
    def value(self) -> Tensor:
        return torch.stack(self._rows)


S = TypeVar("S", bound=Statistic)


class Statistics:
    """What `collect` found: `statistics[node, Kind]`."""

    def __init__(self, wanted: Mapping[Node, Iterable[type[Statistic]]]) -> None:
        self._found = {(node, kind): kind() for node, kinds in wanted.items() for kind in kinds}

    def __getitem__(self, key: tuple[Node, type[S]]) -> S:
        return cast(S, self._found[key])

    def items(self) -> Iterator[tuple[Node, Statistic]]:
        """Every statistic with its node."""
        return ((node, statistic) for (node, _), statistic in self._found.items())

    def merge(self, other: Statistics) -> None:
        """Take in what another run over the same nodes has seen."""
        for key, statistic in self._found.items():
            statistic.merge(other._found[key])


def collect(
    program: Program,
    wanted: Mapping[Node, Iterable[type[Statistic]]],
    batches: Tensor | Iterable[Batch],
    progress: Any = None,
    *,
    axes: Mapping[Node, int] | None = None,
) -> Statistics:
    """The wanted statistics of nodes of the main graph, in one run of the program (without cache) over the inputs.

    Args:
        wanted: statistics by node. Values are freed as soon as nobody reads them, so memory is that of one batch and of the statistics; a Gram
            matrix is the only large one, and callers that need many ask for a few layers at a time.
        batches: token ids [S, L] int64 or images [S, C, Y, X], run one at a time, or the inputs of each run by name.
        progress: wraps the batches to show how far the run is, `progress(batches, text)`.
        axes: the channel axis of a node where it is not the last, e.g. 1 for what a convolution reads.

    Raises CompileError[calibration-short] for inputs with fewer than two rows, CompileError[calibration-not-finite] for a value with NaN or infinity.
    """
    statistics, nodes, axes = Statistics(wanted), {n for n, kinds in wanted.items() if kinds}, axes or {}
    if not nodes:
        return statistics
    if isinstance(batches, Tensor):
        if batches.numel() < LEAST or batches.dim() != (4 if batches.is_floating_point() else 2):
            raise _short(f"token ids of shape {list(batches.shape)}")
        batches = inputs_of(batches, progress)
    elif progress:
        batches = progress(batches, "calibrating")
    for inputs in batches:
        left = len(nodes)
        given = [(node, inputs[str(node.target)]) for node in nodes if node.op == "placeholder"]  # a run yields what it computes
        for node, value in chain(given, execute(program, inputs)):
            if node not in nodes:
                continue
            x = value.movedim(axes.get(node, -1), -1)
            # dense layers on 2-d values have rows without sequences; all but the first axis of images are rows of one sequence
            x = x[None] if x.dim() == 2 else x.flatten(1, -2)
            for kind in wanted[node]:
                statistics[node, kind].add(x)
            left -= 1
            if not left:
                break
    for node, statistic in statistics.items():
        if statistic.count < LEAST:
            raise _short(f"{statistic.count} rows for {node.name}")
        if not bool(torch.isfinite(statistic.value).all()):
            raise _not_finite(node)
    return statistics


Replacement = Callable[..., Any]  # computes a node's value from the values of its arguments


def propagate(
    program: Program, changes: Mapping[Node, Callable[[Sequence[Tensor]], Replacement]], ids: Tensor, progress: Any = None
) -> None:
    """Run the main graph over token ids [S, L] node by node, each node for all sequences before the next.

    When a node of `changes` is reached, its entry is given the values of the node's first argument, one [1, L, ...] for each sequence, and
    answers with what computes the node from then on: everything behind it sees what the change made. The run ends with the last change.
    One pass over the text, whatever the number of nodes; memory is that of the values between two nodes for the whole text.

    Raises CompileError[calibration-short] for fewer than two ids, CompileError[calibration-not-finite] for an input with NaN or infinity.
    """
    batches, values, left = list(inputs_of(_checked(ids))), dict[Any, list[Any]](), len(changes)
    nodes = list(program.main.nodes)
    last_reader = {source: node for node in nodes for source in node.all_input_nodes}
    for node in progress(nodes, "calibrating") if progress else nodes:
        if node.op == "placeholder":
            values[node] = [batch[str(node.target)] for batch in batches]
        elif node.op == "get_attr":
            values[node] = [program.params[str(node.target)]] * len(batches)
        elif not left or node.op == "output":
            return
        else:
            function = node.target
            if node in changes:
                inputs, left = values[node.args[0]], left - 1
                if not all(bool(torch.isfinite(x).all()) for x in inputs):
                    raise _not_finite(node)
                function = changes[node](inputs)
                if not left:
                    return
            values[node] = []
            spent = [source for source in node.all_input_nodes if last_reader[source] is node]
            for i in range(len(batches)):
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n, i=i: values[n][i])  # type: ignore[misc]
                with torch.no_grad():
                    values[node].append(function(*args, **kwargs))
                for source in spent:
                    values[source][i] = None  # one sequence after the other, so that inputs and outputs never lie side by side
            for source in spent:
                del values[source]


def collect_in_turn(program: Program, nodes: Sequence[Node], ids: Tensor, then: Callable[[Gram], Tensor]) -> None:
    """The Gram matrix of each node, in the order of the graph, handed to `then` at once.

    `then` returns the matrix [K, K] that the node's value is multiplied with before anybody reads it, so that later nodes are seen as they are
    once something was done to the earlier ones. All sequences of `ids` [S, L] run side by side.
    """
    runs = [execute(program, inputs) for inputs in inputs_of(ids)]
    values = [next(run) for run in runs]
    for node in nodes:
        while values[0][0] is not node:
            values = [next(run) for run in runs]
        gram = Gram()
        for _, value in values:
            gram.add(value)
        matrix = then(gram).to(values[0][1].dtype)
        values = [run.send(value @ matrix) for run, (_, value) in zip(runs, values, strict=True)]


def collect_sequentially(
    program: Program,
    products: Sequence[Node],
    needs: Iterable[type[Statistic]],
    ids: Tensor,
    then: Callable[[Node, Statistics], tuple[Tensor, Tensor | None]],
) -> None:
    """Statistics of the inputs of dense layers, each as it is once all earlier ones were changed.

    `then` gets a product and what was seen of its input, and returns the weight [N, K] and the bias that it computes with from there on. All
    sequences of `ids` [S, L] run side by side.
    """
    inputs, wanted, kinds = {x for p in products if isinstance(x := p.args[0], Node)}, set(products), tuple(needs)
    statistics, held = Statistics(dict.fromkeys(inputs, kinds)), dict[Node, list[Tensor]]()
    readers = Counter(p.args[0] for p in products)
    runs = [execute(program, batch) for batch in inputs_of(ids)]
    values = [next(run) for run in runs]
    while (node := values[0][0]).op != "output":
        changed: list[Tensor | None] = [None] * len(runs)
        if node in wanted:
            weight, bias = then(node, statistics)
            changed = [torch.nn.functional.linear(x, weight, bias) for x in held[node.args[0]]]  # type: ignore[index]
        if node in inputs:
            held[node] = [value if other is None else other for (_, value), other in zip(values, changed, strict=True)]
            for value in held[node]:
                for kind in kinds:
                    statistics[node, kind].add(value[None] if value.dim() == 2 else value.flatten(1, -2))
        values = [run.send(other) for run, other in zip(runs, changed, strict=True)]
        if node in wanted:
            readers[node.args[0]] -= 1  # type: ignore[index]
            if not readers[node.args[0]]:  # type: ignore[index]
                del held[node.args[0]]  # type: ignore[arg-type]


def calibration_text(context: Context, key: str) -> Tensor:
    """The ids (or images) that the pass `key` calibrates on; CompileError[pass-refused] when there are none."""
    if context.calibration is None:
        message = f"{key} needs text or images to calibrate on, and none came with the model"
        raise CompileError(
            "pass-refused",
            message,
            where=f"pass {key}",
            fix="pass calibration=ids, or images, to compile, or name them in the plan's `calibration`",
        )
    return context.calibration


def inputs_of(ids: Tensor, progress: Any = None) -> Iterator[Batch]:
    """The inputs of one run per sequence of token ids [S, L], or per image [S, C, Y, X]."""
    for row in progress(ids, "calibrating") if progress else ids:
        yield batch_of(row[None])


def batch_of(samples: Tensor) -> Batch:
    """The inputs of one run over several sequences of token ids [S, L], or images [S, C, Y, X]."""
    if samples.is_floating_point():
        return {"images": samples}
    return {"input_ids": samples, "position_ids": torch.arange(samples.shape[1]).expand(samples.shape)}


def _checked(ids: Tensor) -> Tensor:
    if ids.dim() != 2 or ids.numel() < LEAST:
        raise _short(f"token ids of shape {list(ids.shape)}")
    return ids


def _not_finite(node: Node) -> CompileError:
    return CompileError(
        "calibration-not-finite",
        "calibration gives NaN or infinity here",
        node=describe(node),
        fix="check the model's weights, or run it in float32",
    )


def _short(have: str) -> CompileError:
    return CompileError(
        "calibration-short", f"too little to calibrate on: {have}", fix="pass calibration=ids with at least a few hundred tokens"
    )
