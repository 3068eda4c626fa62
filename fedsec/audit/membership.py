"""What membership scores are worth: compared with the truth, once, after every choice has been made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsec.audit.cohort import Cohort
from fedsec.findings import MembershipScores
from fedsec.metrics.membership import FEW, Interval, advantage, auc, roc, smallest_visible, tpr_at

Array = NDArray[np.float64]
KEYS = {1e-2: "tpr_at_1pct_fpr", 1e-3: "tpr_at_01pct_fpr"}
ROC_POINTS = 200
STRATUM = 200
EXPOSED = 8
"""Images of the most exposed members that a report shows."""


def measured(
    found: Sequence[MembershipScores], cohort: Cohort, groups: NDArray[np.str_], generator: np.random.Generator
) -> dict[str, Any]:
    """All methods beside each other, and the strongest with an interval that counts that it was chosen.

    Args:
        groups: (N,) patient of each candidate.

    Returns:
        `attacks` (method -> measures), `headline`, `blind`, `power`.
    """
    level = 1 - 0.05 / max(1, len(found))
    how = f"largest lower bound of the AUC; intervals at {100 * level:.2f} % (Bonferroni over {len(found)})"
    attacks: dict[str, dict[str, Any]] = {}
    corrected: dict[str, Interval] = {}
    for item in found:
        answered = ~np.isnan(item.scores)
        members, others = (item.scores[answered & (cohort.member == side)] for side in (True, False))
        order = np.concatenate([groups[answered & cohort.member], groups[answered & ~cohort.member]])
        attacks[item.method] = {
            "view": item.view,
            "shadows": item.shadows,
            "without_answer": int((~answered).sum()),
            "auc": auc(members, others, generator=generator, groups=order),
            "advantage": advantage(members, others, generator=generator),
            **{key: tpr_at(members, others, rate) for rate, key in KEYS.items()},
            "roc": log_curve(members, others),
        }
        value = auc(members, others, generator=generator, groups=order, level=level)
        corrected[item.method] = value
    result: dict[str, Any] = {"attacks": attacks}
    if corrected:
        best = max(corrected, key=lambda name: corrected[name].low)
        chosen = next(item for item in found if item.method == best)
        answered = ~np.isnan(chosen.scores)
        members, others = (chosen.scores[answered & (cohort.member == side)] for side in (True, False))
        result["headline"] = {
            "method": best,
            "chosen": how,
            "auc": corrected[best],
            "advantage": attacks[best]["advantage"],
            **{key: tpr_at(members, others, rate, 1 - level) for rate, key in KEYS.items()},
            "spread": spread(members, others),
        }
    n1, n0 = int(cohort.member.sum()), int((~cohort.member).sum())
    if min(n1, n0) > 0:
        result["power"] = smallest_visible(n1, n0)
        if n0 * max(KEYS) < FEW:
            del result["power"]["tpr"]  # a TPR that is not printed could not have been noticed either
    if cohort.blind is not None and cohort.blind_scores is not None:
        scores = cohort.blind_scores
        result["blind"] = {"auc": cohort.blind, "roc": log_curve(scores[cohort.member], scores[~cohort.member])}
    return result


def log_curve(members: Array, others: Array) -> list[list[float]]:
    """The ROC as [FPR, TPR] pairs, evenly spread over log FPR: at most `ROC_POINTS` of them."""
    fpr, tpr, _ = roc(members, others)
    wanted = np.geomspace(1 / max(2, len(others)), 1, ROC_POINTS)
    index = np.unique(np.searchsorted(fpr, wanted, side="right") - 1)
    return [[round(float(fpr[i]), 6), round(float(tpr[i]), 6)] for i in index if fpr[i] > 0]


def spread(members: Array, others: Array, bins: int = 20) -> dict[str, list[float]]:
    """Share of each side's images by the rank of their score among non-members: flat without a leak."""
    order = np.sort(others)
    edges = np.linspace(0, 1, bins + 1)

    def shares(scores: Array) -> list[float]:
        below = (np.searchsorted(order, scores, side="left") + np.searchsorted(order, scores, side="right")) / 2
        counts = np.histogram(below / len(order), edges)[0]
        return [round(float(v), 5) for v in counts / len(scores)]

    return {"edges": edges.round(4).tolist(), "members": shares(members), "others": shares(others)}


def leaks(head: Mapping[str, Any]) -> bool:
    """Does the headline's interval exclude guessing?"""
    tpr = head["tpr_at_1pct_fpr"]
    return bool(head["auc"].low > 0.5 or (isinstance(tpr, Interval) and tpr.low > tpr_rate(tpr)))


def tpr_rate(tpr: Interval) -> float:
    """The false-positive rate that a TPR was measured at."""
    return float((tpr.extra or {})["fpr"])


def most_exposed(item: MembershipScores, cohort: Cohort, count: int = EXPOSED) -> NDArray[np.int64]:
    """Positions of the members with the largest scores: the auditor's own images, never part of any JSON."""
    scores = np.where(cohort.member & ~np.isnan(item.scores), item.scores, -np.inf)
    return np.argsort(-scores, kind="stable")[: min(count, int(cohort.member.sum()))]


def by_stratum(
    item: MembershipScores, cohort: Cohort, strata: Mapping[str, NDArray[np.str_]], generator: np.random.Generator
) -> list[dict[str, Any]]:
    """AUC within each class, hospital, sex …: averages hide an exposed minority.

    Args:
        strata: column -> (N,) value of each candidate; groups below 200 a side are not shown.

    Returns:
        a row each; their intervals hold together (Bonferroni).
    """
    rows: list[dict[str, Any]] = []
    for column, values in strata.items():
        for value in np.unique(values[values != ""]):
            here = (values == value) & ~np.isnan(item.scores)
            members, others = item.scores[here & cohort.member], item.scores[here & ~cohort.member]
            if min(len(members), len(others)) >= STRATUM:
                rows.append(
                    {
                        "column": column,
                        "value": str(value),
                        "members": len(members),
                        "nonmembers": len(others),
                        "scores": (members, others),
                    }
                )
    for row in rows:
        members, others = row.pop("scores")
        row["auc"] = auc(members, others, generator=generator, draws=1000, level=1 - 0.05 / len(rows))
    return rows


def sentence(result: dict[str, Any], valid: bool) -> str:
    """What the membership block says, in plain words (spec §7.5)."""
    blind = result.get("blind", {}).get("auc")
    if not valid and blind is not None:
        return (
            "The comparison is not valid: members and non-members differ so much that a program without the model "
            f"separates them (AUC {blind.value:.2f})"
        )
    if not valid or "headline" not in result:
        return "The comparison is not valid: see the checks"
    head, power = result["headline"], result["power"]
    area, tpr = head["auc"], head["tpr_at_1pct_fpr"]
    lines = []
    visible = f" or TPR {100 * power['tpr']:.1f} % at 1 % FPR" if "tpr" in power else ""
    resolved = isinstance(tpr, Interval)
    if resolved and tpr.low > 0.01:
        lines.append(
            "If an attacker accepts wrongly accusing 1 in 100 outsiders, they recognise about "
            f"{100 * tpr.value:.1f} in 100 people whose image was used for training ({100 * tpr.level:.0f} %: "
            f"{100 * tpr.low:.1f}–{100 * tpr.high:.1f}); guessing would give 1"
        )
        if area.value < 0.6 and tpr.value >= 0.02:
            lines.append(
                f"The average score (AUC {area.value:.2f}) looks harmless, but among the most exposed images the "
                f"attacker is right {tpr.value / 0.01:.1f} times as often as by guessing"
            )
    elif area.low > 0.5:
        lines.append(
            f"Members are recognised better than by guessing: AUC {area.value:.2f} "
            f"({100 * area.level:.0f} %: {area.low:.2f}–{area.high:.2f})"
        )
    else:
        lines.append(
            "No evidence of membership leakage was found; an effect smaller than "
            f"AUC {power['auc']:.3f}{visible} would have been missed"
        )
    return ". ".join(lines)
