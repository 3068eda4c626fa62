"""A round whose updates are never all in memory: each is folded into the mean when it arrives.

Possible where nothing has to see two updates at once: the plain weighted mean, honest clients, no defense and no
adversary that reads uploads. The result is that of `round.run_round`, to the last bit where every client replies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from fedsec.attack import Attack
from fedsec.defense import Aggregation, Defense
from fedsec.federation.aggregate import WeightedMean
from fedsec.federation.desk import ServerState
from fedsec.federation.round import apply, turn_of
from fedsec.federation.screening import MAX_NORM_RATIO, screen
from fedsec.federation.seats import Reply, RoundRecord, Seats, Turn
from fedsec.federation.strategy import Strategy
from fedsec.types import Payload, RoundContext

STREAM_ABOVE = 256 * 2**20
"""Bytes of all updates of a round; below, it is simpler and as good to have them together."""


def streams(seats: Seats, clients: int, ctx: RoundContext, above: int = STREAM_ABOVE) -> bool:
    """Whether a round of so many clients can be streamed, and is worth it."""
    attack, strategy = seats.attack, type(seats.strategy)
    drawn = (e for d in seats.defenses for e in d.releases(ctx.for_client(0)))
    return (
        4 * clients * (seats.sharing.params.size + seats.sharing.buffers.size) > above
        and type(seats.aggregator) is WeightedMean
        and not seats.malicious
        and seats.planted is None
        # Nothing at the server looks at single updates or their reports.
        and not seats.strategy.reports
        and all(getattr(strategy, hook) is getattr(Strategy, hook) for hook in ("serve", "reweigh", "visible"))
        and (attack is None or (not attack.changes_training and type(attack).on_view is Attack.on_view))
        and all(type(d).on_receive is Defense.on_receive for d in seats.defenses)
        # A round may have to be repeated without a client; noise of the operating system would be another one then.
        and all(getattr(e, "rng", "seeded") == "seeded" for e in drawn)
    )


def run_streamed(
    seats: Seats,
    state: ServerState,
    sizes: Mapping[int, int],
    ctx: RoundContext,
    stream: Callable[[Sequence[Turn]], Iterable[Reply]],
    max_steps: Mapping[int, int] | None = None,
) -> RoundRecord:
    """One round; `state` is updated in place.

    Args:
        sizes: participant -> its training images. stream: the engine's; gives the replies in client order.
    """
    start = time.perf_counter()
    limits = max_steps or {}
    ctx = replace(ctx, cohort=tuple(sizes))
    turns = [turn_of(seats, state, k, ctx, limits.get(k)) for k in sizes]
    fold = _Fold(seats, dict(sizes), ctx)
    for reply in stream(turns):
        fold.take(reply, state)
    heard = fold
    if outliers := fold.outliers():  # as good as never: divergence by six orders of magnitude, and not yet to infinity
        fold = _Fold(seats, {k: n for k, n in sizes.items() if k not in outliers}, ctx)
        for reply in stream([turn for turn in turns if turn.client not in outliers]):
            fold.take(reply, state)
        fold.failed = heard.failed | outliers
        fold.flags = heard.flags
    result, flags = fold.finish()
    flags += apply(seats, state, result, ctx)
    return RoundRecord(
        round=ctx.round,
        participants=tuple(sizes),
        failed=fold.failed,
        flags=tuple(flags),
        loss=sum(heard.losses) / len(heard.losses) if heard.losses else float("nan"),
        upload_bytes=round(heard.bytes / max(1, heard.payloads)),
        seconds=time.perf_counter() - start,
        weights=dict(result.weights) if result is not None else {},
    )


class _Fold:
    """The sum so far, and what the record needs of those whose updates are in it."""

    def __init__(self, seats: Seats, sizes: Mapping[int, int], ctx: RoundContext) -> None:
        self.seats = seats
        self.ctx = ctx
        # As the strategy weighs them when all reply: to be corrected when it is known who did.
        self.planned = seats.strategy.weights(sizes)
        seats.aggregator.begin(self.planned, ctx)
        self.failed: dict[int, str] = {}
        self.flags: list[str] = []
        self.losses: list[float] = []
        self.norms: dict[int, float] = {}
        self.sizes: dict[int, int | None] = {}
        self.bytes = self.payloads = 0

    def take(self, reply: Reply, state: ServerState) -> None:
        if reply.failure is not None or not isinstance(reply.content, Payload):
            self.failed[reply.client] = reply.failure or "no payload"
            return
        if reply.local is not None:
            state.local[reply.client] = reply.local
        if reply.own:
            state.own[reply.client] = dict(reply.own)
        state.trained.add(reply.client)
        if reply.loss == reply.loss:
            self.losses.append(reply.loss)
        self.bytes, self.payloads = self.bytes + reply.content.num_bytes, self.payloads + 1
        accepted, rejected, flags = screen([reply.content], self.seats.sharing.params, self.seats.sharing.buffers)
        self.failed |= rejected
        self.flags += flags
        for payload in accepted:
            self.norms[payload.client] = payload.norm or 0.0
            self.sizes[payload.client] = payload.num_samples
            self.seats.aggregator.accumulate(payload, self.ctx)

    def outliers(self) -> dict[int, str]:
        """Who the screening of all updates together would turn away."""
        middle = sorted(self.norms.values())[len(self.norms) // 2] if self.norms else 0.0
        limit = MAX_NORM_RATIO * middle
        return {
            k: f"magnitude: update norm {norm:.3g} is more than {MAX_NORM_RATIO:.0e} x the median"
            for k, norm in self.norms.items()
            if limit > 0 and norm > limit
        }

    def finish(self) -> tuple[Aggregation | None, list[str]]:
        if not self.norms:
            return None, self.flags
        result = self.seats.aggregator.finish(self.ctx)
        if len(self.norms) == len(self.planned):
            return result, self.flags
        share = sum(self.planned[k] for k in self.norms)
        used = {k: self.planned[k] / share for k in self.norms}
        wanted = self.seats.strategy.weights(self.sizes)
        if any(abs(used[k] - wanted[k]) > 1e-9 for k in used):
            self.flags.append(
                "streamed: weights were capped for all participants, and not again for those that replied"
            )
        delta = None if result.delta is None else result.delta / share
        return replace(result, delta=delta, weights=used), self.flags
