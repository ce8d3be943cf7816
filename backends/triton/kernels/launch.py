"""What the kernels share: checks of their arguments, launching them, compiling them without a GPU, and the record of a timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from planc.runtime.errors import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.bool: "i1", torch.uint8: "u8",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """A kernel on tensors of a real model's shape beside the best that is at hand without it."""

    name: str
    run: Callable[[], Any]
    baseline: Callable[[], Any]
    against: str  # what the baseline is
    bytes: int  # that the kernel must move at least
    flops: int


def check(condition: bool, kernel: str, problem: str, fix: str) -> None:
    """Raise InputError[kernel-unsupported] unless the condition holds."""
    if not condition:
        raise InputError("kernel-unsupported", f"{kernel}: {problem}", where=f"kernel {kernel}", fix=fix)


def check_tensors(kernel: str, instead: str, *tensors: Tensor | None) -> None:
    """All on one CUDA device; under Triton's interpreter, and while compiling ahead of time, on the CPU. `instead`: what to use elsewhere."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    check(len(devices) == 1, kernel, f"its tensors lie on {', '.join(sorted(map(str, devices)))}", "move them to one device")
    device = next(iter(devices))
    if device.type != "cuda" and not triton.knobs.runtime.interpret and _target.get() is None:
        check(False, kernel, f"it runs on a CUDA device, its tensors lie on {device}", f"move them with `.cuda()`, or use {instead}")


def check_type(kernel: str, name: str, tensor: Tensor, *types: torch.dtype) -> None:
    """The tensor has one of these types."""
    known = ", ".join(str(t).removeprefix("torch.") for t in types)
    check(tensor.dtype in types, kernel, f"{name} is {str(tensor.dtype).removeprefix('torch.')}", f"convert it to {known}")


def power_of_two(size: int, least: int = 16) -> int:
    """The next power of two, at least `least`: tiles have such sides, and products sides of 16 or more."""
    return max(least, 1 << max(0, size - 1).bit_length())


# ---- launching

_target: ContextVar[list[Any] | None] = ContextVar("target", default=None)


@contextmanager
def ahead_of_time(capability: int) -> Iterator[list[Any]]:
    """Inside, `launch` compiles for a CUDA device of this compute capability (80, 90) and runs nothing; gives what was compiled.

    Needs no GPU. Results of the wrappers are uninitialised memory.
    """
    compiled: list[Any] = [GPUTarget("cuda", capability, 32)]
    token = _target.set(compiled)
    try:
        yield compiled
        del compiled[0]
    finally:
        _target.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 3, **constants: Any) -> None:
    """Run `kernel` over `grid` on the device of its first tensor; an empty grid does nothing."""
    if (compiled := _target.get()) is not None:
        compiled.append(_compile(kernel, args, constants, compiled[0], warps, stages))
    elif 0 not in grid:
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
            kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)


def _compile(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], target: GPUTarget, warps: int, stages: int) -> Any:
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
    signature = {name: _type(values[name]) for name in kernel.arg_names}
    signature.update((p.name, "constexpr") for p in kernel.params if p.is_constexpr)
    fixed = {(i,): values[name] for i, name in enumerate(kernel.arg_names) if signature[name] == "constexpr"}
    return triton.compile(ASTSource(kernel, signature, fixed), target=target, options={"num_warps": warps, "num_stages": stages})


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if value is None or isinstance(value, bool):
        return "constexpr"
    return "i32" if isinstance(value, int) else "fp32"
