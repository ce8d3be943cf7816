"""The pass entropy_code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import FAMILIES, POOL, applied, before_and_after, decoding, info, make, one_layer, onnx_engine, pooled, raised, token_ids

from planc.backends.onnx.coded import CODED_FILE, read_coded
from planc.backends.reference import probe
from planc.compiler.dialect import OPS
from planc.compiler.program import Program
from planc.compiler.raising import raise_program
from planc.compiler.trace import trace
from planc.passes.entropy_code import EntropyCode
from planc.runtime.engine import Step
from planc.runtime.errors import ArtifactError, CompileError


def in_bf16(program: Program) -> Program:
    """The program with all float parameters rounded to bf16 numbers."""
    return program.replace(params={n: v.bfloat16().float() if v.is_floating_point() else v for n, v in program.params.items()})


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(EntropyCode(round=True), one_layer()), "entropy_code.txt")


@pytest.mark.parametrize("family", FAMILIES)
def test_is_bit_equal(family: str) -> None:
    before = in_bf16(raised(family))
    after = applied(EntropyCode(), before)
    assert after.bytes() < 0.6 * before.bytes()  # of float32; tables weigh more here than in matrices of real size
    assert torch.equal(probe(after, token_ids(2, 9))["logits"], probe(before, token_ids(2, 9))["logits"])


@pytest.mark.parametrize("ops", ["fast", "standard"])
@pytest.mark.parametrize("tied", [False, True])
def test_onnx_is_bit_equal(ops: str, tied: bool, tmp_path: Path) -> None:
    program = in_bf16(raise_program(trace(make("llama", tie_word_embeddings=tied), info("llama"))))
    ids, found = token_ids(1, 9).numpy(), []
    for name, part in (("plain", program), ("coded", applied(EntropyCode(), program))):
        (tmp_path / name).mkdir()
        engine = onnx_engine(decoding(part), tmp_path / name, ops)  # type: ignore[arg-type]
        found.append(engine.forward(engine.new_cache(1, 16), Step(ids), logits=True).logits)
    assert np.array_equal(found[0], found[1])
    assert len(np.load(tmp_path / "coded" / CODED_FILE).files) == (15 if tied else 16)
    assert (tmp_path / "coded/model.weights").stat().st_size <= 8192  # rotary tables
    assert not (tmp_path / "plain" / CODED_FILE).exists()


def test_damage_is_found_when_the_artifact_is_opened(tmp_path: Path) -> None:
    engine = onnx_engine(decoding(applied(EntropyCode(round=True), raised("llama"))), tmp_path)
    assert engine.coded
    path = tmp_path / CODED_FILE
    with np.load(path) as file:
        parts = {name: file[name].copy() for name in file.files}
    next(iter(parts.values()))[-1] ^= 1
    np.savez(path, allow_pickle=False, **parts)
    with pytest.raises(ArtifactError) as caught:
        read_coded(tmp_path)
    assert caught.value.code == "artifact-corrupt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactError) as caught:
        read_coded(tmp_path)
    assert caught.value.code == "artifact-corrupt"


def test_refuses_what_bf16_cannot_hold() -> None:
    with pytest.raises(CompileError) as caught:
        EntropyCode().apply(raised("llama"), None)  # type: ignore[arg-type]
    assert caught.value.code == "pass-refused" and caught.value.fix and "round" in caught.value.fix


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(POOL), st.integers(0, 99))
def test_property(name: str, seed: int) -> None:
    """Rounding is to the nearest bf16 numbers, whatever the model; NaN and infinity come back as they are."""
    _, program = pooled(name)
    weight = next(n for n in program.params if n.endswith(("mlp.up_proj.weight", "mlp.c_fc.weight.T", "dense_h_to_4h.weight")))
    odd = program.params[weight].clone()
    odd.view(-1)[seed : seed + 3] = torch.tensor([float("nan"), float("-inf"), 1e-40])
    program = program.replace(params={**program.params, weight: odd})
    after = applied(EntropyCode(round=True), program)
    assert after.history[-1].notes == (f"{after.history[-1].matched} matrices rounded to bf16",)
    rounded = in_bf16(program)
    for node in after.main.nodes:
        if node.target is OPS.decode_bf16.default:
            source = str(node.args[0].target)
            value = OPS.decode_bf16.default(after.params[source], *node.args[1:])
            assert torch.equal(value.nan_to_num(7.0), rounded.params[source.removesuffix(".coded")].nan_to_num(7.0))
