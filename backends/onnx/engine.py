"""The ONNX Runtime engine: preallocated cache buffers bound in place, small inputs per pass, no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from planc.backends.onnx.coded import read_coded
from planc.backends.onnx.packed import LANES_FILE, Lanes
from planc.runtime.artifact import Manifest
from planc.runtime.engine import Cache, EngineSpec, Ints, Outputs, Step
from planc.runtime.errors import ArtifactError
from planc.runtime.kv import KvPolicy, LayerSpec, PolicyCache
from planc.runtime.rows import bias_of, key_bias, positions_of, states_of

Gates = NDArray[np.bool_]

_ROWWISE = ("argmax", "logits", "top_ids", "top_logits")  # outputs that every row has, as `Outputs` names and orders them
_BFLOAT16 = 16  # ONNX's number of the type, which numpy does not have

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class OnnxCache(Cache):
    """Keys and values of B sequences, [B, heads, capacity, width] per tensor; the graph writes into these buffers."""

    def __init__(self, engine: OnnxEngine, batch: int, capacity: int) -> None:
        # zeros, not empty: a slot that nobody wrote must not hold NaN; untouched pages cost no memory
        slots = capacity + 1  # a one-row pass may write a spare row behind its own
        # layers of one shape lie behind each other, so that a graph that joins their heads can work on the same memory (`seen_by`)
        like: dict[Any, list[str]] = {}
        for name, (shape, dtype) in engine.states.items():
            like.setdefault((name.rpartition(".")[2], shape[1], shape[3], dtype), []).append(name)
        slabs = {key: np.zeros((len(names), batch, key[1], slots, key[2]), key[3]) for key, names in like.items()}
        self._place = {name: (slabs[key], i) for key, names in like.items() for i, name in enumerate(names)}
        self.state = {name: slab[i] for name in engine.states for slab, i in (self._place[name],)}
        self.lengths: Ints = np.zeros(batch, dtype=np.int64)
        self.capacity = capacity
        self.bindings: dict[Any, Any] = {}
        self.packed: dict[Any, Any] = {}  # bindings of the lanes
        self.buffers: dict[Any, np.ndarray] = {}

    def keep(self, sequence: int, rows: Ints) -> None:
        """See the engine contract. Rows that are where they belong are not moved."""
        start, count = int(self.lengths[sequence]), len(rows)
        rows = np.asarray(rows, dtype=np.int64)
        first = int(np.argmax(rows != np.arange(count))) if count and rows[-1] != count - 1 else count
        if first < count:
            source = start + rows[first:]
            for tensor in self.state.values():
                tensor[sequence, :, start + first : start + count] = tensor[sequence][:, source]
        self.lengths[sequence] += count

    def rollback(self, sequence: int, length: int) -> None:
        """See the engine contract."""
        assert 0 <= length <= self.lengths[sequence]
        self.lengths[sequence] = length

    def seen_by(self, states: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The memory by the state names of a graph over the same layers, in order, whose states may hold the heads of several layers.

        The latter only for a cache of one sequence, where the layers' heads are contiguous.
        """
        if all(name in self.state and self.state[name].shape[1] == shape[1] for name, (shape, _) in states.items()):
            return self.state
        assert len(self.lengths) == 1, "heads of several layers are neighbours only where there is one sequence"
        views = {}
        for part in ("key", "value"):
            layers = (name for name in self.state if name.endswith(part))
            for name in (name for name in states if name.endswith(part)):
                heads = states[name][0][1]
                slab, start = self._place[next(layers)]
                count = heads // slab.shape[2]
                views[name] = slab[start : start + count].reshape(1, heads, *slab.shape[3:])
                for _ in range(count - 1):
                    next(layers)
        return views

    def bytes(self) -> int:
        """Bytes of all slots (address space; memory is taken as slots are written)."""
        return sum(t.nbytes for t in self.state.values())


class OnnxEngine:
    """Runs `model.onnx` of an artifact by the engine contract.

    Raises ArtifactError[artifact-corrupt] when ONNX Runtime cannot load the file.
    """

    def __init__(self, directory: Path, manifest: Manifest, threads: int | None = None, file: str = "model.onnx") -> None:
        self.directory, self.manifest, self.threads, self.file = directory, manifest, threads, file
        self.coded = read_coded(directory)
        self.session = self._session(file)
        self.lane_count = int(manifest.extra.get("lanes", 0))
        kv = manifest.extra.get("kv")
        self.policy = KvPolicy.model_validate(kv["policy"]) if kv else None
        self.layers = tuple(LayerSpec.model_validate(layer) for layer in kv["layers"]) if kv else ()
        guesses = self.policy.guesses if self.policy is not None else 0
        self.spec: EngineSpec = replace(manifest.signature.spec(), ragged=self.lane_count > 0, guesses=guesses)
        inputs = {i.name: i for i in self.session.get_inputs()}
        self.states = {n: (i.shape, _TYPES[i.type]) for n, i in inputs.items() if n.startswith("past.")}
        self.inputs = [n for n in inputs if n not in self.states]
        self.biases = {n: bias_of(n)[0] for n in self.inputs if n.startswith("bias")}
        self.state_width = int(inputs["states"].shape[-1]) if "states" in inputs else 0
        outputs = {o.name: o for o in self.session.get_outputs()}
        self.outputs = {n: (o.shape, _TYPES[o.type]) for n, o in outputs.items() if not n.startswith("present.")}
        self.queries = tuple(n for n in outputs if n.startswith("query."))
        self.batches = bool(manifest.extra.get("batches", False))
        self._skipping: OnnxSkipEngine | None = None
        self.most_rows = manifest.signature.capacity  # RotaryEmbedding takes no more rows than its tables have positions

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads or self.manifest.target.get("threads") or os.cpu_count() or 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        return options

    def _session(self, file: str) -> ort.InferenceSession:
        options = self._options()
        if self.coded:
            options.add_external_initializers(list(self.coded), list(self.coded.values()))
        try:
            return ort.InferenceSession(str(self.directory / file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own types without a common base
            raise ArtifactError(
                "artifact-corrupt", f"ONNX Runtime cannot load {file}: {error}", where=str(self.directory), fix="compile the plan again"
            ) from error

    @cached_property
    def lanes(self) -> Lanes:
        """The graph for batches, loaded when the first one comes: it holds the weights a second time."""
        return Lanes(self._session(LANES_FILE), self.lane_count, self.outputs, self.biases, self.states)

    def new_cache(self, batch: int, capacity: int) -> OnnxCache | PolicyCache:
        """See the engine contract."""
        if self.policy is not None:
            return PolicyCache(self.policy, self.layers, batch, capacity)
        return OnnxCache(self, batch, capacity)

    def forward(self, cache: Cache, step: Step, *, logits: bool = False, top_k: bool = False) -> Outputs:
        """See the engine contract. Without lanes fused attention takes several rows of one sequence only: a batch goes through one by one."""
        assert isinstance(cache, OnnxCache | PolicyCache)
        which = np.arange(len(cache.lengths)) if step.sequences is None else step.sequences
        parts = [
            self._pack(cache, which[part], _part(step, part), logits, top_k)
            if isinstance(cache, OnnxCache) and self.lane_count and part.stop - part.start > 1
            else self._run(
                cache, slice(int(which[part.start]), int(which[part.stop - 1]) + 1), self._unpadded(_part(step, part)), logits, top_k
            )
            for part in self._parts(which, step.tokens.shape[1])
        ]
        if len(parts) == 1:
            return parts[0]
        taps = {n: _stack([p.taps[n] for p in parts]) for n in self.spec.taps}
        return Outputs(**{name: _join(parts, name) for name in _ROWWISE}, taps=taps)

    def levels(self) -> tuple[OnnxEngine, ...]:
        """A draft head's graphs for all guesses but the first, where it has one for each depth."""
        count = int(self.manifest.extra.get("levels", 1))
        return tuple(OnnxEngine(self.directory, self.manifest, self.threads, f"{level_name(level)}.onnx") for level in range(1, count))

    def skipping(self) -> OnnxSkipEngine:
        """The same target with sublayers that can be left out; opened at the first call, where the artifact has the graph."""
        if self._skipping is None:
            self._skipping = OnnxSkipEngine(self.directory, self.manifest, self.threads)
        return self._skipping

    def _parts(self, which: Ints, rows: int) -> list[slice]:
        """What runs together: neighbours in the cache where the graph takes batches, as many as there are lanes, or one."""
        count = len(which)
        if self.batches:
            cuts = [0, *(i for i in range(1, count) if which[i] != which[i - 1] + 1), count]
        else:
            cuts = [*range(0, count, max(1, min(self.lane_count, self.most_rows // rows))), count]
        return [slice(start, stop) for start, stop in pairwise(cuts)]

    def _unpadded(self, step: Step) -> Step:
        """What a ragged engine runs of a step of one sequence: without its padding, as far as the kernels do not need it."""
        if not self.spec.ragged or step.counts is None:
            return step
        rows = min(max(int(step.counts[0]), step.least), step.tokens.shape[1])
        first = step.logits_from if step.firsts is None else int(step.firsts[0])
        parents = None if step.parents is None else step.parents[:, :rows]
        return replace(step, tokens=step.tokens[:, :rows], parents=parents, logits_from=first)

    def _pack(self, cache: OnnxCache, which: Ints, step: Step, logits: bool, top_k: bool) -> Outputs:
        names = self._wanted(logits, top_k)
        out = self.lanes.run(cache.state, cache.packed, cache.buffers, which, cache.lengths[which], step, names)
        return self._outputs(out)

    def _run(
        self, cache: OnnxCache | PolicyCache, part: slice, step: Step, logits: bool, top_k: bool, gates: Gates | None = None
    ) -> Outputs:
        binding = self._binding(cache, part, step, (self.session, part.start, part.stop, logits, top_k))
        feeds = dict(self._feeds(cache, part, step, gates))  # kept alive until the pass is over
        for name, array in feeds.items():
            kind = _BFLOAT16 if array.dtype == np.uint16 else array.dtype
            binding.bind_input(name, "cpu", 0, kind, array.shape, array.ctypes.data)
        names = [*self._wanted(logits, top_k), *(self.queries if isinstance(cache, PolicyCache) else ())]
        out = {name: self._buffer(cache, binding, part.start, name, step) for name in names}
        self.session.run_with_iobinding(binding)
        if isinstance(cache, PolicyCache):
            cache.observe(part.start, 0, {f"past.{name.partition('.')[2]}": out[name][0] for name in self.queries})
        return self._outputs(out)

    def _binding(self, cache: OnnxCache | PolicyCache, part: slice, step: Step, key: Any) -> Any:
        """The binding of the memory that a pass works on, made again where that has moved."""
        version = 0
        if isinstance(cache, PolicyCache):
            cache.reserve(part.start, step.tokens.shape[1])
            version = cache.version[part.start]
        if key not in cache.bindings or cache.bindings[key][0] != version:
            cache.bindings[key] = version, self._bind_state(cache, part)
        return cache.bindings[key][1]

    def _feeds(self, cache: OnnxCache | PolicyCache, part: slice, step: Step, gates: Gates | None) -> Iterator[tuple[str, np.ndarray]]:
        lengths = cache.lengths[part]
        if isinstance(cache, PolicyCache):
            yield from cache.stored(part.start).items()
        for name in self.inputs:
            if name == "input_ids":
                yield name, np.ascontiguousarray(step.tokens, dtype=np.int64)
            elif name == "position_ids":
                yield name, np.ascontiguousarray(positions_of(lengths, step))
            elif name.startswith("lengths"):
                yield name, _rows_of(cache, part, int(name.partition(".")[2] or 0))
            elif name == "gates":
                assert gates is not None
                yield name, np.ascontiguousarray(gates, dtype=np.bool_)
            elif name == "states":
                yield name, states_of(step, self.state_width)
            elif name == "logits_from":
                yield name, np.array([step.logits_from], dtype=np.int64)
            elif name in self.biases:
                yield name, np.ascontiguousarray(key_bias(_rows_of(cache, part, bias_of(name)[1]), step, self.biases[name]))

    def _outputs(self, out: Mapping[str, np.ndarray]) -> Outputs:
        return Outputs(**{name: out.get(name) for name in _ROWWISE}, taps={name: out[name] for name in self.spec.taps})

    def _wanted(self, logits: bool, top_k: bool) -> list[str]:
        wanted = ["argmax"] + (["logits"] if logits else []) + (["top_ids", "top_logits"] if top_k else [])
        return [n for n in (*wanted, *self.spec.taps) if n in self.outputs]

    def _buffer(self, cache: OnnxCache | PolicyCache, binding: Any, sequence: int, name: str, step: Step) -> np.ndarray:
        """An output buffer of the right shape, bound; grown when needed, a view of the old one otherwise."""
        shape, dtype = self.outputs[name]
        batch, rows = step.tokens.shape
        rows = rows if name.startswith(("tap", "query")) else rows - step.logits_from
        full = (batch, rows, *shape[2:])
        count = int(np.prod(full))
        key = (sequence, name)
        if key not in cache.buffers or cache.buffers[key].size < count:
            cache.buffers[key] = np.empty(count, dtype)
        array = cache.buffers[key][:count].reshape(full)
        binding.bind_output(name, "cpu", 0, dtype, full, array.ctypes.data)
        return array

    def _bind_state(self, cache: OnnxCache | PolicyCache, part: slice) -> Any:
        """Past and present of each layer are the same buffer."""
        binding = self.session.io_binding()
        if isinstance(cache, PolicyCache):
            arrays = cache.tensors(part.start)
        else:
            arrays = {name: whole[part] for name, whole in cache.seen_by(self.states).items()}
        for name, array in arrays.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            binding.bind_output(f"present.{name.partition('.')[2]}", "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding


class OnnxSkipEngine:
    """Passes of the target with some sublayers left out, through `skip.onnx`: same weight file, same caches (`runtime/drafters/self_skip.py`).

    ONNX Runtime repacks weights for every session and its Python interface cannot share the result, so this session costs about the memory
    of the weights again; a set of sublayers costs nothing, and may be another one in every pass.
    """

    def __init__(self, directory: Path, manifest: Manifest, threads: int | None = None) -> None:
        self._engine = OnnxEngine(directory, manifest, threads, file="skip.onnx")
        self.spec = self._engine.spec
        self.units: tuple[tuple[int, str], ...] = tuple((int(layer), str(kind)) for layer, kind in manifest.extra["units"])

    def pass_ms(self, gates: Gates) -> float | None:
        """What a pass of one row takes, by the cost of each kind of sublayer as compile measured it; None when it did not."""
        ms: dict[str, float] = self._engine.manifest.extra.get("unit_ms", {})
        if not ms:
            return None
        return ms["rest"] + sum(ms[kind] for (_, kind), runs in zip(self.units, gates, strict=True) if runs)

    def forward(self, cache: Cache, sequence: int, step: Step, gates: Gates, *, logits: bool = False) -> Outputs:
        """A pass [1, R] of one sequence of a target's cache. `gates` [units] tells which sublayers run."""
        assert isinstance(cache, OnnxCache)
        return self._engine._run(cache, slice(sequence, sequence + 1), step, logits, False, gates)

    def replay(self, cache: Cache, sequence: int, tokens: Ints, gates: Gates) -> Ints:
        """What would have been guessed after each of the last cached `tokens` [W]: argmax [W]. The cache is left as it was."""
        assert isinstance(cache, OnnxCache)
        length, count = int(cache.lengths[sequence]), len(tokens)
        window = slice(length - count, length)
        before = {name: tensor[sequence, :, window].copy() for name, tensor in cache.state.items()}
        cache.lengths[sequence] = length - count
        try:
            outputs = self.forward(cache, sequence, Step(np.asarray(tokens, dtype=np.int64)[None]), gates)
        finally:
            cache.lengths[sequence] = length
            for name, tensor in cache.state.items():
                tensor[sequence, :, window] = before[name]
        assert outputs.argmax is not None
        return outputs.argmax[0].copy()


def level_name(level: int) -> str:
    """What the graph for guesses of this depth, from 0 on, is called in the artifact of a draft head."""
    return f"level-{level + 1}" if level else "model"


def _rows_of(cache: OnnxCache | PolicyCache, part: slice, group: int) -> Ints:
    """Rows [B] that layers of a group of states read."""
    if isinstance(cache, PolicyCache):
        return np.array([cache.rows(part.start, group)], dtype=np.int64)
    return cache.lengths[part].copy()


def _part(step: Step, part: slice) -> Step:
    """Some sequences of a step."""
    parents, counts, firsts = (None if a is None else a[part] for a in (step.parents, step.counts, step.firsts))
    return replace(step, tokens=step.tokens[part], parents=parents, counts=counts, sequences=None, firsts=firsts)


def _join(parts: list[Outputs], name: str) -> np.ndarray | None:
    arrays = [getattr(p, name) for p in parts]
    return None if arrays[0] is None else _stack(arrays)


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    """[B, R', ...] of arrays of some sequences each; a narrower one is filled up with whatever was there."""
    width = max(a.shape[1] for a in arrays)
    if all(a.shape[1] == width for a in arrays):
        return np.concatenate(arrays)
    out = np.empty((sum(map(len, arrays)), width, *arrays[0].shape[2:]), arrays[0].dtype)
    at = 0
    for a in arrays:
        out[at : at + len(a), : a.shape[1]] = a
        at += len(a)
    return out
