"""Tracing: models become programs that compute what eager computes."""

from __future__ import annotations

import pytest
import torch
from models_tiny import FAMILIES, MAX_LENGTH, VOCAB, WINDOW, close, eager, info, layers_of, make, model, token_ids, traced
from torch import Tensor, nn

from planc.backends.reference import probe, run
from planc.compiler.dialect import OPS
from planc.compiler.program import ModelInfo, describe, module_path, source_line
from planc.compiler.trace import trace, trace_module
from planc.compiler.verify import verify
from planc.runtime.errors import CompileError, ModelError

#: family -> windows of its attentions in order.
WINDOWS = {
    "mistral": [WINDOW, WINDOW],
    "gemma2": [WINDOW, 0],
    "gemma3": [WINDOW] * 5 + [0],
    "phi3": [WINDOW, WINDOW],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager(family: str) -> None:
    program = traced(family)
    verify(program, "trace")
    assert list(program.inputs) == ["input_ids", "position_ids"]
    assert list(program.outputs) == ["logits"]
    for shape in ((1, 1), (1, 21), (3, 13)):  # other sizes than the traced ones, and longer than the windows
        ids = token_ids(*shape)
        close(probe(program, ids)["logits"], eager(model(family), ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_attention_per_layer(family: str) -> None:
    program = traced(family)
    attentions = [n for n in program.main.nodes if n.target is OPS.attention.default]
    assert len(attentions) == len(layers_of(model(family)))
    assert [n.args[6] for n in attentions] == WINDOWS.get(family, [0] * len(attentions))
    assert {n.args[5] for n in attentions} == {True}
    assert {n.args[7] for n in attentions} == {50.0 if family == "gemma2" else 0.0}
    assert {n.args[3] for n in attentions} == {None}


def test_positions_are_an_input() -> None:
    """Positions decide, not the place in the row."""
    ids, program = token_ids(1, 6), traced("llama")
    shifted = run(program, {"input_ids": ids, "position_ids": torch.arange(6)[None] + 9})["logits"]
    close(shifted, probe(program, ids)["logits"], 1e-5)  # rotary: only distances count
    gapped = run(program, {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 50, 51, 52]])})["logits"]
    assert float((gapped - shifted)[:, 3:].abs().max()) > 1e-2
    learned = run(traced("gpt2"), {"input_ids": ids, "position_ids": torch.arange(6)[None] + 9})["logits"]
    assert float((learned - probe(traced("gpt2"), ids)["logits"]).abs().max()) > 1e-2


def test_cleaned() -> None:
    """No assertion, copy or gradient switch is left, and nothing that nobody reads."""
    for family in FAMILIES:
        for node in traced(family).main.nodes:
            assert node.users or node.op in ("output", "placeholder")
            assert not any(
                word in str(node.target) for word in ("assert", "contiguous", "dropout", "wrap_with", "detach", "submod", "clone")
            )


def test_nodes_know_where_they_come_from() -> None:
    node = next(n for n in traced("llama").main.nodes if n.target is OPS.attention.default)
    assert module_path(node) == "model.model.layers.0.self_attn"
    assert describe(node).startswith("attention (module ")
    product = next(n for n in traced("llama").main.nodes if n.target is torch.ops.aten.linear.default)
    assert source_line(product).split(":")[0].endswith(".py")


def test_the_model_is_left_as_it_was() -> None:
    module = make("llama")
    module.train()
    before, state = module.config._attn_implementation, {n: p.clone() for n, p in module.named_parameters()}
    program = trace(module, info("llama"))
    assert module.training and module.config._attn_implementation == before
    assert all(torch.equal(p, state[n]) for n, p in module.named_parameters())
    assert program.params["lm_head.weight"].data_ptr() == module.lm_head.weight.data_ptr()  # shared, not copied


def test_tied_weights_are_one_parameter() -> None:
    program = trace(make("llama", tie_word_embeddings=True, num_hidden_layers=1), info("llama"))
    table = [n for n in program.main.nodes if n.op == "get_attr" and program.params[str(n.target)].shape == (VOCAB, 32)]
    assert len({program.params[str(n.target)].data_ptr() for n in table}) == 1
    assert program.bytes() < trace(make("llama", num_hidden_layers=1), info("llama")).bytes()


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class _Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            total = left + right * self.weight
        return total, total.relu()


def test_plain_modules() -> None:
    left, right = torch.randn(4, 3), torch.randn(4, 3)
    sizes = {0: torch.export.Dim.DYNAMIC}
    program = trace_module(_Sum(), (left, right), ModelInfo("sum", 0, MAX_LENGTH), (sizes, sizes))
    assert list(program.inputs) == ["left", "right"]
    assert list(program.outputs) == ["output.0", "output.1"]
    out = run(program, {"left": left[:2], "right": right[:2]})
    assert torch.equal(out["output.0"], left[:2] + right[:2] * torch.arange(3.0))
    assert torch.equal(out["output.1"], out["output.0"].relu())


def test_errors() -> None:
    with pytest.raises(ModelError) as unsupported:
        trace(_Sum(), ModelInfo("sum", 3, 3))
    assert unsupported.value.code == "model-unsupported"
    with pytest.raises(CompileError) as failed:
        trace_module(_Branching(), (torch.randn(3),), ModelInfo("branching", 0, 3))
    assert failed.value.code == "trace-failed"
    assert "torch.where" in (failed.value.fix or "")
    module = make("llama", num_hidden_layers=1)
    before = module.config._attn_implementation
    module.model.layers[0].mlp.forward = lambda x: x * 2 if x.sum() > 0 else x
    with pytest.raises(CompileError) as failed:
        trace(module, info("llama"))
    assert failed.value.code == "trace-failed"
    assert "LlamaForCausalLM" in failed.value.message
    assert module.config._attn_implementation == before
