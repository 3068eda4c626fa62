"""Weights from what clients say about themselves: their training loss, or how often they have each class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedsec.errors import ConfigError
from fedsec.federation.desk import ByLogits, Desk, Objective, Report, Site
from fedsec.federation.strategy import Label, Strategy
from fedsec.types import RoundContext


@dataclass(frozen=True)
class LossWeighted(Strategy):
    """Clients with a larger training loss weigh less: w ∝ n·e^(−ℓ/T), or ∝ 1/ℓ. After Li Z. et al. 2022.

    The loss is a claim: who says that it is almost zero takes (almost) all the weight. Not a defense.
    """

    name: ClassVar[str] = "loss_weighted"
    goal: ClassVar[str] = "FedAvg, clients with a larger training loss weigh less"
    source: ClassVar[str] = "Li Z. et al., TCBB 2022 (by a survey's description)"
    label: ClassVar[Label] = "reconstruction"
    reports: ClassVar[tuple[Report, ...]] = (Report("loss", "the mean training loss: how well its images are known"),)
    form: Annotated[Literal["exponential", "inverse"], Field(description="n·e^(−ℓ/T), or 1/ℓ")] = "exponential"
    temperature: Annotated[float, Field(gt=0, description="T of the exponential form")] = 1.0

    def report(self, site: Site) -> dict[str, Tensor]:
        """The mean loss of this turn's steps."""
        return {"loss": torch.tensor([site.loss])}

    def valid_report(self, extras: Mapping[str, Tensor]) -> str | None:
        """A loss is one positive number."""
        loss = extras["loss"]
        return None if loss.shape == (1,) and float(loss) > 0 else f"loss={loss.tolist()} is not one positive number"

    def reweigh(
        self, weights: Mapping[int, float], reports: Mapping[int, Mapping[str, Tensor]], ctx: RoundContext
    ) -> dict[int, float]:
        """Times e^(−ℓ/T), or 1/ℓ alone, over the clients present."""
        losses = {client: float(reports[client]["loss"]) for client in weights}
        if self.form == "inverse":
            return normalised({client: 1 / loss for client, loss in losses.items()})
        least = min(losses.values())  # relative to the best, so that nothing underflows
        return normalised({k: w * math.exp(-(losses[k] - least) / self.temperature) for k, w in weights.items()})


@dataclass(frozen=True)
class FedSLID(Strategy):
    """Images of classes that a client has too often count less: v[c] = p(c)/p_k(c), of mean 1. After Luo and Wu 2022.

    p is the label distribution of all clients, which needs everybody's histogram: it travels, in every round.
    """

    name: ClassVar[str] = "fedslid"
    goal: ClassVar[str] = "FedAvg, images weighted by the federation's label distribution"
    source: ClassVar[str] = "Luo and Wu, ISBI 2022; not verified"
    label: ClassVar[Label] = "reconstruction"
    reports: ClassVar[tuple[Report, ...]] = (Report("label_histogram", "how many images of each class it has"),)
    not_private: ClassVar[str] = "its image weights follow the client's own label counts"

    def objective(self, site: Site, base: Objective) -> Objective:
        """Cross-entropy weighted by class, once the shared distribution is known."""
        if site.recipe.task == "multilabel":
            raise ConfigError("fedslid: weights one class an image; multilabel data have several")
        if "labels" not in site.received:
            return base
        weights = class_weights(histogram(site.y, site.recipe.num_classes), site.received["labels"]).to(site.x)
        return ByLogits(lambda model, x, y: (F.cross_entropy(model(x), y, reduction="none") * weights[y]).mean())

    def report(self, site: Site) -> dict[str, Tensor]:
        """Images of each class."""
        return {"label_histogram": histogram(site.y, site.recipe.num_classes)}

    def valid_report(self, extras: Mapping[str, Tensor]) -> str | None:
        """Counts are not negative, and not all zero."""
        counts = extras["label_histogram"]
        good = counts.ndim == 1 and bool((counts >= 0).all()) and float(counts.sum()) > 0
        return None if good else "label_histogram is no histogram"

    def serve(self, desk: Desk) -> None:
        """The label distribution of those present, for the next round."""
        counts = [u.extras["label_histogram"] for u in desk.updates]
        sizes = {c.shape for c in counts}
        if len(sizes) == 1:
            total = torch.stack(counts).sum(0)
            desk.state.side["labels"] = total / total.sum()


def histogram(y: Tensor, classes: int) -> Tensor:
    """(L,) float32 counts of labels (N,)."""
    return torch.bincount(y.cpu().long(), minlength=classes).float()


def class_weights(own: Tensor, shared: Tensor) -> Tensor:
    """(L,) p(c)/p_k(c), scaled so that its mean over the client's own images is 1; 0 for classes it does not have."""
    share = own / own.sum()
    ratio = torch.where(share > 0, shared.to(own) / share.clamp(min=1e-12), torch.zeros_like(share))
    return ratio / (share * ratio).sum().clamp(min=1e-12)


def normalised(weights: Mapping[int, float]) -> dict[int, float]:
    """Divided by their sum; equal where that is zero."""
    total = sum(weights.values())
    return {k: w / total for k, w in weights.items()} if total > 0 else dict.fromkeys(weights, 1 / len(weights))
