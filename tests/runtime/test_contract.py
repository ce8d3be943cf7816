"""The cost table interpolates sensibly; the models of the contract survive the manifest."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from planc.runtime.contract import LEVELS, Contract, CostTable, Exactness, PassEffect, hardware, weakest

TABLE = CostTable(rows=(1, 2, 4), past=(16, 128), measured=(((8.0, 10.0, 12.0), (9.0, 11.0, 15.0)),))


def test_cost_is_bilinear_between_points() -> None:
    assert [TABLE.ms(r, 16) for r in (1, 2, 3, 4)] == [8.0, 10.0, 11.0, 12.0]
    assert TABLE.ms(3, 72) == pytest.approx((11.0 + 13.0) / 2)


def test_cost_beyond_the_grid() -> None:
    assert TABLE.ms(6, 16) == pytest.approx(14.0), "linear beyond the last rows"
    assert TABLE.ms(4, 240) == pytest.approx(18.0), "linear beyond the last past"
    assert TABLE.ms(2, 0) == 10.0, "constant below the first past"
    assert CostTable(rows=(3,), past=(5,), measured=(((7.0,),),)).ms(40, 900) == 7.0


def test_lines_do_not_cross_far_out() -> None:
    table = CostTable(rows=(1, 2), past=(16, 128), measured=(((1.0, 3.0), (2.0, 3.1)),))
    assert table.ms(1, 5000) <= table.ms(2, 5000)
    table = CostTable(rows=(1, 2), past=(16, 128), measured=(((1.0, 3.0), (2.9, 3.1)),))
    assert table.ms(40, 16) <= table.ms(40, 128)


def test_cost_of_a_batch() -> None:
    assert TABLE.ms(2, 16, batch=2) == TABLE.ms(4, 16), "without measurement a batch is that many rows"
    table = CostTable(rows=(1, 2), past=(8,), batch=(1, 4), measured=(((10.0, 12.0),), ((16.0, 24.0),)))
    assert table.ms(2, 8, batch=1) == 12.0
    assert table.ms(2, 8, batch=2) == pytest.approx(16.0)
    assert table.ms(2, 8, batch=7) == pytest.approx(36.0)


def test_noise_is_repaired() -> None:
    noisy = CostTable(rows=(1, 2, 3), past=(16, 128), measured=(((10.0, 14.0, 12.0), (9.0, 13.0, 17.0)),))
    assert noisy.ms(2, 16) == noisy.ms(3, 16) == pytest.approx(13.0), "pooled to the mean, not pushed up to the larger"
    assert noisy.ms(1, 16) == noisy.ms(1, 128) == pytest.approx(9.5)
    assert noisy.measured[0][0] == (10.0, 14.0, 12.0), "what was measured stays on record"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(0.1, 100), min_size=4, max_size=4), min_size=3, max_size=3), st.data())
def test_cost_never_falls(ms: list[list[float]], data: st.DataObject) -> None:
    table = CostTable(rows=(1, 2, 5, 9), past=(4, 16, 64), measured=(tuple(tuple(line) for line in ms),))
    rows, past = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 200))
    more, further = data.draw(st.integers(0, 10)), data.draw(st.integers(0, 50))
    assert table.ms(rows + more, past + further) >= table.ms(rows, past) - 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": (2, 1)},
        {"rows": (0, 1)},
        {"past": ()},
        {"measured": (((1.0,),),)},
        {"measured": (((1.0, 0.0),),)},
        {"measured": (((1.0, float("nan")),),)},
    ],
)
def test_impossible_tables_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CostTable.model_validate({"rows": (1, 2), "past": (16,), "measured": (((1.0, 2.0),),), **wrong})


def test_weakest() -> None:
    assert weakest("bitwise", "tokens") == "tokens"
    assert weakest(*LEVELS) == "lossy"


def test_contract_round_trip() -> None:
    exactness = Exactness(
        level="tokens", chains="bitwise", trees="tokens", min_rows=2, probes=40, largest_difference=5e-5, smallest_gap=0.01
    )
    effect = PassEffect(name="fold", declared="exact", counts={"matched": 3})
    contract = Contract(exactness=exactness, cost=TABLE, effects=(effect,), hardware=hardware())
    again = Contract.model_validate_json(contract.model_dump_json())
    assert again == contract
    assert again.cost is not None and again.cost.ms(3, 72) == TABLE.ms(3, 72)
    assert "40 rows probed" in exactness.line() and "at least 2 rows" in exactness.line()


def test_hardware_is_plain_data() -> None:
    found = hardware()
    assert found["cpu"] and found["cores"] >= found["usable_cores"] >= 1
    assert found["versions"]["numpy"]
    assert json.loads(json.dumps(found)) == found
