"""What did the reconstruction attack obtain: the leakage table of a run, from its images and the true ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fedsec.findings import Reconstruction
from fedsec.metrics.encoder import PublicEncoder
from fedsec.metrics.features import Embed, compare_features, diagnosis
from fedsec.metrics.image import largest_rdlv, mse, nearest_public_psnr, pixel_hash, psnr, rdlv, ssim, to_psnr
from fedsec.metrics.limits import mean_mse_psnr
from fedsec.metrics.pairs import Pairs, label_recovery, pair_up
from fedsec.metrics.reidentification import Galleries, draw_galleries, reidentification
from fedsec.metrics.statistics import bootstrap, proportion, weighted_median
from fedsec.types import Estimate

PSNR_MARKS = (20, 25, 30, 40)
SSIM_MARKS = (0.5, 0.7, 0.9)
STRANGERS = 5
"""Draws of public images behind `matched_public_psnr`."""
NULL_DRAWS = 20
"""Sets of strangers behind `rdlv_max_null`."""
MAX_SIMILARITIES = 4096
"""Pairs of one victim batch up to which `rdlv_max` looks at all of them."""
Table = dict[str, Any]


def summarise_reconstructions(
    reconstructions: Sequence[Reconstruction],
    truths: Sequence[Tensor],
    labels: Sequence[Tensor],
    public_images: Tensor,
    *,
    generator: np.random.Generator,
    gallery_images: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    victim_features: Embed | None = None,
    encoder: PublicEncoder | None = None,
    draws: int = 10_000,
) -> Table:
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
        victim_features: penultimate features of the attacked model.
        encoder: trained on public images.
        draws: bootstrap draws.

    Returns:
        Estimates `psnr` (median), `psnr_of_mean_mse`, `ssim` (median), `prior_psnr`, `prior_psnr_of_mean_mse` and
        `prior_ssim` (of μ), `nearest_public_psnr`, `rdlv`; where an attack hands in several images,
        `matched_public_psnr` and its `_of_mean_mse` (as many random public ones, matched with the truth in the same
        way) and `reid_matched_*`; the `label_*` keys of `pairs.label_recovery`; `success`,
        shares of images; the `reid_*` keys of `reidentification`, and `reid_prior_auc`, the same for μ, which must be
        at chance; `rdlv_max` with its null; the keys of `features`, and `reid_encoder_*`, where there is a network;
        `n_missing` images without a finite reconstruction, for which μ counts, and `n_surplus` reconstructions beyond
        the true images; `images`, one row an image. Whole victim batches are resampled, and are the `n` of an
        estimate. SSIM keys are absent below 11 pixels, `reid_*` keys without a gallery.
    """
    if not len(public_images):
        raise ValueError("the public set is empty; without a prior a PSNR says nothing about leakage")
    prior = public_images.detach().double().mean(0).cpu()
    pairs = pair_up(reconstructions, truths, labels, prior)
    measure = _Measure(pairs, prior.expand_as(pairs.truths), generator, draws)
    rows: list[Table] = [
        {"victim": int(v), "missing": bool(gone)} for v, gone in zip(pairs.victim, pairs.missing, strict=True)
    ]
    result = measure.closeness(public_images.cpu(), rows) | measure.similarity(rows)
    success = result.pop("success") | result.pop("success_ssim", {})
    strangers = None
    if any(len(guess.images) > 1 for guess in reconstructions):
        (draw,) = generator.spawn(1)  # every other draw stays what it was
        strangers = [
            pair_up(public_instead(reconstructions, public_images, draw), truths, labels, prior).images
            for _ in range(STRANGERS)
        ]
        result |= measure.matched(strangers, rows)
    result |= label_recovery(reconstructions, labels, pairs)
    if gallery_images is not None and gallery_labels is not None:
        public = set(pixel_hash(public_images))
        private = [row for row, digest in enumerate(pixel_hash(gallery_images)) if digest not in public]
        candidates = gallery_images[private].cpu(), gallery_labels[private].cpu()
        galleries = draw_galleries(pairs.truths, pairs.labels, *candidates, generator=generator)
        result |= measure.identification(galleries, encoder, rows) | measure.best_of_many(galleries)
        if strangers is not None:
            result |= measure.matched_identification(galleries, strangers)
    if victim_features is not None:
        result |= measure.features("victim", victim_features)
    if encoder is not None:
        result |= measure.features("public", encoder.features)
        result |= diagnosis(encoder.classify, pairs.images, pairs.truths, pairs.labels, pairs.victim)
    counts = {"n_missing": int(pairs.missing.sum()), "n_surplus": pairs.surplus}
    return complete(result | counts | {"success": success, "images": rows})


def public_instead(
    reconstructions: Sequence[Reconstruction], public_images: Tensor, generator: np.random.Generator
) -> list[Reconstruction]:
    """As many random public images in the place of each reconstruction.

    Whoever hands in many images is matched with the truth to its advantage; so would anybody be.
    """
    result = []
    for guess in reconstructions:
        count = len(guess.images)
        rows = generator.choice(len(public_images), count, replace=count > len(public_images))
        result.append(replace(guess, images=public_images[torch.from_numpy(rows)]))
    return result


def complete(table: Mapping[str, Any]) -> Table:
    """The table itself; refused where a PSNR stands without that of the public mean image, and so says nothing."""
    if "psnr" in table and "prior_psnr" not in table:
        raise ValueError("a PSNR without prior_psnr says nothing about leakage: the public mean image scores well, too")
    return dict(table)


class _Measure:
    """Attacked images, their reconstructions and the prior, with what every interval needs."""

    def __init__(self, pairs: Pairs, priors: Tensor, generator: np.random.Generator, draws: int) -> None:
        self.pairs, self.priors = pairs, priors
        self.generator, self.draws = generator, draws

    def median(self, values: ArrayLike) -> Estimate:
        """Over images, whole batches resampled."""
        more: Table = {"generator": self.generator, "draws": self.draws, "groups": self.pairs.victim}
        return bootstrap(weighted_median, values, **more)

    def share(self, hits: ArrayLike) -> Estimate:
        """Of images."""
        return proportion(hits, self.pairs.victim)

    def closeness(self, public_images: Tensor, rows: list[Table]) -> Table:
        """Squared error, beside that of the prior and of the most similar public image."""
        pairs = self.pairs
        dB, prior_dB = psnr(pairs.images, pairs.truths).numpy(), psnr(self.priors, pairs.truths).numpy()
        nearest = nearest_public_psnr(pairs.truths, public_images).numpy()
        success = {f"psnr_{mark}": self.share(dB >= mark) for mark in PSNR_MARKS}
        if not np.isnan(nearest).all():
            success["beats_nearest_public"] = self.share(dB > nearest)
        for row, value, prior_value in zip(rows, dB.tolist(), prior_dB.tolist(), strict=True):
            row |= {"psnr": value, "prior_psnr": prior_value}
        more: Table = {"generator": self.generator, "draws": self.draws, "groups": pairs.victim}
        return {
            "psnr": self.median(dB),
            "psnr_of_mean_mse": bootstrap(mean_mse_psnr, mse(pairs.images, pairs.truths).numpy(), **more),
            "prior_psnr": self.median(prior_dB),
            "prior_psnr_of_mean_mse": bootstrap(mean_mse_psnr, mse(self.priors, pairs.truths).numpy(), **more),
            "nearest_public_psnr": self.median(nearest),
            "success": success,
        }

    def matched(self, strangers: Sequence[Tensor], rows: list[Table]) -> Table:
        """What matching alone is worth: several draws of public images (N, C, H, W) that were matched."""
        errors = np.mean([mse(images, self.pairs.truths).numpy() for images in strangers], axis=0)
        dB = to_psnr(torch.from_numpy(errors)).numpy()
        for row, value in zip(rows, dB.tolist(), strict=True):
            row["matched_public_psnr"] = value
        more: Table = {"generator": self.generator, "draws": self.draws, "groups": self.pairs.victim}
        return {
            "matched_public_psnr": self.median(dB),
            "matched_public_psnr_of_mean_mse": bootstrap(mean_mse_psnr, errors, **more),
        }

    def matched_identification(self, galleries: Galleries, strangers: Sequence[Tensor]) -> Table:
        """How often matched public images point at the patient: means over the draws."""
        more: Table = {"generator": self.generator, "draws": 100, "groups": self.pairs.victim}
        found = [reidentification(galleries.ranks(images), **more) for images in strangers]
        result: Table = {}
        for key in ("rank1", "auc"):
            values = [e.value for f in found if isinstance(e := f.get(f"reid_{key}"), Estimate)]
            if values:
                result[f"reid_matched_{key}"] = float(np.mean(values))
        return result

    def similarity(self, rows: list[Table]) -> Table:
        """Structural similarity; nothing below 11 pixels."""
        found, prior = ssim(self.pairs.images, self.pairs.truths), ssim(self.priors, self.pairs.truths)
        if found is None or prior is None:
            return {}
        for row, value in zip(rows, found.tolist(), strict=True):
            row["ssim"] = value
        return {
            "ssim": self.median(found.numpy()),
            "prior_ssim": self.median(prior.numpy()),
            "rdlv": self.median(rdlv(found, prior).numpy()),
            "success_ssim": {f"ssim_{mark}": self.share(found.numpy() >= mark) for mark in SSIM_MARKS},
        }

    def identification(self, galleries: Galleries, encoder: PublicEncoder | None, rows: list[Table]) -> Table:
        """Does a reconstruction point at its patient: by pixels, and by features where there is an encoder."""
        ranks, null = galleries.ranks(self.pairs.images), galleries.ranks(self.priors)
        more: Table = {"generator": self.generator, "draws": self.draws, "groups": self.pairs.victim}
        result: Table = dict(reidentification(ranks, **more))
        for row, rank in zip(rows, ranks.rank, strict=True):
            row["rank"] = None if np.isnan(rank) else float(rank)
        if "reid_auc" not in result:
            return result
        result["reid_prior_auc"] = reidentification(null, **more)["reid_auc"]
        if encoder is not None:
            seen = reidentification(galleries.ranks(self.pairs.images, encoder.features), **more)
            unseen = reidentification(galleries.ranks(self.priors, encoder.features), **more)
            result |= {f"reid_encoder_{key}": seen[f"reid_{key}"] for key in ("rank1", "auc")}
            result["reid_encoder_prior_auc"] = unseen["reid_auc"]
        return result

    def best_of_many(self, galleries: Galleries) -> Table:
        """The largest RDLV of any reconstruction with any image of its batch, and of strangers: never one alone."""
        pairs, prior = self.pairs, self.priors[0]
        batches = [np.flatnonzero(pairs.victim == v) for v in np.unique(pairs.victim)]
        if max(len(b) for b in batches) ** 2 > MAX_SIMILARITIES or not all(len(c) for c in galleries.chosen):
            return {}
        found = [largest_rdlv(pairs.images[b], pairs.truths[b], prior) for b in batches]
        if None in found:
            return {}
        null = []
        for _ in range(NULL_DRAWS):
            others = galleries.images[[int(self.generator.choice(c)) for c in galleries.chosen]].to(pairs.truths)
            null.append(max(largest_rdlv(pairs.images[b], others[b], prior) or 0.0 for b in batches))
        return {"rdlv_max": max(v for v in found if v is not None), "rdlv_max_null": float(np.median(null))}

    def features(self, name: str, embed: Embed) -> Table:
        """Squared difference of features."""
        more: Table = {"generator": self.generator, "draws": self.draws, "groups": self.pairs.victim}
        return dict(compare_features(name, embed, self.pairs.images, self.priors, self.pairs.truths, **more))
