"""A robust rule at work on the server: safety clip, one pass over the updates, the rule, one weighted sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsec.defense import Aggregation, Aggregator
from fedsec.robust.geometry import NOT_MEASURED, Vector, combine, distances_from, measure
from fedsec.robust.order import columns_of, middle, order_mean
from fedsec.robust.presteps import mixing_matrix
from fedsec.robust.rule import CoordinateRule, Infeasible, Rule, Seen, Weighing, WeightRule, assumed_f
from fedsec.types import Payload, RoundContext, Update


class RuleAggregator(Aggregator):
    """Collects a round's updates and lets a rule combine them. Keeps the rule's memory between rounds."""

    def __init__(self, rule: Rule, shadows: Sequence[WeightRule] = ()) -> None:
        self.rule = rule
        self.shadows = tuple(shadows)
        self._memory: dict[str, Mapping[str, Any]] = {}
        self._turned_away = 0

    def memory(self) -> Mapping[str, Any]:
        """Of the rule and of its shadows."""
        return dict(self._memory)

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._memory = dict(memory)

    @property
    def needs_root(self) -> bool:
        """The server has to train on images of its own in every round."""
        return self.rule.needs_root

    def receive_root(self, delta: Tensor) -> None:
        """The update (d,) of the server's own images in this round."""
        self._memory[self.rule.name] = {**self._memory.get(self.rule.name, {}), "root": delta}

    def turned_away(self, clients: Collection[int]) -> None:
        """Remember how many were rejected: they are not left to be reckoned with."""
        self._turned_away = len(clients)

    def begin(self, weights: Mapping[int, float], ctx: RoundContext) -> None:
        """Start from nothing."""
        self._weights = dict(weights)
        self._updates: list[Update] = []
        self._norms: list[float] = []

    def accumulate(self, payload: Payload, ctx: RoundContext) -> None:
        """Keep one client's update; nothing is copied."""
        update: Update = payload.content
        self._updates.append(update)
        self._norms.append(float(torch.linalg.vector_norm(update.delta)) if payload.norm is None else payload.norm)

    def finish(self, ctx: RoundContext) -> Aggregation:
        """Let the rule decide; `delta` is None where it found no safe answer."""
        updates, self._updates = self._updates, []
        clients = tuple(u.client for u in updates)
        rows = [u.delta for u in updates]
        clips, flags = safety_clip(np.array(self._norms), self.rule.kappa)
        f, assumed = assumed_f(self.rule, len(rows))
        if assumed:
            flags.append(f"{self.rule.name}: f_assumed, reckoning with {f} of {len(rows)} clients")
        memory = self._memory.get(self.rule.name, {})
        shares = np.array([self._weights[c] for c in clients])
        try:
            if not self.rule.feasible(len(rows), f):
                f = max(0, f - self._turned_away)
            if not self.rule.feasible(len(rows), f):
                raise Infeasible(f"{self.rule.name} needs {self.rule.requirement}; it has n = {len(rows)}, f = {f}")
            everything = [*rows, *self.rule.extra_rows(clients, memory, rows[0])]
            scales = [*clips, *[1.0] * (len(everything) - len(rows))]
            needed = self.rule.needs_geometry or self.rule.pre != "none" or self.shadows
            geometry = measure(everything, scales) if needed else NOT_MEASURED
            seen = Seen(geometry, clients, shares, f, ctx.numpy("rule"), memory)
            delta, found = apply(self.rule, everything, scales, seen)
        except Infeasible as reason:
            return Aggregation(None, None, flags=(*flags, f"infeasible: {reason}"))
        delta = self.rule.finish(delta, seen, ctx)
        kept = self.rule.remember(rows, clips, seen, delta)
        self._memory[self.rule.name] = {**memory, **found.memory, **kept}
        return Aggregation(
            delta,
            median_buffers(updates),
            weights={} if isinstance(self.rule, CoordinateRule) else _named(clients, found.coefficients),
            suspicion=_named(clients, found.suspicion),
            flags=(*flags, *found.flags),
            clipped={c: float(s) for c, s in zip(clients, clips, strict=True) if s < 1},
            shadows=self._shadow(seen) if self.shadows else {},
        )

    def _shadow(self, seen: Seen) -> dict[str, dict[str, Any]]:
        """What other rules would have done on the same updates: no further pass over them."""
        clean = replace(seen, geometry=seen.geometry.part(range(seen.n)))
        result: dict[str, dict[str, Any]] = {}
        for rule in self.shadows:
            f, _ = assumed_f(rule, seen.n)
            try:
                if not rule.feasible(seen.n, f):
                    raise Infeasible(f"needs {rule.requirement}")
                found = rule.decide(replace(clean, f=f, memory=self._memory.get(f"shadow/{rule.name}", {})))
            except Infeasible as reason:
                result[rule.name] = {"infeasible": str(reason)}
                continue
            self._memory[f"shadow/{rule.name}"] = found.memory
            result[rule.name] = {
                "weights": _named(seen.clients, found.coefficients),
                "suspicion": _named(seen.clients, found.suspicion),
            }
        return result


def apply(rule: Rule, rows: Sequence[Tensor], clips: Sequence[float], seen: Seen) -> tuple[Tensor, Weighing]:
    """The rule's aggregate (d,) of these rows.

    Args:
        rule: any rule. rows: the clients' updates, then the rule's extra rows. clips: the safety clip of each.
        seen: their geometry, after the safety clip.
    """
    if isinstance(rule, WeightRule):
        found = rule.decide(seen)
        return combine(rows, list(found.coefficients * np.asarray(clips))), found
    assert isinstance(rule, CoordinateRule)
    return by_coordinate(rule, rows, clips, seen)


def by_coordinate(
    rule: CoordinateRule, rows: Sequence[Tensor], clips: Sequence[float], seen: Seen
) -> tuple[Tensor, Weighing]:
    """Order statistics of each coordinate; suspicion is the distance from the result."""
    mixing = mixing_matrix(rule.pre, seen)
    fill, count = columns_of(rows, clips), len(rows)
    if mixing is None:
        chosen = list(rule.select(seen))
        fill, count = columns_of([rows[i] for i in chosen], [clips[i] for i in chosen]), len(chosen)
    else:
        plain, weights, count = fill, torch.tensor(mixing, dtype=torch.float32, device=rows[0].device), len(mixing)
        if not rule.feasible(count, seen.f):
            raise Infeasible(f"{rule.name} needs {rule.requirement}; {rule.pre} leaves {count} rows for f = {seen.f}")

        def mixed(start: int, block: Tensor) -> None:
            whole = block.new_empty(len(rows), block.shape[1])
            plain(start, whole)
            torch.mm(weights, whole, out=block)

        fill = mixed
    delta = rule.reduce(fill, count, rows[0].numel(), seen.f, rows[0].device)
    return delta, Weighing(np.zeros(len(rows)), distances_from(rows, delta, clips))


def safety_clip(norms: Vector, kappa: float) -> tuple[list[float], list[str]]:
    """Factors that shorten every update to κ times the median norm, and flags.

    It bounds what any client can do to the centre of the geometry and to the aggregate, whatever the rule.
    """
    middle_norm = float(np.median(norms))
    if middle_norm == 0:
        return [1.0] * len(norms), ["median_norm_zero: most updates are zero, none was clipped"]
    limit = kappa * middle_norm
    return [1.0 if norm <= limit else limit / norm for norm in norms], []


def median_buffers(updates: Sequence[Update]) -> Tensor | None:
    """Coordinate-wise median of the clients' normalisation statistics; None where nobody sent valid ones."""
    valid = [u.buffers for u in updates if u.buffers is not None]
    if not valid:
        return None
    ranks = middle(len(valid))
    return order_mean(columns_of(valid, [1.0] * len(valid)), len(valid), valid[0].numel(), ranks, valid[0].device)


def _named(clients: Sequence[int], values: Vector) -> dict[int, float]:
    return {c: float(v) for c, v in zip(clients, values, strict=False)}
