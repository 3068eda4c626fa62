"""Claimed against audited ε: what canaries in the training prove (see `fedsec.data.canaries`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsec.data.canaries import Canaries, CanaryKind
from fedsec.privacy import auditing
from fedsec.privacy.auditing import ERROR, SHARE
from fedsec.types import RoundContext

LARGE_SHARE = 0.05
MOST = 15.0
"""Claimed ε above which no number of canaries would do."""
GRID = (0.05, 0.1, 0.2, 0.5, 1.0)
BLACK_BOX = "black box: sees the released model's outputs alone"
STEPS = "white box: sees the released sum of every training step, and the sampling rate"
MODELS = "white box: sees the initial and the released model"
ADVERSARY: Mapping[CanaryKind, tuple[str, str]] = {
    "mislabelled": (BLACK_BOX, "log-odds of the wrong label"),
    "dirac": (STEPS, "log-likelihood ratio along the canary's coordinate"),
    "random": (STEPS, "log-likelihood ratio along the canary's direction"),
    "client_dirac": (MODELS, "change of the model in the canary's coordinate"),
    "client_random": (MODELS, "change of the model along the canary's direction"),
}
"""Kind -> who is simulated, and what is scored."""
Verdict = Literal["contradicted", "investigate", "consistent", "uninformative", "no claim"]


def bounds(scores: NDArray[np.float64], included: NDArray[np.bool_], delta: float, seed: int) -> list[dict[str, Any]]:
    """Every lower bound on ε, a row each, with what it assumes and how its choices were made."""
    fixed = auditing.guess(scores, included)
    rows: list[dict[str, Any]] = [
        _row("one-run", auditing.one_run_epsilon(fixed, delta), "none", f"{SHARE:.0%} guesses, fixed beforehand"),
        _row("one-run, grid", _grid(scores, included, delta, ERROR), "none", f"best of {len(GRID)}, Bonferroni"),
        _row(
            "rates", _rates(scores, included, delta, seed, ERROR), "none", "threshold from one half, bound on the other"
        ),
        _row("f-DP", auditing.fdp_epsilon(fixed, delta), "Gaussian trade-off curve", f"{SHARE:.0%} guesses, fixed"),
    ]
    gauss = auditing.gaussian_epsilon(scores, included, delta)
    row = _row("Gaussian estimate", gauss.epsilon, "estimate, assumes Gaussian scores", "none")
    rows.append({**row, "mu": gauss.mu, "hidden": gauss.hidden, **({"epsilon": None} if gauss.hidden else {})})
    return rows


def _row(name: str, epsilon: float, assumption: str, selection: str) -> dict[str, Any]:
    return {"name": name, "epsilon": epsilon, "assumption": assumption, "selection": selection}


def _grid(scores: NDArray[np.float64], included: NDArray[np.bool_], delta: float, error: float) -> float:
    each = [auditing.guess(scores, included, share) for share in GRID]
    return max(auditing.one_run_epsilon(g, delta, error / len(GRID)) for g in each)


def _rates(scores: NDArray[np.float64], included: NDArray[np.bool_], delta: float, seed: int, error: float) -> float:
    draw = RoundContext(seed, 0, 0).numpy("canary-split")
    return auditing.split_rates_epsilon(scores, included, delta, draw, error)


def proven(scores: NDArray[np.float64], included: NDArray[np.bool_], delta: float, seed: int) -> float:
    """The ε that is refuted without any assumption: the larger of two bounds, each at half the error."""
    return max(
        _grid(scores, included, delta, ERROR / 2),
        _rates(scores, included, delta, seed, ERROR / 2),
    )


def audit_claim(
    scores: NDArray[np.float64],
    canaries: Canaries,
    claim: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    """Claimed against audited.

    Args:
        scores: (m,) of the canaries, larger: rather included.
        claim: `epsilon`, `delta` and `unit`; None: nothing was claimed.

    Raises:
        ConfigError: the claim protects another unit than the canaries test.
    """
    unit, remarks = canaries.unit, []
    if claim is not None:
        canaries.check_unit(str(claim.get("unit", unit)))
        if claim.get("unit", unit) == "patient":
            remarks.append("a canary is one image: what it proves holds for patients too, who may give away more")
    delta = float(claim["delta"]) if claim else 1e-5
    included = canaries.included
    rows = bounds(scores, included, delta, seed)
    epsilon = proven(scores, included, delta, seed)
    ceiling = auditing.one_run_ceiling(len(scores), delta)
    assumed = max((r["epsilon"] or 0.0) for r in rows)
    name, text = verdict(epsilon, assumed, ceiling, float(claim["epsilon"]) if claim else None, unit, delta)
    return {
        "unit": unit,
        "canaries": len(scores),
        "included": int(included.sum()),
        "share": canaries.share,
        "inclusion_hash": canaries.commitment,
        "kind": canaries.kind,
        "adversary": ADVERSARY[canaries.kind][0],
        "score": ADVERSARY[canaries.kind][1],
        "delta": delta,
        "bounds": rows,
        "proven": epsilon,
        "ceiling": ceiling,
        "claimed": float(claim["epsilon"]) if claim else None,
        "verdict": name,
        "sentence": text,
        "remarks": remarks + ([] if canaries.share <= LARGE_SHARE else [large_share(canaries)]),
    }


def large_share(canaries: Canaries) -> str:
    """That the training with canaries is another than without."""
    what = "clients" if canaries.unit == "client" else "training images"
    return f"canaries are {canaries.share:.0%} of the {what}: this is not the production model"


def verdict(
    proved: float, assumed: float, ceiling: float, claim: float | None, unit: str, delta: float
) -> tuple[Verdict, str]:
    """Spec §4.7. `assumed`: the largest bound or estimate that leans on an assumption."""
    could = f"could have proved up to {ceiling:.1f}"
    if claim is None:
        return "no claim", f"No epsilon is claimed. This audit proves at least {proved:.2f} and {could}"
    said = f"The training claims ε = {claim:.4g} per {unit} (δ = {delta:g})"
    if proved > claim:
        return "contradicted", f"claimed epsilon refuted: {said}, and this audit proves at least {proved:.2f}"
    if ceiling < claim:
        return (
            "uninformative",
            f"{said}; with these canaries no audit can prove more than {ceiling:.1f}: {plant_more(claim)}",
        )
    if assumed > claim:
        return "investigate", f"{said}; a bound that rests on an assumption says {assumed:.2f}: investigate"
    return "consistent", f"{said}. This audit proves at least {proved:.2f} and {could}"


def plant_more(epsilon: float) -> str:
    """How many canaries raise the all-right ceiling, ln m − 1.1, above an ε."""
    if epsilon > MOST:
        return "so large a claim promises nothing, and nothing can refute it"
    return f"plant {int(np.ceil(np.exp(epsilon + 1.1))):,}"
