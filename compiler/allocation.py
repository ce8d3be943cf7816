"""Which format each matrix takes: the integer programme of LQ-LoRA (Guo et al. 2023), solved exactly by HiGHS."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planc.runtime.errors import CompileError


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The option of each item with the least total cost whose sizes add up to at most `budget`; costs and sizes [items][options].

    Raises CompileError[pass-refused] when even the smallest options are above the budget; it names the smallest total.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    least = sum(min(row) for row in sizes)
    if least > budget:
        raise CompileError(
            "pass-refused",
            f"no choice of formats fits {budget} bits: the smallest needs {least}",
            fix=f"raise `budget` by a factor of {least / budget:.3f}",
        )
    cost, size = np.concatenate([np.asarray(row, float) for row in costs]), np.concatenate([np.asarray(row, float) for row in sizes])
    item = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    one_each = csr_array((np.ones(len(item)), (item, np.arange(len(item)))))
    scale = 1.0 / max(float(cost.max()), 1e-300)  # HiGHS has absolute tolerances
    found = milp(
        cost * scale,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / budget, -np.inf, 1)],
        options={"mip_rel_gap": 1e-6, "time_limit": 30},
    )
    assert found.x is not None, found.message  # feasible, as was checked
    chosen = [int(np.argmax(found.x[item == i])) for i in range(len(costs))]
    return _within(chosen, costs, sizes, budget)


def _within(chosen: list[int], costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The choice, made to fit to the bit: the solver works with floating-point tolerances. Gives up the least cost per bit first."""
    over = sum(row[j] for row, j in zip(sizes, chosen, strict=True)) - budget
    while over > 0:
        cheaper = [
            ((costs[i][k] - costs[i][j]) / (sizes[i][j] - sizes[i][k]), i, k)
            for i, j in enumerate(chosen)
            for k in range(len(sizes[i]))
            if sizes[i][k] < sizes[i][j]
        ]
        _, i, k = min(cheaper)
        over -= sizes[i][chosen[i]] - sizes[i][k]
        chosen[i] = k
    return chosen
