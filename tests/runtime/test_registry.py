"""The registry of plan parts: registration, validation of items, JSON Schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError, field_validator

from planc.runtime.errors import PlanError
from planc.runtime.registry import _PARTS, Item, PlanPart, json_schema, kinds, parts

KIND = "kind_of_the_registry_tests"


class Base(PlanPart):
    """Opens a kind."""

    kind: ClassVar[str] = KIND


class HTTPLeaf(Base):
    """A part with options."""

    n: int = 3

    @field_validator("n")
    @classmethod
    def _small(cls, value: int) -> int:
        if value > 9:
            raise PlanError("plan-bad-value", "n is too large", fix="use 9")
        return value


class Holder(BaseModel):
    """What a plan is to its parts."""

    items: tuple[Annotated[Any, Item(KIND)], ...] = ()


class NestedPart(Base):
    """A part that holds parts of its own kind, defined after the model that takes it."""

    inner: tuple[Annotated[Any, Item(KIND)], ...]


@pytest.fixture(autouse=True, scope="module")
def _closed() -> Iterator[None]:
    yield
    del _PARTS[KIND]


def kind_of(value: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Holder(items=[value])
    return [detail["type"] for detail in caught.value.errors()]


def test_defining_a_class_registers_it_under_its_snake_case_name() -> None:
    assert parts(KIND) == {"httpleaf": HTTPLeaf, "nested_part": NestedPart}
    assert KIND in kinds()
    assert "" not in kinds()
    assert parts("nothing") == {}


def test_four_ways_to_write_an_item() -> None:
    assert Holder(items=["httpleaf", {"httpleaf": None}, {"httpleaf": {}}, HTTPLeaf()]).items == (HTTPLeaf(),) * 4
    assert Holder(items=[{"httpleaf": {"n": 4}}]).items[0].n == 4


def test_items_nest_and_write_back() -> None:
    data = {"items": [{"nested_part": {"inner": [{"httpleaf": {}}, {"nested_part": {"inner": [{"httpleaf": {"n": 1}}]}}]}}]}
    held = Holder.model_validate(data)
    assert held.items[0] == NestedPart(inner=(HTTPLeaf(), NestedPart(inner=(HTTPLeaf(n=1),))))
    assert held.model_dump(mode="json") == data


def test_locations_follow_the_yaml_path() -> None:
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"items": ["httpleaf", {"nested_part": {"inner": [{"httpleaf": {"n": "x"}}]}}]})
    assert [detail["loc"] for detail in caught.value.errors()] == [("items", 1, "nested_part", "inner", 0, "httpleaf", "n")]


def test_refusals_carry_what_a_message_needs() -> None:
    assert kind_of("httpleef") == ["part_unknown"]
    assert kind_of({"httpleaf": {}, "nested_part": {}}) == ["part_form"]
    assert kind_of(3) == ["part_form"]
    assert kind_of({"httpleaf": {"m": 1}}) == ["extra_forbidden"]
    assert kind_of({"httpleaf": [1]}) == ["model_type"]
    with pytest.raises(ValidationError) as caught:
        Holder(items=[{"httpleaf": {"n": 10}}])
    detail = caught.value.errors()[0]
    assert (detail["type"], detail["ctx"]["error"].fix) == ("part_refused", "use 9")


def test_a_part_defined_later_is_known_at_once() -> None:
    assert kind_of("late_part") == ["part_unknown"]

    class LatePart(Base):
        """Late."""

    assert Holder(items=["late_part"]).items == (LatePart(),)
    del _PARTS[KIND]["late_part"]
    assert kind_of(LatePart()) == ["part_unknown"]


def test_json_schema_agrees_with_validation() -> None:
    schema = json_schema(Holder)
    Draft202012Validator.check_schema(schema)
    check = Draft202012Validator(schema)
    for good in (["httpleaf"], [{"httpleaf": None}], [{"nested_part": {"inner": ["httpleaf", {"httpleaf": {"n": 2}}]}}]):
        assert check.is_valid({"items": good})
        Holder(items=good)
    for bad in (
        ["nested_part"],
        [{"httpleaf": {"m": 2}}],
        [{"nested_part": {"inner": ["x"]}}],
        [{"httpleaf": {}, "nested_part": {"inner": []}}],
    ):
        assert not check.is_valid({"items": bad})
        with pytest.raises(ValidationError):
            Holder(items=bad)
