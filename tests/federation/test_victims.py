"""How a victim trains: steps or epochs, whole batches or mini-batches in an order of its own."""

from __future__ import annotations

import torch

from fedsec.federation.victims import local_batches, victim_recipe
from fedsec.findings import VictimPlan
from fedsec.types import LocalRecipe, RoundContext

CLIENTS = LocalRecipe("binary", 2, 0.1, 0.9, 0.0, 32, 1, None)


def test_steps_on_the_whole_batch_by_default() -> None:
    recipe = victim_recipe(CLIENTS, VictimPlan((1,), 8, 8, local_steps=3))
    assert (recipe.steps, recipe.epochs, recipe.batch_size) == (3, None, 8)
    batches = local_batches(recipe, 8, RoundContext(0, 1, 1, 0))
    assert [b.tolist() for b in batches] == [list(range(8))] * 3


def test_epochs_of_mini_batches_are_shuffled_anew() -> None:
    recipe = victim_recipe(CLIENTS, VictimPlan((1,), 10, 10, epochs=2, batch_size=4))
    assert (recipe.steps, recipe.epochs, recipe.batch_size) == (None, 2, 4)
    batches = local_batches(recipe, 10, RoundContext(0, 1, 1, 0))
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2]
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


def test_the_order_is_the_clients_own_secret() -> None:
    recipe = victim_recipe(CLIENTS, VictimPlan((1,), 10, 10, epochs=1, batch_size=4))
    ctx = RoundContext(0, 1, 1, 0)
    again = [torch.cat(local_batches(recipe, 10, ctx)).tolist() for _ in range(2)]
    assert again[0] == again[1]
    assert torch.cat(local_batches(recipe, 10, ctx.for_client(1))).tolist() != again[0]
    assert torch.cat(local_batches(recipe, 10, ctx.adversary())).tolist() != again[0]


def test_a_local_batch_larger_than_the_victims_is_the_whole_batch() -> None:
    recipe = victim_recipe(CLIENTS, VictimPlan((1,), 4, 4, epochs=3, batch_size=64))
    assert recipe.batch_size == 4
    assert [len(b) for b in local_batches(recipe, 4, RoundContext(0, 1, 1, 0))] == [4, 4, 4]
