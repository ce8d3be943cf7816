"""The one registry: every pass, drafter and policy that a plan can name.

A plan part is a frozen pydantic model; defining the class registers it under `kind` and the snake-case class name. Plan parser, command
line, documentation and test matrix all read this registry; there is no second list.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, SchemaValidator, core_schema

from planc.runtime.errors import PlancError

_PARTS: dict[str, dict[str, type[PlanPart]]] = {}
_KIND_MARK = "x-planc-kind"


class PlanPart(BaseModel):
    """Base of everything that a plan can name: fields are the plan options, `key` is the name."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")  # an infinite option is written as `.inf`
    kind: ClassVar[str] = ""
    key: ClassVar[str] = ""
    conflicts: ClassVar[tuple[str, ...]] = ()  # keys that may not stand in the same plan; its own key: at most once
    requires: ClassVar[tuple[str, ...]] = ()  # keys that must stand in the same plan

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not cls.kind or cls.__dict__.get("kind"):  # a class that sets `kind` opens a kind, it is not a member
            _PARTS.setdefault(cls.kind, {})
            return
        cls.key = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        _PARTS[cls.kind][cls.key] = cls

    def item(self) -> dict[str, Any]:
        """This part as it stands in a plan: `{key: {options that differ from the default}}`."""
        return {self.key: self.model_dump(mode="json", exclude_defaults=True)}


def parts(kind: str) -> dict[str, type[PlanPart]]:
    """Every registered part of `kind`, by plan key."""
    return dict(_PARTS.get(kind, {}))


def kinds() -> tuple[str, ...]:
    """Every kind that has been opened, such as `pass` and `drafter`."""
    return tuple(kind for kind in _PARTS if kind)


class Item:
    """Annotation of a plan item of `kind`: validates `{key: options}`, `key` or an instance; error locations follow the YAML path.

    The registry is read when a value is validated, not when the model that holds the item is defined, so a part may be defined later.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[str, type[PlanPart]] = {}
        self._validator: SchemaValidator | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate, serialization=core_schema.plain_serializer_function_ser_schema(lambda part: part.item())
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {_KIND_MARK: self.kind}  # parts may hold parts of their own kind: `json_schema` turns the mark into a reference

    def _validate(self, value: Any) -> PlanPart:
        known = parts(self.kind)
        if isinstance(value, PlanPart):
            if known.get(value.key) is not type(value):
                context = {"kind": self.kind, "name": type(value).__name__, "known": tuple(known)}
                raise PydanticCustomError("part_unknown", "{name} is not a {kind}", context)
            return value
        key = _key(value)
        if key is None:
            raise PydanticCustomError("part_form", "write one {kind} here, as `name` or `name: {options}`", {"kind": self.kind})
        if key not in known:
            context = {"kind": self.kind, "name": key, "known": tuple(known)}
            raise PydanticCustomError("part_unknown", "no {kind} is called {name}", context)
        try:
            return self._union(known).validate_python(value)  # type: ignore[no-any-return]
        except PlancError as error:  # raised by a part's own validator: carry it to where the place in the plan is known
            raise PydanticCustomError("part_refused", "{message}", {"message": error.message, "error": error}) from error

    def _union(self, known: dict[str, type[PlanPart]]) -> SchemaValidator:
        if self._validator is None or known != self._known:
            choices: dict[Any, CoreSchema] = {
                key: core_schema.no_info_before_validator_function(_options(key), cls.__pydantic_core_schema__)
                for key, cls in known.items()
            }
            self._validator = SchemaValidator(core_schema.tagged_union_schema(choices=choices, discriminator=_key))
            self._known = known
        return self._validator


def _key(value: Any) -> str | None:
    if isinstance(value, PlanPart):
        return value.key
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and len(value) == 1:
        return str(next(iter(value)))
    return None


def _options(key: str) -> Any:
    def unwrap(value: Any) -> Any:
        if isinstance(value, PlanPart):
            return value
        return {} if isinstance(value, str) or value[key] is None else value[key]

    return unwrap


def item_of(kind: str) -> Any:
    """Annotated type of one plan item of `kind`, for use in pydantic models."""
    return Annotated[Any, Item(kind)]


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema (Draft 2020-12) of `model`, with every registered part that it can hold under `$defs/KIND`."""
    defs: dict[str, Any] = {}

    def take(owner: type[BaseModel], prefix: str) -> Any:
        schema = owner.model_json_schema(ref_template=f"#/$defs/{prefix}{{model}}")
        for name, definition in schema.pop("$defs", {}).items():
            defs[prefix + name] = resolve(definition)
        return resolve(schema)

    def resolve(schema: Any) -> Any:
        if isinstance(schema, list):
            return [resolve(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        if kind := schema.get(_KIND_MARK):
            if kind not in defs:
                defs[kind] = None  # reserved: a part may hold parts of its own kind
                defs[kind] = {"oneOf": [form for key, cls in parts(kind).items() for form in _forms(cls, take(cls, f"{kind}.{key}."))]}
            # a default that is a part would be printed as its bare options, so it is left out
            return {**{name: value for name, value in schema.items() if name not in (_KIND_MARK, "default")}, "$ref": f"#/$defs/{kind}"}
        return {name: resolve(value) for name, value in schema.items()}

    schema = take(model, "")
    for kind, definition in defs.items():
        if definition == {"oneOf": []}:  # an empty oneOf is not valid; a kind without parts admits nothing
            defs[kind] = {"not": {}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": defs}


def _forms(cls: type[PlanPart], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The ways to write a part: `{key: options}`, and, where no option is required, `key` alone or with nothing after the colon."""
    about = (cls.__doc__ or "").strip().split("\n")[0]
    optional = not any(field.is_required() for field in cls.model_fields.values())
    body = {"anyOf": [options, {"type": "null"}]} if optional else options
    mapping = {"type": "object", "description": about, "properties": {cls.key: body}, "required": [cls.key], "additionalProperties": False}
    return [{"const": cls.key, "description": about}, mapping] if optional else [mapping]
