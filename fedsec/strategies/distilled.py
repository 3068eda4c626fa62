"""Fed-MAS: distillation from a frozen teacher on long tails (EKD), weights from how hard classes were (MAS)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec import checkpoint
from fedsec.errors import ConfigError
from fedsec.federation.desk import ByLogits, Objective, Report, Setting, Site, frozen_copy, seeded
from fedsec.federation.strategy import Label, Strategy
from fedsec.types import RoundContext

from .contrastive import add_projection
from .longtail import COUNTS, balanced_softmax
from .weighting import histogram, normalised

AUXILIARY = ("distil.", "aux_head.")
BATCH = 256


@dataclass(frozen=True)
class EKD(Strategy):
    """Balanced softmax plus λ(2 − 2cos(p(g(x)), f(x))): features go to a frozen teacher's. Elbatel et al. 2023.

    p is a projection (linear, BatchNorm, ReLU, linear), a second head on p(g(x)) keeps it from drifting; both are
    averaged like the rest and left out of the released model. The teacher has the student's architecture: weights
    from a file, or random ones (the baseline that says what the distillation itself is worth). Its architecture-free
    form and the source's augmentations are not built.
    """

    name: ClassVar[str] = "ekd"
    goal: ClassVar[str] = "FedAvg with balanced softmax and a frozen teacher's features"
    source: ClassVar[str] = "Elbatel et al., DeCaF at MICCAI 2023 (Fed-MAS)"
    not_private: ClassVar[str] = COUNTS
    lam: Annotated[float, Field(ge=0, description="λ: weight of the distillation")] = 3.0
    teacher: Annotated[str, Field(description="checkpoint of the same architecture, or random")] = "random"

    def prepare_model(self, model: nn.Module, setting: Setting) -> nn.Module:
        """Add the projection and the second head.

        Raises:
            ConfigError: several labels an image, or a model without features.
        """
        if setting.recipe.task == "multilabel":
            raise ConfigError(f"{self.name}: needs one class an image; multilabel data have several")
        if self.lam > 0:
            add_projection(model, "distil", int(getattr(model, "embed_dim", 0)) or 1, setting.ctx, norm=True)
            width, classes = int(getattr(model, "embed_dim", 0)), setting.recipe.num_classes
            model.add_module("aux_head", seeded(setting.ctx.entropy("aux-head"), lambda: nn.Linear(width, classes)))
        return model

    def auxiliary(self) -> tuple[str, ...]:
        """Projection and second head."""
        return AUXILIARY if self.lam > 0 else ()

    def teaching(self, site: Site) -> nn.Module:
        """The frozen teacher, built anew from its file or its seed."""
        if "teacher" not in site.scratch:
            twin = copy.deepcopy(site.model)
            if self.teacher == "random":
                twin = seeded(site.ctx.common("teacher"), lambda: reset(twin))
            else:
                checkpoint.load_into(twin, Path(self.teacher))
            site.scratch["teacher"] = frozen_copy(twin)
        teacher: nn.Module = site.scratch["teacher"]
        return teacher

    def objective(self, site: Site, base: Objective) -> Objective:
        """BSM of both heads plus the distillation."""
        counts = histogram(site.y, site.recipe.num_classes).to(site.x.device)
        if self.lam == 0:
            return ByLogits(lambda model, x, y: balanced_softmax(model(x), y, counts))
        teacher = self.teaching(site)

        def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            parts: Any = model
            features = parts.embed(x)
            if len(x) < 2:  # the projection's BatchNorm needs two images
                return balanced_softmax(parts.head(features), y, counts)
            guided = parts.distil(features)
            each = distances(guided, taught(teacher, x))
            self.observe(site, each.detach(), y)
            loss = balanced_softmax(parts.head(features), y, counts) + balanced_softmax(
                parts.aux_head(guided), y, counts
            )
            return loss + self.lam * each.mean()

        return ByLogits(total)

    def observe(self, site: Site, each: Tensor, y: Tensor) -> None:
        """What the distillation cost each image of a batch."""


@dataclass(frozen=True)
class FedMAS(EKD):
    """EKD, clients weighted by RF = Σ_k d[k]·d̂[k] of the share of each class in the distillation loss.

    D is the mean loss of each class under the received model, D̂ the same while training; d and d̂ are divided by
    their sums. w = RF/Σ RF; `inv` uses 1/D̂; `drw` is n for the first 80 % of the rounds, then n·RF. With m equally hard
    classes RF = 1/m: clients with few classes win, and who claims RF = 1 takes the most weight that anybody can.
    """

    name: ClassVar[str] = "fedmas"
    goal: ClassVar[str] = "EKD, clients weighted by how the distillation went class by class"
    label: ClassVar[Label] = "faithful, fixed"
    reports: ClassVar[tuple[Report, ...]] = (Report("rf", "one number that grows as its classes get fewer"),)
    variant: Annotated[Literal["mas", "inv", "drw"], Field(description="form of the weights")] = "mas"

    def begin(self, site: Site) -> None:
        """The distillation loss of each class under the received model."""
        classes = site.recipe.num_classes
        site.scratch["during"] = torch.zeros(classes)
        site.scratch["count"] = torch.zeros(classes)
        if self.lam == 0:
            raise ConfigError("fedmas: lam=0 leaves nothing to weigh by; use bsm")
        teacher, student = self.teaching(site), frozen_copy(site.model)
        parts: Any = student
        with torch.no_grad():
            each = torch.cat([distances(parts.distil(parts.embed(x)), taught(teacher, x)) for x in site.x.split(BATCH)])
        site.scratch["before"] = by_class(each, site.y, classes)[0]

    def observe(self, site: Site, each: Tensor, y: Tensor) -> None:
        """Add a batch to D̂."""
        if "during" not in site.scratch:  # who only imitates a client weighs nothing
            return
        total, count = by_class(each, y, site.recipe.num_classes, mean=False)
        site.scratch["during"] += total
        site.scratch["count"] += count

    def report(self, site: Site) -> dict[str, Tensor]:
        """The scalar, and nothing of what it was made of."""
        during = site.scratch["during"] / site.scratch["count"].clamp(min=1)
        return {"rf": relative_fairness(site.scratch["before"], during, self.variant == "inv").reshape(1)}

    def valid_report(self, extras: Mapping[str, Tensor]) -> str | None:
        """RF lies in (0, 1]."""
        rf = extras["rf"]
        return None if rf.shape == (1,) and 0 < float(rf) <= 1 + 1e-6 else f"rf={rf.tolist()} is not in (0, 1]"

    def reweigh(
        self, weights: Mapping[int, float], reports: Mapping[int, Mapping[str, Tensor]], ctx: RoundContext
    ) -> dict[int, float]:
        """RF/Σ RF over the clients present, or with `drw` sizes first and n·RF later."""
        rf = {client: float(reports[client]["rf"]) for client in weights}
        if self.variant != "drw":
            return normalised(rf)
        late = ctx.round > 0.8 * ctx.rounds
        return normalised({k: w * rf[k] for k, w in weights.items()}) if late else dict(weights)


def reset(model: nn.Module) -> nn.Module:
    """Draw all weights anew."""
    for module in model.modules():
        draw: Any = getattr(module, "reset_parameters", None)
        if draw is not None:
            draw()
    return model


def taught(teacher: nn.Module, x: Tensor) -> Tensor:
    """(B, F) the teacher's features. Its weights are frozen; images may be differentiated."""
    parts: Any = teacher
    features: Tensor = parts.embed(x)
    return features


def distances(student: Tensor, teacher: Tensor) -> Tensor:
    """(B,) 2 − 2cos in [0, 4]."""
    return 2 - 2 * F.cosine_similarity(student, teacher, dim=1)


def by_class(each: Tensor, y: Tensor, classes: int, mean: bool = True) -> tuple[Tensor, Tensor]:
    """(L,) mean (or sum) of a quantity (B,) over each class, 0 where there is none, and (L,) counts."""
    each, y = each.cpu(), y.cpu().long()
    total = torch.zeros(classes).index_add(0, y, each)
    count = torch.bincount(y, minlength=classes).float()
    return (total / count.clamp(min=1) if mean else total), count


def relative_fairness(before: Tensor, during: Tensor, inverse: bool = False) -> Tensor:
    """RF = Σ_k d[k]·d̂[k] of D, D̂ (L,); classes that a client does not have are 0 in both. Elbatel et al. 2023."""
    if inverse:
        during = torch.where(during > 0, 1 / during.clamp(min=1e-12), torch.zeros_like(during))
    d, later = before / before.sum().clamp(min=1e-12), during / during.sum().clamp(min=1e-12)
    return (d * later).sum()
