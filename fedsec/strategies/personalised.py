"""Personal models beside a shared one: fine-tuning, pFedMe, IOP-FL's running average, and no exchange at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedsec.defense import LocalStep
from fedsec.federation.desk import Site
from fedsec.federation.sharing import load
from fedsec.federation.strategy import Label, Strategy
from fedsec.types import Descent, RoundContext


@dataclass(frozen=True)
class Local(Strategy):
    """No exchange: every client trains on, with the same steps as the others; what any federation has to beat."""

    name: ClassVar[str] = "local"
    goal: ClassVar[str] = "no exchange: the baseline that a federation has to beat"
    source: ClassVar[str] = "none"
    label: ClassVar[Label] = "ours"
    personal: ClassVar[bool] = True
    shares_nothing: ClassVar[bool] = True
    statistics: ClassVar[str] = ""
    server_seat: ClassVar[str] = "local training sends nothing, so there is nothing for a server to see"

    def local_selectors(self) -> tuple[str, ...]:
        """Everything."""
        return ("key:*",)


@dataclass(frozen=True)
class Finetune(Strategy):
    """FedAvg, after which every client trains on for itself for a few epochs; nothing more leaves."""

    name: ClassVar[str] = "finetune"
    goal: ClassVar[str] = "FedAvg, then a few epochs of each client's own"
    personal: ClassVar[bool] = True
    epochs: Annotated[int, Field(ge=0, description="epochs of each client's own after the last round")] = 2

    @property
    def final_epochs(self) -> int:
        """The `epochs` parameter."""
        return self.epochs


@dataclass(frozen=True)
class IOPFL(Strategy):
    """The inside part of IOP-FL: personal weights q ← α q + (1 − α) θ_k after each local training. Jiang et al. 2023.

    Training always starts from the broadcast model; q is judged. The test-time routing for unseen clients, whose
    shape prior is for segmentation, is not built.
    """

    name: ClassVar[str] = "iopfl"
    goal: ClassVar[str] = "FedAvg; each client uses the running average of its own models"
    source: ClassVar[str] = "Jiang et al., IEEE TMI 2023 (inside part)"
    personal: ClassVar[bool] = True
    alpha: Annotated[float, Field(ge=0, le=1, description="share of the old personal weights")] = 0.1

    def finish(self, site: Site) -> None:
        """Blend; the first model is taken as it is."""
        for key, new in (("params", site.shared()), ("buffers", site.buffers())):
            old = site.own.get(key)
            site.own[key] = new if old is None else torch.lerp(new, old, self.alpha)


@dataclass(frozen=True)
class PFedMe(Strategy):
    """Moreau envelopes: θ̃ ≈ argmin ℓ(θ̃) + (λ/2)‖θ̃ − u‖² on every batch, then u ← u − ηλ(u − θ̃). Dinh et al. 2020.

    The server mixes the mean of the u into its model: θ ← (1 − β)θ + β·mean(u). θ̃ of the last batch is the client's
    own model. The constants are not verified against the paper.
    """

    name: ClassVar[str] = "pfedme"
    goal: ClassVar[str] = "Moreau envelopes: a personal model near a shared one"
    source: ClassVar[str] = "Dinh, Tran and Nguyen, NeurIPS 2020; constants not verified"
    personal: ClassVar[bool] = True
    not_private: ClassVar[str] = "the inner steps use each batch several times without noise"
    lam: Annotated[float, Field(gt=0, description="λ: how near the personal model stays")] = 15.0
    eta: Annotated[float, Field(gt=0, description="η: step of the shared model towards the personal one")] = 0.005
    beta: Annotated[float, Field(gt=0, le=1, description="β: share of the clients' mean in the new model")] = 1.0
    inner_steps: Annotated[int, Field(ge=1, description="steps on each batch")] = 5

    def local_step(self, step: LocalStep, site: Site) -> LocalStep:
        """Envelope steps in place of plain ones."""
        return EnvelopeStep(step, site, self.lam, self.eta, self.inner_steps)

    def descent(self) -> Descent:
        """Of one batch: inner steps with a pull, of which u and then the mixture take a share."""
        return Descent(pull=self.lam, repeats=self.inner_steps, share=self.eta * self.lam * self.beta)

    def finish(self, site: Site) -> None:
        """Keep θ̃ as personal, put u into the model, and shorten its way by β: the server's mixture, in one update."""
        assert site.sharing is not None
        personal = site.own.pop("envelope", None)
        if personal is None:
            return
        u = site.own.pop("u")
        site.keep_personal()
        site.own["params"] = personal
        load(site.model, site.sharing, torch.lerp(site.params, u, self.beta), site.buffers(), None)


class EnvelopeStep:
    """One step of pFedMe on one batch: inner SGD steps to θ̃, then u moves towards it."""

    def __init__(self, inner: LocalStep, site: Site, lam: float, eta: float, steps: int) -> None:
        self.inner, self.site = inner, site
        self.model, self.optimizer = inner.model, inner.optimizer
        self.lam, self.eta, self.steps = lam, eta, steps
        self._u = site.params.clone()
        parameters = dict(site.model.named_parameters())
        self._shared = [parameters[name] for name in site.sharing.params.names]
        self.optimizer.register_step_pre_hook(lambda *_: self._pull())

    def _pull(self) -> None:
        for parameter, anchor in zip(self._shared, self.site.sharing.params.views(self._u).values(), strict=True):
            difference = parameter.detach() - anchor
            parameter.grad = difference * self.lam if parameter.grad is None else parameter.grad + difference * self.lam

    def batches(self, size: int, ctx: RoundContext) -> Iterator[Tensor]:
        """Those of the inner step."""
        return self.inner.batches(size, ctx)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """θ̃ from where it was, then u ← u − ηλ(u − θ̃)."""
        loss = torch.zeros(())
        for _ in range(self.steps):
            loss = self.inner(x, y)
        near = self.site.shared()
        self._u = self._u - self.eta * self.lam * (self._u - near)
        self.site.own["envelope"], self.site.own["u"] = near, self._u
        return loss
