"""MediSecFed: no parameters are exchanged; clients send images inverted out of their own models, and soft labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fedsec.errors import ConfigError
from fedsec.federation.desk import Desk, Objective, Report, Setting, Site
from fedsec.federation.strategy import Label, Strategy

from .pfa import divergence

TV, L2, STATISTICS = 1e-4, 1e-5, 0.1
"""Weights of the inversion's priors."""


@dataclass(frozen=True)
class MediSecFed(Strategy):
    """Knowledge moves by synthetic images. A reconstruction: the paper is behind a paywall and has no code.

    Client: trains on its images plus τ²KL towards the labels of the last broadcast set S; inverts its own model into
    `images` pictures of each class; sends them, and its soft labels for the pool of the last round. Server: the label
    of a pool image is the median of all clients' soft labels, renormalised; it is dropped where that label's entropy
    is above 0.98 ln L, where its owner's label disagrees, or where its owner agrees with too few. A pool is labelled
    one round after it was sent, since a round has one upload.
    """

    name: ClassVar[str] = "medisecfed"
    goal: ClassVar[str] = "no parameters leave: images inverted from the clients' models, and soft labels"
    source: ClassVar[str] = "MediSecFed (abstract; paper not readable)"
    label: ClassVar[Label] = "reconstruction"
    personal: ClassVar[bool] = True
    shares_nothing: ClassVar[bool] = True
    statistics: ClassVar[str] = ""
    individuals: ClassVar[str] = "its server compares what single clients say of each image"
    own_rule: ClassVar[str] = "there are no updates to aggregate"
    not_private: ClassVar[str] = "the images are inverted from a model trained without noise"
    reports: ClassVar[tuple[Report, ...]] = (
        Report("images", "pictures inverted from its model, which can resemble patients"),
        Report("votes", "its soft labels for everybody's pictures", required=False),
    )
    images: Annotated[int, Field(ge=1, description="pictures of each class and client")] = 20
    steps: Annotated[int, Field(ge=1, description="steps of the inversion")] = 100
    step_size: Annotated[float, Field(gt=0, description="Adam step of the inversion")] = 0.1
    temperature: Annotated[float, Field(gt=0, description="τ of soft labels and distillation")] = 3.0
    agreement: Annotated[float, Field(ge=0, le=1, description="least share of its own pictures a client agrees on")] = (
        0.5
    )

    def local_selectors(self) -> tuple[str, ...]:
        """Everything stays."""
        return ("key:*",)

    def prepare_model(self, model: nn.Module, setting: Setting) -> nn.Module:
        """The model as it is.

        Raises:
            ConfigError: several labels an image.
        """
        if setting.recipe.task == "multilabel":
            raise ConfigError("medisecfed: inverts one class a picture; multilabel data have several")
        return model

    def objective(self, site: Site, base: Objective) -> Objective:
        """Base loss, plus distillation on a batch of the broadcast set."""
        if "set" not in site.received or not len(site.received["set"]):
            return base
        pictures, labels = (site.received[k].to(site.x.device) for k in ("set", "set_labels"))
        rng = site.ctx.generator("distillation")

        def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            rows = torch.randint(len(pictures), (min(len(pictures), len(x)),), generator=rng).to(x.device)
            teacher = self.temperature * torch.log(labels[rows].clamp(min=1e-6))  # softmax at τ gives the label
            return base(model, x, y) + divergence(model(pictures[rows]), teacher, self.temperature)

        return total

    def report(self, site: Site) -> dict[str, Tensor]:
        """Pictures of the model as it is now, and soft labels for the last pool."""
        twin = copy.deepcopy(site.model).eval()
        classes = torch.arange(site.recipe.num_classes, device=site.x.device).repeat(self.images)
        start = torch.rand(len(classes), *site.x.shape[1:], generator=site.ctx.generator("pictures"))
        found = {"images": invert(twin, start.to(site.x.device), classes, self.steps, self.step_size)}
        if "pool" in site.received:
            with torch.no_grad():
                logits = twin(site.received["pool"].to(site.x.device))
            found["votes"] = F.softmax(logits / self.temperature, 1)
        return found

    def valid_report(self, extras: Mapping[str, Tensor]) -> str | None:
        """Pictures have four dimensions and values in [0, 1]; votes are probabilities."""
        pictures, votes = extras["images"], extras.get("votes")
        if pictures.ndim != 4 or bool((pictures < 0).any()) or bool((pictures > 1).any()):
            return "images are not pictures in [0, 1]"
        if votes is not None and (votes.ndim != 2 or bool((votes < 0).any())):
            return "votes are not probabilities"
        return None

    def serve(self, desk: Desk) -> None:
        """Label and filter the last pool; the pictures of this round are the next one."""
        side = desk.state.side
        if "pool" in side:
            voters = [u for u in desk.updates if "votes" in u.extras and len(u.extras["votes"]) == len(side["pool"])]
            if voters:
                votes = torch.stack([u.extras["votes"] for u in voters])
                known = {u.client: i for i, u in enumerate(voters)}
                kept, labels = believed(votes, side["owners"], known, self.agreement)
                side["set"], side["set_labels"] = side["pool"][kept], labels[kept]
        if desk.updates:
            side["pool"] = torch.cat([u.extras["images"] for u in desk.updates])
            side["owners"] = torch.cat([torch.full((len(u.extras["images"]),), u.client) for u in desk.updates])


def believed(
    votes: Tensor, owners: Tensor, voters: Mapping[int, int], agreement: float, entropy: float = 0.98
) -> tuple[Tensor, Tensor]:
    """Which pool images are kept, and everybody's label for each.

    Args:
        votes: (K, N, L) soft labels. owners: (N,) client of each image. voters: client -> its row in `votes`.
        agreement: least share of its own images for which an owner agrees with the median.
        entropy: largest entropy of a label, in ln L (a binary label at τ = 3 is soft).

    Returns:
        (N,) bool and (N, L) labels: the coordinate-wise median over the clients, renormalised.
    """
    middle = votes.quantile(0.5, dim=0)
    labels = middle / middle.sum(1, keepdim=True).clamp(min=1e-12)
    spread = -(labels * labels.clamp(min=1e-12).log()).sum(1)
    keep = spread <= entropy * math.log(labels.shape[1])
    for owner in owners.unique().tolist():
        mine = owners == owner
        if owner not in voters:
            keep[mine] = False
            continue
        agrees = votes[voters[owner]][mine].argmax(1) == labels[mine].argmax(1)
        keep[mine] &= agrees
        if float(agrees.float().mean()) < agreement:
            keep[mine] = False
    return keep, labels


def invert(model: nn.Module, start: Tensor, classes: Tensor, steps: int, step_size: float) -> Tensor:
    """Pictures (N, C, H, W) in [0, 1] that a model calls `classes`: cross-entropy, total variation, size, statistics.

    min CE + 1e-4 TV + 1e-5 ‖x‖² + 0.1 Σ_l ‖μ_l(x) − μ̂_l‖² + ‖σ²_l(x) − σ̂²_l‖² over the BatchNorm layers, by Adam.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = start.clone().requires_grad_(True)
    seen: list[Tensor] = []

    def statistics(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        values = inputs[0].transpose(0, 1).flatten(1)
        assert isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
        seen.append((values.mean(1) - layer.running_mean).square().sum())
        seen.append((values.var(1, unbiased=False) - layer.running_var).square().sum())

    handles = [m.register_forward_hook(statistics) for m in model.modules() if isinstance(m, _BatchNorm)]
    optimizer = torch.optim.Adam([x], lr=step_size)
    try:
        for _ in range(steps):
            seen.clear()
            optimizer.zero_grad()
            variation = (x[..., 1:, :] - x[..., :-1, :]).abs().sum() + (x[..., 1:] - x[..., :-1]).abs().sum()
            loss = F.cross_entropy(model(x), classes, reduction="sum") + TV * variation + L2 * x.square().sum()
            (loss + STATISTICS * sum(seen) if seen else loss).backward()
            optimizer.step()
            with torch.no_grad():
                x.clamp_(0, 1)
    finally:
        for handle in handles:
            handle.remove()
    return x.detach()
