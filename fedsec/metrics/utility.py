"""What is the model worth to the clinic: ranking and decision measures of a test set, each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedsec.metrics import classification
from fedsec.metrics.one_vs_rest import Questions, questions
from fedsec.metrics.statistics import bootstrap_weights, estimate
from fedsec.types import Estimate, Task

Array = NDArray[np.float64]
Values = ArrayLike | Tensor


def utility(
    scores: Values,
    labels: Values,
    task: Task,
    *,
    generator: np.random.Generator,
    class_names: Sequence[str] | None = None,
    positive_class: int | None = 1,
    groups: ArrayLike | None = None,
    draws: int = 1000,
) -> dict[str, Any]:
    """Utility of one model on one test set.

    Args:
        scores: (N, C) logits or probabilities; binary: C = 2. Exclusive classes: rows that are non-negative and sum
            to 1 are probabilities. Multi-label, (N, L): all within [0, 1] are probabilities, decided at 0.5; logits
            are decided at 0.
        labels: (N,) or (N, 1) classes, or (N, L) of 0/1; NaN and negative values are unknown and left out.
        task: what the columns mean.
        generator: draws the bootstrap; all measures share its draws.
        class_names: names of the columns; their numbers by default.
        positive_class: binary: the class that is to be found; None is 1.
        groups: (N,) patients; they are resampled whole, and are then the `n` of each estimate.
        draws: bootstrap draws.

    Returns:
        `auc`, `balanced_accuracy`, `sensitivity_at_90_specificity`, `accuracy`, and for ordinal tasks
        `quadratic_weighted_kappa`: estimates. With more than two classes AUC and sensitivity are unweighted means
        of one-vs-rest values, and `auc_by_class` lists the AUCs; multi-label balanced accuracy is the mean over
        labels, and accuracy the share of known entries. `auc_skipped` names the classes without both positives and
        negatives, which no mean counts. `nonfinite_scores`, where there are any: images whose scores are NaN or Inf;
        they rank as undecided and count as wrong.
    """
    posed = questions(scores, labels, task, class_names=class_names, positive_class=positive_class, groups=groups)
    values, sampled = _measure(posed, draws, generator)
    by_class, sampled_by_class = values.pop("auc_by_class"), sampled.pop("auc_by_class")
    result: dict[str, Any] = {
        name: estimate(float(values[name]), sampled[name], posed.n, posed.units()) for name in values
    }
    if task != "binary":
        known = ~np.isnan(posed.targets)
        result["auc_by_class"] = {
            name: estimate(float(by_class[k]), sampled_by_class[k], int(known[:, k].sum()), posed.units(known[:, k]))
            for k, name in enumerate(posed.counted)
        }
    result["auc_skipped"] = list(posed.skipped)
    if posed.undecided:
        result["nonfinite_scores"] = posed.undecided
    return result


def auc(scores: Values, labels: Values, task: Task, *, positive_class: int | None = 1) -> float:
    """The AUC of `utility` alone, without interval; NaN where no class has both positives and negatives."""
    posed = questions(scores, labels, task, positive_class=positive_class)
    return float(classification.macro_auc(posed.margins, posed.targets))


def per_client_utility(
    parts: Sequence[tuple[Values, Values]],
    clients: Sequence[str | int],
    task: Task,
    *,
    generator: np.random.Generator,
    class_names: Sequence[str] | None = None,
    positive_class: int | None = 1,
    groups: Sequence[ArrayLike] | None = None,
    draws: int = 1000,
) -> dict[str, Any]:
    """AUC on each client's own test part; a pooled AUC can hide that one hospital is served badly.

    Args:
        parts: (scores, labels) of each client, as in `utility`.
        clients: the clients' names, in the same order.
        task, class_names, positive_class, draws: as in `utility`.
        generator: draws the bootstrap, for each client anew.
        groups: patients of each client.

    Returns:
        `client_auc` (client -> estimate), `mean_client_auc` (these clients, other images), `worst_client` with
        `worst_client_auc` (its own interval, which does not count that it was picked as the lowest),
        `client_auc_spread` (standard deviation over clients), and `clients_skipped`: those whose test part has no
        class with both positives and negatives.
    """
    if len({str(client) for client in clients}) != len(parts):
        raise ValueError(f"{len(parts)} test parts need as many different client names, not {list(clients)}")
    by_client: dict[str, Estimate] = {}
    sampled, skipped = [], []
    owners = [None] * len(parts) if groups is None else groups
    for (scores, labels), client, owner in zip(parts, map(str, clients), owners, strict=True):
        posed = questions(scores, labels, task, class_names=class_names, positive_class=positive_class, groups=owner)
        if not posed.counted:
            skipped.append(client)
            continue
        blocks = bootstrap_weights(posed.n, generator=generator, draws=draws, groups=posed.groups)
        drawn = np.concatenate([classification.macro_auc(posed.margins, posed.targets, block) for block in blocks])
        value = float(classification.macro_auc(posed.margins, posed.targets))
        by_client[client] = estimate(value, drawn, posed.n, posed.units())
        sampled.append(drawn)
    aucs = [client.value for client in by_client.values()]
    images = sum(client.n for client in by_client.values())
    nothing = Estimate(float("nan"), float("nan"), float("nan"), 0)
    worst = min(by_client, key=lambda client: by_client[client].value, default=None)
    return {
        "client_auc": by_client,
        "mean_client_auc": estimate(float(np.mean(aucs)), np.mean(sampled, axis=0), images) if aucs else nothing,
        "worst_client": worst,
        "worst_client_auc": nothing if worst is None else by_client[worst],
        "client_auc_spread": float(np.std(aucs)) if aucs else float("nan"),
        "clients_skipped": skipped,
    }


def _measure(posed: Questions, draws: int, generator: np.random.Generator) -> tuple[dict[str, Array], dict[str, Array]]:
    """Every measure on all images, and in each bootstrap draw (last axis)."""
    values = _evaluate(posed, np.ones(posed.n))
    if posed.n == 0:
        return values, {name: np.zeros((*value.shape, 0)) for name, value in values.items()}
    blocks = [
        _evaluate(posed, weights)
        for weights in bootstrap_weights(posed.n, generator=generator, draws=draws, groups=posed.groups)
    ]
    return values, {name: np.concatenate([block[name] for block in blocks], axis=-1) for name in values}


def _evaluate(posed: Questions, weights: Array) -> dict[str, Array]:
    """Every measure: 0-d values for (N,) weights, (d,) for (N, d)."""
    columns, shape = range(len(posed.counted)), weights.shape[1:]
    known: NDArray[np.bool_] = ~np.isnan(posed.targets)
    each = [(posed.margins[known[:, k], k], posed.targets[known[:, k], k], weights[known[:, k]]) for k in columns]
    by_class = [classification.auc_binary(*column) for column in each]
    found = [classification.sensitivity_at_specificity(m, t, weights=w) for m, t, w in each]
    result = {
        "auc": _mean(by_class, shape),
        "auc_by_class": np.stack(by_class) if by_class else np.zeros((0, *shape)),
        "sensitivity_at_90_specificity": _mean(found, shape),
    }
    if posed.task == "multilabel":
        decided = posed.predictions[:, posed.use]
        balanced = [
            classification.balanced_accuracy(decided[known[:, k], k], t, w)
            for k, (_, t, w) in zip(columns, each, strict=True)
        ]
        right, entries = (posed.predictions == posed.labels).sum(1), (~np.isnan(posed.labels)).sum(1)
        with np.errstate(invalid="ignore"):
            result["accuracy"] = np.asarray((right @ weights) / (entries @ weights))
        result["balanced_accuracy"] = _mean(balanced, shape)
        return result
    result["accuracy"] = classification.accuracy(posed.predictions, posed.labels, weights)
    result["balanced_accuracy"] = classification.balanced_accuracy(posed.predictions, posed.labels, weights)
    if posed.task == "ordinal":
        result["quadratic_weighted_kappa"] = classification.quadratic_weighted_kappa(
            posed.predictions, posed.labels, posed.num_classes, weights
        )
    return result


def _mean(columns: Sequence[Array], shape: tuple[int, ...]) -> Array:
    return np.asarray(np.mean(columns, axis=0)) if columns else np.full(shape, np.nan)
