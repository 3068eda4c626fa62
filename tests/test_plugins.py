"""Names and parameters of plugins: parsing, checking, describing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from fedsec import plugins
from fedsec.config import Cell
from fedsec.errors import ConfigError
from fedsec.files import write_json
from fedsec.plugins import PluginSpec


@dataclass(frozen=True)
class Sample:
    """A plugin with one parameter of each kind."""

    strength: Annotated[float, Field(gt=0, description="how much")] = 1.0
    count: int | None = None
    mode: Literal["one", "two"] = "one"
    flag: bool = False
    secret: int = field(default=7, metadata={"internal": True})


words = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)


@given(words, st.dictionaries(words, words, max_size=4))
def test_spec_survives_printing(name: str, params: dict[str, str]) -> None:
    spec = PluginSpec(name, params)
    assert PluginSpec.parse(str(spec)) == spec
    assert PluginSpec.from_table(spec.to_table() if "name" not in params else {"name": name}).name == name


@pytest.mark.parametrize("word", ["dp:epsilon", "dp:=3", "dp:epsilon=3,epsilon=4"])
def test_malformed_words_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="dp"):
        PluginSpec.parse(word)


def test_stack_splits_between_plugins_only() -> None:
    stack = plugins.parse_stack("dp:epsilon=1e+2,delta=1e-5+dos")
    assert [s.name for s in stack] == ["dp", "dos"]
    assert stack[0].params["epsilon"] == "1e+2"
    assert plugins.parse_stack("none") == ()


def test_parameters_are_converted_and_checked() -> None:
    built = plugins.construct(Sample, {"strength": "2.5", "count": "3", "mode": "two", "flag": "true"}, "sample")
    assert built == Sample(2.5, 3, "two", True)
    assert plugins.construct(Sample, {"count": "none"}, "sample").count is None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"strength": "-1"}, "greater than 0"),
        ({"strength": "much"}, "valid number"),
        ({"strenght": "1"}, "did you mean 'strength'"),
        ({"mode": "three"}, "'one' or 'two'"),
        ({"secret": "1"}, "unknown parameter 'secret'"),
        ({"count": "1.5"}, "integer"),
    ],
)
def test_wrong_parameters_are_named_in_one_line(params: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plugins.construct(Sample, params, "sample")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("sample: ")


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gradinversion'"):
        plugins.load("attacks", "gradinversio")


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_every_plugin_has_a_summary_and_loads(kind: str) -> None:
    for name in plugins.names(kind):
        line = plugins.summary(kind, name)
        assert line and "\n" not in line and "cannot be read" not in line
        plugins.load(kind, name)


def test_infinity_travels_through_files(tmp_path: Path) -> None:
    """`kappa=inf` switches the safety clip off; JSON has no number for it."""
    cell = Cell(defense=(PluginSpec.parse("fedavg:kappa=inf"),))
    plugins.build("defenses", cell.defense[0])
    write_json(tmp_path / "cell.json", cell.to_json())
    again = Cell.from_json(json.loads((tmp_path / "cell.json").read_text()))
    assert again.key() == cell.key()
    assert again.label() == "fedavg:kappa=inf"
    assert plugins.build("defenses", again.defense[0]).kappa == float("inf")
