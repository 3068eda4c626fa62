"""What each turn releases is in the ledger before the turn starts, and no client is trained beyond its budget."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedsec.privacy.ledger import Event, Ledger, spent
from fedsec.types import PrivacySpent, RoundContext

if TYPE_CHECKING:
    from fedsec.federation.assemble import Federation

LIBRARIES = ("fedsec", "opacus", "torch")


class Budget:
    """The ledger of one training.

    Args:
        federation: as `assemble` gives it.
        ledger: of the whole run.
        training: the training's key.
    """

    def __init__(self, federation: Federation, ledger: Ledger, training: str) -> None:
        self.federation = federation
        self.ledger = ledger
        self.training = training
        self.exhausted: dict[int, int] = {}
        """Client -> the first round that it could not take part in."""
        claim = planned_claim(federation)
        ledger.begin(training, **header(federation, claim))
        self._used: Counter[int] = Counter()
        for event in ledger.of(training):
            self._used[event.client] += event.count

    @property
    def events(self) -> tuple[Event, ...]:
        """All that this training released so far."""
        return self.ledger.of(self.training)

    def admit(self, participants: Sequence[int], ctx: RoundContext) -> tuple[list[int], dict[int, int]]:
        """Who may train in this round, and with how many steps at most, where that is fewer than planned.

        Their releases are recorded; a turn that fails afterwards has spent them all the same.
        """
        present: list[int] = []
        limits: dict[int, int] = {}
        for client in participants:
            events = [e for d in self.federation.seats.defenses for e in d.releases(ctx.for_client(client))]
            left = self._left(client)
            if left is not None:
                steps = sum(e.count for e in events)
                if left <= 0:
                    self.exhausted.setdefault(client, ctx.round)
                    continue
                if left < steps:
                    limits[client] = left
                    events = [e.limited(left) for e in events]
            for event in events:
                self.ledger.record(event)
                self._used[client] += event.count
            present.append(client)
        return present, limits

    def _left(self, client: int) -> int | None:
        allowed = [a for d in self.federation.seats.defenses if (a := d.allowance(client)) is not None]
        return min(allowed) - self._used[client] if allowed else None

    def close(self) -> None:
        """The training is complete."""
        self.ledger.finish()

    def claim(self) -> PrivacySpent | None:
        """What was really spent, composed over all recorded events; None where the stack makes no claim."""
        planned = planned_claim(self.federation)
        if planned is None:
            return None
        real = spent(self.events, planned.delta, planned.unit, planned.assumptions)
        if real is None:  # a defense of somebody else's that claims but does not say what it releases
            return planned
        absent = dict.fromkeys(set(planned.per_client) - set(real.per_client), 0.0)
        return replace(real, per_client=dict(sorted({**real.per_client, **absent}.items())))

    def notes(self) -> tuple[str, ...]:
        """Which clients had to stop."""
        names = self.federation.owners
        stopped = [f"{names[k]} from round {r}" for k, r in sorted(self.exhausted.items())]
        return (f"privacy budget spent, not trained any more: {', '.join(stopped)}",) if stopped else ()


def planned_claim(federation: Federation) -> PrivacySpent | None:
    """The stack's one claim, for clients that take part in every round."""
    return next((c for d in federation.seats.defenses if (c := d.privacy()) is not None), None)


def header(federation: Federation, claim: PrivacySpent | None) -> dict[str, Any]:
    """What a reader of the ledger needs beside the events."""
    settings = federation.cell.federation
    return {
        "data_fingerprint": federation.dataset.fingerprint,
        "defense": federation.cell.label(),
        "seed": federation.cell.seed,
        "participation": settings.participation,
        "rounds": settings.rounds,
        "clients": list(federation.owners),
        "client_sizes": list(federation.plan.client_sizes),
        "unit": claim.unit if claim else None,
        "delta": claim.delta if claim else None,
        "planned_epsilon": claim.epsilon if claim else None,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
