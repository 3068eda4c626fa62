"""How a backdoored update is shaped before it is sent."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fedsec.types import Peers, RoundContext, Update

if TYPE_CHECKING:
    from . import Backdoor


def shaped(attack: Backdoor, update: Update, peers: Peers, ctx: RoundContext) -> Update:
    """The update as the method sends it.

    model_replacement scales by n/f, so that the mean becomes the attackers' model where honest updates are small
    (Bagdasaryan et al. 2020, 1807.00459, eq. 3). neurotoxin drops the coordinates that moved most in the last round,
    once, after local training (Zhang et al. 2022, 2206.10341, project at every step). `bound` then limits the norm.
    """
    delta = update.delta
    if attack.method == "neurotoxin":
        delta = quiet(delta, _last_step(attack, peers, ctx), attack.top)
    boost = attack.boost
    if boost is None:
        boost = peers.clients / len(peers.own) if attack.method == "model_replacement" else 1.0
    delta = delta * boost
    if attack.bound is not None:
        typical = float(np.median([float(u.delta.norm()) for u in (peers.honest or peers.own)]))
        norm = float(delta.norm())
        delta = delta * min(1.0, attack.bound * typical / max(norm, 1e-30))
    return replace(update, delta=delta)


def quiet(delta: Tensor, last_step: Tensor | None, top: float) -> Tensor:
    """The update without the `top` per cent coordinates that the common model moved most along."""
    if last_step is None:
        return delta
    count = max(1, round(len(delta) * top / 100))
    busy = last_step.abs().topk(count).indices
    return delta.index_fill(0, busy, 0.0)


def _last_step(attack: Backdoor, peers: Peers, ctx: RoundContext) -> Tensor | None:
    """A_{t−1}, from the models that the adversary was sent in this round and the one before."""
    if attack.memory.get("round") != ctx.round:
        before = attack.memory.get("params") if attack.memory.get("round") == ctx.round - 1 else None
        step = None if before is None or peers.params is None else peers.params - before
        attack.memory.update(round=ctx.round, params=peers.params, step=step)
    last: Tensor | None = attack.memory["step"]
    return last
