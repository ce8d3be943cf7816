"""What the checks of cache policies share: one model, one pass over a prompt for all policies; imported as `planc_paper_checks.caches`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planc.backends.onnx.artifact import policy_of, signature
from planc.backends.onnx.engine import OnnxCache, OnnxEngine
from planc.backends.onnx.lower import lower
from planc.compiler.compile import calibration_blocks, raised, text_ids, text_of
from planc.compiler.models import load_model
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.quality import nll_of
from planc.passes.argmax import Argmax
from planc.passes.fuse_projections import FuseProjections
from planc.passes.kv_cache import KvCache
from planc.passes.logits_rows import LogitsRows
from planc.passes.quantize_weights import QuantizeWeights
from planc.passes.skip_layers import SkipLayers
from planc.runtime.artifact import Manifest
from planc.runtime.engine import Floats, Step
from planc.runtime.kv import KvPolicy, PolicyCache
from planc_paper_checks.common import MODEL, data

CHUNK = 256  # rows of a pass over a prompt
LEFT_OUT = (22, 23, 24, 25, 26, 27)  # layers that the draft does without
JUDGES = 64  # last rows of a prompt whose queries are kept
_READER = {"evict": {"attention_window": {"capacity": 2 * JUDGES, "window": JUDGES}}}

Options = dict[str, Any] | None  # of a policy; None: a plain cache


@dataclass(frozen=True)
class Prompt:
    """A text that went through the model densely: per layer keys and values [G,T,D] and the last queries [W,H,D]."""

    ids: list[int]
    keys: list[Floats]
    values: list[Floats]
    queries: list[Floats]
    first: int  # likeliest next token


class Lab:
    """SmolLM2-135M with a cache of any policy, its weights in row-wise int8 or as they are.

    What a policy does begins when a prompt ends, so that one pass over a prompt serves all of them.
    """

    def __init__(self, folder: Path, *, capacity: int = 8192) -> None:
        loaded = load_model(MODEL)
        self.text, self.capacity, self._folder = text_of(loaded), capacity, folder
        self.context = Context(calibration_blocks(text_ids(loaded)))
        self.program = FuseProjections().apply(raised(loaded), self.context)
        self._int8 = QuantizeWeights(format="int8").apply(self.program, self.context)
        self._draft = SkipLayers(layers=LEFT_OUT).apply(self._int8, self.context)
        self._engines: dict[tuple[str, bool], OnnxEngine] = {}
        self._made = 0

    @property
    def draft_share(self) -> float:
        """Layers of the draft, as a share of the model's."""
        return len(self.engine(_READER, draft=True).layers) / len(self.engine(_READER).layers)

    def engine(self, options: Options, *, int8: bool = True, draft: bool = False) -> OnnxEngine:
        """The model, or its draft, with a cache of this policy; made once."""
        key = f"{options!r} {draft}", int8
        if key not in self._engines:
            program = self._draft if draft else self._int8 if int8 else self.program
            for part in (KvCache(policy=KvPolicy.model_validate(options) if options else None), LogitsRows(), Argmax()):
                program = part.apply(program, self.context)
            folder = self._folder / str(self._made)
            self._made += 1
            folder.mkdir(parents=True)
            lower(program, folder, positions=self.capacity)
            manifest = Manifest(planc="0", signature=signature(program, self.capacity), extra={"batches": False, **policy_of(program)})
            self._engines[key] = OnnxEngine(folder, manifest)
        return self._engines[key]

    def close(self, options: Options, *, int8: bool = True) -> None:
        """Give back what an engine takes, on disk too."""
        shutil.rmtree(self._engines.pop((f"{options!r} False", int8)).directory)

    def words(self, count: int, skip: int = 0) -> list[int]:
        """Tokens of running text."""
        file = data("wikitext2/valid.txt")
        assert file is not None, "PLANC_DATA must hold wikitext2"
        ids = self.text.encode(file.read_text(encoding="utf-8")[: 8 * (count + skip) + 2000])
        return list(ids[skip : skip + count])

    def read(self, ids: Sequence[int], *, draft: bool = False) -> Prompt:
        """The prompt, once for all policies; or as the draft sees it."""
        engine = self.engine(_READER, draft=draft)
        cache = engine.new_cache(1, len(ids))
        assert isinstance(cache, PolicyCache)
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            out = engine.forward(cache, Step(np.array([part]), logits_from=max(0, len(part) - 2)))
            cache.keep(0, np.arange(len(part)))
        assert out.argmax is not None
        layers, count = list(cache.layers(0).values()), len(ids)
        keys, values = ([getattr(layer, part)[0, :, :count].copy() for layer in layers] for part in ("key", "value"))
        return Prompt(list(ids), keys, values, [layer.queries.copy() for layer in layers], int(out.argmax[0, -1]))

    def dense(self, prompt: Prompt, room: int = 256) -> OnnxCache:
        """A plain cache that holds the prompt."""
        cache = self.engine(None).new_cache(1, len(prompt.ids) + room)
        assert isinstance(cache, OnnxCache)
        for i, (key, value) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
            cache.state[f"past.{i}.key"][0, :, : key.shape[1]] = key
            cache.state[f"past.{i}.value"][0, :, : value.shape[1]] = value
        cache.lengths[0] = len(prompt.ids)
        return cache

    def sealed(
        self, options: Options, prompt: Prompt, guessed: Sequence[int] = (), room: int = 256, *, int8: bool = True
    ) -> OnnxCache | PolicyCache:
        """A cache of this policy behind the prompt, sealed; `guessed` is what may follow."""
        if options is None:
            return self.dense(prompt, room)
        engine, count = self.engine(options, int8=int8), len(prompt.ids)
        cache = engine.new_cache(1, count + room)
        assert isinstance(cache, PolicyCache)
        for name, layer in cache.layers(0).items():
            index, which = int(name.partition(".")[2].rstrip("s")), list(layer.spec.which)
            layer.key[0, :, :count], layer.value[0, :, :count] = prompt.keys[index][which], prompt.values[index][which]
            layer.positions[:, :count], layer.window = np.arange(count), count
            group = layer.spec.query_heads // layer.spec.heads
            layer.queries = prompt.queries[index][:, [h * group + j for h in which for j in range(group)]]
        cache.lengths[0] = count
        if guessed:
            engine.forward(cache, Step(np.array([guessed])))
        cache.seal(0, len(guessed))
        return cache

    def follow(
        self, options: Options, cache: OnnxCache | PolicyCache, ids: Sequence[int], rows: int = 64, *, int8: bool = True
    ) -> Iterator[Floats]:
        """Logits [R,V] after each of `ids`, which are committed, in passes that never cross the cache's horizon; views."""
        engine, at = self.engine(options, int8=int8), 0
        while at < len(ids):
            part = ids[at : at + min(rows, cache.horizon(0))]
            out = engine.forward(cache, Step(np.array([part])), logits=True)
            assert out.logits is not None
            yield out.logits[0]
            cache.keep(0, np.arange(len(part)))
            at += len(part)

    def perplexity(self, options: Options, prompt: Prompt, following: Sequence[int]) -> float:
        """Of the tokens behind the first one of `following`, read by this policy."""
        cache, total, at = self.sealed(options, prompt, room=len(following) + 8), 0.0, 0
        for logits in self.follow(options, cache, following[:-1]):
            total += nll_of(logits, following[at + 1 : at + 1 + len(logits)])
            at += len(logits)
        return float(np.exp(total / (len(following) - 1)))

    def greedy(self, options: Options, cache: OnnxCache | PolicyCache, first: int, count: int, *, int8: bool = True) -> list[int]:
        """`first` and the likeliest tokens behind it."""
        engine, tokens = self.engine(options, int8=int8), [first]
        while len(tokens) < count:
            out = engine.forward(cache, Step(np.array([tokens[-1:] * 2])))
            assert out.argmax is not None
            cache.keep(0, np.arange(1))
            tokens.append(int(out.argmax[0, 0]))
        return tokens

    def needle(self, length: int, depth: float, code: int) -> list[int]:
        """About `length` tokens of text with a code at `depth`, and the question for it."""
        said = self.text.encode(f"\n\nThe secret access code is {code}. Remember that the secret access code is {code}.\n\n")
        asked = self.text.encode("\n\nQuestion: What is the secret access code?\nAnswer: The secret access code is")
        words = self.words(length - len(said) - len(asked), skip=code % 1000)
        at = int(depth * len(words))
        return [*words[:at], *said, *words[at:], *asked]

    def guess(self, prompt: Prompt, count: int) -> list[int]:
        """The first token of the answer, and what the draft makes of the next ones."""
        engine, ids = self.engine(_READER, draft=True), prompt.ids
        cache, tokens = engine.new_cache(1, len(ids) + count + 8), [prompt.first]
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            engine.forward(cache, Step(np.array([part]), logits_from=max(0, len(part) - 2)))
            cache.keep(0, np.arange(len(part)))
        while len(tokens) < count + 1:
            out = engine.forward(cache, Step(np.array([tokens[-1:] * 2])))
            assert out.argmax is not None
            cache.keep(0, np.arange(1))
            tokens.append(int(out.argmax[0, 0]))
        return tokens

    def found(self, options: Options, prompt: Prompt, code: int, guessed: Sequence[int] = ()) -> bool:
        """Whether the code comes back."""
        answer = self.greedy(options, self.sealed(options, prompt, guessed), prompt.first, 8)
        return str(code) in self.text.decode(answer)


def policy_in(plan: Path) -> dict[str, Any]:
    """The options of a plan's cache policy."""
    (part,) = (p for p in Plan.from_yaml(plan).passes if isinstance(p, KvCache))
    assert part.policy is not None
    return part.policy.model_dump(mode="json", exclude_defaults=True)
