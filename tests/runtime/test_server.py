"""The server: handles, threads, errors, closing; every answer is the one that `generate` gives."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from test_executable import BITWISE, COST, EOS, SPECULATIVE, executable, one
from toy_engine import ToyEngine

from planc.runtime.contract import Contract
from planc.runtime.decode import Decode
from planc.runtime.engine import Outputs, Step
from planc.runtime.errors import InputError
from planc.runtime.executable import Executable
from planc.runtime.text import Text

PROMPTS = ["abc", "d", "efghijklm", "bb", "cafe", "abcabcabc"]


@pytest.mark.parametrize(
    "decode",
    [{"min_rows": 2}, SPECULATIVE, {"batching": {"policy": "regroup", "sequences": 2, "window": 3}}],
    ids=["plain", "speculative", "regroup"],
)
def test_answers_are_those_of_generate(decode: dict[str, Any]) -> None:
    exe = executable(decode)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 3},
        {"max_new_tokens": 7},
        {"stop": "c"},
        {"temperature": 1.2, "repetition_penalty": 1.3},
    ]
    wanted = [[one(exe.generate(prompt, **kind)) for kind in kinds] for prompt in PROMPTS]
    with exe.serve(3) as server:
        handles = [[server.submit(prompt, **kind) for kind in kinds] for prompt in PROMPTS]
        answers = [[handle.result(30) for handle in line] for line in handles]
    for have, want in zip(answers, wanted, strict=True):
        for a, b in zip(have, want, strict=True):
            assert (a.ids, a.text, a.finish_reason, a.prompt_tokens) == (b.ids, b.text, b.finish_reason, b.prompt_tokens)
            assert a.stats.tokens == len(a.ids)
            assert 0 < a.stats.ttft_ms / 1e3 <= a.stats.seconds


def test_an_id_keys_the_noise() -> None:
    exe = executable({"min_rows": 2})
    pair = exe.generate(["abc", "abc"], temperature=1.0)
    assert isinstance(pair, list)
    assert pair[0].ids != pair[1].ids
    with exe.serve(2) as server:
        handles = [server.submit("abc", temperature=1.0, id=key) for key in (1, 0, 1)]
        assert [handle.result(30).ids for handle in handles] == [pair[1].ids, pair[0].ids, pair[1].ids]


def test_chunks_come_as_they_are_made_and_can_be_read_twice() -> None:
    exe = executable(SPECULATIVE)
    wanted = one(exe.generate("abcabc"))
    with exe.serve() as server:
        handle = server.submit("abcabc")
        chunks = list(handle)
        again = list(handle)
    assert [chunk.ids for chunk in again] == [chunk.ids for chunk in chunks]
    assert [token for chunk in chunks for token in chunk.ids] == wanted.ids
    assert "".join(chunk.text for chunk in chunks) == wanted.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [wanted.finish_reason]
    assert chunks[-1].generation == handle.result()
    assert sum(chunk.accepted for chunk in chunks) == sum(count * times for count, times in handle.result().stats.accepted.items())
    assert all(chunk.sources for chunk in chunks if chunk.accepted)
    assert all("".join(chunk.pieces) == chunk.text for chunk in chunks)


class Slow(ToyEngine):
    """Every pass takes a millisecond, so that callers can get in between."""

    def forward(self, cache: Any, step: Step, **flags: Any) -> Outputs:
        time.sleep(1e-3)
        return super().forward(cache, step, **flags)


def slow(**decode: Any) -> Executable:
    contract = Contract(exactness=BITWISE, cost=COST)
    return Executable(Slow(), Text(eos_ids=[EOS]), Decode.model_validate({"max_new_tokens": 200, "min_rows": 2, **decode}), contract)


def test_a_cancelled_answer_keeps_what_it_said() -> None:
    exe = slow()
    wanted = one(exe.generate([1, 2, 4])).ids
    with exe.serve(2) as server:
        handle, other = server.submit([1, 2, 4]), server.submit([1, 2, 4])
        next(iter(handle))
        handle.cancel()
        answer = handle.result(30)
        assert other.result(30).ids == wanted
    assert answer.finish_reason in ("cancelled", "stop", "length")
    assert answer.ids == wanted[: len(answer.ids)]
    assert list(handle)[-1].generation == answer


def test_many_threads_may_submit() -> None:
    exe = executable({"min_rows": 2})
    wanted = {prompt: one(exe.generate(prompt)).ids for prompt in PROMPTS}
    found: list[tuple[str, list[int]]] = []

    with exe.serve(3) as server:

        def ask(prompt: str) -> None:
            found.extend((prompt, server.submit(prompt).result(30).ids) for _ in range(4))

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.stats.mean > 1
    assert len(found) == 24
    assert all(ids == wanted[prompt] for prompt, ids in found)


@pytest.mark.parametrize(("prompt", "options", "code"), [
    ([], {}, "prompt-empty"), ([99], {}, "input-invalid"), ([1] * 2000, {}, "prompt-too-long"), ("abc", {"temperature": -1.0}, "input-invalid"),
    (["abc", "d"], {}, "input-invalid"), ("abc", {"id": -1}, "input-invalid"), ("abc", {"max_new_tokens": 0}, "input-invalid"),
])  # fmt: skip
def test_bad_requests_are_refused_where_they_are_made(prompt: Any, options: dict[str, Any], code: str) -> None:
    with executable().serve() as server:
        with pytest.raises(InputError) as refusal:
            server.submit(prompt, **options)
        assert refusal.value.code == code
        assert server.submit("abc").result(30).ids


def test_bad_batches_are_refused() -> None:
    with pytest.raises(InputError, match="max_batch"):
        executable().serve(0)
    with pytest.raises(InputError, match="capacity"):
        executable().serve(capacity=0)
    with pytest.raises(InputError, match="trees"):
        executable({"speculative": {"drafter": "prompt_lookup", "tree": {"shape": "tree"}}}, trees=False).serve()


def test_an_engine_that_fails_ends_the_answers_of_its_pass() -> None:
    class Broken(ToyEngine):
        def forward(self, cache: Any, step: Step, **flags: Any) -> Outputs:
            if (step.tokens == 7).any():
                raise MemoryError("no")
            return super().forward(cache, step, **flags)

    exe = Executable(Broken(predictable=1.0), Text(eos_ids=[EOS]), Decode(max_new_tokens=3, min_rows=2))
    with exe.serve(2) as server:
        handle = server.submit([1, 7, 2])
        with pytest.raises(MemoryError):
            handle.result(30)
        with pytest.raises(MemoryError):
            list(handle)
        assert handle.done


def test_closing_waits_or_cancels() -> None:
    exe = slow()
    with exe.serve(1) as server:
        handles = [server.submit([1, 2, number]) for number in range(3)]
    assert all(handle.done and handle.result().finish_reason != "cancelled" for handle in handles)
    with pytest.raises(InputError) as refusal:
        server.submit([1])
    assert refusal.value.code == "server-closed"

    def leave() -> None:
        with exe.serve(1) as server:
            handles[:] = [server.submit([1, 2, number]) for number in range(3)]
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert handles[2].result(1).finish_reason == "cancelled"
    server.close()  # once more does no harm


def test_waiting_may_end() -> None:
    with slow().serve(1) as server:
        handle = server.submit([1, 2, 4])
        with pytest.raises(TimeoutError):
            handle.result(1e-4)
        handle.cancel()


def test_prompts_take_turns_where_sharing_a_pass_promises_less() -> None:
    exe = executable({"min_rows": 2}, contract=Contract(exactness=BITWISE.model_copy(update={"batch": "lossy"}), cost=COST))
    with exe.serve(3) as server:
        handles = [server.submit(prompt) for prompt in PROMPTS]
        assert all(handle.result(30).ids for handle in handles)
    assert server.stats.mean == 1


def test_a_plan_without_drafts_pads_as_its_batches_need() -> None:
    assert executable().min_rows == 1
    assert executable({"batching": {}}).min_rows == 2
    assert executable({"batching": {}, "min_rows": 4}).min_rows == 4
    engine = executable({"batching": {}}, least=2)
    with engine.serve() as server:
        assert server.submit("abc").result(30).ids == one(engine.generate("abc")).ids


def test_what_drafters_learned_outlives_the_server() -> None:
    exe = executable(SPECULATIVE)
    with exe.serve() as server:
        server.submit("abcabc").result(30)
    lane = exe._take_lane()
    assert (lane.drafters[1].matrix >= 0).any()  # type: ignore[attr-defined]
