"""What did malicious clients achieve, and were they found out? From the record of a training's rounds.

All of this is known to the simulation alone: no server could compute it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsec.metrics.statistics import bootstrap, proportion, weighted_mean
from fedsec.types import Estimate

Record = Mapping[str, Any]
DRAWS = 2000
STARVED = 0.5
"""A client whose weight is below this share of an equal one counts as turned down."""


def detection_auroc(suspicion: Mapping[int, float], malicious: Sequence[int], rejected: Sequence[int]) -> float:
    """Chance that a malicious client looks more suspicious than an honest one, ties counting half; NaN without both.

    A client that screening turned away is as suspicious as can be.
    """
    scores = {**suspicion, **dict.fromkeys(rejected, np.inf)}
    bad = [scores[k] for k in scores if k in malicious]
    good = [scores[k] for k in scores if k not in malicious]
    if not bad or not good:
        return float("nan")
    pairs = np.sign(np.subtract.outer(_finite(bad, scores), _finite(good, scores)))
    return float((pairs + 1).mean() / 2)


def _finite(values: Sequence[float], scores: Mapping[int, float]) -> NDArray[np.float64]:
    """Infinite scores as one more than the largest finite one, so that they tie with each other."""
    finite = [v for v in scores.values() if np.isfinite(v)]
    return np.array([v if np.isfinite(v) else max(finite, default=0.0) + 1 for v in values])


def most_suspicious(suspicion: Mapping[int, float], count: int, rejected: Sequence[int]) -> frozenset[int]:
    """The rejected clients, and the most suspicious of the others until there are `count`; ties to the smaller id."""
    rest = sorted((k for k in suspicion if k not in rejected), key=lambda k: (-suspicion[k], k))
    return frozenset(rejected) | frozenset(rest[: max(0, count - len(rejected))])


def effective_clients(weights: Mapping[int, float]) -> float:
    """(Σw)²/Σw²: how many clients with equal weights would average as much noise away."""
    w = np.array(list(weights.values()))
    return float(w.sum() ** 2 / (w**2).sum()) if (w**2).sum() > 0 else 0.0


def robustness(history: Sequence[Record], flagged: int, *, generator: np.random.Generator) -> dict[str, Any]:
    """Detection, weight and damage over all rounds in which somebody malicious took part.

    Args:
        history: one record a round, as `federation.round.RoundRecord`.
        flagged: how many clients a server that goes by suspicion would accuse in each round.
        generator: draws the bootstrap samples; whole rounds are drawn.

    Returns:
        `detection_auroc`, `detection_tpr` and `detection_fpr` (of accusing the `flagged` most suspicious),
        `attacker_weight` beside `fair_share`, `effective_clients`, `aggregate_deviation`, and what the attack did
        (`tampering`, median relative change of an update; `tampered_images` a round). Keys that do not apply are
        absent.
    """
    rounds = [_Round(r) for r in history]
    hostile = [r for r in rounds if r.malicious]
    result: dict[str, Any] = {}

    def mean(values: Sequence[float]) -> Estimate:
        return bootstrap(weighted_mean, [v for v in values if v == v], generator=generator, draws=DRAWS)

    weighted = [r for r in rounds if r.weights]
    if weighted:
        result["effective_clients"] = mean([effective_clients(r.weights) for r in weighted])
    if not hostile:
        return result
    aurocs = [detection_auroc(r.suspicion, r.malicious, r.rejected) for r in hostile if r.suspicion or r.rejected]
    if any(v == v for v in aurocs):
        result["detection_auroc"] = mean(aurocs)
    accused = [(r, most_suspicious(r.suspicion, flagged, r.rejected)) for r in hostile if r.suspicion or r.rejected]
    for key, wanted in (("detection_tpr", True), ("detection_fpr", False)):
        chosen = [(k in named, k) for r, named in accused for k in r.clients if (k in r.malicious) == wanted]
        if chosen:
            result[key] = proportion([hit for hit, _ in chosen], [k for _, k in chosen])
    if any(r.weights for r in hostile):
        result["attacker_weight"] = mean(
            [sum(w for k, w in r.weights.items() if k in r.malicious) for r in hostile if r.weights]
        )
        result["fair_share"] = float(np.mean([len(r.malicious) / len(r.clients) for r in hostile]))
    if any(r.deviation is not None for r in hostile):
        result["aggregate_deviation"] = mean([r.deviation for r in hostile if r.deviation is not None])
    changes = [v for r in hostile for v in r.tampering.values()]
    result["tampering"] = float(np.median(changes)) if changes else 0.0
    result["tampered_images"] = int(np.mean([sum(r.tampered.values()) for r in hostile]))
    result["malicious_clients"] = sorted({k for r in hostile for k in r.malicious})
    return result


def without_effect(history: Sequence[Record]) -> bool:
    """Malicious clients were there and changed nothing: neither an update nor an image."""
    hostile = [r for r in map(_Round, history) if r.malicious]
    acted = any(v > 0 for r in hostile for v in (*r.tampering.values(), *r.tampered.values()))
    return bool(hostile) and not acted


class _Round:
    """One record; client ids are text once a record has been in a file."""

    def __init__(self, record: Record) -> None:
        def by_client(key: str) -> dict[int, Any]:
            return {int(k): v for k, v in (record.get(key) or {}).items() if v is not None}

        self.malicious = tuple(record.get("malicious") or ())
        self.suspicion = by_client("suspicion")
        self.weights = by_client("weights")
        self.tampering = by_client("tampering")
        self.tampered = by_client("tampered")
        self.deviation = record.get("deviation")
        self.clients = tuple(record.get("participants") or ())
        self.rejected = tuple(int(k) for k in record.get("failed") or {})
