"""What did the reconstruction attack obtain: the leakage table of a run, from its images and the true ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedsec.metrics.image import (
    match,
    mse,
    nearest_public_psnr,
    pixel_hash,
    psnr,
    rdlv,
    replace_missing,
    ssim,
    to_psnr,
)
from fedsec.metrics.reidentification import label_rows, rank_in_gallery, reidentification
from fedsec.metrics.statistics import bootstrap, proportion, weighted_mean, weighted_median
from fedsec.types import Estimate, Reconstruction

PSNR_MARKS = (20, 25, 30, 40)
SSIM_MARKS = (0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Pairs:
    """Every attacked image beside the reconstruction matched to it."""

    images: Tensor
    """(N, C, H, W) clamped; the prior where nothing was recovered."""
    truths: Tensor
    labels: Tensor
    victim: NDArray[np.int64]
    """(N,) the victim batch of each image."""
    missing: NDArray[np.bool_]
    label_right: NDArray[np.bool_]
    """(N,) the matched reconstruction carries the true label."""
    labels_found: NDArray[np.bool_]
    """(N,) as many hits in each batch as true labels are in its recovered multiset."""
    surplus: int
    """Reconstructions that no true image was left for."""


def summarise_reconstructions(
    reconstructions: Sequence[Reconstruction],
    truths: Sequence[Tensor],
    labels: Sequence[Tensor],
    public_images: Tensor,
    *,
    generator: np.random.Generator,
    gallery_images: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    draws: int = 10_000,
) -> dict[str, Any]:
    """Leakage of one run, with the public mean image μ as the attacker's prior.

    Args:
        reconstructions: one for each victim batch, in order.
        truths: (B, C, H, W) in [0, 1] for each victim batch; B may differ.
        labels: (B,) or (B, L) for each victim batch.
        public_images: (N, C, H, W) in [0, 1], the attacker's prior.
        generator: draws bootstrap samples and galleries.
        gallery_images: (P, C, H, W) in [0, 1] for re-identification, none of an attacked image's patient. Public
            ones are left out.
        gallery_labels: (P,) or (P, L).
        draws: bootstrap draws.

    Returns:
        Estimates `psnr` (median), `psnr_of_mean_mse`, `ssim` (median), `prior_psnr` and `prior_ssim` (of μ),
        `nearest_public_psnr`, `rdlv`, `label_accuracy` (of each batch's multiset of labels), `label_exact` (share of
        batches with a perfect multiset), `label_accuracy_matched` (per image, after matching); `success`, shares of
        images; the `reid_*` keys of `reidentification`, and `reid_prior_auc`, the same for μ, which must be at
        chance; `n_missing` images without a finite reconstruction, for which μ counts, and `n_surplus`
        reconstructions beyond the true images; `images`, one row an image. Whole victim batches are resampled, and
        are the `n` of an estimate. SSIM keys are absent below 11 pixels, `reid_*` keys without a gallery.
    """
    if not len(public_images):
        raise ValueError("the public set is empty; without a prior a PSNR says nothing about leakage")
    prior = public_images.detach().double().mean(0).cpu()
    pairs = pair_up(reconstructions, truths, labels, prior)
    priors = prior.expand_as(pairs.truths)
    victim, nearest = pairs.victim, nearest_public_psnr(pairs.truths, public_images.cpu()).numpy()
    errors, dB = mse(pairs.images, pairs.truths).numpy(), psnr(pairs.images, pairs.truths).numpy()

    def median(values: ArrayLike) -> Estimate:
        return bootstrap(weighted_median, values, generator=generator, draws=draws, groups=victim)

    def mean_mse_psnr(values: ArrayLike, weights: ArrayLike | None = None) -> Any:
        return to_psnr(torch.as_tensor(weighted_mean(values, weights))).numpy()

    result: dict[str, Any] = {
        "psnr": median(dB),
        "psnr_of_mean_mse": bootstrap(mean_mse_psnr, errors, generator=generator, draws=draws, groups=victim),
        "prior_psnr": median(psnr(priors, pairs.truths).numpy()),
        "nearest_public_psnr": median(nearest),
        "label_accuracy": proportion(pairs.labels_found, victim),
        "label_exact": proportion([pairs.labels_found[victim == v].all() for v in np.unique(victim)]),
        "label_accuracy_matched": proportion(pairs.label_right, victim),
        "n_missing": int(pairs.missing.sum()),
        "n_surplus": pairs.surplus,
    }
    success = {f"psnr_{mark}": proportion(dB >= mark, victim) for mark in PSNR_MARKS}
    if not np.isnan(nearest).all():
        success["beats_nearest_public"] = proportion(dB > nearest, victim)
    rows: list[dict[str, Any]] = [
        {"victim": int(v), "psnr": float(value), "missing": bool(gone)}
        for v, value, gone in zip(victim, dB, pairs.missing, strict=True)
    ]
    similarity, prior_similarity = ssim(pairs.images, pairs.truths), ssim(priors, pairs.truths)
    if similarity is not None and prior_similarity is not None:
        result["ssim"] = median(similarity.numpy())
        result["prior_ssim"] = median(prior_similarity.numpy())
        result["rdlv"] = median(rdlv(similarity, prior_similarity).numpy())
        success |= {f"ssim_{mark}": proportion(similarity.numpy() >= mark, victim) for mark in SSIM_MARKS}
        for row, value in zip(rows, similarity.tolist(), strict=True):
            row["ssim"] = value
    if gallery_images is not None and gallery_labels is not None:
        public = set(pixel_hash(public_images))
        private = [row for row, digest in enumerate(pixel_hash(gallery_images)) if digest not in public]
        gallery = gallery_images[private].cpu(), gallery_labels[private].cpu()
        found, ranks = _identify(pairs, pairs.images, gallery, generator, draws)
        result |= found
        null, _ = _identify(pairs, priors, gallery, generator, draws)
        result |= {"reid_prior_auc": null["reid_auc"]} if "reid_auc" in null else {}
        for row, rank in zip(rows, ranks, strict=True):
            row["rank"] = None if np.isnan(rank) else float(rank)
    return result | {"success": success, "images": rows}


def pair_up(
    reconstructions: Sequence[Reconstruction], truths: Sequence[Tensor], labels: Sequence[Tensor], prior: Tensor
) -> Pairs:
    """Match each victim batch with its reconstruction; `prior` (C, H, W) stands in for what is missing."""
    if not len(reconstructions) == len(truths) == len(labels) or not truths:
        raise ValueError(
            f"{len(reconstructions)} reconstructions and {len(labels)} label sets for {len(truths)} victim batches; "
            "give one of each for every batch, and at least one batch"
        )
    images, missing, right, found, surplus = [], [], [], [], 0
    for guess, truth, label in zip(reconstructions, truths, labels, strict=True):
        if guess.images.shape[1:] != truth.shape[1:]:
            raise ValueError(
                f"{guess.method} returned images of shape {tuple(guess.images.shape[1:])}, not {tuple(truth.shape[1:])}"
            )
        repaired, broken = replace_missing(guess.images.detach().double().cpu(), prior)
        assigned = match(repaired, truth.cpu())
        wanted, offered = _as_tuples(label), _as_tuples(guess.labels)
        hits = (Counter(wanted) & Counter(offered)).total()
        images.append(torch.stack([prior.clamp(0, 1) if a is None else repaired[a] for a in assigned]))
        missing += [a is None or bool(broken[a]) for a in assigned]
        right += [a is not None and offered[a] == w for a, w in zip(assigned, wanted, strict=True)]
        found += [position < hits for position in range(len(wanted))]
        surplus += max(0, len(repaired) - len(truth))
    return Pairs(
        torch.cat(images),
        torch.cat([truth.detach().double().cpu() for truth in truths]),
        torch.cat([label.cpu() for label in labels]),
        np.repeat(np.arange(len(truths)), [len(truth) for truth in truths]),
        np.array(missing),
        np.array(right),
        np.array(found),
        surplus,
    )


def _identify(
    pairs: Pairs, images: Tensor, gallery: tuple[Tensor, Tensor], generator: np.random.Generator, draws: int
) -> tuple[Mapping[str, Any], NDArray[np.float64]]:
    ranks = rank_in_gallery(images, pairs.truths, pairs.labels, *gallery, generator=generator)
    return reidentification(ranks, generator=generator, draws=draws, groups=pairs.victim), ranks.rank


def _as_tuples(labels: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in label_rows(labels).tolist()]
