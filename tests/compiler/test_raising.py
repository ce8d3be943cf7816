"""Raising: which structures of the ten families are recognised, and which near misses are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from models_tiny import FAMILIES, close, eager, model, raised, token_ids, traced
from torch import Tensor, nn

from planc.backends.reference import probe, run
from planc.compiler.blocks import find_blocks
from planc.compiler.program import ModelInfo, Program
from planc.compiler.raising import raise_program
from planc.compiler.trace import trace_module
from planc.compiler.verify import verify

#: family -> rms_norm, rope, rope_table, glu, linear after raising (two layers, six of Gemma 3).
COUNTS = {
    "llama": (5, 4, 1, 2, 15),
    "mistral": (5, 4, 1, 2, 15),
    "qwen2": (5, 4, 1, 2, 15),
    "qwen3": (9, 4, 1, 2, 15),  # queries and keys are normalised, too
    "gemma2": (9, 4, 1, 2, 15),  # norms behind attention and MLP, too
    "gemma3": (37, 12, 2, 6, 43),  # one table for windowed layers, one for the others
    "phi3": (5, 4, 1, 2, 9),
    "gpt2": (0, 0, 0, 0, 9),
    "opt": (0, 0, 0, 0, 13),
    "gpt_neox": (0, 4, 1, 0, 9),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_counts(family: str) -> None:
    have = Counter(str(n.target).removesuffix(".default").partition(".")[2] for n in raised(family).main.nodes if n.op == "call_function")
    assert tuple(have[name] for name in ("rms_norm", "rope", "rope_table", "glu", "linear")) == COUNTS[family]
    for name in ("rsqrt", "cos", "sin", "addmm"):  # nothing of a raised structure is left over
        assert not have[name]
    wanted = {"gpt_neox": 8}.get(family, 0)  # its heads are interleaved with queries, keys and values
    assert have["transpose.int"] == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager(family: str) -> None:
    program, ids = raised(family), token_ids(2, 19)
    verify(program, "raising", ("logits",))
    have = probe(program, ids)["logits"]
    close(have, eager(model(family), ids))
    close(have, probe(traced(family), ids)["logits"], 1e-6)
    again = raise_program(program)
    assert again is program  # nothing is recognised twice


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks(family: str) -> None:
    blocks = find_blocks(raised(family))
    assert [b.index for b in blocks] == list(range(6 if family == "gemma3" else 2))
    assert all(b.path.endswith(f".{b.index}") for b in blocks)
    assert [b.entry for b in blocks[1:]] == [b.exit for b in blocks[:-1]]


# ---- near misses ----

EPS = 1e-6


def program_of(function: Callable[..., Tensor], *inputs: Tensor, weight: Tensor | None = None) -> Program:
    """The raised program of a function (of inputs and a weight)."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1) if weight is None else weight)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return function(x, y, self.weight)

    x, y = (*inputs, torch.zeros(1))[:2]
    program = raise_program(trace_module(Module(), (x, y), ModelInfo("x", 1, 1)))
    verify(program, "raising")
    close(run(program, {"x": x, "y": y})["output"], function(x, y, Module().weight.detach()))
    return program


def has(program: Program, name: str) -> int:
    return sum(str(n.target).startswith(f"planc.{name}.") for n in program.main.nodes)


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
W = torch.rand(6, generator=torch.Generator().manual_seed(1)) + 0.5


def rms(x: Tensor, eps: float = EPS, axis: int = -1) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(axis, keepdim=True) + eps)


@pytest.mark.parametrize(
    ("found", "norm"),
    [
        pytest.param(1, lambda x, y, w: w * rms(x), id="as in Llama"),
        pytest.param(1, lambda x, y, w: rms(x) * w, id="weight behind"),
        pytest.param(1, lambda x, y, w: rms(x) * (1.0 + w), id="as in Gemma"),
        pytest.param(1, lambda x, y, w: rms(x), id="without weight"),
        pytest.param(1, lambda x, y, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w, id="product for square"),
        pytest.param(1, lambda x, y, w: (n := rms(x)) * w + n, id="read twice"),
        pytest.param(0, lambda x, y, w: rms(x, axis=1) * w, id="other axis"),
        pytest.param(0, lambda x, y, w: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS), id="two axes"),
        pytest.param(0, lambda x, y, w: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + EPS), id="other power"),
        pytest.param(0, lambda x, y, w: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS), id="cube"),
        pytest.param(0, lambda x, y, w: y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS), id="scale of another value"),
        pytest.param(0, lambda x, y, w: x * torch.rsqrt((x * y).mean(-1, keepdim=True).abs() + EPS), id="product of two"),
        pytest.param(0, lambda x, y, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS), id="sum"),
        pytest.param(0, lambda x, y, w: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True)), id="no epsilon"),
    ],
)
def test_norms(found: int, norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    assert has(program_of(norm, X, X.flip(0), weight=W), "rms_norm") == found


def test_a_norm_whose_weight_is_computed_keeps_the_product() -> None:
    program = program_of(lambda x, y, w: rms(x) * (w * 2.0), X, weight=W)
    assert has(program, "rms_norm") == 1  # with ones; the product stays
    assert any(n.target is torch.ops.aten.mul.Tensor and n.meta["val"].dim() == 3 for n in program.main.nodes)


@pytest.mark.parametrize(
    ("found", "gated"),
    [
        pytest.param("silu", lambda x, y, w: torch.nn.functional.silu(x) * y, id="silu"),
        pytest.param("relu", lambda x, y, w: y * x.relu(), id="behind"),
        pytest.param("gelu", lambda x, y, w: torch.nn.functional.gelu(x) * y, id="gelu"),
        pytest.param("gelu_tanh", lambda x, y, w: torch.nn.functional.gelu(x, approximate="tanh") * y, id="gelu with tanh"),
        pytest.param(None, lambda x, y, w: torch.nn.functional.silu(x) + y, id="sum"),
        pytest.param(None, lambda x, y, w: x.sigmoid() * y, id="sigmoid"),
        pytest.param(None, lambda x, y, w: torch.nn.functional.silu(x) * y[:, :1], id="broadcast"),
        pytest.param(None, lambda x, y, w: torch.nn.functional.silu(x) * 2.0, id="number"),
    ],
)
def test_gated_units(found: str | None, gated: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    nodes = [n for n in program_of(gated, X, X.flip(0)).main.nodes if str(n.target).startswith("planc.glu")]
    assert [n.args[2] for n in nodes] == ([found] if found else [])


HEADS = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(2))  # [B,H,R,D]
POSITIONS = torch.arange(5)[None].repeat(2, 1)
FREQUENCIES = 10.0 ** -torch.arange(4.0)


def halves(x: Tensor) -> Tensor:
    low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-high, low), -1)


def interleaved(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


def rotated(
    x: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    turn: Callable[[Tensor], Tensor] = halves,
    spread: Callable[[Tensor], Tensor] = lambda a: torch.cat((a, a), -1),
    cos: Callable[[Tensor], Tensor] = torch.cos,
    scale: float = 1.0,
) -> Tensor:
    angles = spread(positions[:, :, None].float() * frequencies)
    return x * (cos(angles) * scale).unsqueeze(1) + turn(x) * (torch.sin(angles) * scale).unsqueeze(1)


@pytest.mark.parametrize(
    ("found", "options"),
    [
        pytest.param(1, {}, id="halves"),
        pytest.param(1, {"scale": 1.5}, id="scaled"),
        pytest.param(0, {"turn": interleaved, "spread": lambda a: a.repeat_interleave(2, -1)}, id="interleaved"),
        pytest.param(0, {"spread": lambda a: a.repeat_interleave(2, -1)}, id="tables of the other kind"),
        pytest.param(0, {"turn": lambda x: -halves(x)}, id="other direction"),
        pytest.param(0, {"turn": lambda x: torch.cat((-x[..., :4], x[..., 4:]), -1)}, id="not swapped"),
        pytest.param(0, {"cos": lambda a: torch.cos(a) + 0.01}, id="not a cosine"),
        pytest.param(0, {"cos": lambda a: torch.cos(a + 0.5)}, id="shifted"),
    ],
)
def test_ropes(found: int, options: dict[str, Callable[[Tensor], Tensor]]) -> None:
    program = program_of(lambda x, y, w: rotated(x, y, w, **options), HEADS, POSITIONS, weight=FREQUENCIES)  # type: ignore[arg-type]
    assert (has(program, "rope"), has(program, "rope_table")) == (found, found)


def test_a_rope_of_the_first_channels() -> None:
    def partial(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return torch.cat((rotated(x[..., :8], y, w), x[..., 8:]), -1)

    program = program_of(partial, torch.cat((HEADS, HEADS), -1), POSITIONS, weight=FREQUENCIES)
    assert has(program, "rope") == 1
    assert not any(n.target in (torch.ops.aten.cat.default, torch.ops.aten.slice.Tensor) for n in program.main.nodes)


def test_conv1d() -> None:
    def product(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return torch.addmm(w[0], x.view(-1, 6), w[1:]).view(2, 5, 4)

    program = program_of(product, X, weight=torch.randn(7, 4))  # bias and weight are computed, so it stays
    assert any(n.target is torch.ops.aten.addmm.default for n in program.main.nodes)
