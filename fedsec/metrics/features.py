"""How close is a reconstruction in the eyes of a network: its features, and the diagnosis that it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsec.metrics.statistics import bootstrap, proportion, weighted_median
from fedsec.types import Estimate

Embed = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) in [0, 1] -> features (B, F)."""


@torch.no_grad()
def feature_mse(embed: Embed, images: Tensor, truths: Tensor) -> NDArray[np.float64]:
    """Mean squared difference of the features of each pair, (B,)."""
    difference = embed(images.float()).double() - embed(truths.float()).double()
    return difference.square().flatten(1).mean(1).cpu().numpy()


def compare_features(
    name: str,
    embed: Embed,
    images: Tensor,
    priors: Tensor,
    truths: Tensor,
    *,
    generator: np.random.Generator,
    draws: int,
    groups: NDArray[np.int64],
) -> dict[str, Estimate]:
    """`feature_mse_<name>` and `prior_feature_mse_<name>`, medians over images.

    The unit is the network's own, so that the prior's value is the scale.
    """
    return {
        key: bootstrap(weighted_median, feature_mse(embed, x, truths), generator=generator, draws=draws, groups=groups)
        for key, x in ((f"feature_mse_{name}", images), (f"prior_feature_mse_{name}", priors))
    }


def diagnosis(
    classify: Callable[[Tensor], Tensor], images: Tensor, truths: Tensor, labels: Tensor, groups: NDArray[np.int64]
) -> dict[str, Any]:
    """Does a public classifier still see the true disease?

    Args:
        classify: images -> classes (B,).
        images: reconstructions. truths: the true images. labels: their true classes (B,).
        groups: (B,) victim batches.

    Returns:
        `diagnosis_retained`, the share of reconstructions that get the true class; `diagnosis_original`, the same for
        the true images, the most that can be expected; `diagnosis_chance`, the share of the most frequent class.
    """
    truth = labels.long().cpu()
    return {
        "diagnosis_retained": proportion((classify(images.float()).cpu() == truth).numpy(), groups),
        "diagnosis_original": proportion((classify(truths.float()).cpu() == truth).numpy(), groups),
        "diagnosis_chance": float(torch.bincount(truth).max()) / len(truth),
    }
