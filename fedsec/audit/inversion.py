"""Is an image made from a model closer to its training images than to images it never saw? Never: is the model sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec import models
from fedsec.federation.local import PlainStep, train_locally
from fedsec.findings import Prototype
from fedsec.metrics.image import psnr
from fedsec.metrics.membership import Interval
from fedsec.metrics.signals import logits_of
from fedsec.metrics.statistics import clopper_pearson
from fedsec.types import LocalRecipe, RoundContext

if TYPE_CHECKING:
    from fedsec.audit.exam import Exam

NETWORK, SIDE = "cnn", 32
RECIPE = LocalRecipe("multiclass", 2, lr=0.02, momentum=0.9, weight_decay=0.0, batch_size=32, epochs=None, steps=300)
"""How the independent model is trained."""
LIMIT = 0.01
Array = NDArray[np.float64]


def compare_prototypes(prototypes: Sequence[Prototype], exam: Exam, generator: np.random.Generator) -> dict[str, Any]:
    """Each class's best attempt: the ratio test, and the public class mean as baseline (spec §5.1).

    Returns:
        `classes`, a row each; `log10p`, −log10 of the smallest p after Bonferroni, 0 where the ratio is not below 1.
    """
    judge = independent(exam)
    sides = {label: _sides(exam, label, generator) for label in sorted({item.label for item in prototypes})}
    null = fresh_ratios(exam, sides)
    rows = [_compare(item, exam, sides[item.label], null, judge) for item in prototypes]
    smallest = min((min(1.0, row["p"] * len(rows)) for row in rows if row["ratio"] < 1), default=1.0)
    leak = smallest < LIMIT
    better = [row for row in rows if row["psnr_gain"] > 0]
    text = (
        "Images made from the model lie closer to training images than to held-out ones of the same class "
        f"(p = {smallest:.3f}): the model gives away training images"
        if leak
        else "What inversion recovers is at best the average of a class, not a patient: it lies no closer to training "
        f"images than to held-out ones (smallest corrected p {smallest:.2f}), and {len(better)} of {len(rows)} "
        "attempts are nearer to them than the public mean image is"
    )
    return {
        "classes": rows,
        "log10p": float(-np.log10(max(smallest, 1e-12))),
        "leak": leak,
        "fresh_images": len(null),
        "independent": {"model": judge.name, "accuracy": judge.accuracy},
        "verdict": text,
    }


@dataclass(frozen=True)
class Independent:
    """A model of its own architecture and weights, trained on public images: is it sure of the class, too?"""

    name: str
    network: nn.Module
    side: int
    accuracy: Interval
    """On non-members."""

    def confidence(self, images: Tensor, label: int) -> float:
        """Its probability of a class for the first of the images."""
        x = F.adaptive_avg_pool2d(images[:1], self.side)
        return float(torch.softmax(torch.from_numpy(logits_of(self.network, x)), 1)[0, label])


def independent(exam: Exam) -> Independent:
    """A small convolutional net, trained on the population: what fools only the attacked model fails here."""
    dataset, cohort = exam.dataset, exam.cohort
    side = min(SIDE, min(dataset.image_shape[1:]))
    network = models.build(
        NETWORK, num_classes=dataset.num_classes, in_channels=dataset.image_shape[0], image_size=side, seed=exam.seed
    )

    def small(rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        x, y = dataset.batch(rows)
        return F.adaptive_avg_pool2d(x, side), y

    train_locally(PlainStep(network, RECIPE), *small(cohort.population), RECIPE, RoundContext(exam.seed, 1, 1, 0))
    x, y = small(cohort.rows[~cohort.member])
    right = logits_of(network, x).argmax(1) == y.numpy()
    low, high = (float(v) for v in clopper_pearson(right.sum(), len(right)))
    accuracy = Interval(float(right.mean()), low, high, len(right), "clopper-pearson")
    return Independent(f"{NETWORK}, {len(cohort.population):,} public images", network, side, accuracy)


@dataclass(frozen=True)
class Sides:
    """Members and non-members of one class, as many of each."""

    members: Tensor
    """(n, F) standardised pixels."""
    others: Tensor
    images: Tensor
    """(n, C, H, W) of the members."""


def _sides(exam: Exam, label: int, generator: np.random.Generator) -> Sides:
    cohort, dataset = exam.cohort, exam.dataset
    own = np.asarray(dataset.labels)[cohort.rows] == label
    inside, outside = cohort.rows[own & cohort.member], cohort.rows[own & ~cohort.member]
    size = min(len(inside), len(outside))
    drawn = [dataset.batch(generator.choice(rows, size, replace=False))[0] for rows in (inside, outside)]
    return Sides(_standard(drawn[0]), _standard(drawn[1]), drawn[0])


def fresh_ratios(exam: Exam, sides: Mapping[int, Sides]) -> Array:
    """(Z,) ratio of every public image: what an image shows that has nothing to do with the model."""
    population = exam.cohort.population
    labels = np.asarray(exam.dataset.labels)[population]
    found = [
        ratios(_standard(exam.dataset.batch(population[labels == label])[0]), side)
        for label, side in sides.items()
        if (labels == label).any() and len(side.images)
    ]
    return np.concatenate(found) if found else np.zeros(0)


def ratios(images: Tensor, side: Sides) -> Array:
    """(B,) ρ = d(nearest member)/d(nearest other) of standardised images (B, F)."""
    near = [torch.cdist(images, x).min(1).values.double().numpy() for x in (side.members, side.others)]
    return np.asarray(near[0] / np.maximum(near[1], 1e-12))


def ratio_p(ratio: float, null: Array) -> float:
    """Share of fresh images whose ratio is as small.

    Re-splitting the union of both sides at random, as one might, has no power at all: whatever the distances, the
    nearest image is on the members' side in half of all splits, so that a perfect copy gets p = 0.5.
    """
    return float((1 + np.sum(null <= ratio)) / (1 + len(null)))


def _compare(item: Prototype, exam: Exam, side: Sides, null: Array, judge: Independent) -> dict[str, Any]:
    mean = public_mean(exam, item.label)
    ratio, mean_ratio = (float(ratios(_standard(x), side)[0]) for x in (item.images[:1], mean))
    quality = [float(psnr(x.expand_as(side.images), side.images).mean()) for x in (item.images[:1], mean)]
    return {
        "label": exam.dataset.class_names[item.label],
        "method": item.method,
        "ratio": ratio,
        "p": ratio_p(ratio, null),
        "mean_ratio": mean_ratio,
        "psnr": quality[0],
        "mean_psnr": quality[1],
        "psnr_gain": quality[0] - quality[1],
        "confidence": item.confidence[0],
        "independent_confidence": judge.confidence(item.images, item.label),
        "images": len(side.images),
    }


def public_mean(exam: Exam, label: int) -> Tensor:
    """(1, C, H, W) mean of the public images of a class; of all, where there is none."""
    population = exam.cohort.population
    own = population[np.asarray(exam.dataset.labels)[population] == label]
    return exam.dataset.batch(own if len(own) else population)[0].mean(0, keepdim=True)


def _standard(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True).clamp(min=1e-6)
