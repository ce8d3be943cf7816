"""The pass patchwise: parts equal the whole, to the bit and to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import applied, before_and_after
from torch import Tensor, nn
from torch.fx import Node
from vision_tiny import images, program_of, random_cnn, randomised, tiny, tiny_program

from planc.backends.onnx.lower import lower
from planc.backends.reference import probe
from planc.compiler.intervals import demand, rules
from planc.compiler.memory import Allocation, plan_memory, run_counted
from planc.compiler.passbase import Context
from planc.compiler.patches import Search, cells, network_macs, schedule
from planc.compiler.program import Program
from planc.compiler.verify import verify
from planc.passes.patchwise import Patchwise, Unroll
from planc.runtime.errors import CompileError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Handing maps of a few values to other threads takes longer than computing them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Eager(Unroll[Tensor]):
    """The parts, executed at once."""

    def __init__(self, params: Any) -> None:
        self.params = params

    def call(self, target: Any, *args: Any) -> Tensor:
        return target(*args)  # type: ignore[no-any-return]

    def lookup(self, node: Node) -> Tensor:
        return self.params[str(node.target)]  # type: ignore[no-any-return]

    def size(self, value: Tensor, axis: int) -> int:
        return int(value.shape[axis])


def whole(count: int, *size: int) -> Tensor:
    """Images of whole numbers."""
    return torch.randint(-3, 4, (count, 3, *size), generator=torch.Generator().manual_seed(1)).double()


def deepest(program: Program) -> str:
    """Name of the last cut."""
    return Search(program, Allocation()).found[0][-1].cut.name


def drawn(data: st.DataObject) -> Callable[[int, int], int]:
    return lambda low, high: data.draw(st.integers(low, high))


def test_golden(golden: Callable[[str, str], None]) -> None:
    module = randomised(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    golden(before_and_after(Patchwise(split="2", grid=(2, 1)), program_of(module, 12, 9)), "patchwise.txt")


@pytest.mark.parametrize("grid", [(1, 3), (2, 2), (4, 3)])
def test_equals_eager(grid: tuple[int, int]) -> None:
    x = images(2, 20, 18)
    new = applied(Patchwise(split=deepest(tiny_program()), grid=grid), tiny_program())
    assert len(new.main.nodes) > 10 * grid[0] * grid[1]
    assert torch.allclose(probe(new, x)["logits"], tiny()(x), rtol=1e-5, atol=1e-5)


def test_every_border_is_padded_at_every_layer() -> None:
    """Weights, biases and image of ones: padding the image alone would leave something other than zeros around the later maps."""
    module = nn.Sequential(
        *[m for _ in range(5) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())], nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    program, x = program_of(module.double().eval().float(), 11, 13), torch.ones(1, 3, 11, 13)
    stage = Search(program, Allocation()).found[0][-1]
    whole_map = schedule(stage, x, cells(stage, (1, 1)), Eager(program.params))
    assert torch.equal(schedule(stage, x, cells(stage, (3, 4)), Eager(program.params)), whole_map)


def test_one_part_is_the_program_itself() -> None:
    assert Patchwise(grid=(1, 1)).apply(tiny_program(), Context()) is tiny_program()
    peak = plan_memory(tiny_program()).peak
    assert Patchwise(budget=peak).apply(tiny_program(), Context()) is tiny_program()


def test_budget_and_overhead_are_kept() -> None:
    program = program_of(randomised(Wide()), 64, 64)
    search = Search(program, Allocation())
    part = Patchwise(budget=search.full_peak // 2)
    chosen = part.choose(search)
    assert chosen is not None and chosen.peak <= search.full_peak // 2
    assert plan_memory(part.apply(program, Context())).peak == chosen.peak
    for limit in (0.02, 0.2):
        cheap = Patchwise(overhead=limit).choose(search)
        assert cheap is not None and cheap.overhead <= limit and cheap.peak < search.full_peak
    assert not any(s.extra_macs < chosen.extra_macs and s.peak <= search.full_peak // 2 for s in every(search))


def every(search: Search) -> list[Any]:
    return [search.evaluate(s, (a, b)) for s in search.found[0] for a in (1, 2, 3, 4, 6) for b in (1, 2, 3, 4, 6) if a * b > 1]


class Wide(nn.Module):
    """Large maps first, small ones later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.gate = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return (x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))).mean((2, 3))


def test_refuses() -> None:
    program = program_of(randomised(Wide()), 64, 64)

    def refused(part: Patchwise) -> CompileError:
        with pytest.raises(CompileError) as caught:
            part.apply(program, Context())
        assert caught.value.code == "pass-refused"
        return caught.value

    search = Search(program, Allocation())
    error = refused(Patchwise(budget=1000))
    least = min(s.peak for s in every(search))
    assert f"the least possible is {least}" in error.message and "aten.mean.dim needs all of its input" not in error.message
    assert "mean (module model" in error.message and str(least) in (error.fix or "")
    assert "aten.mean.dim needs all of its input; the last possible is c" in refused(Patchwise(split="gate")).message
    assert "no such module" in refused(Patchwise(split="nowhere")).message
    assert "finer" in refused(Patchwise(grid=(60, 60))).message
    with pytest.raises(CompileError, match="no layer can run in parts"):
        Patchwise().apply(program_of(randomised(nn.Sequential(nn.Flatten(), nn.Linear(192, 4))), 8, 8), Context())


def test_standard_operators_equal_the_program(tmp_path: Any) -> None:
    x = images(2, 20, 18)
    for grid in ((2, 3), (4, 4)):
        new = Patchwise(split=deepest(tiny_program()), grid=grid).apply(tiny_program(), Context())
        path = lower(new, tmp_path, ops="standard", positions=1)
        made = ort.InferenceSession(path).run(["logits"], {"images": x.numpy()})[0]
        assert torch.allclose(torch.from_numpy(made), tiny()(x), rtol=1e-5, atol=1e-5)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_property_parts_equal_the_whole(data: st.DataObject) -> None:
    draw = drawn(data)
    rows, columns = draw(5, 17), draw(5, 17)
    program = random_cnn(draw, rows, columns)
    search = Search(program, Allocation())
    stages, stop = search.found
    assert stop is None
    if not stages:
        return
    stage, x = stages[draw(0, len(stages) - 1)], whole(1, rows, columns)
    grid = min(draw(1, 4), stage.size[0]), min(draw(1, 4), stage.size[1])
    eager = Eager(program.params)
    want = schedule(stage, x, cells(stage, (1, 1)), eager)
    assert torch.equal(schedule(stage, x, cells(stage, grid), eager), want)
    if stage.cut.name == program.outputs["logits"].name:
        assert torch.equal(want, probe(program, x)["logits"])


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_property_bytes_and_multiplications(data: st.DataObject) -> None:
    draw = drawn(data)
    program = random_cnn(draw, 12, 14)
    allocation = Allocation(inplace_depthwise=bool(draw(0, 1)), fuse_residual=bool(draw(0, 1)), element_bytes=(None, 1)[draw(0, 1)])
    search, x = Search(program, allocation), whole(1, 12, 14)
    outputs, counted = run_counted(program, {"images": x}, allocation)
    assert counted.live == plan_memory(program, allocation).live
    assert torch.equal(outputs["logits"], probe(program, x)["logits"])
    if not search.found[0]:
        return
    stage = search.found[0][-1]
    grid = min(draw(1, 3), stage.size[0]), min(draw(1, 3), stage.size[1])
    part = Patchwise(split=stage.cut.name, grid=grid, **allocation.model_dump(exclude={"place_concat", "packed"}))
    new = part.apply(program, Context())
    verify(new, part.key, tuple(program.outputs))
    outputs, counted = run_counted(new, {"images": x}, allocation)
    assert torch.equal(outputs["logits"], probe(program, x)["logits"])
    planned = plan_memory(new, allocation)
    assert counted.live == planned.live
    if grid != (1, 1):
        cost = search.evaluate(stage, grid)
        assert network_macs(new) - network_macs(program) == cost.extra_macs
        assert planned.peak == cost.peak


def test_receptive_fields_of_a_chain() -> None:
    """3x3 stride 2, 5x5, 3x3 dilation 2: 1 + 2 * 2 = 5, + 4 = 9 positions at stride 2, 2 * 8 + 3 = 19 of the image."""
    module = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 3, 5, padding=2), nn.Conv2d(3, 3, 3, padding=2, dilation=2), nn.Flatten())
    program = program_of(randomised(module), 64, 64)
    stage = Search(program, Allocation()).found[0][-1]
    assert all(rules(node) is not None for node in stage.nodes)
    start, stop = demand(stage.nodes, 0, 15, 16).cover[stage.image]
    assert stop - start == 19
