"""Attack beside bound, adaptive beside naive: differences in dB between errors on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fedsec.findings import Limits
from fedsec.metrics.image import to_psnr
from fedsec.metrics.statistics import bootstrap, two_level_bootstrap, weighted_mean
from fedsec.metrics.verdict import MATCHED, MEAN_IMAGE, Standing, verdict
from fedsec.types import Estimate

Row = Mapping[str, Any]
Array = NDArray[np.float64]


def mean_mse_psnr(errors: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """PSNR in dB of the mean of squared errors, (n,); with (n, d) weights one for each column."""
    return to_psnr(torch.as_tensor(weighted_mean(errors, weights))).numpy()


def psnr_gain(errors: ArrayLike, others: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """How many dB the PSNR of the mean of `errors` lies above that of `others`, on the same images."""
    return mean_mse_psnr(errors, weights) - mean_mse_psnr(others, weights)


def errors_of(rows: Sequence[Row], key: str = "psnr") -> Array:
    """Mean squared errors (n,) from the PSNRs of the `images` rows of a leakage table."""
    return 10 ** (-np.array([row[key] for row in rows], dtype=np.float64) / 10)


def beside_limits(
    rows: Sequence[Row],
    limits: Sequence[Limits],
    *,
    generator: np.random.Generator,
    identified: bool = False,
    draws: int = 10_000,
) -> dict[str, Any]:
    """What the observations allowed, beside what the attack made of them.

    Args:
        rows: `images` of a leakage table; `victim` numbers the entries of `limits`.
        limits: one for each victim batch; none at all: no limit is known.
        generator: draws the bootstrap.
        identified: re-identification is above chance.
        draws: bootstrap draws; whole victim batches are drawn, for bound and attack alike.

    Returns:
        `bound_psnr` of the mean of the bounds, and `gap_db`, by how much the attack's PSNR of the mean squared error on
        the same images is below it (both absent without bound); the median of every further figure of the limits;
        `verdict`, a sentence; `limit_notes`. A bound holds for the mean over images, and there is none for a single
        one.
    """
    victim = np.array([row["victim"] for row in rows])
    errors, prior = errors_of(rows), errors_of(rows, "prior_psnr")
    bounds = np.array([np.nan if item.bound_mse is None else item.bound_mse for item in limits] or [np.nan])
    bounds = np.maximum(bounds[victim], 1e-14) if limits else np.full(len(rows), np.nan)
    known = ~np.isnan(bounds)
    baseline = MEAN_IMAGE
    result: dict[str, Any] = {}
    for name in sorted({name for item in limits for name in item.values}):
        result[name] = float(np.median([item.values[name] for item in limits if name in item.values]))
    notes = sorted({note for item in limits for note in item.notes})
    shown = known if known.any() else np.ones(len(rows), dtype=bool)
    if rows and all("matched_public_psnr" in row for row in rows):
        matched = errors_of(rows, "matched_public_psnr")
        if matched[shown].mean() < prior[shown].mean():
            prior, baseline = matched, MATCHED
    standing = Standing(
        attack=float(mean_mse_psnr(errors[shown])),
        prior=float(mean_mse_psnr(prior[shown])),
        baseline=baseline,
        bound=float(mean_mse_psnr(bounds[known])) if known.any() else None,
        identified=identified,
    )
    if known.any():
        more: dict[str, Any] = {"generator": generator, "draws": draws, "groups": victim[known]}
        result["bound_psnr"] = bootstrap(mean_mse_psnr, bounds[known], **more)
        result["gap_db"] = bootstrap(psnr_gain, bounds[known], errors[known], **more)
        if not known.all():
            notes.append(f"the bound is for {known.sum()} of {len(rows)} images")
    return result | {"verdict": verdict(standing), **({"limit_notes": notes} if notes else {})}


def adaptive_gap(
    adaptive: Sequence[Row], naive: Sequence[Row], *, generator: np.random.Generator, draws: int = 10_000
) -> Estimate:
    """dB that knowledge of the defense brings: PSNR of the mean squared error, adaptive minus naive, same images.

    The same measure as `gap_db`, so that bound, attack and naive attack lie on one scale.
    """
    if [row["victim"] for row in adaptive] != [row["victim"] for row in naive]:
        raise ValueError("the adaptive and the naive attack were not made on the same images")
    victim = [row["victim"] for row in adaptive]
    return bootstrap(psnr_gain, errors_of(adaptive), errors_of(naive), generator=generator, draws=draws, groups=victim)


def across_seeds(
    rows_by_seed: Sequence[Sequence[Row]],
    key: str = "psnr",
    *,
    generator: np.random.Generator,
    draws: int = 10_000,
) -> Estimate:
    """Median over the images of several seeds, with an interval that counts seeds and images as random.

    Args:
        rows_by_seed: for each seed the `images` rows of its leakage table. Images of one victim batch are drawn
            together.
        key: which column of the rows.
        generator: draws the bootstrap.
        draws: bootstrap draws.
    """
    values = [[row[key] for row in rows] for rows in rows_by_seed]
    groups = [[row["victim"] for row in rows] for rows in rows_by_seed]
    return two_level_bootstrap(values, "median", draws, generator=generator, groups_by_seed=groups)
