"""Where a plan was written: YAML that remembers its lines, and pydantic's findings turned into errors that name line, reason and fix.

Plans are read as YAML 1.2 core: `true`/`false` are the only booleans, `1e-5` is a number, `no` and `off` are strings. Anchors, aliases and
tags are refused, because a plan is data and not a language.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from planc.runtime.errors import PlanError
from planc.runtime.registry import kinds, parts

YamlPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe loader with the scalars of YAML 1.2 core."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - declared so in the base class


class _Dumper(yaml.SafeDumper):
    """Safe dumper that also quotes what only YAML 1.2 would read as a number, and starts lists below their key."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012 - declared so in the base class
        first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        breaks = any(char in "\r\x85\u2028\u2029\ufeff" for char in data)  # YAML folds these into line feeds unless they are escaped
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper.represent_str)

_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("tag:yaml.org,2002:float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), [*_first, *([""] if "null" in _tag else [])])


class Source:
    """The text of a plan and the line of each of its parts. Two sources never make two plans differ."""

    def __init__(self, name: str = "", text: str = "", root: yaml.Node | None = None) -> None:
        self.name = name
        self._lines = text.splitlines()
        self._root = root

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source)

    def __hash__(self) -> int:
        return 0

    def line(self, path: Sequence[str | int]) -> int | None:
        """Line number, from 1, of the deepest part of `path` that the text holds; None without a text."""
        if self._root is None:
            return None
        node, mark = self._root, self._root.start_mark
        for step in path:
            if isinstance(node, yaml.MappingNode):
                pair = next(((key, value) for key, value in node.value if key.value == str(step)), None)
                if pair is None:
                    break
                mark, node = pair[0].start_mark, pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                mark = node.start_mark
            else:
                break
        return int(mark.line) + 1

    def where(self, path: Sequence[str | int]) -> str | None:
        """`demo.yaml:7   - skip_layers: {layers: [12, 30]}`; None without a text."""
        line = self.line(path)
        return None if line is None else self.quote(line)

    def quote(self, line: int) -> str:
        """File, line and the text of line number `line`."""
        text = self._lines[line - 1].strip() if 0 < line <= len(self._lines) else ""
        return f"{self.name}:{line}   {text}".rstrip()


def read(plan: str | Path) -> tuple[dict[str, Any], Source]:
    """Data and source of a plan: a path, or the YAML text itself (text holds a line break or `: `)."""
    if isinstance(plan, str) and ("\n" in plan or ": " in plan):
        return parse(plan, "<plan>")
    path = Path(plan)
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise PlanError("plan-syntax", f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        if path.is_dir():
            raise PlanError("plan-not-found", f"{path} is a directory, not a plan file", fix="name the YAML file in it") from None
        beside = [str(path.parent / name) for name in nearest(path.name, _names(path.parent))]
        hint = f"did you mean {beside[0]}?" if beside else "give the path of a YAML file, or the plan's text"
        raise PlanError("plan-not-found", f"cannot read the plan {path}: {error.strerror or error}", fix=hint) from None


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml")] if folder.is_dir() else []


def parse(text: str, name: str) -> tuple[dict[str, Any], Source]:
    """Data and source of a plan's YAML text; `name` is what messages call it."""
    source = Source(name, text)
    try:
        for event in yaml.parse(text, _Loader):
            if getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None:
                place = source.quote(event.start_mark.line + 1) if event.start_mark else name
                raise PlanError("plan-syntax", "anchors, aliases and tags have no place in a plan", plan=place, fix="write the value out")
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            found = "empty" if root is None else "not a mapping"
            raise PlanError("plan-syntax", f"the plan is {found}", plan=source.quote(1), fix="start with the line `planc: 1`")
        _check_keys(root, source)
        return dict(loader.construct_document(root)), Source(name, text, root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        place = source.quote(mark.line + 1) if mark else name
        raise PlanError(
            "plan-syntax", f"not valid YAML: {problem}", plan=place, fix="check indentation, brackets and colons there"
        ) from None
    except RecursionError:
        raise PlanError("plan-syntax", "the plan is nested too deeply", plan=name) from None


def _check_keys(node: yaml.Node, source: Source) -> None:
    """Refuse keys that are no strings and keys that stand twice: YAML itself would silently let the last one win."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, source)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            raise PlanError("plan-syntax", "a key must be a name", plan=source.quote(line), fix="put the key in quotes, or remove it")
        if key.value in seen:
            message = f"the key {key.value!r} stands twice, first in line {seen[key.value]}"
            raise PlanError(
                "plan-syntax", message, plan=source.quote(line), fix="remove one of them; a list may repeat a name, a mapping may not"
            )
        seen[key.value] = line
        _check_keys(value, source)


def dump(data: dict[str, Any]) -> str:
    """YAML text of plain data: keys in their order, innermost lists and mappings on one line."""
    flow = None if any(isinstance(value, dict | list) for value in data.values()) else False  # never the whole plan on one line
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, allow_unicode=True, width=120))


# ---- from pydantic's findings to one PlanError -------------------------------------------------------------------------------------


def explain(error: ValidationError, data: Any, source: Source, schema: dict[str, Any]) -> PlanError:
    """The PlanError for a failed validation of `data`; `schema` (JSON Schema of the plan) tells which fields there are."""
    found: dict[YamlPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_real_path(detail, data), []).append(detail)
    # A value that fits no branch of a union fails in each; the branch that got furthest is the one that was meant.
    deepest = {path: details for path, details in found.items() if not any(len(p) > len(path) and p[: len(path)] == path for p in found)}
    problems = [_problem(path, details, schema) for path, details in deepest.items()]
    places = [source.where(path) or dotted(path) for path in deepest]
    lines = [source.line(path) or 0 for path in deepest]
    order = sorted(
        range(len(problems)), key=lambda i: (lines[i], problems[i][0] != "plan-unknown-field")
    )  # a slip explains a missing field
    code, message, fix = problems[order[0]]
    rest = [f"{places[i].split('   ')[0]}: {problems[i][1]}" for i in order[1:]]
    if rest:
        message += f" (and {len(rest)} more: {'; '.join(rest[:3])}{'; ...' if len(rest) > 3 else ''})"
    return PlanError(code, message, plan=places[order[0]], fix=fix)


def _real_path(detail: ErrorDetails, data: Any) -> YamlPath:
    """The error's location without the names that pydantic gives to branches of a union."""
    path: list[str | int] = []
    for step in detail["loc"]:
        in_list = isinstance(data, list | tuple) and isinstance(step, int) and step < len(data)
        if in_list or (isinstance(data, Mapping) and step in data):
            data = data[step]
            path.append(step)
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return tuple(path)


def dotted(path: Iterable[str | int]) -> str:
    """`passes[0].skip_layers.layers`; "the plan" for the empty path."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or "the plan"


def _problem(path: YamlPath, details: list[ErrorDetails], schema: dict[str, Any]) -> tuple[str, str, str | None]:
    """Code, message and fix of one place."""
    first, context = details[0], details[0].get("ctx", {})
    owner = next((step for step in reversed(path[:-1]) if isinstance(step, str)), "the plan")
    match first["type"]:
        case "extra_forbidden":
            return (
                "plan-unknown-field",
                f"{owner} has no field {path[-1]!r}",
                did_you_mean(str(path[-1]), _fields(schema, path[:-1]), "fields"),
            )
        case "missing":
            return "plan-bad-value", f"{owner} needs the field {path[-1]!r}", f"add {path[-1]!r} to {dotted(path[:-1])}"
        case "part_unknown":
            kind, name = context["kind"], context["name"]
            for other in kinds():
                if other != kind and name in parts(other):
                    known = ", ".join(sorted(context["known"])) or "none"
                    return (
                        "plan-unknown-name",
                        f"{name!r} is a {other}, not a {kind}",
                        f"move it to where a {other} belongs; known: {known}",
                    )
            return "plan-unknown-name", f"no {kind} is called {name!r}", did_you_mean(name, context["known"], "known")
        case "part_refused":
            cause = context["error"]
            return cause.code, cause.message, cause.fix
    wanted = list(dict.fromkeys(_wanted(detail) for detail in details))
    allowed = [value for detail in details for value in re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))]
    near = nearest(str(first["input"]), allowed)
    if first["type"] in ("value_error", "assertion_error", "part_form"):
        return "plan-bad-value", f"{dotted(path)}: {wanted[0]}", None
    value = "nothing" if first["input"] is None else repr(first["input"])
    message = f"{dotted(path)}: expected {' or '.join(wanted)}, got {value if len(value) <= 60 else value[:57] + '...'}"
    return "plan-bad-value", message, f"did you mean {near[0]!r}?" if near else None


def _wanted(detail: ErrorDetails) -> str:
    """What the field takes, in words."""
    limits = detail.get("ctx", {})
    match detail["type"]:
        case "tuple_type" | "list_type":
            return "a list"
        case "model_type" | "dict_type" | "model_attributes_type":
            return "a mapping of options"
        case "too_short":
            return f"at least {limits['min_length']} item(s)"
        case "too_long":
            return f"at most {limits['max_length']} item(s)"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return "a number " + detail["msg"].removeprefix("Input should be ")
        case "part_form":
            return detail["msg"]
    text = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").removeprefix("Input should be ")
    return text.split(", unable")[0].replace("a valid integer", "an integer").replace("a valid ", "a ")


def _fields(schema: dict[str, Any], path: YamlPath) -> list[str]:
    """Field names that the schema allows in the mapping at `path`."""
    places = _branches(schema, schema)
    for step in path:
        if isinstance(step, str):
            held = [place["properties"][step] for place in places if step in place.get("properties", {})]
            places = [branch for place in held for branch in _branches(schema, place)]
    return sorted({name for place in places for name in place.get("properties", {})})


def _branches(schema: dict[str, Any], place: dict[str, Any]) -> list[dict[str, Any]]:
    """`place` with its references, alternatives and list items opened."""
    if "$ref" in place:
        return _branches(schema, schema["$defs"][place["$ref"].removeprefix("#/$defs/")])
    options = [*place.get("anyOf", ()), *place.get("oneOf", ()), *place.get("allOf", ())]
    if isinstance(items := place.get("items"), dict):
        options.append(items)
    return [place, *(branch for option in options for branch in _branches(schema, option))]


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of the names in `known` that `name` may be a slip of."""
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str], label: str) -> str:
    """`did you mean 'x'? known: a, b, c`."""
    known = sorted(known)
    near = nearest(name, known)
    return (f"did you mean {near[0]!r}? " if near else "") + f"{label}: {', '.join(known) or 'none'}"
