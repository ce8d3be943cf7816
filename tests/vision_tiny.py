"""Tiny seeded image models: a CNN with every operation that patches know, a vision transformer, and random CNN graphs for properties."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from planc.compiler.classify import traced
from planc.compiler.dialect import OPS
from planc.compiler.image_models import LoadedClassifier
from planc.compiler.program import MAIN, ModelInfo, Program, eliminate_dead
from planc.runtime.vision import ImageSpec

aten = torch.ops.aten


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic random, so that leaving one out shows."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_buffers():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=random) + (0.5 if "var" in name else 0.0))
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3 + (0.1 if parameter.dim() == 1 else 0.0))
    return module.eval()


class Tiny(nn.Module):
    """Convolutions of several strides and paddings, writes in place, a residual, pools, upsampling and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, 2, padding=0, bias=False), nn.BatchNorm2d(6)
        self.depth, self.bn2 = nn.Conv2d(6, 6, 5, padding="same", groups=6), nn.BatchNorm2d(6)
        self.wide, self.head = nn.Conv2d(6, 8, 3, dilation=2, padding=2), nn.Linear(14, 7)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(F.pad(x, (0, 1, 0, 1)))))
        x = F.hardswish(self.bn2(self.depth(x))) + x
        y = F.interpolate(F.max_pool2d(self.wide(x), 3, 2, 1), scale_factor=2.0, mode="nearest")
        x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.head(F.adaptive_avg_pool2d(torch.cat([x, F.silu(y)[:, :, : x.shape[2], : x.shape[3]]], 1), 1).flatten(1))


@cache
def tiny() -> nn.Module:
    return randomised(Tiny())


@cache
def tiny_program() -> Program:
    """The tiny CNN's program in the dialect, images 3x20x18."""
    return program_of(tiny(), 20, 18)


def program_of(module: nn.Module, rows: int, columns: int) -> Program:
    return traced(LoadedClassifier(module, type(module).__name__, ImageSpec(size=(rows, columns))))


@cache
def vit() -> nn.Module:
    """A vision transformer of transformers."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8, num_labels=5
    )
    return randomised(transformers.ViTForImageClassification(config))


def images(count: int, rows: int, columns: int, seed: int = 0, dtype: Any = torch.float32) -> Tensor:
    return torch.randn(count, 3, rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- random graphs -----------------------------------------------------------------------------------------------------------------


def random_cnn(draw: Callable[[int, int], int], rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Program:
    """A random CNN on images 3 x rows x columns, with whole numbers for weights, so that every sum in float64 is exact.

    Convolutions of any stride, dilation, grouping and padding on each side (windows may lie in the padding alone), pools, upsampling, ranges,
    padding, activations, concatenations and residual sums.
    """
    edit = _MetaGraph(rows, columns, dtype)
    random = torch.Generator().manual_seed(draw(0, 10**6))
    x, old = edit.image, list[Node]()
    for _ in range(draw(2, 6)):
        old.append(x)
        x = _random_step(draw, edit, x, old, random)
    return edit.program(x)


class _MetaGraph:
    """Builds a graph with shapes from meta tensors, which is a hundred times as fast as tracing."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.graph, self.params = torch.fx.Graph(), dict[str, Tensor]()
        self.image = self.graph.placeholder("images")
        self.image.meta["val"] = torch.empty(1, 3, rows, columns, dtype=dtype, device="meta")

    def call(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))
        return node

    def param(self, name: str, value: Tensor) -> Node:
        self.params[name] = value
        node = self.graph.get_attr(name)
        node.meta["val"] = value.to("meta")
        return node

    def program(self, result: Node) -> Program:
        self.graph.output({"logits": result})
        with FakeTensorMode():
            for node in self.graph.nodes:
                if node.op != "output":
                    node.meta["val"] = torch.empty(node.meta["val"].shape, dtype=node.meta["val"].dtype)
        eliminate_dead(self.graph)
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        return Program(
            {MAIN: self.graph}, {k: v for k, v in self.params.items() if k in used}, ModelInfo("random", 0, 1, task="classification")
        )


def _random_step(draw: Callable[[int, int], int], edit: Any, x: Node, old: list[Node], random: torch.Generator) -> Node:
    size = [int(s) for s in x.meta["val"].shape]
    kind = draw(0, 8)
    if kind <= 3 or max(size[2:]) > 24:
        return _random_conv(draw, edit, x, random, shrink=max(size[2:]) > 24)
    if kind == 4:
        fitting = [n for n in old if n.meta["val"].shape == x.meta["val"].shape]
        return (
            edit.call(aten.add.Tensor, x, fitting[0]) if fitting and fitting[0] is not x else edit.call(aten.hardtanh.default, x, 0.0, 99.0)
        )
    if kind == 5:
        kernel, pads = [min(draw(1, 3), s) for s in size[2:]], [draw(0, 1) for _ in range(4)]
        pads = [min(p, k - 1) for p, k in zip(pads, kernel * 2, strict=True)]
        return edit.call(OPS.max_pool2d.default, x, kernel, [draw(1, 2), draw(1, 2)], pads, [1, 1])
    if kind == 6:
        return edit.call(OPS.upsample2d.default, x, [draw(1, 3), draw(1, 2)])
    if kind == 7:
        near = [n for n in old if n.meta["val"].shape[2:] == x.meta["val"].shape[2:]]
        return edit.call(aten.cat.default, [x, (near or [x])[0]], 1)
    if draw(0, 1):
        return edit.call(aten.pad.default, x, [draw(0, 2), draw(0, 2), draw(0, 2), draw(0, 2)], "constant", 3.0)
    return (
        edit.call(aten.slice.Tensor, x, 2 + draw(0, 1), draw(0, min(size[2:]) // 2), 2**40 if draw(0, 1) else -1)
        if min(size[2:]) > 3
        else x
    )


def _random_conv(draw: Callable[[int, int], int], edit: Any, x: Node, random: torch.Generator, shrink: bool) -> Node:
    channels = int(x.meta["val"].shape[1])
    kernel, dilation = [draw(1, 4), draw(1, 4)], [draw(1, 2), draw(1, 2)]
    stride = [2, 2] if shrink else [draw(1, 3), draw(1, 3)]
    pads = [draw(0, (k - 1) * d + 1) for k, d in zip(kernel * 2, dilation * 2, strict=True)]
    for i in range(2):  # at least one window
        missing = (kernel[i] - 1) * dilation[i] + 1 - int(x.meta["val"].shape[2 + i]) - pads[i] - pads[2 + i]
        pads[i] += max(0, missing)
    groups = channels if draw(0, 1) else 1
    outputs = channels if groups > 1 or draw(0, 1) else draw(1, 4)
    count = len(edit.params)
    weight, bias = (
        torch.randint(-2, 3, shape, generator=random).to(x.meta["val"].dtype)
        for shape in ((outputs, channels // groups, *kernel), (outputs,))
    )
    return edit.call(OPS.conv2d.default, x, edit.param(f"w{count}", weight), edit.param(f"b{count}", bias), stride, pads, dilation, groups)
