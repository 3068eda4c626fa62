"""What every registered defense promises. A new defense is one row of `ROWS`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fedsec import plugins
from fedsec.defense import Defense
from fedsec.federation.engines.processes import Processes
from fedsec.federation.engines.serial import Serial
from fedsec.federation.round import client_update, run_round
from fedsec.federation.seats import Seats, Turn
from fedsec.plugins import PluginSpec
from fedsec.types import FederationPlan, RoundContext
from tests.federation import toy


@dataclass(frozen=True)
class Row:
    """`zero`: parameters of strength 0 (None: it has none). `some`: parameters with an effect."""

    some: dict[str, Any]
    zero: dict[str, Any] | None = None
    tolerance: float = 0.0
    """How exactly strength 0 is the identity."""
    random: bool = True
    """It draws at random."""
    adds_layers: bool = False
    """`prepare_model` adds tensors, which are shared as well."""


ROWS = {
    # DP-SGD without noise is refused by name; with next to none it is plain SGD to rounding.
    "dp": Row({"noise_multiplier": 1.0}, {"noise_multiplier": 1e-9, "clip": 1e3}, tolerance=1e-5),
    # Its noise is on the server: at the client only the clip shows.
    "dp_client": Row({"noise_multiplier": 1.0, "clip": 0.01}, {"noise_multiplier": 1e-9, "clip": 1e3}, random=False),
    "gaussian": Row({"sigma": 0.1}, {"sigma": 0.0}),
    "laplace": Row({"sigma": 0.1}, {"sigma": 0.0}),
    "topk": Row({"fraction": 0.1}, {"fraction": 1.0}, random=False),
    "int8": Row({"bits": 4, "stochastic": True}, {"bits": 16}, tolerance=1e-6),
    "soteria": Row({"fraction": 0.5}, {"fraction": 0.0}, random=False),
    "precode": Row({"size": 8}, adds_layers=True),
    # What these two do to a payload is tested in tests/defenses; a stack with them is the identity at the client.
    "he": Row({"backend": "seal"}, random=False),
    "secagg": Row({}, random=False),
    # Rules change nothing at the client; what they do on the server is tested in tests/robust.
    **{
        name: Row({}, random=False)
        for name in (
            "fedavg",
            "norm_clip",
            "median",
            "trimmed_mean",
            "krum",
            "multi_krum",
            "bulyan",
            "geometric_median",
            "centered_clipping",
            "dnc",
            "foolsgold",
            "fltrust",
            "flame",
            "dos",
            "dos_clipped",
            "dos_guarded",
        )
    },
}


def defended(name: str, params: dict[str, Any], sizes: tuple[int, ...] = (24, 17, 32)) -> Seats:
    defense: Defense = plugins.build("defenses", PluginSpec(name, params))
    model = defense.prepare_model(toy.network())
    table = toy.seats(model, recipe=toy.recipe())
    plan = FederationPlan(table.recipe, rounds=2, client_sizes=sizes, layout=table.sharing.params)
    return replace(table, defenses=(defense.calibrate(plan),))


def one_update(table: Seats, seed: int = 0, count: int = 8) -> torch.Tensor:
    """The update of one plain step on one whole batch of the recipe's batch size."""
    state = toy.state(table)
    ctx = RoundContext(seed, 1, 2, 0)
    x, y = toy.images(count, seed=5)
    turn = Turn(0, state.params, state.buffers, ctx)
    return client_update(table, turn, x, y, [torch.arange(count)])[0].delta


def test_the_table_is_complete() -> None:
    assert set(ROWS) == set(plugins.names("defenses"))


@pytest.mark.parametrize("name", ROWS)
def test_identity_at_strength_zero(name: str) -> None:
    zero = ROWS[name].zero
    if zero is None:
        pytest.skip(f"{name} has no strength 0")
    plain, weak = one_update(toy.seats()), one_update(defended(name, zero))
    torch.testing.assert_close(weak, plain, rtol=0, atol=ROWS[name].tolerance)
    strong = one_update(defended(name, ROWS[name].some))
    assert not torch.allclose(strong, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_determinism_by_seed(name: str) -> None:
    once, again = (one_update(defended(name, ROWS[name].some), seed=3) for _ in range(2))
    assert torch.equal(once, again)
    other = one_update(defended(name, ROWS[name].some), seed=4)
    assert torch.equal(once, other) != ROWS[name].random


@pytest.mark.parametrize("name", ROWS)
def test_shapes_and_dtypes_are_kept(name: str) -> None:
    table = defended(name, ROWS[name].some)
    delta = one_update(table)
    assert delta.shape == (table.sharing.params.size,)
    assert delta.dtype == torch.float32
    assert torch.isfinite(delta).all()
    names, before = set(dict(table.model.named_parameters())), set(dict(toy.network().named_parameters()))
    assert names == before or ROWS[name].adds_layers


@pytest.mark.parametrize("name", ROWS)
def test_serial_equals_processes(name: str) -> None:
    data = toy.clients()
    results = []
    for make in (Serial, Processes):
        table = defended(name, ROWS[name].some)
        state = toy.state(table)
        with make(table, data) as engine:
            for number in (1, 2):
                record = run_round(table, state, range(3), RoundContext(0, number, 2), engine.train)
                assert not record.failed
        results.append(state.params)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("which", ["some", "zero", "default"])
def test_parameters_survive_json(name: str, which: str) -> None:
    params = {} if which == "default" else getattr(ROWS[name], which) or {}
    defense = plugins.build("defenses", PluginSpec(name, params))
    text = json.dumps(plugins.parameters(defense))
    assert plugins.construct(type(defense), json.loads(text), name) == defense


@pytest.mark.parametrize("name", ROWS)
def test_public_knowledge_holds_no_secret(name: str) -> None:
    table = defended(name, ROWS[name].some)
    knowledge = table.defenses[0].public_knowledge(0)
    assert all(isinstance(v, (int, float, str, bool, torch.Tensor, tuple)) for v in knowledge.values())
    assert all(isinstance(v, str) for group in knowledge.values() if isinstance(group, tuple) for v in group)
    assert not any("seed" in key for key in knowledge)


@pytest.mark.parametrize("name", ROWS)
def test_a_claim_covers_the_whole_run(name: str) -> None:
    """A defense that claims an epsilon claims more of it for more rounds."""
    spent = []
    for rounds in (1, 10):
        defense = plugins.build("defenses", PluginSpec(name, ROWS[name].some))
        plan = FederationPlan(toy.recipe(), rounds, (240, 170, 320))
        claim = defense.calibrate(plan).privacy()
        if claim is None:
            return
        assert claim.epsilon == max(claim.per_client.values())
        spent.append(claim.epsilon)
    assert spent[1] > spent[0]
