"""Plans: reading, writing, refusing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import Field, field_validator

from planc.compiler.passbase import Pass
from planc.compiler.plan import Plan, Target
from planc.compiler.plan_source import Source, dump, parse
from planc.runtime.errors import PlanError
from planc.runtime.registry import _PARTS, kinds, parts

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").rglob("*.yaml"))


class TestDropPart(Pass):
    """A pass of these tests alone."""

    __test__ = False
    conflicts: ClassVar[tuple[str, ...]] = ("test_drop_part", "test_clash_part")
    layers: tuple[int, ...]
    where: Literal["first", "last"] = "last"
    factor: float = 1.0
    note: str = ""

    @field_validator("layers")
    @classmethod
    def _few(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) > 9:
            raise PlanError("skip-out-of-range", "more than nine layers", fix="name fewer")
        return value


class TestClashPart(Pass):
    """A pass that the first one excludes."""

    __test__ = False
    bits: int = Field(8, ge=2, le=8)


class TestNeedsPart(Pass):
    """A pass that needs the second one."""

    __test__ = False
    requires: ClassVar[tuple[str, ...]] = ("test_clash_part",)


OURS = {cls.key: cls for cls in (TestDropPart, TestClashPart, TestNeedsPart)}
for key in OURS:  # other tests walk the registry too
    del _PARTS["pass"][key]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    _PARTS["pass"].update(OURS)
    yield
    for key in OURS:
        del _PARTS["pass"][key]


GOOD = """\
planc: 1
name: demo
passes:
  # drop two layers
  - test_drop_part: {layers: [1, 2], factor: 1e-5}
decode:
  speculative:
    drafter:
      - prompt_lookup
      - token_recycling: {k: 4}
target: {threads: 2}
"""


def refusal(text: str) -> PlanError:
    with pytest.raises(PlanError) as caught:
        Plan.from_yaml(text)
    return caught.value


def test_reads_fields_and_remembers_lines(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(GOOD)
    plan = Plan.from_yaml(path)
    assert plan.passes == (TestDropPart(layers=(1, 2), factor=1e-5),)
    assert plan.target == Target(threads=2)
    assert plan.decode.speculative is not None
    assert [drafter.key for drafter in plan.decode.speculative.drafter] == ["prompt_lookup", "token_recycling"]
    assert plan.where("passes", 0) == f"{path}:5   - test_drop_part: {{layers: [1, 2], factor: 1e-5}}"
    assert plan.where("decode", "speculative", "drafter", 1, "token_recycling", "k") == f"{path}:10   - token_recycling: {{k: 4}}"
    assert plan.where("target", "threads") == f"{path}:11   target: {{threads: 2}}"
    assert Plan.from_yaml(str(path)) == plan


def test_yaml_dict_and_python_are_the_same_plan() -> None:
    plan = Plan.from_yaml(GOOD)
    assert Plan.from_dict(yaml.safe_load(GOOD.replace("1e-5", "0.00001"))) == plan
    built = Plan(
        name="demo",
        passes=[TestDropPart(layers=(1, 2), factor=1e-5)],
        decode={"speculative": {"drafter": ["prompt_lookup", {"token_recycling": {"k": 4}}]}},
        target=Target(threads=2),
    )
    assert built == plan
    assert hash(built) == hash(plan)
    assert built.where("passes", 0) is None
    assert built != Plan(name="demo")


def test_writing_keeps_only_what_differs_from_the_default() -> None:
    assert Plan().to_yaml() == "planc: 1\n"
    assert Plan(passes=["test_clash_part"], target={"threads": 2}).to_dict() == {
        "planc": 1,
        "passes": [{"test_clash_part": {}}],
        "target": {"threads": 2},
    }


names = st.text(max_size=12) | st.sampled_from(["no", "1e-5", "0x1f", "null", "~", "1:30", "on", "- a", "a: b", "\u2028", "\x85", "#"])
drops = st.builds(
    TestDropPart,
    layers=st.lists(st.integers(-5, 99), max_size=4).map(tuple),
    where=st.sampled_from(["first", "last"]),
    factor=st.floats(allow_nan=False),
    note=names,
)
targets = st.builds(
    Target,
    backend=st.just("onnx"),
    threads=st.none() | st.integers(1, 64),
    ops=st.sampled_from(["fast", "standard"]),
    capacity=st.none() | st.integers(1, 9999),
)
drafters = st.lists(
    st.sampled_from(["prompt_lookup", {"token_recycling": {"k": 3}}, {"prompt_lookup": {"max_ngram": 5}}]), min_size=1, max_size=3
)


@settings(max_examples=120, deadline=None)
@given(
    name=st.none() | names,
    passes=st.lists(drops, max_size=1),
    clash=st.booleans(),
    target=targets,
    drafter=st.none() | drafters,
    exactness=st.sampled_from(["bitwise", "tokens"]),
)
def test_round_trip_property(
    name: str | None, passes: list[Any], clash: bool, target: Target, drafter: list[Any] | None, exactness: str
) -> None:
    if clash and not passes:
        passes = ["test_clash_part", {"test_clash_part": {"bits": 4}}]
    decode = {} if drafter is None else {"speculative": {"drafter": drafter}}
    plan = Plan(name=name, passes=passes, decode=decode, target=target, exactness=exactness)
    text = plan.to_yaml()
    assert Plan.from_yaml(text + "\n") == plan
    assert Plan.from_yaml(text + "\n").to_yaml() == text
    assert Plan.from_dict(plan.to_dict()) == plan


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("abplnc:-[]{}, \n#&*!'\"|>1"), max_size=40))
def test_any_text_is_a_plan_or_a_plan_error(text: str) -> None:
    with suppress(PlanError):
        assert Plan.from_yaml(text + "\n").planc == 1


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_for_planc_and_for_editors(path: Path) -> None:
    plan = Plan.from_yaml(path)
    assert Plan.from_yaml(plan.to_yaml() + "\n") == plan
    Draft202012Validator(Plan.schema()).validate(yaml.safe_load(path.read_text()))


def test_schema_knows_every_part_and_refuses_what_planc_refuses() -> None:
    schema = Plan.schema()
    Draft202012Validator.check_schema(schema)
    listed = {next(iter(form["properties"])) for form in schema["$defs"]["pass"]["oneOf"] if "properties" in form}
    assert listed == set(parts("pass"))
    validator = Draft202012Validator(schema)
    assert validator.is_valid({"planc": 1, "passes": ["test_clash_part", {"test_drop_part": {"layers": [1]}}]})
    for wrong in (
        {"planc": 2},
        {"passes": ["test_drop_part"]},  # needs `layers`
        {"passes": [{"test_drop_part": {"layers": [1]}, "test_clash_part": {}}]},  # two keys in one item
        {"passes": [{"test_clash_part": {"bit": 4}}]},
        {"passes": ["prompt_lookup"]},
        {"taget": {}},
    ):
        assert not validator.is_valid(wrong), wrong
        with pytest.raises(PlanError):
            Plan.from_dict(wrong)


def test_declared_relations_name_parts_that_exist() -> None:
    Plan()  # loads the passes
    every = {key for kind in kinds() for key in parts(kind)}
    for kind in kinds():
        for cls in parts(kind).values():
            assert {*cls.conflicts, *cls.requires} <= every, cls


# ---- errors ------------------------------------------------------------------------------------------------------------------------


def test_unknown_pass_says_line_and_suggestion() -> None:
    error = refusal(GOOD.replace("test_drop_part", "test_drop_prt"))
    assert str(error).splitlines()[:2] == [
        "PlanError[plan-unknown-name]: no pass is called 'test_drop_prt'",
        "  plan   <plan>:5   - test_drop_prt: {layers: [1, 2], factor: 1e-5}",
    ]
    assert error.fix is not None
    assert error.fix.startswith("did you mean 'test_drop_part'? known: argmax")


def test_a_part_of_another_kind_is_named_as_such() -> None:
    error = refusal("passes: [prompt_lookup]\n")
    assert (error.code, error.message) == ("plan-unknown-name", "'prompt_lookup' is a drafter, not a pass")


@pytest.mark.parametrize(
    ("old", "new", "code", "message", "line", "fix"),
    [
        (
            "layers:",
            "layrs:",
            "plan-unknown-field",
            "test_drop_part has no field 'layrs'",
            5,
            "did you mean 'layers'? fields: factor, layers",
        ),
        ("name: demo", "nme: demo", "plan-unknown-field", "the plan has no field 'nme'", 2, "did you mean 'name'? fields: calibration"),
        ("{k: 4}", "{kk: 4}", "plan-unknown-field", "token_recycling has no field 'kk'", 10, "did you mean 'k'? fields: k, "),
        ("[1, 2]", "[1, x]", "plan-bad-value", "passes[0].test_drop_part.layers[1]: expected an integer, got 'x'", 5, None),
        (
            "layers: [1, 2], ",
            "",
            "plan-bad-value",
            "test_drop_part needs the field 'layers'",
            5,
            "add 'layers' to passes[0].test_drop_part",
        ),
        (
            "threads: 2",
            "backend: onx",
            "plan-bad-value",
            "target.backend: expected 'onnx', 'reference' or 'triton', got 'onx'",
            11,
            "did you mean 'onnx'?",
        ),
        ("threads: 2", "threads: 0", "plan-bad-value", "target.threads: expected a number greater than 0, got 0", 11, None),
        ("{threads: 2}", "", "plan-bad-value", "target: expected a mapping of options, got nothing", 11, None),
        ("planc: 1", "planc: 2", "plan-version", "the plan has schema version 2; this release reads version 1", 1, "update planc"),
        ("planc: 1", "planc: 0", "plan-version", "the plan has schema version 0; this release reads version 1", 1, "write `planc: 1`"),
        ("name: demo", "planc: 1", "plan-syntax", "the key 'planc' stands twice, first in line 1", 2, "remove one of them"),
        ("name: demo", "name: &a demo", "plan-syntax", "anchors, aliases and tags have no place in a plan", 2, "write the value out"),
        ("name: demo", "7: demo", "plan-syntax", "a key must be a name", 2, "put the key in quotes"),
        ("name: demo", "name: [demo", "plan-syntax", "not valid YAML", 3, "check indentation"),
        (
            "{layers: [1, 2], factor: 1e-5}",
            "[1]",
            "plan-bad-value",
            "passes[0].test_drop_part: expected a mapping of options, got [1]",
            5,
            None,
        ),
        ("[1, 2]", "[0,1,2,3,4,5,6,7,8,9]", "skip-out-of-range", "more than nine layers", 5, "name fewer"),
        (
            "demo\n",
            "demo\nexactness: tokns\n",
            "plan-bad-value",
            "exactness: expected 'bitwise' or 'tokens', got 'tokns'",
            3,
            "did you mean 'tokens'?",
        ),
    ],
)
def test_errors_name_line_reason_and_fix(old: str, new: str, code: str, message: str, line: int, fix: str | None) -> None:
    assert old in GOOD
    error = refusal(GOOD.replace(old, new, 1))
    assert error.code == code
    assert error.message.startswith(message)
    assert error.plan is not None
    assert error.plan.split("   ")[0] == f"<plan>:{line}"
    assert (error.fix is None) if fix is None else str(error.fix).startswith(fix)


def test_several_problems_are_reported_together_in_their_order() -> None:
    error = refusal("passes:\n  - test_clash_part: {bits: 9}\n  - test_needs_prt\ntarget: {threads: 0}\n")
    assert error.plan == "<plan>:2   - test_clash_part: {bits: 9}"
    assert "and 2 more: <plan>:3: no pass is called 'test_needs_prt'; <plan>:4: target.threads" in error.message


def test_a_union_reports_the_branch_that_was_meant() -> None:
    error = refusal("decode: {speculative: {drafter: {prompt_lookup: {max_ngrm: 3}}}}\n")
    assert error.message == "prompt_lookup has no field 'max_ngrm'"
    error = refusal("decode: {speculative: {drafter: prompt_lookup, tree: {budget: many}}}\n")
    assert error.message == "decode.speculative.tree.budget: expected 'auto' or an integer, got 'many'"


def test_conflicts_and_requirements_are_refused_before_anything_else() -> None:
    twice = refusal("passes:\n  - test_drop_part: {layers: [1]}\n  - test_drop_part: {layers: [2]}\n")
    assert (twice.code, twice.plan) == ("plan-conflict", "<plan>:2   - test_drop_part: {layers: [1]}")
    assert "only once; the other is at <plan>:3" in twice.message
    clash = refusal("passes:\n  - test_drop_part: {layers: [1]}\n  - test_clash_part\n")
    assert clash.message.startswith("test_drop_part and test_clash_part exclude each other; the other is at <plan>:3")
    missing = refusal("passes: [test_needs_part]\n")
    assert (missing.code, missing.fix) == ("plan-requires", "add test_clash_part to the plan")
    assert Plan(passes=["test_needs_part", "test_clash_part"]).passes


def test_target_options_that_would_be_ignored_are_refused() -> None:
    assert refusal("target:\n  backend: triton\n  ops: standard\n").plan == "<plan>:3   ops: standard"
    assert refusal("target: {device: cuda, threads: 2}\n").code == "plan-conflict"


def test_python_plans_get_the_same_errors_with_paths_for_lines() -> None:
    with pytest.raises(PlanError) as caught:
        Plan(passes=[{"test_clash_part": {"bits": 1}}])
    assert (caught.value.code, caught.value.plan) == ("plan-bad-value", "passes[0].test_clash_part.bits")


def test_plan_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "fast-cpu.yaml").write_text(GOOD)
    with pytest.raises(PlanError) as caught:
        Plan.from_yaml(tmp_path / "fast-cpus.yaml")
    assert (caught.value.code, caught.value.fix) == ("plan-not-found", f"did you mean {tmp_path / 'fast-cpu.yaml'}?")
    with pytest.raises(PlanError, match="is a directory"):
        Plan.from_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(PlanError, match="not UTF-8"):
        Plan.from_yaml(tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(PlanError, match="the plan is empty"):
        Plan.from_yaml(tmp_path / "empty.yaml")


def test_yaml_is_read_as_version_1_2() -> None:
    data, _ = parse("a: no\nb: 1e-5\nc: 0o17\nd: 1:30\ne: true\nf: 010\ng: ~\nh: .5\ni: 2024-01-01\nj: -.inf\n", "x")
    assert data == {
        "a": "no", "b": 1e-5, "c": "0o17", "d": "1:30", "e": True, "f": "010", "g": None, "h": 0.5, "i": "2024-01-01", "j": float("-inf")
    }  # fmt: skip
    assert parse(dump(data), "x")[0] == data


def test_sources_do_not_make_plans_differ() -> None:
    assert Source("a", "x") == Source()
    assert Plan.from_yaml("# a comment\n\nname: x\n") == Plan(name="x")
