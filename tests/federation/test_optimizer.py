"""What clients descend with: torch's own optimisers, fresh in every round, and who refuses to read them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fedsec
from fedsec.config import Cell, FederationConfig
from fedsec.errors import ConfigError
from fedsec.federation.assemble import build_stack
from fedsec.federation.local import PlainStep, train_locally
from fedsec.plugins import PluginSpec
from fedsec.types import RoundContext
from tests.federation import toy


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(decay: float) -> None:
    """Two local epochs equal a loop written out with torch.optim.AdamW on the same batches."""
    recipe = toy.recipe(optimizer="adamw", lr=0.01, weight_decay=decay, epochs=2)
    (x, y), ctx = toy.images(20, 0), RoundContext(0, 1, 1)
    ours, theirs = toy.network(), toy.network()
    step = PlainStep(ours, recipe)
    train_locally(step, x, y, recipe, ctx)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=decay)
    theirs.train()
    for rows in step.batches(len(x), ctx):
        plain.zero_grad()
        nn.functional.cross_entropy(theirs(x[rows]), y[rows]).backward()
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_new_round_forgets() -> None:
    """The first step of AdamW without decay moves every entry by the learning rate, whatever was trained before."""
    recipe = toy.recipe(optimizer="adamw", lr=0.01, epochs=None, steps=1)
    model, (x, y) = toy.network(), toy.images(20, 0)
    for number in (1, 2):
        before = [p.detach().clone() for p in model.parameters()]
        train_locally(PlainStep(model, recipe), x, y, recipe, RoundContext(0, number, 2))
        moved = torch.cat([(p.detach() - b).abs().flatten() for p, b in zip(model.parameters(), before, strict=True)])
        assert float(moved[moved > 0].median()) == pytest.approx(0.01, rel=1e-3)


def cell(**federation: Any) -> Cell:
    return Cell(federation=FederationConfig(clients=3, rounds=1, **federation))


def test_what_needs_sgd_says_so() -> None:
    asked = replace(cell(optimizer="adamw"), attack=PluginSpec("gradinversion", {}))
    with pytest.raises(ConfigError, match=r"gradinversion: .* adamw.* would prove nothing. Use optimizer=sgd"):
        build_stack(asked)
    build_stack(replace(asked, federation=cell().federation))
    build_stack(replace(asked, attack=PluginSpec("membership", {})))


@pytest.mark.parametrize(("settings", "rate"), [({}, 0.02), ({"optimizer": "adamw"}, 0.001), ({"lr": 0.5}, 0.5)])
def test_each_optimizer_has_its_own_rate(settings: dict[str, Any], rate: float) -> None:
    from fedsec.federation.assemble import assemble

    small = replace(cell(**settings), data=replace(Cell().data, max_train=60))
    assert assemble(small).seats.recipe.lr == rate


@pytest.mark.parametrize("defense", ["none", "dp:epsilon=30", "dp_client:epsilon=30", "topk"])
def test_a_run_with_adamw_learns(defense: str) -> None:
    done = fedsec.run(
        {
            "data": {"name": "synthetic-cxr", "max_train": 400},
            "model": {"name": "cnn"},
            "federation": {"clients": 2, "rounds": 6, "local_epochs": 2, "optimizer": "adamw", "engine": "serial"},
            "baseline": False,
        },
        defense=defense,
    )
    auc = done["cells"][0]["utility"]["auc"]["value"]
    assert auc > (0.7 if defense == "none" else 0.4)
