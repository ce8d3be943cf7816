"""Dependency groups: what goes together in language models of ten families and in convolutional networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models_tiny import FAMILIES, model, raised
from torch import Tensor, nn

from planc.backends.reference import run
from planc.compiler.groups import find_groups
from planc.compiler.passbase import Context
from planc.compiler.program import ModelInfo, Program
from planc.compiler.trace import trace_module
from planc.passes.prune import Prune
from planc.passes.realise import Realise

CHANNELS = {"gpt2": 128}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_channels_of_every_layer(family: str) -> None:
    """Two groups a layer, which together hold every weight of its dense layers (norms and the biases of the outputs stay)."""
    config = model(family).config
    layers, groups = config.num_hidden_layers, find_groups(raised(family)).groups
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert [(g.kind, g.size) for g in groups] == [("heads", heads), ("channels", CHANNELS.get(family, 48))] * layers
    held = sum(int(g.costs.sum()) for g in groups)
    read = {s.param for g in groups for s in g.sites if raised(family).params[s.param].dim() > 1}
    biases = {s.param for g in groups for s in g.sites} - read
    params = raised(family).params
    assert held == sum(params[p].numel() for p in read | biases)
    others = [p for p, v in params.items() if v.dim() == 2 and p not in read and "emb" not in p and "lm_head" not in p and "wpe" not in p]
    assert others == []


def test_a_key_value_head_goes_with_its_queries() -> None:
    group = find_groups(raised("llama")).groups[0]
    units = {s.param.split(".")[-2]: (s.axis, s.units.tolist()) for s in group.sites}
    rows = [0] * 8 + [1] * 8
    assert units["k_proj"] == units["v_proj"] == (0, rows)
    assert units["q_proj"] == (0, [0] * 16 + [1] * 16) and units["o_proj"] == (1, [0] * 16 + [1] * 16)
    assert [s.param.split(".")[-2] for s in group.read] == ["o_proj"]


def test_joined_weights_keep_their_parts_together() -> None:
    """GPT-NeoX interleaves q, k and v by head; Phi-3 stacks gate and up."""
    heads = find_groups(raised("gpt_neox")).groups[0]
    assert next(s for s in heads.sites if s.axis == 0).units.tolist() == np.repeat(range(4), 24).tolist()
    channels = find_groups(raised("phi3")).groups[1]
    assert next(s for s in channels.sites if s.axis == 0).units.tolist() == [*range(48), *range(48)]


class PostNorm(nn.Module):
    """A layer of BERT: norms behind the sums, attention that sees all but what a mask hides."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.fc1, self.fc2, self.norms = nn.Linear(12, 10), nn.Linear(10, 12), nn.ModuleList(nn.LayerNorm(12) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = [p(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v)]
        seen = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        x = self.norms[0](x + self.o(seen.transpose(1, 2).reshape(x.shape)))
        return self.norms[1](x + self.fc2(F.gelu(self.fc1(x))))


@pytest.mark.parametrize("by_head", [False, True])
def test_encoders_with_post_norms(by_head: bool) -> None:
    """Heads and hidden channels go; the stream stays, as norms need it whole, and so do heads that a mask tells apart."""
    torch.manual_seed(0)
    module, x = PostNorm(), torch.randn(2, 5, 12)
    mask = torch.randn(2, 3 if by_head else 1, 1, 5)
    program = trace_module(module, (x, mask), ModelInfo("bert", 0, 1))
    groups = find_groups(program).groups
    assert [(g.kind, g.size, g.name) for g in groups] == [("heads", 3, "o.weight")] * (not by_head) + [("channels", 10, "fc2.weight")]
    masked = Prune(granularity="units", sparsity=0.3, modules=("o", "fc2")).apply(program, Context())
    small = Realise().apply(masked, Context())
    inputs = {"x": x, "mask": mask}
    assert torch.allclose(run(small, inputs)["output"], run(masked, inputs)["output"], atol=1e-5)
    assert small.bytes() < masked.bytes()
    if not by_head:
        assert small.params["q.weight*r"].shape[0] < 12


# ---- convolutional networks ----------------------------------------------------------------------------------------------------------


class Squeeze(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """Inverted residual block with an identity around it."""

    def __init__(self, width: int, inner: int, squeeze: bool) -> None:
        super().__init__()
        self.open, self.deep = nn.Conv2d(width, inner, 1, bias=False), nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm, self.close = nn.BatchNorm2d(inner), nn.Conv2d(inner, width, 1)
        self.gate = Squeeze(inner, 5) if squeeze else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.close(self.gate(F.relu6(self.norm(self.deep(F.silu(self.open(x)))))))


class Net(nn.Module):
    """Stem, block, two branches joined by concatenation, pooling, flattening, classifier."""

    def __init__(self, squeeze: bool) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3), Inverted(8, 12, squeeze)
        self.left, self.right, self.after = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, 1), nn.Conv2d(16, 7, 3)
        self.head = nn.Linear(7 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = self.after(torch.cat((F.relu(self.left(x)), self.right(x)), 1))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 2), 1))


def net(squeeze: bool = True) -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    module, x = Net(squeeze).eval(), torch.randn(2, 3, 10, 10)
    with torch.no_grad():
        for buffer in module.block.norm.buffers():
            if buffer.dim():
                buffer.uniform_(0.5, 1.5)
    return trace_module(module, (x,), ModelInfo("net", 0, 0)), x


def test_groups_of_a_convolutional_network() -> None:
    found = [{(s.param, s.axis) for s in g.sites} for g in find_groups(net()[0]).groups]
    norm = {(f"block.norm.{part}", 0) for part in ("weight", "bias", "running_mean", "running_var")}
    inner = {("block.open.weight", 0), ("block.deep.weight", 0), ("block.close.weight", 1)} | norm
    inner |= {("block.gate.reduce.weight", 1), ("block.gate.expand.weight", 0), ("block.gate.expand.bias", 0)}
    outer = {("block.open.weight", 1), ("left.weight", 1), ("right.weight", 1)}
    outer |= {(f"{name}.{part}", 0) for name in ("stem", "block.close") for part in ("weight", "bias")}
    assert sorted(found, key=sorted) == sorted(
        [
            inner,
            outer,
            {("block.gate.reduce.weight", 0), ("block.gate.reduce.bias", 0), ("block.gate.expand.weight", 1)},
            {("left.weight", 0), ("left.bias", 0), ("after.weight", 1)},
            {("right.weight", 0), ("right.bias", 0), ("after.weight", 1)},
            {("after.weight", 0), ("after.bias", 0), ("head.weight", 1)},
        ],
        key=sorted,
    )
    flat = next(g for g in find_groups(net()[0]).groups if g.name == "head.weight")
    assert next(s for s in flat.sites if s.param == "head.weight").units.tolist() == np.repeat(range(7), 4).tolist()


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_a_smaller_network_computes_what_the_masked_one_does(squeeze: bool, sparsity: float) -> None:
    """All channels, those of the residual stream included; the classifier's own outputs stay."""
    program, x = net(squeeze)
    masked = Prune(granularity="channels", sparsity=sparsity, modules=("*",)).apply(program, Context())
    small = Realise().apply(masked, Context())
    assert small.bytes() < masked.bytes()
    want, have = (run(p, {"x": x})["output"] for p in (masked, small))
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


class Odd(nn.Module):
    """Channels that something needs whole: a softmax over them, a grouped convolution, an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.roll(self.c(self.grouped(self.b(torch.softmax(self.a(x), 1)))), 1, 1))


def test_what_is_needed_whole_is_frozen() -> None:
    program = trace_module(Odd().eval(), (torch.randn(1, 4, 3, 3),), ModelInfo("odd", 0, 0))
    found = find_groups(program)
    assert found.groups == ()
    assert {("a.weight", 0): "softmax", ("b.weight", 0): "conv2d_2", ("c.weight", 0): "roll"}.items() <= found.frozen.items()
