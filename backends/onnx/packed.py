"""Runs `model_batch.onnx`: a pass over the rows of several sequences, packed behind each other, each sequence in a lane of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from planc.runtime.engine import Ints, Step
from planc.runtime.rows import key_bias, positions_of

LANES_FILE = "model_batch.onnx"
ATTENDING = 2  #: rows that an attention works on at least: a single one takes another kernel than several
_BINDINGS = 16  # sets of sequences whose bindings are kept

State = dict[str, np.ndarray]  # name -> [B, heads, capacity, width]


@dataclass(frozen=True)
class Packing:
    """Where the rows of a step stand.

    A row that is padding takes part in attention only, where it is a copy of the sequence's last row: one row alone would take another
    kernel there than several. The products have enough rows without it.
    """

    counts: list[int]  # rows of each sequence
    attending: list[Ints]  # [n] per sequence: its rows among the packed ones, padding included
    back: Ints  # [N] place of every packed row among the attention rows of all lanes
    wanted: Ints  # [M] packed rows with outputs
    takers: list[int]  # of `wanted`, how many each sequence has

    @classmethod
    def of(cls, step: Step) -> Packing:
        """The packing of a step [B, R]."""
        batch, rows = step.tokens.shape
        counts = [rows] * batch if step.counts is None else step.counts.tolist()
        firsts = [step.logits_from] * batch if step.firsts is None else step.firsts.tolist()
        least = min(step.least, rows)
        start = place = 0
        attending, back, wanted, takers = list[Ints](), list[Ints](), list[Ints](), list[int]()
        for count, first in zip(counts, firsts, strict=True):
            width = max(count, least, ATTENDING)
            attending.append(np.minimum(np.arange(start, start + width), start + count - 1))
            back.append(np.arange(place, place + count))
            wanted.append(np.arange(start + first, start + count))
            takers.append(len(wanted[-1]))
            start, place = start + count, place + width
        spare = [np.zeros(max(0, least - start), np.int64)]  # any rows: they make the products wide enough
        few = [np.zeros(max(0, least - sum(takers)), np.int64)]
        return cls(counts, attending, np.concatenate(back + spare), np.concatenate(wanted + few), takers)

    def rows(self, values: Ints) -> Ints:
        """[1, N] of values [B, R]."""
        parts = [line[:count] for line, count in zip(values, self.counts, strict=True)]
        missing = len(self.back) - sum(self.counts)
        return np.concatenate([*parts, np.repeat(parts[-1][-1:], missing)])[None]

    def spread(self, packed: np.ndarray, takers: Sequence[int], width: int) -> np.ndarray:
        """[B, width, ...] of rows [1, .., ...] of which every sequence has `takers`; the rest of a line is whatever was there."""
        total = sum(takers)
        if all(taken == width for taken in takers):
            return packed[0, :total].reshape(len(takers), width, *packed.shape[2:])
        out = np.empty((len(takers), width, *packed.shape[2:]), packed.dtype)
        at = 0
        for line, taken in zip(out, takers, strict=True):
            line[:taken] = packed[0, at : at + taken]
            at += taken
        return out


class Lanes:
    """The session of the lanes. `names`, `outputs` and `biases` are those of the engine: inputs, output shapes, windows of mask inputs."""

    def __init__(
        self, session: ort.InferenceSession, count: int, outputs: dict[str, Any], biases: dict[str, int], state: dict[str, Any]
    ) -> None:
        self.session, self.count, self.outputs, self.biases = session, count, outputs, biases
        self.fed = {value.name for value in session.get_inputs()}
        # a lane without sequence attends with one row to nothing and writes it here
        self.idle = {name: np.zeros((1, shape[1], 1, shape[3]), dtype) for name, (shape, dtype) in state.items()}

    def run(
        self,
        state: State,
        bindings: dict[Any, Any],
        buffers: dict[Any, np.ndarray],
        which: Ints,
        lengths: Ints,
        step: Step,
        names: Sequence[str],
    ) -> dict[str, np.ndarray]:
        """Outputs [B, R', ...] by name of a pass over at most `count` sequences of a cache; `bindings` and `buffers` live as long as it does."""
        packing = Packing.of(step)
        key = ("lanes", *which.tolist(), *names)
        if key not in bindings:
            if len(bindings) > _BINDINGS:
                bindings.clear()
            bindings[key] = self._bind(state, which)
        binding = bindings[key]
        feeds = {
            name: array for name, array in self._feeds(packing, lengths, step) if name in self.fed
        }  # kept alive until the pass is over
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        out = {name: self._buffer(buffers, binding, name, packing, int(which[0])) for name in names}
        self.session.run_with_iobinding(binding)
        rows = step.tokens.shape[1]
        return {
            name: packing.spread(array, packing.counts, rows)
            if name.startswith("tap")
            else packing.spread(array, packing.takers, rows - step.logits_from)
            for name, array in out.items()
        }

    def _feeds(self, packing: Packing, lengths: Ints, step: Step) -> Iterator[tuple[str, np.ndarray]]:
        yield "input_ids", packing.rows(step.tokens)
        yield "position_ids", packing.rows(positions_of(lengths, step))
        yield "lengths", np.concatenate([lengths, np.zeros(self.count - len(lengths), np.int64)])
        yield "back", packing.back
        yield "wanted", packing.wanted
        for lane in range(self.count):
            taken = lane < len(lengths)
            yield f"rows.{lane}", packing.attending[lane] if taken else np.zeros(1, np.int64)
            for name, window in self.biases.items():
                yield (
                    f"{name}.{lane}",
                    _bias(lengths, step, lane, len(packing.attending[lane]), window) if taken else np.zeros((1, 1, 1, 1), np.float32),
                )

    def _buffer(self, buffers: dict[Any, np.ndarray], binding: Any, name: str, packing: Packing, first: int) -> np.ndarray:
        """An output buffer, bound. Each group of lanes has its own, by its first sequence: a batch of several groups reads all at the end."""
        shape, dtype = self.outputs[name]
        rows = len(packing.back) if name.startswith("tap") else len(packing.wanted)
        full = (1, rows, *shape[2:])
        count, key = int(np.prod(full)), ("lanes", first, name)
        if key not in buffers or buffers[key].size < count:
            buffers[key] = np.empty(count, dtype)
        array = buffers[key][:count].reshape(full)
        binding.bind_output(name, "cpu", 0, dtype, full, array.ctypes.data)
        return array

    def _bind(self, state: State, which: Ints) -> Any:
        """Past and present of a lane are the same buffer."""
        binding = self.session.io_binding()
        for name, whole in state.items():
            for lane in range(self.count):
                array = whole[which[lane] : which[lane] + 1] if lane < len(which) else self.idle[name]
                binding.bind_input(f"{name}.{lane}", "cpu", 0, array.dtype, array.shape, array.ctypes.data)
                binding.bind_output(f"present.{name.partition('.')[2]}.{lane}", "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding


def _bias(lengths: Ints, step: Step, lane: int, rows: int, window: int) -> np.ndarray:
    """Mask [1,1,n,T] of one lane."""
    parents = None if step.parents is None else step.parents[lane : lane + 1, :rows]
    return np.ascontiguousarray(key_bias(lengths[lane : lane + 1], Step(step.tokens[lane : lane + 1, :rows], parents), window))
