"""The pass quantize_static: integer arithmetic as ONNX Runtime does it, and parts that equal the whole bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import applied, before_and_after
from torch import Tensor, nn
from vision_tiny import images, program_of, random_cnn, randomised, tiny_program

from planc.backends.onnx.lower import lower
from planc.backends.reference import probe
from planc.compiler.calibration import Histogram
from planc.compiler.codes import Scale, fit_scale
from planc.compiler.dialect import OPS
from planc.compiler.memory import Allocation, plan_memory, run_counted
from planc.compiler.passbase import Context
from planc.compiler.patches import Search
from planc.compiler.program import Program
from planc.passes.fold_batch_norm import FoldBatchNorm
from planc.passes.patchwise import Patchwise
from planc.passes.quantize_static import QuantizeStatic
from planc.runtime.errors import CompileError

SHOTS = images(4, 20, 18, seed=3)


def quantised(program: Program, shots: Tensor, **options: Any) -> Program:
    return applied(QuantizeStatic(**options), program, Context(shots))


def session(program: Program, folder: Path) -> tuple[ort.InferenceSession, list[str]]:
    """The program in ONNX Runtime, and the operators that it runs."""
    path, options = lower(program, folder, ops="standard", positions=1), ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 3
    made = ort.InferenceSession(path, options)
    graph = onnx.load(str(folder / "optimised.onnx"), load_external_data=False).graph
    return made, [node.op_type for node in graph.node]


def run_onnx(made: ort.InferenceSession, x: Tensor) -> Tensor:
    return torch.from_numpy(made.run(["logits"], {"images": x.numpy()})[0])


class Chain(nn.Module):
    """Convolutions, dense, strided and depthwise, with every activation that codes absorb; no sum, whose ties backends round as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.c, self.d = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(nn.functional.relu6(self.a(x))))
        x = nn.functional.max_pool2d(nn.functional.hardtanh(self.c(x), -0.5, 0.7), 2)
        return self.d(torch.cat((x, x), 1)[:, 3:15]).mean((2, 3))


def chain() -> Program:
    return program_of(randomised(Chain()), 20, 18)


def test_golden(golden: Callable[[str, str], None]) -> None:
    module = randomised(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    golden(before_and_after(QuantizeStatic(range="peak"), program_of(module, 12, 9), Context(images(2, 12, 9))), "quantize_static.txt")


@pytest.mark.parametrize("range_", ["peak", "search"])
def test_equals_eager(range_: str) -> None:
    """Within a few per cent of the float program: eight layers of codes."""
    program = FoldBatchNorm().apply(tiny_program(), Context())
    new = quantised(program, SHOTS, range=range_)
    want, have = probe(program, SHOTS)["logits"], probe(new, SHOTS)["logits"]
    assert 0 < float((have - want).norm() / want.norm()) < 0.05


def test_equals_onnx_bit_for_bit(tmp_path: Path) -> None:
    new = quantised(chain(), SHOTS)
    made, kinds = session(new, tmp_path)
    assert kinds.count("QLinearConv") == 4 and "Conv" not in kinds
    assert torch.equal(run_onnx(made, SHOTS[:2]).round(decimals=4), probe(new, SHOTS[:2])["logits"].round(decimals=4))
    codes = new.replace(graphs={"main": _cut(new)})
    assert torch.equal(run_onnx(session(codes, tmp_path)[0], SHOTS[:2]), probe(codes, SHOTS[:2])["logits"])


def _cut(program: Program) -> torch.fx.Graph:
    """The graph up to the last convolution's codes."""
    graph, copies = torch.fx.Graph(), dict[Any, Any]()
    graph.output(graph.graph_copy(program.main, copies))
    last = [n for n in graph.nodes if n.target is OPS.conv2d_int8.default][-1]
    graph.output_node().args = ({"logits": last},)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    return graph


def test_sums_and_silu_run_on_codes_and_numbers(tmp_path: Path) -> None:
    new = quantised(FoldBatchNorm().apply(tiny_program(), Context()), SHOTS)
    made, kinds = session(new, tmp_path)
    assert kinds.count("QLinearConv") == 3 and "Conv" not in kinds
    want = probe(new, SHOTS)["logits"]
    assert float((run_onnx(made, SHOTS) - want).abs().max() / want.abs().max()) < 0.02  # a tie rounded the other way is a code off


def test_products_by_hand() -> None:
    random = np.random.default_rng(0)
    x, w, b = random.integers(0, 256, (2, 3, 6, 5)), random.integers(-127, 128, (4, 3, 3, 3)), random.integers(-9999, 9999, 4)
    steps = random.uniform(0.01, 0.02, 4).astype(np.float32)
    made = OPS.conv2d_int8(
        torch.tensor(x, dtype=torch.uint8), torch.tensor(w, dtype=torch.int8), torch.tensor(b, dtype=torch.int32), [1, 1], [1, 0, 0, 2],
        [1, 1], 1, torch.tensor(steps), 0.02, 31, 1.5, 100, 20, 210,
    )  # fmt: skip
    padded = np.pad(x - 31, ((0, 0), (0, 0), (1, 0), (0, 2)))
    for n, i, j in ((0, 0, 0), (1, 2, 3), (3, 4, 4)):
        for image in range(2):
            total = int((padded[image, :, i : i + 3, j : j + 3] * w[n]).sum() + b[n])
            code = np.clip(np.rint(np.float32(total) * (np.float32(0.02) * steps[n] / np.float32(1.5))) + 100, 20, 210)
            assert int(made[image, n, i, j]) == code


def test_scales() -> None:
    assert Scale.of(0.0, 6.0).limits(0.0, 6.0) == (0, 255)
    half = Scale.of(-1.0, 1.0)
    assert half.limits(0.0, None) == (half.zero, 255) and 0 in half.decoded(half.codes(torch.tensor([0.0]))).tolist()
    assert Scale.of(0.0, 0.0) == Scale(1.0, 0)
    parts, whole = [Histogram(), Histogram()], Histogram()
    values = torch.cat((torch.randn(4000, generator=torch.Generator().manual_seed(0)), torch.tensor([60.0])))
    for part, piece in zip((*parts, whole), (values[:100], values[100:], values), strict=True):
        part.add(piece[None, :, None])
    parts[0].merge(parts[1])
    assert torch.equal(parts[0].counts, whole.counts) and (parts[0].low, parts[0].high) == (whole.low, whole.high)
    wide, narrow = (fit_scale(whole, fit, 4) for fit in ("peak", "search"))
    error = [float(((scale.decoded(scale.codes(values)) - values) ** 2).sum()) for scale in (wide, narrow)]
    assert error[1] < error[0]


def test_refuses() -> None:
    def refused(program: Program, shots: Tensor | None, **options: Any) -> str:
        with pytest.raises(CompileError) as caught:
            QuantizeStatic(**options).apply(program, Context(shots))
        assert caught.value.code in ("pass-refused", "calibration-not-finite")
        return caught.value.message

    assert "no convolutions" in refused(program_of(randomised(nn.Sequential(nn.Flatten(), nn.Linear(192, 4))), 8, 8), images(2, 8, 8))
    assert "no convolutions" in refused(chain(), SHOTS, keep=("*",))
    assert "calibrate" in refused(chain(), None)
    assert "NaN" in refused(chain(), SHOTS * torch.nan)
    new = quantised(chain(), SHOTS, keep=("a",))
    assert sum(n.target is OPS.conv2d.default for n in new.main.nodes) == 1


def test_memory_is_counted_in_bytes_of_codes() -> None:
    program, new = chain(), quantised(chain(), SHOTS)
    assert run_counted(new, {"images": SHOTS[:1]}, Allocation())[1].live == plan_memory(new).live
    assert plan_memory(new).peak < plan_memory(program).peak


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_property_parts_equal_the_whole_bit_for_bit(data: st.DataObject) -> None:
    draw: Callable[[int, int], int] = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    rows, columns = draw(5, 15), draw(5, 15)
    program = random_cnn(draw, rows, columns, torch.float32)
    if all(n.target is not OPS.conv2d.default for n in program.main.nodes):
        return
    x = images(3, rows, columns)
    new = quantised(program, x, range="peak")
    search = Search(new, Allocation())
    if not search.found[0]:
        return
    stage = search.found[0][draw(0, len(search.found[0]) - 1)]
    grid = min(draw(1, 3), stage.size[0]), min(draw(1, 3), stage.size[1])
    parts = Patchwise(split=stage.cut.name, grid=grid).apply(new, Context())
    assert torch.equal(probe(parts, x[:1])["logits"], probe(new, x[:1])["logits"])
