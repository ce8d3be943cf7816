"""The pass load_weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, before_and_after, close, eager, make, model, one_layer, pooled, raised, token_ids
from safetensors.torch import save_file
from torch import Tensor

from planc.backends.reference import probe
from planc.compiler.passbase import Context
from planc.compiler.program import Program
from planc.compiler.verify import verify
from planc.passes.load_weights import FITS, VOCABULARY, LoadWeights, fingerprint
from planc.passes.skip_layers import SkipLayers
from planc.runtime.errors import CompileError

NORM = "model.norm.weight"


def loaded(program: Program, folder: Path, tensors: dict[str, Tensor], **about: str) -> Program:
    save_file(tensors, folder / "w.safetensors", about)
    new = LoadWeights(file="w.safetensors").apply(program, Context(folder=folder))
    verify(new, "load_weights", tuple(program.outputs))
    return new


def test_golden(golden: Callable[[str, str], None], tmp_path: Path) -> None:
    program = one_layer()
    save_file({NORM: torch.ones_like(program.params[NORM])}, tmp_path / "w.safetensors")
    golden(before_and_after(LoadWeights(file="w.safetensors"), program, Context(folder=tmp_path)), "load_weights.txt")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_equals_eager(family: str, tmp_path: Path) -> None:
    """With all weights of another model it is that model; the file's other tensor is not for this pass."""
    other, ids, program = make(family, seed=7), token_ids(2, 9), raised(family)
    own = dict(model(family).named_parameters())
    # names of the graph that are no parameters of the module were computed from some: they stay, and are left out of both models
    tensors = {name: value.detach().clone() for name, value in other.named_parameters() if name in program.params}
    with torch.no_grad():
        for name in own.keys() - tensors.keys():
            dict(other.named_parameters())[name].copy_(own[name])
    assert not torch.allclose(eager(other, ids), eager(model(family), ids), atol=1e-2)
    new = loaded(program, tmp_path, {**tensors, VOCABULARY: torch.arange(3)})
    close(probe(new, ids)["logits"], eager(other, ids))
    assert new.main is not program.main and new.history[-1].rewritten == len(tensors)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    program = raised("llama")
    halved = program.params[NORM].half()
    new = loaded(program, tmp_path, {NORM: halved})
    assert new.params[NORM].dtype == torch.float32 and torch.equal(new.params[NORM], halved.float())
    assert loaded(new, tmp_path, {NORM: halved}) is new  # a second time changes nothing


def test_only_takes_what_it_names(tmp_path: Path) -> None:
    """A file for several programs: what the pattern leaves out need not exist here, and is not what the file was made for."""
    program = raised("llama")
    frozen = fingerprint(program.params, [NORM])
    save_file({NORM: torch.full((32,), 2.0), "other.weight": torch.ones(3)}, tmp_path / "w.safetensors", {FITS: frozen})
    part, context = LoadWeights(file="w.safetensors", only="model.norm.*"), Context(folder=tmp_path)
    changed = part.apply(program, context)
    assert {n for n, v in changed.params.items() if not torch.equal(v, program.params[n])} == {NORM}
    with pytest.raises(CompileError, match="no parameter here"):
        LoadWeights(file="w.safetensors").apply(program, context)


def test_refuses(tmp_path: Path) -> None:
    program, norm = raised("llama"), raised("llama").params[NORM].clone()
    for tensors, text in (
        ({"model.norm.wight": norm}, "model.norm.wight, which is no parameter here"),
        ({NORM: norm[:-1].clone()}, "[31] in w.safetensors and [32] in the model"),
        ({NORM: torch.full_like(norm, torch.nan)}, "not made of finite numbers"),
        ({NORM: norm.int()}, "not made of finite numbers"),
    ):
        with pytest.raises(CompileError) as caught:
            loaded(program, tmp_path, tensors)
        assert (caught.value.code, caught.value.where) == ("pass-refused", "pass load_weights")
        assert text in caught.value.message and caught.value.fix
    with pytest.raises(CompileError) as caught:
        loaded(SkipLayers(layers=(1,)).apply(program, Context()), tmp_path, {"model.layers.1.mlp.up_proj.weight": torch.zeros(48, 32)})
    assert "model.layers.0.mlp.up_proj.weight" in (caught.value.fix or "")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("text.safetensors", "absent.safetensors"):
        with pytest.raises(CompileError) as caught:
            LoadWeights(file=name).apply(program, Context(folder=tmp_path))
        assert caught.value.code == "input-invalid" and name in caught.value.message


def test_a_file_for_other_weights_is_refused(tmp_path: Path) -> None:
    """What the file leaves as it is must be what it was trained beside; what it replaces may be anything."""
    program, zeros = raised("llama"), {NORM: torch.zeros(32)}
    fits = fingerprint(program.params, zeros)
    loaded(program, tmp_path, zeros, **{FITS: fits})
    loaded(loaded(program, tmp_path, {NORM: torch.ones(32)}), tmp_path, zeros, **{FITS: fits})
    name = "model.layers.0.mlp.up_proj.weight"
    moved = program.params[name] + torch.nn.functional.one_hot(torch.tensor(3), 32) * 1e-6
    with pytest.raises(CompileError) as caught:
        loaded(loaded(program, tmp_path, {name: moved}), tmp_path, zeros, **{FITS: fits, "model": "tiny"})
    assert caught.value.code == "pass-refused" and "tiny" in (caught.value.fix or "")


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(POOL), st.data())
def test_property(name: str, data: st.DataObject) -> None:
    """Any parameters can be replaced; the others, and what reads only them, stay."""
    _, program = pooled(name)
    names = data.draw(
        st.lists(st.sampled_from(sorted(n for n, v in program.params.items() if v.is_floating_point())), unique=True, min_size=1)
    )
    tensors = {n: program.params[n].half() * 0.5 for n in names}
    with tempfile.TemporaryDirectory() as folder:
        new = loaded(program, Path(folder), tensors)
    assert set(new.params) == set(program.params)
    for n, value in program.params.items():
        assert torch.equal(new.params[n], tensors[n].to(value.dtype) if n in tensors else value)
    assert bool(torch.isfinite(probe(new, token_ids(1, 5))["logits"]).all())
