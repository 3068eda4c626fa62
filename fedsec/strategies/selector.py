"""FedSM: a shared model, soft-pulled personal ones, and a selector that says whose model an image needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.defense import LocalStep
from fedsec.federation.desk import Desk, Report, ServerState, Setting, Site
from fedsec.federation.sharing import Sharing, load
from fedsec.federation.strategy import Label, Strategy

from .beside import Beside, flat_state, load_flat

THUMBNAIL = 4
LOG_CENTRE = 2.0
"""Brings logarithms of typical contrasts near zero, where they and their squares are of one size."""
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class FedSM(Strategy):
    """θ by FedAvg; personal q_k ← λ q̂_k + (1 − λ)/(K − 1) Σ_{j≠k} q̂_j; a selector between them. Xu et al. 2022.

    An image uses q_argmax where the selector is surer than γ, else θ. For the selector each client is one class, so
    that averaging locally trained selectors fails; here every client sends one gradient a round and the server steps
    (Adam) on their mean. It is linear on a thumbnail and its mean and deviation (ours). The selector is a site
    classifier that the defenders train themselves; without it every client uses its own model.
    """

    name: ClassVar[str] = "fedsm"
    goal: ClassVar[str] = "a shared model, soft-pulled personal models, and a selector between them"
    source: ClassVar[str] = "Xu et al., CVPR 2022; selector network ours"
    label: ClassVar[Label] = "faithful, fixed"
    personal: ClassVar[bool] = True
    individuals: ClassVar[str] = "it sends each client a mixture around its own personal model"
    reports: ClassVar[tuple[Report, ...]] = (
        Report("personal", "a second model, trained on its images alone"),
        Report("selector", "the gradient of a classifier of hospitals", required=False),
    )
    not_private: ClassVar[str] = "a personal model and a selector are trained beside the shared one"
    lam: Annotated[float, Field(ge=0, le=1, description="λ: share of its own in a personal model")] = 0.7
    gamma: Annotated[float, Field(ge=0, le=1, description="γ: sureness below which the shared model is used")] = 0.9
    selector: Annotated[bool, Field(description="train a selector; without, each client uses its own model")] = True
    selector_lr: Annotated[float, Field(gt=0, description="Adam step of the selector at the server")] = 0.1

    def initial_side(self, model: nn.Module, setting: Setting) -> dict[str, Tensor]:
        """Everybody starts from the common model; the selector from zero."""
        side = {"clients": torch.tensor(setting.clients)}
        if self.selector:
            inputs = setting.image_shape[0] * (THUMBNAIL**2 + 6) + 1
            side["selector"] = torch.zeros(setting.clients, inputs)
        return side

    def received(self, state: ServerState, client: int) -> Mapping[str, Tensor]:
        """The selector and this client's personal model, of nobody else."""
        mine = f"personal/{client}"
        return {k: t for k, t in state.side.items() if not k.startswith("personal/") or k == mine}

    def local_step(self, step: LocalStep, site: Site) -> LocalStep:
        """The personal model trains on the same batches."""
        twin = copy.deepcopy(site.model)
        kept = site.received.get(f"personal/{site.client}")
        if kept is not None:
            load_flat(twin, site.sharing, kept)
        site.scratch["personal"] = twin
        return Beside(step, twin, site)

    def report(self, site: Site) -> dict[str, Tensor]:
        """The personal model, and the selector's gradient on this client's images."""
        found = {"personal": flat_state(site.scratch["personal"], site.sharing)}
        if self.selector:
            weights = site.received["selector"].to(site.x.device).clone().requires_grad_(True)
            label = torch.full((len(site.x),), site.client, device=site.x.device)
            (gradient,) = torch.autograd.grad(F.cross_entropy(described(site.x) @ weights.T, label), weights)
            found["selector"] = gradient
        return found

    def valid_report(self, extras: Mapping[str, Tensor]) -> str | None:
        """The selector's gradient is a matrix."""
        return "selector is no matrix" if "selector" in extras and extras["selector"].ndim != 2 else None

    def serve(self, desk: Desk) -> None:
        """Pull the personal models towards each other; one step of the selector."""
        side = desk.state.side
        size = desk.sharing.params.size + desk.sharing.buffers.size
        sent = {u.client: u.extras["personal"] for u in desk.updates if u.extras["personal"].shape == (size,)}
        for client, pulled in soft_pull(sent, self.lam).items():
            side[f"personal/{client}"] = pulled
        gradients = [u.extras["selector"] for u in desk.updates if "selector" in u.extras]
        fitting = [g for g in gradients if "selector" in side and g.shape == side["selector"].shape]
        if fitting:
            adam(side, "selector", torch.stack(fitting).mean(0), self.selector_lr)

    def personal_model(
        self, model: nn.Module, sharing: Sharing, client: int, state: ServerState, images: Tensor
    ) -> nn.Module:
        """θ, all q and the selector; without a selector, q of this client."""
        load(model, sharing, state.params, state.buffers, state.local.get(client))
        found: dict[int, nn.Module] = {}
        for k in range(int(state.side["clients"])):
            if f"personal/{k}" in state.side:
                found[k] = copy.deepcopy(model)
                load_flat(found[k], sharing, state.side[f"personal/{k}"])
        if not self.selector:
            return found.get(client, model)
        return Selected(model, found, state.side["selector"], self.gamma)


class Selected(nn.Module):
    """Each image goes to the personal model that the selector is sure of, else to the shared one."""

    def __init__(self, shared: nn.Module, personal: Mapping[int, nn.Module], selector: Tensor, gamma: float) -> None:
        super().__init__()
        self.shared = shared
        self.owners = list(personal)
        self.models = nn.ModuleList(personal.values())
        self.gamma = gamma
        self.register_buffer("selector", selector.clone())

    def choices(self, x: Tensor) -> Tensor:
        """(B,) client whose model is used; −1 for the shared one."""
        sure, client = torch.softmax(described(x) @ self.get_buffer("selector").T, 1).max(1)
        return torch.where(sure > self.gamma, client, torch.full_like(client, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L)."""
        logits: Tensor = self.shared(x)
        chosen = self.choices(x)
        for owner, model in zip(self.owners, self.models, strict=True):
            rows = chosen == owner
            if rows.any():
                logits = logits.index_copy(0, rows.nonzero().squeeze(1), model(x[rows]))
        return logits


def described(x: Tensor) -> Tensor:
    """(B, C·(16 + 6) + 1): what the selector sees.

    A 4x4 thumbnail; logarithms of mean, deviation and neighbour differences, which tell a scanner's offset, gain and
    noise, and their squares, so that a site can lie between two others; and 1.
    """
    small = F.adaptive_avg_pool2d(x, THUMBNAIL).flatten(1)
    rough = (x[..., 1:] - x[..., :-1]).abs().mean((2, 3))
    logs = torch.log(torch.cat([x.mean((2, 3)).clamp(min=0), x.std((2, 3)), rough], 1) + 0.01) + LOG_CENTRE
    return torch.cat([small, logs, logs.square(), torch.ones(len(x), 1, device=x.device)], 1)


def soft_pull(models: Mapping[int, Tensor], lam: float) -> dict[int, Tensor]:
    """q_k ← λ q̂_k + (1 − λ)/(K − 1) Σ_{j≠k} q̂_j: only the sum and the own copy are needed. Xu et al. 2022, eq. 3."""
    if len(models) < 2:
        return dict(models)
    total = torch.stack(list(models.values())).sum(0)
    return {k: lam * q + (1 - lam) / (len(models) - 1) * (total - q) for k, q in models.items()}


def adam(side: dict[str, Tensor], name: str, gradient: Tensor, lr: float) -> None:
    """One Adam step (Kingma and Ba 2015) of a tensor that the server holds, its moments beside it."""
    first, second = (side.get(f"{name}/{k}", torch.zeros_like(gradient)) for k in ("m", "v"))
    count = float(side.get(f"{name}/t", torch.zeros(()))) + 1
    first, second = torch.lerp(gradient, first, BETAS[0]), torch.lerp(gradient.square(), second, BETAS[1])
    step = lr * (first / (1 - BETAS[0] ** count)) / ((second / (1 - BETAS[1] ** count)).sqrt() + 1e-8)
    side[name] = side[name] - step
    side[f"{name}/m"], side[f"{name}/v"], side[f"{name}/t"] = first, second, torch.tensor(count)


def accuracy_by_client(selected: Selected, images: Sequence[Tensor]) -> list[float]:
    """How often the selector names the right client, whatever its sureness."""
    weights = selected.get_buffer("selector")
    return [float(((described(x) @ weights.T).argmax(1) == k).float().mean()) for k, x in enumerate(images)]
