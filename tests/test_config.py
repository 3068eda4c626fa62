"""Configuration: tables and words become cells, cells become hashes, and nothing is accepted unseen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fedsec.config import Cell, DataConfig, FederationConfig, ModelConfig, expand, read_resolved, read_toml, set_path
from fedsec.errors import ConfigError
from fedsec.plugins import PluginSpec

names = st.from_regex(r"[a-z][a-z0-9_]{0,7}", fullmatch=True)
specs = st.builds(
    PluginSpec, names, st.dictionaries(names.filter(lambda n: n != "name"), st.integers() | names, max_size=3)
)
cells = st.builds(
    Cell,
    data=st.builds(DataConfig, name=names, partition=st.sampled_from(["iid", "dirichlet"]), alpha=st.floats(0.01, 100)),
    model=st.builds(ModelConfig, name=names, norm=st.sampled_from(["group", "batch", "none"])),
    federation=st.builds(FederationConfig, clients=st.none() | st.integers(1, 50), lr=st.floats(1e-6, 10)),
    attack=st.none() | specs,
    defense=st.lists(specs, max_size=2).map(tuple),
    seed=st.integers(0, 2**31),
)


@given(cells)
def test_cells_survive_json_and_keep_their_key(cell: Cell) -> None:
    again = Cell.from_json(json.loads(json.dumps(cell.to_json())))
    assert again == cell
    assert again.key() == cell.key()


@given(cells, st.integers(0, 2**31))
def test_the_key_depends_on_every_field(cell: Cell, seed: int) -> None:
    other = dataclasses.replace(cell, seed=seed)
    assert (other.key() == cell.key()) == (seed == cell.seed)
    without = dataclasses.replace(cell, attack=None)
    assert cell.key(without_attack=True) == without.key()


def test_lists_span_the_grid_and_the_baseline_comes_first() -> None:
    tables = {
        "attack": ["gradinversion:images=4"],
        "defense": [{"name": "dp", "epsilon": [1, 3, 8]}, "gaussian:sigma=0.1"],
        "federation": {"lr": [0.01, 0.02]},
        "seeds": 2,
    }
    grid = expand(tables)
    assert len(grid) == 2 * 2 * (1 + 3 + 1)
    assert grid[0].defense == ()
    assert {c.seed for c in grid} == {0, 1}
    assert len({c.key() for c in grid}) == len(grid)
    assert len(expand({**tables, "baseline": False})) == 2 * 2 * 4


def test_words_and_tables_mean_the_same() -> None:
    word = expand({"defense": ["dp+gaussian:sigma=0.1"], "baseline": False})[0]
    table = expand({"defense": [{"stack": [{"name": "dp"}, {"name": "gaussian", "sigma": "0.1"}]}], "baseline": False})[
        0
    ]
    assert word == table


def test_set_reaches_every_setting() -> None:
    tables: dict[str, object] = {}
    for word in ("federation.lr=0.5", "model.options.init=default", "data.partition=site", "seeds=3"):
        set_path(tables, word)
    assert tables == {
        "federation": {"lr": 0.5},
        "model": {"options": {"init": "default"}},
        "data": {"partition": "site"},
        "seeds": 3,
    }


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"federaton": {}}, "did you mean 'federation'"),
        ({"federation": {"round": 3}}, "did you mean 'rounds'"),
        ({"federation": {"rounds": 0}}, "greater than or equal to 1"),
        ({"federation": {"local_epochs": 1, "local_steps": 1}}, "not both"),
        ({"data": {"alpha": []}}, "empty list"),
        ({"data": {"partition": "sites"}}, "'iid'"),
        ({"defense": [{"epsilon": 3}]}, "needs a name"),
        ({"cells": [{"data": {}}]}, "not a resolved cell"),
    ],
)
def test_wrong_tables_are_one_line(tables: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        expand(tables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["lr=3", "federation", "federatin.lr=3", "=", "federation.lr"])
def test_wrong_assignments_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        set_path({}, word)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(tomli_w.dumps({"federation": {"lr": 0.1}}))
    assert read_toml(path) == {"federation": {"lr": 0.1}}
    path.write_text("[federation\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(path)
    with pytest.raises(ConfigError, match="no such"):
        read_toml(tmp_path / "absent.toml")
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"not a resolved\.json"):
        read_resolved(tmp_path / "r.json")
