"""What every registered attack promises. A new attack is one row of `ROWS`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

import fedsec
from fedsec import plugins
from fedsec.plugins import PluginSpec
from fedsec.types import Seat


@dataclass(frozen=True)
class Row:
    """`some`: parameters of a quick attack. `measure`: what grows with its success, and the same without an attack."""

    some: Mapping[str, Any]
    measure: tuple[str, str]
    margin: float
    """How far success lies above chance."""


ROWS = {"gradinversion": Row({"images": 2, "rounds": "last", "budget_s": 2.0}, ("psnr", "prior_psnr"), margin=20.0)}
# Attacks from clients' seats spoil the model instead: their success is what they change.
CLIENTS: dict[str, Mapping[str, Any]] = {
    "poisoning": {"fraction": 0.3, "method": "sign_flip"},
    "backdoor": {"fraction": 0.5, "target": 0},
}
# Attacks on the trained model are judged against the truth of membership; what they find depends on the training.
OUTSIDERS: dict[str, Mapping[str, Any]] = {
    "extras": {"samples": 20},
    "membership": {"methods": "loss", "shadows": 0},
    "modelinversion": {"steps": 5, "starts": 1},
    "attribute": {"strength": 0.02},
    "property": {"trait": "class", "shadows": 20, "low": 0.2, "high": 0.8},
}
# What is left of an update under this much noise tells nothing: no attack may claim to have found something in it.
NOTHING_TO_FIND = "gaussian:sigma=1e4"
TINY = {"data": {"name": "synthetic-cxr:images=260"}, "model": {"name": "lenet"}, "federation": {"engine": "serial"}}


def results(name: str, folder: Path, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Leakage without a defense, and where there is nothing to find."""
    spec = PluginSpec(name, ROWS[name].some)
    done = fedsec.run(
        {**TINY, "seed": seed},
        attack=str(spec),
        defense=NOTHING_TO_FIND,
        clients=2,
        rounds=2,
        local_epochs=1,
        out=folder,
    )
    return {"found": done["cells"][0]["leakage"], "nothing": done["cells"][1]["leakage"]}


def test_the_table_is_complete() -> None:
    assert set(ROWS) | set(CLIENTS) | set(OUTSIDERS) == set(plugins.names("attacks"))


@pytest.mark.parametrize("name", OUTSIDERS)
def test_an_outsider_leaves_the_training_alone_and_repeats(name: str, tmp_path: Path) -> None:
    spec = str(PluginSpec(name, OUTSIDERS[name]))
    # 200 people on either side whose attribute is known are the least that is compared.
    people = name in ("attribute", "property")
    tables = {**TINY, "data": {"name": "synthetic-cxr:images=2200"}} if people else TINY
    if name == "extras":  # something has to be sent beside the parameters
        tables = {**TINY, "federation": {"engine": "serial", "strategy": "fedslid"}}
    runs = [
        fedsec.run(tables, attack=a, clients=2, rounds=1, local_epochs=1, out=tmp_path / folder)["cells"][0]
        for folder, a in (("once", spec), ("again", spec), ("plain", "none"))
    ]
    assert runs[0]["training"] == runs[2]["training"] and runs[0]["utility"] == runs[2]["utility"]
    assert runs[0]["leakage"] == runs[1]["leakage"] and runs[0]["leakage"]
    json.dumps(runs[0], allow_nan=False)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_s_attack_acts_and_is_recorded_and_repeats(name: str, tmp_path: Path) -> None:
    spec = PluginSpec(name, CLIENTS[name])
    cells = []
    for folder in ("once", "again"):
        out = tmp_path / folder
        done = fedsec.run(TINY, attack=str(spec), defense="median", clients=4, rounds=2, local_epochs=1, out=out)
        cells.append(done["cells"])
    for cell, other in zip(*cells, strict=True):
        found = cell["robustness"]
        assert len(found["malicious_clients"]) == (2 if name == "backdoor" else 1)
        assert found["tampering"] > 0 or found["tampered_images"] > 0
        assert found == other["robustness"]
        assert cell["utility"] == other["utility"]
    assert 0 <= cells[0][1]["robustness"]["detection_auroc"]["value"] <= 1


@pytest.fixture(scope="module", params=list(ROWS))
def attacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    return request.param, results(request.param, tmp_path_factory.mktemp("attack") / "run")


def test_it_beats_chance_where_there_is_something_and_not_where_there_is_nothing(
    attacked: tuple[str, dict[str, Any]],
) -> None:
    name, leakage = attacked
    success, chance = ROWS[name].measure
    for table in leakage["found"]["by_round"].values():
        assert table[success]["value"] > table[chance]["value"] + ROWS[name].margin
    for table in leakage["nothing"]["by_round"].values():
        assert table[success]["value"] < table[chance]["value"] + 1
        assert table["certified"] == 0


def test_determinism_by_seed(attacked: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    name, leakage = attacked

    def timeless(value: Any) -> str:
        text = json.dumps(value, sort_keys=True)
        return json.dumps(json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if "seconds" not in k}))

    assert timeless(results(name, tmp_path / "again")) == timeless(leakage)
    assert timeless(results(name, tmp_path / "other", seed=1)) != timeless(leakage)


@pytest.mark.parametrize("name", [*ROWS, *CLIENTS, *OUTSIDERS])
def test_parameters_survive_json(name: str) -> None:
    for params in ({}, {**CLIENTS, **OUTSIDERS}.get(name) or ROWS[name].some):
        attack = plugins.build("attacks", PluginSpec(name, params))
        text = json.dumps(plugins.parameters(attack))
        assert plugins.construct(type(attack), json.loads(text), name) == attack


@pytest.mark.parametrize("name", [*ROWS, *CLIENTS, *OUTSIDERS])
def test_the_seat_is_one_of_the_four(name: str) -> None:
    assert plugins.load("attacks", name).seat in get_args(Seat)
