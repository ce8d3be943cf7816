"""Gradients through a program, against those of the model itself."""

from __future__ import annotations

import pytest
import torch
from models_tiny import apply, close, make, raised, token_ids
from torch import Tensor, nn

from planc.backends.reference import probe
from planc.compiler.training import differentiable, next_token_loss, sensitivities
from planc.passes.quantize_weights import QuantizeWeights

IDS = token_ids(3, 17)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox"])
def test_sensitivities_are_the_gradients_of_the_model(family: str) -> None:
    program, module = raised(family), make(family)
    names = {n: str(n.args[1].target).removesuffix(".weight") for n in program.main.nodes if n.target is torch.ops.aten.linear.default}  # type: ignore[union-attr]
    squares: dict[str, Tensor] = {}
    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        layer.register_full_backward_hook(
            lambda _, __, grads, name=name: squares.update({name: squares.get(name, 0) + grads[0].pow(2).flatten(0, 1).sum(0)})  # type: ignore[misc]
        )
    for ids in IDS:
        logits = module(ids[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
    found = sensitivities(program, names, IDS)
    assert set(squares) == set(names.values())
    for node, name in names.items():
        wanted = (squares[name] / IDS.numel()).sqrt()
        close(found[node] / wanted.max(), wanted / wanted.max(), 1e-4)


@pytest.mark.parametrize("form", ["int8", "int4_blocks", "nf3"])
def test_quantised_products_are_what_they_stand_for(form: str) -> None:
    """The loss is that of the program as it runs, but for int8 activations, which are not rounded here."""
    program = apply(raised("qwen2"), QuantizeWeights(format=form, block=16))  # type: ignore[arg-type]
    logits = probe(program, IDS)["logits"][:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    with torch.no_grad():
        found = next_token_loss(program, differentiable(program), IDS, {})
    assert float(found) == pytest.approx(float(wanted), rel=1e-2 if form == "int8" else 1e-5)
