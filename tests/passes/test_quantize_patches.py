"""The pass quantize_patches: bits for every map of every part."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import applied, before_and_after
from torch import Tensor, nn
from vision_tiny import images, program_of, random_cnn, randomised

from planc.backends.onnx.lower import lower
from planc.backends.reference import probe
from planc.compiler.memory import Allocation, plan_memory
from planc.compiler.passbase import Context
from planc.compiler.patches import Search
from planc.compiler.program import Program
from planc.passes.patchwise import Patchwise
from planc.passes.quantize_patches import QuantizePatches, find_parts, part_bit_operations, part_bytes
from planc.passes.quantize_static import QuantizeStatic
from planc.runtime.errors import CompileError


class Net(nn.Module):
    """A stem, a residual block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 12, 1)
        self.depth, self.narrow = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 6, 1)
        self.down = nn.Conv2d(6, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.narrow(nn.functional.relu6(self.depth(nn.functional.relu6(self.wide(x)))))
        return torch.relu(self.down(x)).mean((2, 3))


def spiked(count: int) -> Tensor:
    """Images with a few bright pixels in the upper left corner."""
    x = images(count, 24, 24, seed=5) * 0.2
    x[:, :, 1:4, 1:4] = 8.0
    return x


SHOTS = spiked(4)


@cache
def parts() -> Program:
    program = QuantizeStatic().apply(program_of(randomised(Net()), 24, 24), Context(SHOTS))
    return Patchwise(split="down", grid=(2, 2)).apply(program, Context())


def changed(**options: Any) -> Program:
    return applied(QuantizePatches(**options), parts(), Context(SHOTS))


def widths(program: Program) -> dict[Any, set[int]]:
    """Widths of the maps of every part but the last map's, from the largest code."""
    found: dict[Any, set[int]] = {}
    for part in find_parts(program):
        codes = [int(m.makers[0].args[-1]) for m in part.maps if not m.shared]  # type: ignore[call-overload]
        found[part.place] = {next(b for b in (2, 4, 8) if code < 2**b) for code in codes}
    return found


def test_golden(golden: Callable[[str, str], None]) -> None:
    module = randomised(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    shots = images(2, 12, 9)
    program = QuantizeStatic().apply(program_of(module, 12, 9), Context(shots))
    program = Patchwise(split="2", grid=(2, 1)).apply(program, Context())
    golden(before_and_after(QuantizePatches(entropy=0.3), program, Context(shots)), "quantize_patches.txt")


def test_equals_eager_where_all_bits_are_eight() -> None:
    assert QuantizePatches(entropy=1.0).apply(parts(), Context(SHOTS)) is parts()
    assert QuantizePatches(deviations=0.01).apply(parts(), Context(SHOTS)) is parts()  # every part has outliers
    new = changed(entropy=0.5)
    want = probe(parts(), SHOTS)["logits"]
    assert 0 < float((probe(new, SHOTS)["logits"] - want).norm() / want.norm()) < 0.3


def test_parts_with_outliers_keep_eight_bits() -> None:
    assert widths(changed(entropy=0.0)) == {(0, 0): {8}, (0, 3): {2}, (3, 0): {2}, (3, 3): {2}}
    others = [widths(changed(entropy=0.0, classes="random", seed=seed)) for seed in range(6)]
    assert all(sum(bits == {8} for bits in each.values()) == 1 for each in others)
    assert len({str(each) for each in others}) > 1


def test_the_last_map_keeps_the_scale_of_all() -> None:
    ends = [m.makers[0].args[-4:] for part in find_parts(changed(entropy=0.0)) for m in part.maps if m.shared]
    assert len(ends) == 4 and len(set(ends)) == 1 and ends[0][-1] == 255


def test_bit_operations_and_bytes_are_those_of_the_graph() -> None:
    new, text = changed(entropy=0.4), changed(entropy=0.4).history[-1].notes[1]
    before, after = part_bit_operations(parts()), part_bit_operations(new)
    assert f"{after / 1e9:.3f} G, {before / after:.2f} times fewer; {part_bytes(new)} bytes" in text
    assert after < before and part_bytes(new) < part_bytes(parts()) == max(
        size for name, size in plan_memory(parts(), Allocation(packed=True)).live if parts_of(name)
    )


def parts_of(name: str) -> bool:
    return next((n.meta.get("part") for n in parts().main.nodes if n.name == name), None) is not None


def test_budget_is_kept_or_refused() -> None:
    widest, narrowest = part_bytes(changed(entropy=0.9)), part_bytes(changed(entropy=0.0))
    assert narrowest < widest
    budget = (narrowest + widest) // 2
    assert part_bytes(changed(entropy=0.9, budget=budget)) <= budget
    with pytest.raises(CompileError, match=f"more than {narrowest // 4}"):
        QuantizePatches(budget=narrowest // 4).apply(parts(), Context(SHOTS))


def test_equals_onnx(tmp_path: Path) -> None:
    new = changed(entropy=0.3)
    made = ort.InferenceSession(lower(new, tmp_path, ops="standard", positions=1)).run(["logits"], {"images": SHOTS.numpy()})[0]
    want = probe(new, SHOTS)["logits"]
    assert float((torch.from_numpy(made) - want).abs().max() / want.abs().max()) < 0.03  # a tie rounded the other way is a code off


def test_refuses() -> None:
    with pytest.raises(CompileError, match="no part of a schedule computes with codes") as caught:
        QuantizePatches().apply(program_of(randomised(Net()), 24, 24), Context(SHOTS))
    assert caught.value.code == "pass-refused"
    with pytest.raises(CompileError, match="calibrate"):
        QuantizePatches().apply(parts(), Context())


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_property_random_parts(data: st.DataObject) -> None:
    """Lambda 1 changes nothing; lambda 0 takes as few bit operations as there can be; more outliers never take fewer."""
    draw: Callable[[int, int], int] = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    program, x = random_cnn(draw, 12, 12, torch.float32), images(3, 12, 12)
    try:
        program = QuantizeStatic().apply(program, Context(x))
    except CompileError:
        return
    stages = Search(program, Allocation()).found[0]
    if not stages or min(stages[-1].size) < 2:
        return
    program = Patchwise(split=stages[-1].cut.name, grid=(2, 2)).apply(program, Context())
    if not any(part.maps for part in find_parts(program)):
        return
    assert QuantizePatches(entropy=1.0).apply(program, Context(x)) is program
    work = [part_bit_operations(applied(QuantizePatches(entropy=0.0, deviations=d), program, Context(x))) for d in (1e6, 1.0, 1e-6)]
    assert work[0] <= work[1] <= work[2] <= part_bit_operations(program)
