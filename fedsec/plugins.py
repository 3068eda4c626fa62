"""How a name on the command line becomes an attack, a defense, a data set, a model or a strategy.

Names are found through entry points, ours exactly as a third party's. Listing them reads source text only, so that
`fedsec list` needs no torch and runs no plugin's code.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import math
import re
import typing
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from fedsec.errors import ConfigError

T = TypeVar("T")
KINDS = ("attacks", "defenses", "datasets", "models", "strategies")


@dataclasses.dataclass(frozen=True)
class PluginSpec:
    """A plugin's name and the parameters that were asked for, before they are checked."""

    name: str
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, word: str) -> PluginSpec:
        """Read `name` or `name:key=value,key=value`."""
        name, _, rest = word.partition(":")
        params: dict[str, Any] = {}
        for item in filter(None, rest.split(",")):
            key, equals, value = item.partition("=")
            if not equals or not key or key.strip() in params:
                problem = "is given twice" if key.strip() in params else "is not of the form key=value"
                raise ConfigError(f"{word}: '{item}' {problem}; write {name}:key=value,key=value")
            params[key.strip()] = value.strip()
        return cls(name.strip(), params)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> PluginSpec:
        """Read a configuration table with a `name` key."""
        if not isinstance(table.get("name"), str):
            raise ConfigError("a plugin table needs a name, such as name = 'dp'")
        return cls(table["name"], {k: v for k, v in table.items() if k != "name"})

    def to_table(self) -> dict[str, Any]:
        """The configuration table that `from_table` reads; an infinite number, which JSON lacks, as text."""
        params = {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in self.params.items()}
        return {"name": self.name, **params}

    def __str__(self) -> str:
        words = ",".join(f"{key}={_word(value)}" for key, value in self.params.items())
        return f"{self.name}:{words}" if words else self.name


def _word(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_stack(word: str) -> tuple[PluginSpec, ...]:
    """Read a stack such as `dp:epsilon=3+dos`; `none` is the empty stack."""
    if word == "none":
        return ()
    # A plus sign inside a number (1e+5) is followed by a digit, one between plugins by a letter.
    return tuple(PluginSpec.parse(part) for part in re.split(r"\+(?=[A-Za-z_])", word))


@cache
def _entry_points(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=f"fedsec.{kind}"):
        if point.name in found and found[point.name].value != point.value:
            warnings.warn(f"{kind}: '{point.name}' is offered twice; using {found[point.name].value}", stacklevel=2)
            continue
        found[point.name] = point
    return found


def names(kind: str) -> list[str]:
    """All registered names of a kind, sorted."""
    return sorted(_entry_points(kind))


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?' for the closest known name, else the list of known names."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(choices)}"


def load(kind: str, name: str) -> Any:
    """The class or function registered under this name.

    Raises:
        ConfigError: unknown name (with the nearest match), or a plugin that cannot be imported.
    """
    points = _entry_points(kind)
    if name not in points:
        singular = {"strategies": "strategy"}.get(kind, kind.removesuffix("s"))
        raise ConfigError(f"unknown {singular} '{name}': {nearest(name, points)}")
    try:
        return points[name].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind}: '{name}' ({points[name].value}) cannot be loaded: {error}") from error


def parameter_fields(cls: type) -> dict[str, tuple[Any, Any, str]]:
    """Parameter -> (annotation, default, description). Fields with `internal` in their metadata are no parameters."""
    known: Any = cls  # mypy holds that a type is not hashable
    return _fields(known)


@cache
def _fields(cls: Any) -> dict[str, tuple[Any, Any, str]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    result: dict[str, tuple[Any, Any, str]] = {}
    for item in dataclasses.fields(cls):
        if item.metadata.get("internal") or not item.init:
            continue
        default = item.default
        if default is dataclasses.MISSING and item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        extras = getattr(hints[item.name], "__metadata__", ())
        text = next((e.description for e in extras if isinstance(e, FieldInfo) and e.description), "")
        result[item.name] = (hints[item.name], default, text)
    return result


@cache
def _adapter(cls: Any, key: str) -> TypeAdapter[Any]:
    """What checks one parameter; making it costs a hundred times as much as using it, and grids use it often."""
    return TypeAdapter(parameter_fields(cls)[key][0])


def construct(cls: type[T], params: Mapping[str, Any], label: str) -> T:
    """Build a dataclass from untrusted parameters: names, types, ranges and choices are checked.

    Args:
        cls: a dataclass whose annotations say what is allowed.
        params: texts (from the command line) or typed values (from TOML).
        label: how messages name the thing, such as `dp` or `federation`.

    Raises:
        ConfigError: one line that names the parameter, its value and what is allowed.
    """
    fields = parameter_fields(cls)
    known: Any = cls
    values: dict[str, Any] = {}
    for key, value in params.items():
        if key not in fields:
            raise ConfigError(
                f"{label}: unknown parameter '{key}': {nearest(key, fields) if fields else 'it has none'}"
            )
        checked = _adapter(known, key)
        if isinstance(value, str) and value.lower() in ("none", "null"):
            with contextlib.suppress(ValidationError):  # some parameters know 'none' as a choice
                values[key] = checked.validate_python(None)
                continue
        try:
            values[key] = checked.validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{label}: {key}={value} is not allowed: {problem}") from None
    missing = [k for k, (_, default, _) in fields.items() if default is dataclasses.MISSING and k not in values]
    if missing:
        raise ConfigError(f"{label}: parameter '{missing[0]}' is required")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{label}: {error}") from None


def checked(kind: str, spec: PluginSpec) -> PluginSpec:
    """The same specification with converted parameters: a text and the number it stands for are then one."""
    plugin = build(kind, spec)
    return PluginSpec(spec.name, {key: getattr(plugin, key) for key in spec.params})


def build(kind: str, spec: PluginSpec) -> Any:
    """An instance of the dataclass plugin that this specification names."""
    return construct(load(kind, spec.name), spec.params, spec.name)


def parameters(plugin: Any) -> dict[str, Any]:
    """A plugin's parameters as plain values: `construct(type(plugin), parameters(plugin), …)` gives it back."""
    return {name: getattr(plugin, name) for name in parameter_fields(type(plugin))}


def summary(kind: str, name: str) -> str:
    """The one line that describes a plugin, read from its source without importing it.

    The line is the class attribute `protects` or `goal`, else the first line of the docstring.
    """
    point = _entry_points(kind)[name]
    module, _, attribute = point.value.partition(":")
    try:
        path = _source_of(module)
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        return f"(cannot be read: {error})"
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == attribute:
            return _class_line(node) or (ast.get_docstring(node) or "").partition("\n")[0]
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def _source_of(module: str) -> Path:
    """The file of a module, without executing anything but its (light) parent packages."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"no module {module}")
    return Path(spec.origin)


def _class_line(node: ast.ClassDef | ast.FunctionDef) -> str | None:
    for statement in node.body:
        if not isinstance(statement, (ast.AnnAssign, ast.Assign)):
            continue
        target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
        known = isinstance(target, ast.Name) and target.id in ("protects", "goal")
        if known and isinstance(statement.value, ast.Constant):
            return str(statement.value.value)
    return None
