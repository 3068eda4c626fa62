"""Losses for long tails: balanced softmax, LDAM, focal and class-balanced. The class counts stay at the client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedsec.errors import ConfigError
from fedsec.federation.desk import ByLogits, Objective, Site
from fedsec.federation.strategy import Strategy

from .weighting import histogram

COUNTS = "its loss follows the client's own class counts"
LogitLoss = Callable[[Tensor, Tensor], Tensor]


def with_loss(site: Site, name: str, make: Callable[[Tensor], LogitLoss]) -> Objective:
    """An objective of this loss of (logits, labels), made from the client's own class counts (L,).

    Raises:
        ConfigError: several labels an image.
    """
    if site.recipe.task == "multilabel":
        raise ConfigError(f"{name}: needs one class an image; multilabel data have several")
    loss = make(histogram(site.y, site.recipe.num_classes).to(site.x.device))
    return ByLogits(lambda model, x, y: loss(model(x), y))


@dataclass(frozen=True)
class BalancedSoftmax(Strategy):
    """FedAvg with the balanced softmax: ln of the client's class shares joins the logits. Ren et al. 2020, eq. 3."""

    name: ClassVar[str] = "bsm"
    goal: ClassVar[str] = "FedAvg with the balanced softmax"
    source: ClassVar[str] = "Ren et al., NeurIPS 2020"
    not_private: ClassVar[str] = COUNTS

    def objective(self, site: Site, base: Objective) -> Objective:
        """In place of the cross-entropy."""
        return with_loss(site, "bsm", lambda counts: lambda z, y: balanced_softmax(z, y, counts))


@dataclass(frozen=True)
class LDAM(Strategy):
    """FedAvg with margins that grow for rare classes: m_c ∝ n_c^(−1/4). Cao et al. 2019, eq. 13."""

    name: ClassVar[str] = "ldam"
    goal: ClassVar[str] = "FedAvg with larger margins for rare classes"
    source: ClassVar[str] = "Cao et al., NeurIPS 2019"
    not_private: ClassVar[str] = COUNTS
    margin: Annotated[float, Field(ge=0, description="of the rarest class")] = 0.5
    scale: Annotated[float, Field(gt=0, description="of the logits; 30 needs a cosine classifier")] = 1.0

    def objective(self, site: Site, base: Objective) -> Objective:
        """In place of the cross-entropy."""
        return with_loss(site, "ldam", lambda counts: lambda z, y: ldam(z, y, counts, self.margin, self.scale))


@dataclass(frozen=True)
class Focal(Strategy):
    """FedAvg with the focal loss: easy images count less. Lin et al. 2017, eq. 4."""

    name: ClassVar[str] = "focal"
    goal: ClassVar[str] = "FedAvg with the focal loss"
    source: ClassVar[str] = "Lin et al., ICCV 2017"
    gamma: Annotated[float, Field(ge=0, description="0 is the cross-entropy")] = 2.0

    def objective(self, site: Site, base: Objective) -> Objective:
        """In place of the cross-entropy."""
        return with_loss(site, "focal", lambda counts: lambda z, y: focal(z, y, self.gamma))


@dataclass(frozen=True)
class ClassBalanced(Strategy):
    """FedAvg with weights (1 − β)/(1 − β^n_c), of mean 1 over the classes present. Cui et al. 2019, eq. 8."""

    name: ClassVar[str] = "cb"
    goal: ClassVar[str] = "FedAvg with class-balanced weights"
    source: ClassVar[str] = "Cui et al., CVPR 2019"
    not_private: ClassVar[str] = COUNTS
    beta: Annotated[float, Field(ge=0, lt=1, description="0: no weights")] = 0.9999

    def objective(self, site: Site, base: Objective) -> Objective:
        """In place of the cross-entropy."""
        return with_loss(site, "cb", lambda counts: lambda z, y: class_balanced(z, y, counts, self.beta))


def balanced_softmax(logits: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, L) + ln(class share + 1e-12). Ren et al. 2020, eq. 3."""
    return F.cross_entropy(logits + torch.log(counts / counts.sum() + 1e-12), y)


def ldam(logits: Tensor, y: Tensor, counts: Tensor, margin: float, scale: float = 1.0) -> Tensor:
    """Mean cross-entropy with the true class's logit lowered by m_c = margin·(n_min/n_c)^(1/4). Cao et al. 2019."""
    present = counts.clamp(min=1)
    margins = margin * (present[counts > 0].min() / present) ** 0.25
    return F.cross_entropy(scale * (logits - F.one_hot(y, logits.shape[1]) * margins), y)


def focal(logits: Tensor, y: Tensor, gamma: float) -> Tensor:
    """Mean of −(1 − p)^γ ln p of the true class. Lin et al. 2017, eq. 4."""
    log_p = F.log_softmax(logits, 1).gather(1, y[:, None]).squeeze(1)
    return (-((1 - log_p.exp()) ** gamma) * log_p).mean()


def class_balanced(logits: Tensor, y: Tensor, counts: Tensor, beta: float) -> Tensor:
    """Mean of weight x cross-entropy over the batch; divided by its size, so that no image changes another's share."""
    return (F.cross_entropy(logits, y, reduction="none") * effective(counts, beta)[y]).mean()


def effective(counts: Tensor, beta: float) -> Tensor:
    """(L,) (1 − β)/(1 − β^n), of mean 1 over classes with n > 0, and 0 elsewhere. Cui et al. 2019, eq. 8."""
    raw = torch.where(counts > 0, (1 - beta) / (1 - beta ** counts.clamp(min=1)), torch.zeros_like(counts))
    return raw / raw[counts > 0].mean()
