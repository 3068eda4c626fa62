"""Membership and origin from the server's seat: what the updates of a training say about single images.

g = ∇ℓ(θ; x) at the broadcast model, in the last layer and in closed form: (p − y) ⊗ h; u_k = −Δ_k/(η·steps).
Sources: Li, Li & Ribeiro 2023 (gradient cosine, difference); Zhu et al. 2025 (FedMIA, one client against all others);
Hu et al. 2021 (source inference).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_ndtr
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.findings import MembershipScores, SourceGuesses, Target
from fedsec.metrics.signals import BATCH, evaluating, logits_of, signals
from fedsec.types import Layout, ServerView, Task

if TYPE_CHECKING:
    from . import Membership

Array = NDArray[np.float64]
FEWEST, MANY = 4, 10
"""Clients a round below which "one against all others" says nothing, and from which the tail is taken for normal."""


@dataclass(frozen=True)
class Measured:
    """One round: (K, N) cosine, gradient difference and log-probability after training, client by client."""

    clients: tuple[int, ...]
    cosine: Array
    difference: Array
    log_p: Array


def watched_scores(
    attack: Membership, target: Target
) -> tuple[tuple[MembershipScores, ...], tuple[SourceGuesses, ...], tuple[str, ...]]:
    """Scores and guesses from the updates of evenly spaced rounds, and why something could not be applied."""
    candidates = target.candidates
    assert candidates is not None
    views = [view for view in candidates.history if view.updates]
    if not views:
        return (), (), ("no update history: the methods from the server's seat did not run",)
    chosen = [views[i] for i in np.unique(np.linspace(0, len(views) - 1, attack.rounds).round().astype(int))]
    hidden = any(view.clients_in_sum > 1 for view in chosen)
    model = target.model().to(target.device)
    layer = logits_layer(model, candidates.images[:1].to(target.device))
    notes: list[str] = []
    if layer is None or any(f"{layer}.weight" not in v.layout.names for v in chosen):
        why = "no fully connected layer makes the logits" if layer is None else f"{layer} stays with the clients"
        notes.append(f"{why}: grad_cos, grad_diff and all_for_one, which read that layer's update, did not run")
        layer = None
    rounds = [measure(model, view, target, layer) for view in chosen]
    view = "sum" if hidden else "updates"
    found: dict[str, Array] = {"loss_series": np.mean([r.log_p.max(0) for r in rounds], axis=0)}
    if layer is not None:
        found["grad_cos"] = np.mean([r.cosine.max(0) for r in rounds], axis=0)
        found["grad_diff"] = np.mean([r.difference.max(0) for r in rounds], axis=0)
    sources: list[SourceGuesses] = []
    if hidden:
        notes.append("view is aggregate only: source inference and all_for_one need individual updates")
    else:
        sources.append(SourceGuesses("lowest loss", lowest_loss(rounds)))
        if layer is None:
            pass
        elif min(len(r.clients) for r in rounds) >= FEWEST:
            score, who = one_against_all(rounds)
            found["all_for_one"] = score
            sources.append(SourceGuesses("one against all", who))
        else:
            notes.append(f"all_for_one needs {FEWEST} clients in every round")
    chosen_methods = [name for name in attack.asked if name in found]
    scores = tuple(MembershipScores(name, found[name], 0, view) for name in chosen_methods)  # type: ignore[arg-type]
    return scores, tuple(sources), tuple(notes)


def measure(model: nn.Module, view: ServerView, target: Target, layer: str | None) -> Measured:
    """What one round says about every candidate; nothing by gradients where no `layer` makes the logits."""
    candidates = target.candidates
    assert candidates is not None
    _load(model, view, view.params, view.buffers)
    images, labels = candidates.images, candidates.labels
    known = None if layer is None else last_layer(model, layer, images, labels, candidates.task, target.device)
    per_step = view.recipe.lr * max(1, view.local_steps)
    cosine, difference, log_p = [], [], []
    for update in view.updates:
        silent = np.full(len(images), np.nan)
        if layer is None or known is None:
            cosine.append(silent)
            difference.append(silent)
        else:
            errors, features = known
            u = _layer_of(update.delta, view.layout, layer) / -per_step
            inner = ((errors @ u[:, :-1]) * features).sum(1) + errors @ u[:, -1]
            own = (errors.square().sum(1) * (features.square().sum(1) + 1)).clamp(min=1e-20)
            scale = 1 / max(1, update.num_samples)
            cosine.append((inner / (own.sqrt() * u.norm().clamp(min=1e-20))).numpy())
            difference.append((2 * scale * inner - scale**2 * own).numpy())
        _load(model, view, view.params + update.delta, update.buffers)
        logits = logits_of(model, candidates.images, target.device)
        log_p.append(signals(logits, candidates.labels.numpy(), candidates.task).log_p)
    stacked = [np.stack(rows).astype(np.float64) for rows in (cosine, difference, log_p)]
    return Measured(tuple(u.client for u in view.updates), *stacked)


@torch.no_grad()
def logits_layer(model: nn.Module, image: Tensor) -> str | None:
    """Name of the fully connected layer whose outputs the logits are; None where something else makes them.

    The last one of the model need not be it: strategies add projectors, hypernetworks and graphs.
    """
    made: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: made.update({name: output})

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    hooks = [module.register_forward_hook(hook(name)) for name, module in layers]
    try:
        with evaluating(model):
            logits = model(image)
    finally:
        for each in hooks:
            each.remove()
    return next((name for name, output in made.items() if torch.equal(output, logits)), None)


def last_layer(
    model: nn.Module, layer: str, images: Tensor, labels: Tensor, task: Task, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(N, C) derivative of each image's loss by its logits, and (N, F) what enters the last layer."""
    seen: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].cpu()))
    errors = []
    try:
        with evaluating(model):
            for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
                logits = model(x.to(device)).cpu()
                if task == "multilabel":
                    known = ~torch.isnan(y)
                    wrong = (torch.sigmoid(logits) - torch.nan_to_num(y)) * known
                    errors.append(wrong / known.sum(1, keepdim=True).clamp(min=1))
                else:
                    errors.append(torch.softmax(logits, 1) - F.one_hot(y, logits.shape[1]))
    finally:
        hook.remove()
    return torch.cat(errors), torch.cat(seen).flatten(1)


def lowest_loss(rounds: Sequence[Measured]) -> NDArray[np.int64]:
    """Client whose models have, over the rounds, the lowest mean loss on each candidate (Hu et al. 2021); (N,)."""
    return _by_client(rounds, [r.log_p for r in rounds])


def one_against_all(rounds: Sequence[Measured]) -> tuple[Array, NDArray[np.int64]]:
    """Score (N,) and client (N,): how far one client's cosine stands above all others' of the same round.

    The other clients give the distribution of a non-member: mean and standard deviation, the latter not below that of
    the pooled images. Assumes that an image is at one client at most; patients shared by hospitals break this.
    """
    tails, standard = [], []
    for r in rounds:
        k = len(r.clients)
        total, squares = r.cosine.sum(0), (r.cosine**2).sum(0)
        mean = (total - r.cosine) / (k - 1)
        variance = np.maximum((squares - r.cosine**2) / (k - 1) - mean**2, 0) * (k - 1) / (k - 2)
        spread = np.sqrt(np.maximum(variance, variance.mean()))
        z = (r.cosine - mean) / (spread * np.sqrt(1 + 1 / (k - 1)))
        standard.append(z)
        tails.append(student.logcdf(z, k - 2) if k < MANY else log_ndtr(z))
    return _pooled(rounds, tails).max(0), _by_client(rounds, standard)


def _pooled(rounds: Sequence[Measured], values: Sequence[Array]) -> Array:
    """(clients, N) mean over the rounds in which a client took part; -inf where in none."""
    clients = sorted({k for r in rounds for k in r.clients})
    rows = []
    for client in clients:
        mine = [v[r.clients.index(client)] for r, v in zip(rounds, values, strict=True) if client in r.clients]
        rows.append(np.mean(mine, axis=0))
    return np.stack(rows)


def _by_client(rounds: Sequence[Measured], values: Sequence[Array]) -> NDArray[np.int64]:
    clients = np.array(sorted({k for r in rounds for k in r.clients}))
    return np.asarray(clients[_pooled(rounds, values).argmax(0)])


def _layer_of(flat: Tensor, layout: Layout, layer: str) -> Tensor:
    """(C, F + 1) weight and bias of the last layer inside a flat vector; a zero column where there is no bias."""
    parts = layout.views(flat.float())
    weight = parts[f"{layer}.weight"]
    bias = parts.get(f"{layer}.bias", torch.zeros(len(weight)))
    return torch.cat([weight, bias[:, None]], 1)


@torch.no_grad()
def _load(model: nn.Module, view: ServerView, params: Tensor, buffers: Tensor | None) -> None:
    tensors = model.state_dict(keep_vars=True)
    parts = {**view.layout.views(params)}
    if buffers is not None:
        parts |= view.buffer_layout.views(buffers)
    for name, value in parts.items():
        tensors[name].copy_(value)
