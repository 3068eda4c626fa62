"""Pooled and local training beside the federation: same images, same judges, and nothing between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedsec
from fedsec import config
from fedsec.errors import ConfigError
from fedsec.federation.assemble import build_stack, resolve
from fedsec.federation.topology import POOLED

TINY: dict[str, Any] = {
    "data": {"name": "synthetic-cxr:images=300", "max_train": 60, "min_images": 1},
    "model": {"name": "lenet"},
    "federation": {"engine": "serial", "clients": 3, "rounds": 2, "local_epochs": 1, "batch_size": 8},
}


def tables(**federation: Any) -> dict[str, Any]:
    return {**TINY, "federation": {**TINY["federation"], **federation}}


def run(out: Path, attack: str = "none", defense: str = "none", **federation: Any) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = fedsec.run(tables(**federation), attack=attack, defense=defense, out=out)["cells"]
    return cells


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    cells = run(tmp_path_factory.mktemp("run") / "all", topology=["federated", "central", "local"])
    return {cell["topology"]: cell for cell in cells}


def test_all_three_are_judged_on_the_same_hospitals(side_by_side: dict[str, dict[str, Any]]) -> None:
    assert set(side_by_side) == {"federated", "central", "local"}
    judges = [(sorted(c["utility"]["client_auc"]), c["utility"]["auc"]["n"]) for c in side_by_side.values()]
    assert judges[0] == judges[1] == judges[2]
    assert len(judges[0][0]) + len(side_by_side["central"]["utility"].get("clients_skipped", [])) == 3
    assert [side_by_side[t]["assumptions"]["clients"] for t in ("federated", "central", "local")] == [3, 1, 3]


def test_nothing_is_sent_where_everybody_trains_alone(side_by_side: dict[str, dict[str, Any]]) -> None:
    assert side_by_side["local"]["cost"]["upload_bytes_per_client"] == 0
    assert side_by_side["federated"]["cost"]["upload_bytes_per_client"] > 0


def test_central_training_is_a_federation_of_one_client(
    side_by_side: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    alone = run(tmp_path / "one", clients=1)[0]
    for measure in ("auc", "accuracy", "balanced_accuracy"):
        assert alone["utility"][measure] == side_by_side["central"]["utility"][measure]


def test_central_training_under_dp_has_one_budget(tmp_path: Path) -> None:
    cell = run(tmp_path / "dp", defense="dp:epsilon=4", topology="central")[1]
    assert cell["topology"] == "central"
    assert set(cell["privacy"]["per_client"]) == {POOLED}
    assert 0 < cell["privacy"]["epsilon"] <= 4


def test_a_pooled_model_can_be_attacked_from_outside(tmp_path: Path) -> None:
    cell = run(tmp_path / "mia", attack="membership:methods=loss,shadows=0", topology="central")[0]
    assert cell["leakage"]["membership"]


def test_in_a_grid_the_baselines_stand_plain() -> None:
    cells = config.expand(
        {
            **tables(topology=["federated", "central", "local"], strategy="fedsgd", participation="0.5"),
            "attack": ["gradinversion"],
            "defense": ["dp", "he"],
        }
    )
    kinds = [(c.federation.topology, c.attack is not None, c.label(), c.federation.strategy) for c in cells]
    assert kinds.count(("central", False, "none", "fedavg")) == kinds.count(("local", False, "none", "fedavg")) == 1
    assert [k for k in kinds if k[0] == "federated"] == [
        ("federated", True, label, "fedsgd") for label in ("none", "dp", "he")
    ]
    assert len(kinds) == 5


@pytest.mark.parametrize(
    ("topology", "attack", "defense", "federation", "words"),
    [
        ("central", "none", "he", {}, "he protects what is sent"),
        ("local", "none", "median", {}, "median protects what is sent"),
        ("central", "gradinversion", "none", {}, "gradinversion needs the server's seat"),
        ("central", "poisoning:fraction=0.3", "none", {}, "poisoning needs the client's seat"),
        ("local", "membership", "none", {}, "no model is released"),
        ("central", "none", "none", {"strategy": "fedsgd"}, "there is no --strategy fedsgd"),
        ("local", "none", "none", {"participation": "0.5"}, "participation says who is heard"),
    ],
)
def test_what_has_no_place_is_refused(
    topology: str, attack: str, defense: str, federation: dict[str, Any], words: str
) -> None:
    cell = config.expand(
        {**tables(topology=topology, **federation), "attack": [attack], "defense": [defense], "baseline": False}
    )[0]
    with pytest.raises(ConfigError, match=words):
        build_stack(resolve(cell))


def test_an_unknown_topology_is_named() -> None:
    with pytest.raises(ConfigError, match="topology=ring is not allowed"):
        config.expand(tables(topology="ring"))
