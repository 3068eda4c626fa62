"""FedProx: local training is pulled back towards the model that was broadcast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from fedsec.defense import LocalStep
from fedsec.federation.desk import Site
from fedsec.federation.strategy import Strategy
from fedsec.types import Descent


@dataclass(frozen=True)
class FedProx(Strategy):
    """FedAvg whose clients add (μ/2)‖θ' − θ‖² over the shared parameters. Li et al. 2020, eq. 2.

    The term has no data in it, so it is added as μ(θ' − θ) when the optimiser steps: after a defense's clipping and
    noise, and without a second graph.
    """

    name: ClassVar[str] = "fedprox"
    goal: ClassVar[str] = "FedAvg with a pull towards the broadcast model"
    source: ClassVar[str] = "Li et al., MLSys 2020"
    mu: Annotated[float, Field(ge=0, description="strength of the pull; 0 is fedavg")] = 0.01

    def local_step(self, step: LocalStep, site: Site) -> LocalStep:
        """The optimiser adds the pull to whatever gradient it is given."""
        if self.mu == 0:
            return step
        shared = site.sharing.params
        tensors = dict(site.model.named_parameters())
        pairs = [(tensors[name], anchor) for name, anchor in shared.views(site.params).items()]
        step.optimizer.register_step_pre_hook(lambda *_: pull(pairs, self.mu))
        return step

    def descent(self) -> Descent:
        """The pull."""
        return Descent(pull=self.mu)


def pull(pairs: list[tuple[Any, Tensor]], mu: float) -> None:
    """Add μ(θ' − θ) to the gradients of (parameter, anchor) pairs."""
    for parameter, anchor in pairs:
        difference = parameter.detach() - anchor
        if parameter.grad is None:
            parameter.grad = difference * mu
        else:
            parameter.grad.add_(difference, alpha=mu)
