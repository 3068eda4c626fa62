"""PRR-FL: progressive Fourier aggregation of deputies (PFA), and deputy-enhanced transfer at the client (DET)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.defense import LocalStep
from fedsec.errors import ConfigError
from fedsec.federation.desk import Desk, ServerState, Site
from fedsec.federation.local import PlainStep
from fedsec.federation.sharing import Sharing, load, resolve
from fedsec.federation.strategy import Label, Strategy
from fedsec.models.loss import task_loss
from fedsec.types import LocalRecipe, RoundContext

from .spectrum import as_matrix, blend_low

Stage = Literal["recover", "exchange", "sublimate"]
LAST = 0.95
"""Rate of the band in the last round."""
RECOVER, SUBLIMATE = 0.7, 0.9
"""α₁ and α₂: shares of the personal model's macro-F1."""


@dataclass(frozen=True)
class PFA(Strategy):
    """Only deputies travel; each comes back with the mean low amplitudes and its own phase. Chen et al. 2021.

    The rate of the band grows from r₀ = 0.7 to 0.95 over the rounds; tensors without a spectrum (biases, scales)
    are averaged with equal weights, BatchNorm stays local. With `average=complex` the whole low band is averaged,
    phase included, which is what surveys describe; the released code averages amplitudes. Its half-open band, which
    leaves imaginary parts, and its hard-coded four clients are corrected. The personal model never travels.
    """

    name: ClassVar[str] = "pfa"
    goal: ClassVar[str] = "deputies share low-frequency amplitudes of their weights; personal models stay"
    source: ClassVar[str] = "Chen et al., MICCAI 2021 (PRR-FL)"
    label: ClassVar[Label] = "faithful, fixed"
    personal: ClassVar[bool] = True
    statistics: ClassVar[str] = ""
    individuals: ClassVar[str] = "it builds another model for each client from single uploads"
    own_rule: ClassVar[str] = "it combines spectra, and gives each client another model"
    not_private: ClassVar[str] = "personal model and deputy teach each other on every batch"
    rate: Annotated[float, Field(ge=0, le=1, description="r₀: rate of the band at first; 0.95 at last")] = 0.7
    average: Annotated[Literal["amplitude", "complex"], Field(description="what of the low band is averaged")] = (
        "amplitude"
    )
    det: Annotated[bool, Field(description="personal model and deputy teach each other; without, one model")] = True

    def sharing(self, model: nn.Module) -> Sharing:
        """BatchNorm stays where there is some."""
        has = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        return resolve(model, ("type:BatchNorm",) if has else (), self.name)

    def local_step(self, step: LocalStep, site: Site) -> LocalStep:
        """Deputy and personal model train side by side."""
        if not self.det:
            return step
        if site.recipe.task == "multilabel":
            raise ConfigError("pfa: its transfer compares softmax outputs; for several labels use pfa:det=false")
        return TransferStep(step, site)

    def finish(self, site: Site) -> None:
        """Keep the personal model (with `det`, the one that was trained beside the deputy)."""
        if not self.det:
            site.keep_personal()

    def serve(self, desk: Desk) -> None:
        """A model for each client that replied; the others keep the one they had."""
        if not desk.updates:
            return
        models = {u.client: desk.sharing.params.views(desk.uploaded(u)) for u in desk.updates}
        rate = self.rate + (LAST - self.rate) * desk.ctx.round / max(1, desk.ctx.rounds) if self.rate else 0.0
        for client, mixed in progressive(models, rate, self.average).items():
            desk.state.sent[client] = desk.sharing.params.flatten(mixed)

    def personal_model(
        self, model: nn.Module, sharing: Sharing, client: int, state: ServerState, images: Tensor
    ) -> nn.Module:
        """The personal model, with statistics of its own."""
        super().personal_model(model, sharing, client, state, images)
        kept = state.own.get(client, {}).get("personal_local")
        if kept is not None:
            load(model, sharing, state.own[client]["params"], state.own[client]["buffers"], kept)
        return model


def progressive(
    models: dict[int, dict[str, Tensor]], rate: float, average: Literal["amplitude", "complex"] = "amplitude"
) -> dict[int, dict[str, Tensor]]:
    """One round of PFA: client -> tensors, from client -> tensors. Chen et al. 2021, eq. 1-3.

    Matrices and conv kernels are blended in the frequency domain; everything else is the plain mean.
    """
    names = list(next(iter(models.values())))
    result: dict[int, dict[str, Tensor]] = {client: {} for client in models}
    for name in names:
        stack = {client: tensors[name] for client, tensors in models.items()}
        shape = next(iter(stack.values())).shape
        if len(shape) not in (2, 4):
            mean = torch.stack(list(stack.values())).mean(0)
            for client in stack:
                result[client][name] = mean
            continue
        spectra = torch.stack([torch.fft.fft2(as_matrix(w)) for w in stack.values()])
        phase = None
        if average == "complex":
            whole = spectra.mean(0)
            low, phase = whole.abs(), whole.angle()
        else:
            low = spectra.abs().mean(0)
        for client, weight in stack.items():
            result[client][name] = blend_low(weight, low, rate, phase)
    return result


def stage_of(first: bool, previous: Stage | None, f1_deputy: float, f1_personal: float) -> Stage:
    """The stage of one local epoch (Chen et al. 2021); conditions are tested in this order.

    Args:
        first: the first epoch of a round. previous: stage of the epoch before. f1_*: macro-F1 on the client's images.
    """
    if first or f1_deputy < RECOVER * f1_personal:
        return "recover"
    if previous == "recover" or f1_deputy < SUBLIMATE * f1_personal:
        return "exchange"
    return "sublimate"


def macro_f1(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Macro-F1 on these images, in evaluation mode."""
    training = model.training
    model.eval()
    with torch.no_grad():
        decided = torch.cat([model(part).argmax(1) for part in x.split(512)])
    model.train(training)
    return float(f1_score(np.asarray(y.cpu()), np.asarray(decided.cpu()), average="macro", zero_division=0))


class TransferStep:
    """One batch of DET: the deputy (which travels) by the inner step, the personal model beside it.

    recover: the deputy learns from the personal model. exchange: both learn from each other. sublimate: the personal
    model learns from the deputy. Teachers are detached. With one local epoch a round there is nothing to compare:
    always exchange.
    """

    def __init__(self, inner: PlainStep | LocalStep, site: Site) -> None:
        self.inner, self.site = inner, site
        self.model, self.optimizer = inner.model, inner.optimizer
        self.base = task_loss(site.recipe.task)
        self.personal = copy.deepcopy(site.model)
        own = site.own
        if "params" in own:
            load(self.personal, site.sharing, own["params"], own["buffers"], own.get("personal_local"))
        self.personal.train(site.model.training)
        self.other = PlainStep(self.personal, site.recipe, self._personal_loss)
        assert isinstance(inner, PlainStep)
        inner.objective = self._deputy_loss
        self.stage: Stage = "exchange"

    def batches(self, size: int, ctx: RoundContext) -> Iterator[Tensor]:
        """Those of the inner step; before each epoch the stage is chosen, and after the last the model is kept."""
        recipe: LocalRecipe = self.site.recipe
        each = -(-size // recipe.batch_size)
        several = recipe.epochs is not None and recipe.epochs > 1
        self.personal.train(self.model.training)
        previous: Stage | None = None
        for number, batch in enumerate(self.inner.batches(size, ctx)):
            if several and number % each == 0:
                scores = [macro_f1(m, self.site.x, self.site.y) for m in (self.model, self.personal)]
                self.stage = previous = stage_of(number == 0, previous, scores[0], scores[1])
            yield batch
            self._keep()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Both models step on the batch, each from the other's outputs before the step."""
        self._personal = self.personal(x)  # one forward pass each: a second one would move BatchNorm statistics
        loss = self.inner(x, y)
        self.other(x, y)
        return loss

    def _deputy_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        self._deputy = logits.detach()
        loss = self.base(logits, y)
        return loss if self.stage == "sublimate" else loss + divergence(logits, self._personal)

    def _personal_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = self.base(self._personal, y)
        return loss if self.stage == "recover" else loss + divergence(self._personal, self._deputy)

    def _keep(self) -> None:
        tensors = dict(self.personal.state_dict(keep_vars=True))
        sharing, own = self.site.sharing, self.site.own
        own["params"], own["buffers"] = sharing.params.flatten(tensors), sharing.buffers.flatten(tensors)
        if sharing.local.size:
            own["personal_local"] = sharing.local.flatten(tensors)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """τ²·KL(teacher ‖ student) of softened outputs (B, L), mean over the batch; no gradient through the teacher."""
    log_student = F.log_softmax(student / temperature, 1)
    target = F.softmax(teacher.detach() / temperature, 1)
    return temperature**2 * F.kl_div(log_student, target, reduction="batchmean")


def spread(models: Sequence[Tensor]) -> float:
    """Root mean squared distance of the clients' tensors from their mean."""
    stack = torch.stack(list(models))
    return float((stack - stack.mean(0)).square().mean().sqrt())
