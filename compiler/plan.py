"""The plan: what to do to a model and how to decode with it, as data. YAML and Python are two ways to write the same pydantic models."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, PrivateAttr, ValidationError, model_validator

from planc.compiler.cache_conflicts import check_cache
from planc.compiler.plan_source import Source, YamlPath, dotted, dump, explain, read
from planc.compiler.search.spec import Search, check_search
from planc.runtime.decode import Decode
from planc.runtime.errors import PlanError
from planc.runtime.registry import PlanPart, item_of, json_schema, kinds, parts

if TYPE_CHECKING:
    from planc.compiler.passbase import Pass as PassItem
else:
    PassItem = item_of("pass")

VERSION = 1  #: schema version of plans that this release reads and writes


class Target(BaseModel):
    """What the program is lowered for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["onnx", "reference", "triton"] = Field("onnx", description="who runs the graph")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where it runs")
    threads: PositiveInt | None = Field(None, description="CPU threads inside one operation; left out: one per physical core")
    ops: Literal["fast", "standard"] = Field("fast", description="onnx only: ONNX Runtime's own operators, or standard opsets alone")
    capacity: PositiveInt | None = Field(
        None, description="slots of the KV cache per sequence; left out: what the positions allow, at most 4096"
    )


class Calibration(BaseModel):
    """Text, or for classifiers images, for passes that measure what goes through the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None = Field(None, description="a text file; counts from the folder of the plan")
    images: str | None = Field(None, description="a folder of image files; counts from the folder of the plan")
    count: PositiveInt = Field(32, description="how many of the images are used, evenly spread over the sorted names")
    tokens: PositiveInt = Field(16384, description="how many of its tokens are used")
    length: PositiveInt = Field(512, ge=2, description="tokens per sequence")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.text is None) == (self.images is None):
            raise ValueError("name one of text and images")
        return self


class Plan(BaseModel):
    """An inference plan: passes over the graph, the decoding policy, and the target.

    Passes are sorted into stages by the pipeline; their order inside a stage is kept. The lines of the YAML that a plan was read from stay
    with it (`where`) and never make two plans differ.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    planc: Literal[1] = Field(1, description="schema version")
    name: str | None = Field(None, description="a short name for tables")
    paper: PositiveInt | None = Field(None, description="number of the method in `planc papers`")
    description: str | None = Field(None, description="what the plan shows, in a sentence")
    passes: tuple[PassItem, ...] = Field((), description="rewrites of the model, one key per item")
    calibration: Calibration | None = Field(None, description="what passes calibrate on; left out: a short text that comes with planc")
    search: Search | None = Field(None, description="what is left open, for `planc search` to settle")
    decode: Decode = Field(default_factory=Decode, description="how tokens are chosen")
    target: Target = Field(default_factory=Target, description="what the program is lowered for")
    exactness: Literal["bitwise", "tokens"] = Field("bitwise", description="how closely a lossless loop must match the plain one")
    _source: Source = PrivateAttr(default_factory=Source)

    def __init__(self, source: Source | None = None, /, **data: Any) -> None:
        """Build from fields (in Python: `Plan(passes=[...], target=Target(...))`); `source` tells where they were read."""
        _load_parts()
        source = source or Source()
        _check_version(data, source)
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise explain(error, data, source, json_schema(type(self))) from None
        self._source = source
        _check_target(self)
        _check_relations(self)
        check_cache(self)
        if self.search is not None:
            check_search(self)

    @classmethod
    def from_yaml(cls, plan: str | Path) -> Plan:
        """The plan in a YAML file, or in YAML text (a string with a line break or `: `)."""
        data, source = read(plan)
        return cls(source, **data)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan in plain data, as `to_dict` gives it."""
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON types) with the schema version and all fields that differ from their default."""
        return {"planc": self.planc, **self.model_dump(mode="json", exclude_defaults=True)}

    def to_yaml(self) -> str:
        """YAML text that reads back to an equal plan."""
        return dump(self.to_dict())

    @classmethod
    def schema(cls) -> dict[str, Any]:  # type: ignore[override]
        """JSON Schema (Draft 2020-12) of plans with every known pass and policy, for editors."""
        _load_parts()
        return {**json_schema(cls), "title": "planc plan"}

    @property
    def folder(self) -> Path:
        """What paths in the plan count from: the folder of its file; the working directory when it was not read from one."""
        return Path(self._source.name).parent

    def where(self, *path: str | int) -> str | None:
        """`file:line   text` of a part, such as `where("passes", 0)`; None when the plan was not read from YAML."""
        return self._source.where(path)


def _load_parts() -> None:
    """Register every pass. Not at import: passes import the compiler, which imports this module."""
    import_module("planc.passes")


def _check_version(data: dict[str, Any], source: Source) -> None:
    version = data.get("planc", VERSION)
    if isinstance(version, int) and not isinstance(version, bool) and version != VERSION:
        fix = "update planc" if version > VERSION else f"write `planc: {VERSION}`"
        place = source.where(("planc",)) or "planc"
        raise PlanError("plan-version", f"the plan has schema version {version}; this release reads version {VERSION}", plan=place, fix=fix)


def _check_target(plan: Plan) -> None:
    """Refuse target options that the chosen backend would silently ignore."""
    target, place = plan.target, plan.where("target", "ops") or "target.ops"
    if target.device == "cuda" and target.backend != "triton":
        message = f"the {target.backend} backend runs on the CPU, but the device is cuda"
        raise PlanError("plan-conflict", message, plan=plan.where("target", "device") or "target.device", fix="remove `device`")
    if target.ops == "standard" and target.backend != "onnx":
        message = f"`ops: standard` chooses ONNX operators, but the backend is {target.backend}"
        raise PlanError("plan-conflict", message, plan=place, fix="remove `ops`, or use `backend: onnx`")
    if target.device == "cuda" and target.threads is not None:
        message = "`threads` counts CPU threads, but the device is cuda"
        raise PlanError("plan-conflict", message, plan=plan.where("target", "threads") or "target.threads", fix="remove `threads`")


def _check_relations(plan: Plan) -> None:
    """Check what the parts of a plan declare about each other, before anything is traced."""
    named = [*_parts_in(plan.passes, ("passes",)), *_parts_in(plan.search, ("search",)), *_parts_in(plan.decode, ("decode",))]
    places = [plan.where(*path) or dotted(path) for path, _ in named]
    for place, (path, part) in zip(places, named, strict=True):
        for key in part.conflicts:
            other = next((other for other, (at, it) in zip(places, named, strict=True) if it.key == key and at != path), None)
            if other is None:
                continue
            if key == part.key:
                reason, fix = f"{key} may stand in a plan only once", "remove one of them"
            else:
                reason, fix = f"{part.key} and {key} exclude each other", f"remove {part.key} or {key}"
            raise PlanError("plan-conflict", f"{reason}; the other is at {other}", plan=place, fix=fix)
        for key in part.requires:
            if not any(it.key == key for _, it in named):
                kind = next((kind for kind in kinds() if key in parts(kind)), "part")
                raise PlanError("plan-requires", f"{part.key} needs the {kind} {key}", plan=place, fix=f"add {key} to the plan")


def _parts_in(value: Any, path: YamlPath) -> Iterator[tuple[YamlPath, PlanPart]]:
    """Every part inside `value` with its path in the YAML, outer parts first."""
    if isinstance(value, PlanPart) and value.key:
        yield path, value
        path = (*path, value.key)
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _parts_in(getattr(value, name), (*path, name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _parts_in(item, (*path, index))
