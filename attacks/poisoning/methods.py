"""What does each method send? From the adversary's clean update, and what it knows of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsec.errors import ConfigError
from fedsec.robust.aggregator import RuleAggregator
from fedsec.robust.rule import CoordinateRule
from fedsec.types import Peers, RoundContext, Update

from . import crafted
from .rule_aware import search

if TYPE_CHECKING:
    from . import Poisoning


def forge(attack: Poisoning, update: Update, peers: Peers, ctx: RoundContext) -> Update:
    """The update that this malicious client sends."""
    if attack.method == "size_liar":
        return replace(update, num_samples=int(attack.strength()))
    if attack.method == "garbage":
        made: Any = crafted.garbage(update.delta, attack.garbage)
        return replace(update, delta=made)
    row = ALONE[attack.method](attack, update, ctx) if attack.method in ALONE else _together(attack, peers, ctx)
    known = attack.known(peers, ctx.round)
    if attack.norm_match:
        row = crafted.with_norm(row, known.median_norm)
    return replace(update, delta=crafted.jittered(row, known.std, attack.jitter, ctx.generator("poisoning/jitter")))


def _gaussian(attack: Poisoning, update: Update, ctx: RoundContext) -> Tensor:
    draw = torch.randn(update.delta.shape, generator=ctx.generator("poisoning/gaussian"))
    return attack.strength() * draw.to(update.delta)


ALONE: dict[str, Callable[[Poisoning, Update, RoundContext], Tensor]] = {
    "gaussian": _gaussian,
    "sign_flip": lambda attack, update, _: -attack.strength() * update.delta,
    "scale": lambda attack, update, _: attack.strength() * update.delta,
    "zero": lambda _, update, __: torch.zeros_like(update.delta),
}
"""Methods that need nobody else's update."""


def _together(attack: Poisoning, peers: Peers, ctx: RoundContext) -> Tensor:
    """Methods whose colluders send one and the same row."""
    known = attack.known(peers, ctx.round)
    shared = replace(ctx, client=None)

    def make() -> Tensor:
        if attack.method == "alie":
            return crafted.alie(known, peers.clients, len(peers.own), attack.factor)
        if attack.method == "ipm":
            return crafted.ipm(known, attack.strength())
        if attack.method == "min_max":
            return crafted.min_max(known, attack.direction)
        if attack.method == "min_sum":
            return crafted.min_sum(known, attack.direction)
        if attack.method == "fang":
            return crafted.fang(known, shared.generator("poisoning/fang"), complete=bool(peers.honest))
        if attack.method == "mimic":
            return _mimicked(attack, peers, known)
        return _searched(attack, peers, known)

    row: Tensor = attack.once_a_round("row", ctx.round, make)
    return row


def _mimicked(attack: Poisoning, peers: Peers, known: crafted.Known) -> Tensor:
    """The target is chosen once a run, and again only when it is absent."""
    candidates = list(peers.honest or peers.own)
    present = {u.client: u.delta for u in candidates}
    if attack.memory.get("run/target") not in present:
        attack.memory["run/target"] = candidates[crafted.mimic_target(known)].client
    return present[attack.memory["run/target"]]


def _searched(attack: Poisoning, peers: Peers, known: crafted.Known) -> Tensor:
    rule = peers.aggregator.rule if isinstance(peers.aggregator, RuleAggregator) else None
    if rule is None:
        raise ConfigError(
            "poisoning: rule_aware searches against a robust rule; put one into --defense (fedavg for the plain mean), "
            "or choose another method"
        )
    if attack.objective == "weight" and isinstance(rule, CoordinateRule):
        raise ConfigError(f"poisoning: {rule.name} gives no weights; objective=deviation or reverse works against it")
    return search(known, rule, len(peers.own), attack.objective).row
