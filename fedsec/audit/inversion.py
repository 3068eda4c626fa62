"""Is an image made from a model closer to its training images than to images it never saw? Never: is the model sure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsec.findings import Prototype
from fedsec.metrics.image import psnr

if TYPE_CHECKING:
    from fedsec.audit.exam import Exam

SPLITS = 1000
LIMIT = 0.01


def compare_prototypes(prototypes: Sequence[Prototype], exam: Exam, generator: np.random.Generator) -> dict[str, Any]:
    """Each class's best attempt: the ratio test, and the public class mean as baseline (spec §5.1).

    Returns:
        `classes`, a row each; `log10p`, −log10 of the smallest p after Bonferroni, 0 where the ratio is not below 1.
    """
    rows = [_compare(item, exam, generator) for item in prototypes]
    smallest = min((min(1.0, row["p"] * len(rows)) for row in rows if row["ratio"] < 1), default=1.0)
    leak = smallest < LIMIT
    better = [row for row in rows if row["psnr_gain"] > 0]
    text = (
        "Images made from the model lie closer to training images than to held-out ones of the same class "
        f"(p = {smallest:.3f}): the model gives away training images"
        if leak
        else "What inversion recovers is at best the average of a class, not a patient: it lies no closer to training "
        f"images than to held-out ones (smallest corrected p {smallest:.2f}), and beats the public mean image in "
        f"{len(better)} of {len(rows)} classes"
    )
    return {"classes": rows, "log10p": float(-np.log10(max(smallest, 1e-12))), "leak": leak, "verdict": text}


def _compare(item: Prototype, exam: Exam, generator: np.random.Generator) -> dict[str, Any]:
    cohort, dataset = exam.cohort, exam.dataset
    labels = np.asarray(dataset.labels)
    own = labels[cohort.rows] == item.label
    inside, outside = cohort.rows[own & cohort.member], cohort.rows[own & ~cohort.member]
    size = min(len(inside), len(outside))
    inside, outside = (generator.choice(rows, size, replace=False) for rows in (inside, outside))
    members, others = (_standard(dataset.batch(rows)[0]) for rows in (inside, outside))
    population = cohort.population[labels[cohort.population] == item.label]
    mean = dataset.batch(population)[0].mean(0, keepdim=True)
    ratio, p = ratio_test(_standard(item.images[:1]), members, others, generator)
    mean_ratio, _ = ratio_test(_standard(mean), members, others, generator)
    truth = dataset.batch(inside)[0]
    quality = [float(psnr(x.expand_as(truth), truth).mean()) for x in (item.images[:1], mean)]
    return {
        "label": dataset.class_names[item.label],
        "ratio": ratio,
        "p": p,
        "mean_ratio": mean_ratio,
        "psnr": quality[0],
        "mean_psnr": quality[1],
        "psnr_gain": quality[0] - quality[1],
        "confidence": item.confidence[0],
        "images": size,
    }


def ratio_test(image: Tensor, members: Tensor, others: Tensor, generator: np.random.Generator) -> tuple[float, float]:
    """ρ = d(nearest member)/d(nearest other), and its p from random re-splits of the union.

    Args:
        image: (1, F). members, others: (n, F) each.
    """
    distances = torch.cdist(image, torch.cat([members, others]))[0].numpy()
    n = len(members)
    ratio = float(distances[:n].min() / max(distances[n:].min(), 1e-12))
    # Only the order of distances matters: the nearest of each side after a random split.
    order = np.argsort(distances)
    found = []
    for _ in range(SPLITS):
        side = generator.permutation(2 * n) < n
        ranked = side[order]
        first_in, first_out = distances[order[ranked.argmax()]], distances[order[(~ranked).argmax()]]
        found.append(first_in / max(first_out, 1e-12))
    return ratio, float((1 + np.sum(np.array(found) <= ratio)) / (1 + SPLITS))


def _standard(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True).clamp(min=1e-6)
