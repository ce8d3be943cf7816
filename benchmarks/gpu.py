"""Time every Triton kernel beside the best that PyTorch has for the same work, on the GPU of this machine.

    python benchmarks/gpu.py [KERNEL ...] [--output FILE]

Each line: median milliseconds over half a second of runs after a warm-up (the caches are flushed between runs), the bandwidth reached by the bytes
that must be moved at least, the baseline's median, and how many times faster the kernel is. The JSON has the quartiles and the device.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from planc.runtime.contract import hardware

KERNELS = (
    "int8_matmul", "block_matmul", "segment_attention", "entropy_decode", "rms_quantize", "top_k", "bitmap_attention", "page_attention",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "gpu.json"
QUANTILES = [0.5, 0.25, 0.75]


def measured(name: str) -> dict[str, Any]:
    """Times of one kernel and its baseline, the two in turns so that a slow spell hits both."""
    from triton.testing import do_bench

    module = import_module(f"planc.backends.triton.kernels.{name}")
    timing = module.timing()
    rounds = [[do_bench(run, rep=250, quantiles=QUANTILES) for run in (timing.run, timing.baseline)] for _ in range(2)]
    ours, theirs = (min((pair[i] for pair in rounds), key=lambda times: times[0]) for i in range(2))
    return {
        "shape": module.timing.__doc__, "ms": ours, "gb_per_s": round(timing.bytes / ours[0] / 1e6, 1),
        "tflop_per_s": round(timing.flops / ours[0] / 1e9, 2), "against": timing.against, "baseline_ms": theirs,
        "ratio": round(theirs[0] / ours[0], 3),
    }  # fmt: skip


def main() -> int:
    """The table for people, the JSON for programs."""
    options = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    options.add_argument("kernels", nargs="*", default=KERNELS, help="which kernels; all by default")
    options.add_argument("--output", type=Path, default=RESULTS)
    chosen = options.parse_args()
    if unknown := set(chosen.kernels) - set(KERNELS):
        options.error(f"no kernel is called {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}")
    if not torch.cuda.is_available():
        print("there is no CUDA device here", file=sys.stderr)
        return 2
    properties, rows = torch.cuda.get_device_properties(0), {}
    print(f"{properties.name}, torch {torch.__version__}\n{'kernel':20} {'ms':>9} {'GB/s':>8} {'baseline ms':>12} {'times':>6}  against")
    for name in chosen.kernels:
        row = rows[name] = measured(name)
        times = f"{row['ms'][0]:9.4f} {row['gb_per_s']:8.0f} {row['baseline_ms'][0]:12.4f} {row['ratio']:6.2f}"
        print(f"{name:20} {times}  {row['against']}", flush=True)
    device = {"gpu": properties.name, "multiprocessors": properties.multi_processor_count, "torch": torch.__version__}
    chosen.output.write_text(json.dumps({"device": device, "hardware": hardware(), "kernels": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
