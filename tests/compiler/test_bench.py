"""`planc bench`: prompts, the race, what the runs say, and perplexity. No model; the processes are replaced by objects."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from planc.compiler import bench
from planc.compiler.bench import Options, Prompt, Run, System, compare, load_prompts, race, speed, summary
from planc.compiler.peers import PeerMissing
from planc.compiler.quality import nll_of, perplexity, read_windows, window_nll
from planc.compiler.store import Stored
from planc.runtime.engine import EngineSpec, Outputs, Step
from planc.runtime.errors import InputError, PlancError

ROOT = Path(__file__).resolve().parents[2]


class FakeWorker:
    """Answers like worker.py; `log` is shared by all and records who computed when."""

    def __init__(
        self, name: str, log: list[tuple[str, str | None]], *, answer: Callable[[str | None, list[int]], dict[str, Any]] | None = None
    ) -> None:
        self.name, self.log, self.answer = name, log, answer or (lambda form, ids: {"ids": [7] * 8, "seconds": 0.1})

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append((self.name, "closed"))

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        if op == "load":
            return {"load_s": 0.5, "version": f"{self.name}-1", "peak_rss_mb": 10.0, "file_bytes": 2**20}
        if op == "memory":
            return {"live_mb": 20.0}
        if op == "about":
            return {
                "eos": [2],
                "exactness": "bitwise",
                "exactness_line": "bitwise",
                "min_rows": 2,
                "speculative": True,
                "torch": False,
                "bytes": 5,
            }
        if op == "encode":
            return {"ids": [ord(letter) for letter in request["text"]]}
        if op == "write_logits":
            Path(request["path"]).write_text(str(len(request["ids"])))
            return {}
        if op == "score":
            assert Path(request["reference"]).read_text() == str(len(request["ids"])), "the reference has written this window's logits"
            rows = len(request["ids"]) - 1
            known = self.name != "llama.cpp"
            return {"nll": 2.0 * rows if known else None, "kl": 0.5 * rows if known else None, "same": rows // 2, "tokens": rows}
        self.log.append((self.name, request.get("form")))
        return {"peak_rss_mb": 100.0, "ttft_ms": 5.0, **self.answer(request.get("form"), request["ids"])}


# ---- prompts -----------------------------------------------------------------------------------------------------------------------


def test_prompts_from_json_lines_and_text(tmp_path: Path) -> None:
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"id": 4, "category": "a", "turns": ["one", "two"]}\n\n{"prompt": "three"}\n')
    assert load_prompts(str(lines)) == [Prompt("4", "a", "one"), Prompt("2", "all", "three")]
    text = tmp_path / "p.txt"
    text.write_text("first\nsecond\n")
    assert [prompt.text for prompt in load_prompts(str(text))] == ["first", "second"]


@pytest.mark.parametrize("line", ["{", "[]", '{"turns": []}', '{"turns": [3]}', '{"other": "x"}', '{"prompt": ""}'])
def test_prompts_that_are_none(tmp_path: Path, line: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InputError) as caught:
        load_prompts(str(file))
    assert caught.value.where == f"{file}:2"


def test_prompts_absent_or_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_prompts(str(tmp_path / "absent.jsonl"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no prompts"):
        load_prompts(str(tmp_path / "empty.txt"))


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5), limit=st.integers(1, 40))
def test_limit_takes_evenly(sizes: list[int], limit: int) -> None:
    prompts = [Prompt(f"{c}-{i}", str(c), "x") for i in range(7) for c, size in enumerate(sizes) if i < size]
    taken = bench._evenly(prompts, limit)
    assert len(taken) == min(limit, len(prompts))
    assert taken == [prompt for prompt in prompts if prompt in taken], "the order of the file is kept"
    counts = [sum(prompt.category == str(c) for prompt in taken) for c in range(len(sizes))]
    for count, size in zip(counts, sizes, strict=True):
        assert count == size or count >= max(counts) - 1, "no category is short while another has two more"
    with pytest.raises(InputError):
        bench._evenly(prompts, 0)


@pytest.mark.parametrize("name", ["repeat", "mixed"])
def test_prompt_files_of_the_repository(name: str) -> None:
    prompts = load_prompts(str(ROOT / f"benchmarks/prompts/{name}.jsonl"))
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    if name == "repeat":
        assert 290 <= len(prompts[0].text.split("\n\n", 1)[1].split()) <= 320


# ---- the race ----------------------------------------------------------------------------------------------------------------------


def test_systems_take_turns_in_rotating_order() -> None:
    log: list[tuple[str, str | None]] = []
    worker = FakeWorker("ours", log)
    systems = [System("ours", worker, "plan"), System("ours", worker, "plain"), System("peer", FakeWorker("peer", log))]  # type: ignore[arg-type]
    steps: list[tuple[int, int]] = []
    race(
        systems,
        [[1], [2], [3], [4]],
        max_new_tokens=8,
        eos=[2],
        warm=[9],
        pause=0,
        progress=lambda done, total: steps.append((done, total)),
    )
    a, b, c = ("ours", "plan"), ("ours", "plain"), ("peer", None)
    assert log == [a, b, c] + [a, b, c] + [b, c, a] + [c, a, b] + [a, b, c]  # warm-up first, then one round per prompt
    assert [len(system.runs) for system in systems] == [4, 4, 4], "the warm-up is not counted"
    assert steps[-1] == (12, 12)


def runs(*pairs: tuple[int, float], passes: int = 4, per_pass: float = 2.0) -> list[Run]:
    return [Run([7] * count, seconds, 5.0, 50.0, per_pass, passes, 0.1) for count, seconds in pairs]


def test_summary() -> None:
    result = summary([*runs((10, 1.0)), *runs((30, 1.0), passes=12, per_pass=3.0)], ["a", "b"])
    assert result["tokens_per_s"] == 20.0
    assert result["tokens_per_pass"] == pytest.approx((2 * 4 + 3 * 12) / 16)
    assert result["categories"] == {"a": {"tokens_per_s": 10.0}, "b": {"tokens_per_s": 30.0}}
    assert (result["prompts"], result["tokens"], result["ttft_ms"], result["peak_rss_mb"]) == (2, 40, 5.0, 50.0)


def test_compare_takes_tokens_from_one_plain_form_and_speed_from_the_other() -> None:
    plan = [Run([1, 2], 1.0), Run([3, 4], 1.0)]
    plain = [Run([1, 2], 2.0), Run([3, 5], 2.0)]
    one_row = [Run([9, 9], 1.6), Run([9, 9], 1.6)]
    result = compare({"plan": plan, "plain": plain, "plain_one_row": one_row}, ["a", "b"])
    assert (result["identical"], result["different"], result["prompts"]) == (1, [1], 2)
    assert result["plain"] == "plain_one_row"
    assert result["ratio"] == pytest.approx(1.6)
    assert result["ratio_median"] == pytest.approx(1.6)
    assert result["categories"]["b"]["ratio"] == pytest.approx(1.6)
    slower = compare({"plan": plan, "plain": plain, "plain_one_row": [Run([9, 9], 9.0)] * 2}, ["a", "b"])
    assert (slower["plain"], slower["ratio"]) == ("plain", pytest.approx(2.0))


def test_counts_of_requests() -> None:
    counts: dict[str, Any] = {"purposes": {"prefill": 1, "verify": 3}, "widths": {"2": 1, "16": 2}, "accepted": {"0": 2, "5": 1}}
    counts |= {"drafted_by": {"a": 8, "b": 2}, "accepted_by": {"a": 5}}
    one, peer = Run([1, 2], 1.0, 5.0, **counts), Run([3], 0.5)
    assert bench.request(Prompt("7", "x", "hi"), one) == {"id": "7", "tokens": 2, "seconds": 1.0, "ttft_ms": 5.0, **counts}
    assert bench.request(Prompt("8", "x", "ho"), peer) == {"id": "8", "tokens": 1, "seconds": 0.5, "ttft_ms": None}
    total = bench.counted([one, one, peer])
    assert (total["purposes"], total["accepted"]) == ({"prefill": 2, "verify": 6}, {"0": 4, "5": 2})
    assert list(total["widths"].items()) == [("2", 2), ("16", 4)]
    assert total["rows_per_pass"] == pytest.approx(34 / 3, abs=1e-4)
    assert total["acceptance"] == {"a": 0.625, "b": 0.0}
    assert bench.counted([peer])["rows_per_pass"] is None
    described = (ROOT / "benchmarks/README.md").read_text()
    assert all(f"`{name}`" in described for name in {*total, "requests", "ttft_ms", "decoding"})


_JSON = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=20), inner, max_size=8),
    max_leaves=40,
)


@given(_JSON)
def test_saved_json_is_the_result(value: Any) -> None:
    assert json.loads(bench._indented(value)) == value


def test_total_and_median_ratio_differ_when_one_prompt_dominates() -> None:
    plan = [Run([0] * 100, 1.0), Run([0] * 10, 1.0), Run([0] * 10, 1.0)]
    plain = [Run([0] * 100, 2.0), Run([0] * 10, 1.0), Run([0] * 10, 1.0)]
    result = compare({"plan": plan, "plain": plain, "plain_one_row": plain}, ["a"] * 3)
    assert result["ratio"] == pytest.approx(4 / 3, abs=1e-4)
    assert result["ratio_median"] == 1.0
    assert speed([]) == 0.0


# ---- the whole command -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str | None]]:
    """`bench` without processes and models: ours makes 8 tokens in 0.05 s, plain in 0.1 s; llama.cpp in 0.08 s; transformers is not installed."""
    log: list[tuple[str, str | None]] = []

    def start(name: str, file: str, config: dict[str, Any], **_: Any) -> FakeWorker:
        if name == "transformers":
            worker = FakeWorker(name, log)
            worker.ask = _missing  # type: ignore[method-assign]
            return worker
        seconds = {"plan": 0.05, "plain": 0.1, "plain_one_row": 0.11, None: 0.08}
        return FakeWorker(name, log, answer=lambda form, ids: {"ids": [7] * 8, "seconds": seconds[form]})

    def _missing(op: str, **_: Any) -> dict[str, Any]:
        raise PeerMissing("peer-failed", "transformers is not installed", fix="pip install transformers")

    monkeypatch.setattr(bench, "Worker", start)
    monkeypatch.setattr(bench, "PAUSE", 0)
    monkeypatch.setattr(bench, "obtain", lambda plan, model, progress: Stored(tmp_path / plan.stem, 3.5, False))
    monkeypatch.setattr(bench, "locate_files", lambda model: (tmp_path / "hf", tmp_path / "model.gguf"))
    monkeypatch.setenv("PLANC_CACHE", str(tmp_path / "cache"))
    return log


def test_bench(stage: list[tuple[str, str | None]], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text to score " * 10)
    said: list[str] = []
    options = Options("tiny", 8, ("llama.cpp", "transformers"), "python", text, 100, progress=False)
    result = bench.bench([Path("a.yaml"), Path("b.yaml")], [Prompt("1", "x", "hi"), Prompt("2", "y", "ho")], options, said.append)
    json.dumps(result, allow_nan=False)
    plan, peer = result["plans"][0], result["peers"][0]
    assert [row["name"] for row in result["plans"]] == ["a", "b"]
    assert [row["name"] for row in result["peers"]] == ["llama.cpp"]
    assert (plan["identical"], plan["prompts"], plan["exactness"], plan["compile_s"], plan["load_s"]) == (2, 2, "bitwise", 3.5, 0.5)
    assert plan["tokens_per_s"] == pytest.approx(160)
    assert plan["ratio"] == pytest.approx(2.0)
    assert (result["fastest_peer"], result["ratio_to_fastest_peer"]["a"]) == ("llama.cpp", pytest.approx(1.6))
    assert (peer["version"], peer["peak_rss_mb"], peer["load_s"]) == ("llama.cpp-1", 100.0, 0.5)
    assert [(line["id"], line["tokens"]) for line in plan["requests"]] == [("1", 8), ("2", 8)] and len(peer["requests"]) == 2
    assert plan["quality"]["perplexity"] == pytest.approx(math.exp(2), abs=1e-3)
    assert (plan["quality"]["kl"], plan["quality"]["tokens"]) == (0.5, 99)
    assert plan["quality"]["agreement"] == pytest.approx(49 / 99, abs=1e-4)
    assert (peer["quality"]["perplexity"], peer["quality"]["kl"], peer["quality"]["tokens"]) == (None, None, 0), "it hands out no logits"
    assert (peer["file_bytes"], peer["live_mb"]) == (2**20, 20.0)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(bench.quality_table(result))
    assert all(piece in shown.get() for piece in ("7.39", "0.5000", "49.5%", "20", "160.0", "99 tokens of text.txt"))
    assert "pip install transformers" in said[0]
    assert "transformers" in result["skipped_peers"]
    ended = {name for name, what in stage if what == "closed"}
    assert ended == {"a", "b", "llama.cpp", "transformers", "unrewritten"}, "no process stays behind"
    assert {"cpu", "versions"} <= result["hardware"].keys()


def test_bench_prints(stage: list[tuple[str, str | None]], capsys: pytest.CaptureFixture[str]) -> None:
    result = bench.bench(
        [Path("a.yaml")], [Prompt("1", "x", "hi"), Prompt("2", "y", "ho")], Options("tiny", 8, ("llama.cpp",), "python", progress=False)
    )
    Console(width=200).print(bench.table(result), bench.category_table(result))
    shown = capsys.readouterr().out
    for piece in ("160.0", "2.00x", "1.60x", "2/2", "bitwise", "llama.cpp", "160.0 (2.00x)"):
        assert piece in shown


def test_bench_refuses(stage: list[tuple[str, str | None]]) -> None:
    with pytest.raises(PlancError, match="no peer is named 'vllm'"):
        bench.bench([Path("a.yaml")], [Prompt("1", "x", "hi")], Options("tiny", peers=("vllm",)))
    with pytest.raises(PlancError, match="two plans are called 'a'"):
        bench.bench([Path("a.yaml"), Path("other/a.yaml")], [Prompt("1", "x", "hi")], Options("tiny"))
    assert not stage


def test_save_is_complete_or_absent(tmp_path: Path) -> None:
    bench.save({"a": 1}, tmp_path / "new" / "r.json")
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == {"a": 1}
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        bench.save({"a": 1}, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]


# ---- perplexity --------------------------------------------------------------------------------------------------------------------


class Bigram:
    """An engine whose logits for a row depend on that row's token alone; refuses passes below `least` rows."""

    def __init__(self, vocab: int, least: int = 1) -> None:
        self.spec, self.least = EngineSpec(vocab, 4096), least
        self.logits = np.random.default_rng(0).normal(size=(vocab, vocab)).astype(np.float32)
        self.seen: list[int] = []

    def new_cache(self, batch: int, capacity: int) -> Any:
        engine = self

        class Cache:
            lengths = np.zeros(1, dtype=np.int64)

            def keep(self, sequence: int, rows: Any) -> None:
                assert list(rows) == list(range(len(rows)))
                engine.seen += engine.last[: len(rows)]
                assert len(engine.seen) <= capacity

        return Cache()

    def forward(self, cache: Any, step: Step, *, logits: bool = False, top_k: bool = False) -> Outputs:
        assert step.tokens.shape[1] >= self.least
        self.last = step.tokens[0].tolist()
        return Outputs(logits=self.logits[step.tokens])


@given(length=st.integers(2, 30), chunk=st.integers(2, 9), least=st.integers(1, 4))
def test_window_nll_is_the_sum_over_the_chain(length: int, chunk: int, least: int) -> None:
    engine = Bigram(11, least)
    ids = np.random.default_rng(length).integers(0, 11, length).tolist()
    rows = engine.logits.astype(np.float64)
    log_p = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    expected = -sum(log_p[a, b] for a, b in zip(ids, ids[1:], strict=False))
    assert window_nll(engine, ids, least, chunk=max(chunk, least)) == pytest.approx(expected, rel=1e-9)  # type: ignore[arg-type]
    assert engine.seen == ids[:-1]


def test_nll_survives_large_logits() -> None:
    assert nll_of(np.array([[1e4, 0.0]], dtype=np.float32), [0]) == 0.0
    assert perplexity(nll_of(np.zeros((3, 8), dtype=np.float32), [1, 2, 3]), 3) == pytest.approx(8.0)


def test_read_windows(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("abcdefghijk")

    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    windows = read_windows(file, encode, tokens=9, window=4)
    assert ["".join(map(chr, window)) for window in windows] == ["abcd", "efgh"], "a last window of one token scores nothing"
    with pytest.raises(InputError, match="fewer than two"):
        read_windows(file, lambda text: [1], tokens=9)
    with pytest.raises(InputError, match="cannot be read"):
        read_windows(tmp_path / "absent", encode)
