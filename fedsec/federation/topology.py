"""Who trains on whose images: a federation, one owner of all images, or every hospital for itself.

The last two are what a federation is held against: pooled data bound what it can reach, and a hospital that reaches as
much alone has no reason to join. All three see the same images as often, and are judged on the same test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedsec.attack import Attack
from fedsec.config import Cell
from fedsec.data.partition import Partition
from fedsec.defense import Defense
from fedsec.errors import ConfigError

POOLED = "all hospitals"
"""Name of the one owner."""
TRAINING = ("local_step", "prepare_model")
"""Hooks of defenses that change how a client trains, whether or not anything is sent."""
DEFAULT_STRATEGY = "fedavg"
ALONE = "local"
"""The strategy under which nothing is sent."""


def settled(cell: Cell) -> Cell:
    """The cell with the strategy that its topology means.

    Raises:
        ConfigError: a strategy was chosen, and nobody exchanges anything.
    """
    settings = cell.federation
    if settings.topology == "federated":
        return cell
    allowed = (DEFAULT_STRATEGY, ALONE) if settings.topology == "local" else (DEFAULT_STRATEGY,)
    if settings.strategy not in allowed:
        raise ConfigError(
            f"--topology {settings.topology}: nothing is exchanged, so there is no --strategy {settings.strategy}; "
            "leave one of the two out"
        )
    if settings.topology == "central":
        return cell
    return replace(cell, federation=replace(settings, strategy=ALONE))


def shown(cell: Cell) -> str:
    """What a result says: clients under the strategy `local` train alone, however it was asked for."""
    return "local" if cell.federation.strategy == ALONE else cell.federation.topology


def check(cell: Cell, defenses: Sequence[Defense], attack: Attack | None) -> None:
    """Refuse what has no place where nothing is exchanged.

    Raises:
        ConfigError: a defense of what is sent, an adversary who has no seat, or a schedule of who takes part.
    """
    settings = cell.federation
    where = f"--topology {settings.topology}"
    if settings.topology == "federated":
        return
    for defense in defenses:
        if all(getattr(type(defense), hook) is getattr(Defense, hook) for hook in TRAINING):
            raise ConfigError(
                f"{where}: {defense.name} protects what is sent, and nothing is; leave one of the two out"
            )
    if attack is not None and attack.seat != "outsider":
        raise ConfigError(
            f"{where}: {attack.name} needs the {attack.seat}'s seat in a federation; outsiders alone remain, such as "
            "--attack membership"
        )
    if attack is not None and settings.topology == "local":
        raise ConfigError(f"{where}: every hospital has a model of its own and none is released; attack the others")
    for name, default in (("participation", "full"), ("shadow_rules", None)):
        if getattr(settings, name) != default:
            raise ConfigError(f"{where}: {name} says who is heard, and nothing is exchanged; leave it out")


def owners(cell: Cell, dealt: Partition) -> tuple[tuple[np.ndarray[Any, Any], ...], tuple[str, ...]]:
    """The data set rows of everybody who trains, and their names."""
    if cell.federation.topology == "central":
        return (np.sort(np.concatenate(dealt.clients)),), (POOLED,)
    return dealt.clients, dealt.names
