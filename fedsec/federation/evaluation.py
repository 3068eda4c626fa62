"""How good the trained model is: on each client's own part and on all of them together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsec.federation.assemble import Federation
from fedsec.federation.desk import ServerState
from fedsec.federation.sharing import load
from fedsec.metrics import utility as measures
from fedsec.metrics.statistics import proportion
from fedsec.models.loss import probabilities
from fedsec.types import Probe, RoundContext, to_json

ProbeOf = Callable[[Tensor, Tensor], Probe | None]
EVALUATION_BATCH = 512
SHARED = ("auc", "balanced_accuracy", "mean_client_auc", "worst_client_auc", "client_auc_spread")
MIN_PROBES = 30
"""Images of other classes below which a success rate says nothing."""


@torch.no_grad()
def predict(federation: Federation, x: Tensor, model: nn.Module | None = None) -> Tensor:
    """Scores (N, C) on the CPU, of the parameters that are in the model now, or of another model."""
    model = model or federation.seats.model
    model.eval()
    parts = [probabilities(model(batch), federation.dataset.task).cpu() for batch in x.split(EVALUATION_BATCH)]
    return torch.cat(parts) if parts else torch.empty(0, federation.dataset.num_classes)


def shared_scores(federation: Federation, part: str, state: ServerState) -> list[tuple[Tensor, Tensor]]:
    """Each client's (scores, labels) on its own part of `val` or `test`, all under the one shared model."""
    pieces, seats = federation.evaluation[part], federation.seats
    load(seats.model, seats.sharing, state.params, state.buffers, None)
    everything = predict(federation, torch.cat([x for x, _ in pieces]))
    return list(zip(everything.split([len(x) for x, _ in pieces]), (y.cpu() for _, y in pieces), strict=True))


def scores_by_client(federation: Federation, part: str, state: ServerState) -> list[tuple[Tensor, Tensor]]:
    """Each client's (scores, labels) on its own part of `val` or `test`, under the model that it would use."""
    seats, strategy = federation.seats, federation.seats.strategy
    if not (strategy.personal or state.local):
        return shared_scores(federation, part, state)
    result = []
    for client, (x, y) in enumerate(federation.evaluation[part]):
        model = copy.deepcopy(seats.model)
        images = federation.clients[client][0]
        if state.trained and client not in state.trained:
            model = strategy.unseen_model(model, seats.sharing, state, images)
        else:
            model = strategy.personal_model(model, seats.sharing, client, state, images)
        result.append((predict(federation, x, model), y.cpu()))
    return result


def curve_point(federation: Federation, state: ServerState) -> float:
    """AUC on the validation part (the test part where there is none)."""
    part = "val" if any(len(x) for x, _ in federation.evaluation["val"]) else "test"
    pieces = scores_by_client(federation, part, state)
    scores, labels = (torch.cat(column).numpy() for column in zip(*pieces, strict=True))
    return float(measures.auc(scores, labels, federation.dataset.task))


def attack_success(
    federation: Federation, part: str, params: Tensor, buffers: Tensor, probe_of: ProbeOf
) -> dict[str, Any]:
    """How often a backdoor's trigger turns held-out images of other classes into the target.

    Returns:
        `attack_success_rate`, `untriggered_rate` (called the target without any trigger) and `lift`, their difference;
        `attack_success_images`; nothing where the attack has no backdoor. The rates are absent below `MIN_PROBES`.
    """
    load(federation.seats.model, federation.seats.sharing, params, buffers, None)
    x, y = (torch.cat(column) for column in zip(*federation.evaluation[part], strict=True))
    probe = probe_of(x, y)
    if probe is None:
        return {}
    triggered, clean = (_called(federation, images, probe.target) for images in (probe.triggered, probe.clean))
    result: dict[str, Any] = {"attack_success_images": len(triggered)}
    if len(triggered) < MIN_PROBES:
        return result
    rate, without = proportion(triggered), proportion(clean)
    return result | {
        "attack_success_rate": rate,
        "untriggered_rate": without,
        "lift": rate.value - without.value,
    }


def _called(federation: Federation, images: Tensor, target: int) -> np.ndarray:
    scores = predict(federation, images)
    decided = scores.argmax(1) if scores.shape[1] > 1 else (scores[:, 0] > 0.5).long()
    return (decided == target).numpy()


def evaluate(federation: Federation, state: ServerState) -> dict[str, Any]:
    """All utility measures on the test part, with intervals, in JSON form.

    Where clients are judged on models of their own, `shared` says the same of the one model that all of them get.
    """
    pieces = scores_by_client(federation, "test", state)
    result = _utility(federation, pieces)
    strategy = federation.seats.strategy
    if (strategy.personal or state.local) and not strategy.shares_nothing:
        whole = _utility(federation, shared_scores(federation, "test", state))
        result["shared"] = {key: whole[key] for key in SHARED if key in whole}
    names = [n for n, (s, _) in zip(federation.partition.names, pieces, strict=True) if constant(s)]
    if names:
        result["constant_outputs"] = list(names)
    found: dict[str, Any] = to_json(result)
    return found


def constant(scores: Tensor) -> bool:
    """The same scores for every image: a dead network, not a bad one; its AUC of 0.5 is no measurement."""
    return len(scores) > 1 and bool((scores == scores[:1]).all())


def _utility(federation: Federation, pieces: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    scores, labels = (torch.cat(column).numpy() for column in zip(*pieces, strict=True))
    rng = RoundContext(federation.cell.seed, 0, 0).numpy("utility-bootstrap")
    dataset = federation.dataset
    pooled = measures.utility(
        scores,
        labels,
        dataset.task,
        class_names=dataset.class_names,
        positive_class=dataset.positive_class,
        groups=np.concatenate(federation.test_groups),
        generator=rng,
    )
    own = measures.per_client_utility(
        [(s.numpy(), y.numpy()) for s, y in pieces],
        federation.partition.names,
        dataset.task,
        positive_class=dataset.positive_class,
        groups=federation.test_groups,
        generator=rng,
    )
    return {**pooled, **own}
