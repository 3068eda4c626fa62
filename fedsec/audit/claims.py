"""What is claimed of a training: by a run's ledger, by a ledger file, or in the user's own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsec.audit.model import digest_of
from fedsec.errors import ConfigError
from fedsec.privacy.ledger import Event, Ledger, spent

DELTAS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""At which the profile of a claim is computed: each gives a curve that no attack may cross."""


def of_ledger(path: Path) -> dict[str, Any]:
    """The claim of a ledger file: its last training that was finished.

    Raises:
        ConfigError: no such file, nothing finished, or no claim in it. RefusedError: it cannot be read.
    """
    if not path.is_file():
        raise ConfigError(f"--ledger {path}: no such file")
    ledger = Ledger(path)
    finished = [attempt for attempt in ledger.attempts if attempt.finished]
    if not finished:
        raise ConfigError(f"--ledger {path}: no finished training in it")
    header = finished[-1].header
    unit, delta = header.get("unit"), header.get("delta")
    events = ledger.of(finished[-1].training)
    claim = spent(events, float(delta), str(unit)) if unit and delta else None
    if claim is None:
        raise ConfigError(f"--ledger {path}: its last training ({header.get('defense', '?')}) claims no epsilon")
    return {
        "epsilon": claim.epsilon,
        "delta": claim.delta,
        "unit": claim.unit,
        "accountant": claim.accountant,
        "assumptions": list(claim.assumptions),
        "ledger_sha256": digest_of(path),
        "data_fingerprint": header.get("data_fingerprint"),
        "per_client": dict(claim.per_client),
        "profile": profile(events, claim.unit, claim.per_client),
    }


def profile(events: Sequence[Event], unit: str, per_client: Mapping[int, float]) -> list[tuple[float, float]]:
    """(ε, δ) pairs that all hold at once for the client that spent most: their lower envelope is tighter than one."""
    worst = max(per_client, key=lambda k: per_client[k])
    own = [event for event in events if event.client == worst]
    pairs = ((spent(own, delta, unit), delta) for delta in DELTAS)
    return [(claim.epsilon, delta) for claim, delta in pairs if claim is not None]


def with_profile(claim: Mapping[str, Any], ledger: Path) -> dict[str, Any]:
    """A run's own claim with the profile of its ledger, where that is there and says the same."""
    try:
        found = of_ledger(ledger)
    except ConfigError:
        return dict(claim)
    if abs(found["epsilon"] - claim["epsilon"]) > 1e-6 * claim["epsilon"] or found["unit"] != claim["unit"]:
        return dict(claim)  # another claim than the ledger's: the user's own
    return {**claim, "profile": found["profile"], "ledger_sha256": found["ledger_sha256"]}
