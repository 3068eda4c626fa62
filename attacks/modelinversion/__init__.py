"""What do a class's training images look like, by the released model alone? The plugin `modelinversion`.

MIFace (Fredrikson, Jha & Ristenpart 2015) with total variation, an L2 term and, where the model has them, the stored
BatchNorm statistics (Yin et al. 2020); and a search in the latent space of a generative model of public images, the
idea of Zhang et al. 2020. What comes out is at best an average of a class, not a patient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedsec.attack import Attack
from fedsec.errors import ConfigError
from fedsec.plugins import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedsec.findings import CandidatePlan, Findings, Target

    from .prior import Prior


METHODS = ("miface", "generative")


@dataclass(frozen=True)
class ModelInversion(Attack):
    """Gradient descent on pixels until the model is sure of a class, from noise and from the public class mean."""

    name: ClassVar[str] = "modelinversion"
    seat: ClassVar[Literal["outsider"]] = "outsider"
    goal: ClassVar[str] = (
        "images of a class from the released model: MIFace with total variation and BatchNorm statistics, or a "
        "generative prior of public images"
    )

    methods: Annotated[str, Field(description="joined by +: miface on pixels, generative with a public prior")] = (
        "miface+generative"
    )
    steps: Annotated[int, Field(ge=1, description="of Adam")] = 500
    lr: Annotated[float, Field(gt=0, description="of Adam")] = 0.1
    starts: Annotated[int, Field(ge=1, description="from noise; two more start at the public class mean")] = 8
    tv: Annotated[float, Field(ge=0, description="weight of total variation")] = 1e-4
    l2: Annotated[float, Field(ge=0, description="weight of the squared norm")] = 1e-5
    bn: Annotated[float, Field(ge=0, description="weight of the distance to BatchNorm statistics")] = 0.1
    epochs: Annotated[int, Field(ge=1, description="generative: passes of the prior over the public images")] = 60
    typical: Annotated[float, Field(ge=0, description="generative: weight of how usual the image is")] = 1e-3

    def __post_init__(self) -> None:
        for method in self.asked:
            if method not in METHODS:
                raise ConfigError(f"modelinversion: unknown method '{method}': {nearest(method, METHODS)}")

    @property
    def asked(self) -> tuple[str, ...]:
        """The methods, each once."""
        return tuple(dict.fromkeys(self.methods.split("+")))

    def candidates(self) -> CandidatePlan:
        """It asks about no image; the frame compares what it makes with members and non-members."""
        from fedsec.findings import CandidatePlan

        return CandidatePlan()

    def conclude(self, target: Target) -> Findings:
        """A few images a class, the surest by the attack's own objective first.

        Raises:
            ConfigError: several labels an image.
        """
        from fedsec.findings import Findings, Prototype

        assert target.candidates is not None
        if target.candidates.task == "multilabel":
            raise ConfigError("modelinversion: needs exclusive classes; this task has several labels an image")
        model = target.released().to(target.device).eval()
        prior = None
        if "generative" in self.asked:
            from .prior import trained

            prior = trained(target.public.images, target.ctx.generator("modelinversion/prior"), self.epochs)
            prior = prior.to(target.device)
        found = []
        classes = [int(c) for c in target.candidates.labels.unique()]
        for method in self.asked:
            for label in classes:
                if method == "generative":
                    assert prior is not None
                    images, objective, sure = self.search(model, label, prior, target)
                else:
                    images, objective, sure = self.invert(model, label, self.start(label, target))
                order = objective.argsort()
                best = tuple(float(v) for v in sure[order])
                found.append(Prototype(label, images[order].cpu(), best, method))
        assumptions: dict[str, Any] = {"prior": target.public.name, "view": "released model, white box"}
        return Findings(assumptions=assumptions, prototypes=tuple(found))

    def start(self, label: int, target: Target) -> Tensor:
        """(starts + 2, C, H, W): noise, and the mean of the public images of the class, plain and noisy."""
        import torch

        generator = target.ctx.generator(f"modelinversion/{label}")
        noise = torch.rand((self.starts, *target.image_shape), generator=generator)
        own = target.public.images[target.public.labels == label]
        mean = (own if len(own) else target.public.images).mean(0, keepdim=True)
        blurred = (mean + 0.1 * torch.randn(mean.shape, generator=generator)).clamp(0, 1)
        return torch.cat([noise, mean, blurred]).to(target.device)

    def invert(self, model: nn.Module, label: int, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (R, C, H, W), their objective (R,) and the model's confidence (R,)."""
        import torch

        x = start.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([x], lr=self.lr)
        for _ in range(self.steps):
            optimiser.zero_grad(set_to_none=True)
            objective = self.objective(model, label, x)[0]
            (gradient,) = torch.autograd.grad(objective.sum(), x)
            x.grad = gradient
            optimiser.step()
            with torch.no_grad():
                x.clamp_(0, 1)
        with torch.no_grad():
            objective, sure = self.objective(model, label, x)
        return x.detach(), objective.detach(), sure.detach()

    def search(self, model: nn.Module, label: int, prior: Prior, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        """As `invert`, in the latent space of a generative prior: −ln p of the class plus how unusual the image is."""
        import torch

        generator = target.ctx.generator(f"modelinversion/latent/{label}")
        z = torch.randn(self.starts + 2, prior.latent, generator=generator).to(target.device).requires_grad_(True)
        optimiser = torch.optim.Adam([z], lr=self.lr)
        for step in range(self.steps + 1):
            with StatisticsGap(model) as gaps:
                images = prior(z)
                log_p = torch.log_softmax(model(images), 1)[:, label]
            objective = self.typical * z.square().sum(1) - log_p
            objective = objective + self.bn * sum(gaps) / len(z) if gaps else objective
            if step < self.steps:
                (z.grad,) = torch.autograd.grad(objective.sum(), z)
                optimiser.step()
        return images.detach(), objective.detach(), log_p.exp().detach()

    def objective(self, model: nn.Module, label: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R,) of each image, and the confidence in the class."""
        import torch

        with StatisticsGap(model) as gaps:
            p = torch.softmax(model(x), 1)[:, label]
        across = (x[..., 1:] - x[..., :-1]).abs().flatten(1).sum(1) + (x[..., 1:, :] - x[..., :-1, :]).abs().flatten(
            1
        ).sum(1)
        value = 1 - p + self.tv * across + self.l2 * x.flatten(1).square().sum(1)
        return (value + self.bn * sum(gaps) / len(x) if gaps else value), p


class StatisticsGap:
    """Collects, in each BatchNorm layer of a forward pass, the distance to the stored mean and variance."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: list[Tensor] = []
        self.hooks: list[Any] = []

    def __enter__(self) -> list[Tensor]:
        from torch.nn.modules.batchnorm import _BatchNorm

        for layer in self.model.modules():
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
                self.hooks.append(layer.register_forward_pre_hook(self._measure))
        return self.found

    def _measure(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        axes = [0, *range(2, inputs[0].ndim)]
        mean, variance = inputs[0].mean(axes), inputs[0].var(axes, unbiased=False)
        self.found.append((mean - layer.running_mean).square().sum() + (variance - layer.running_var).square().sum())

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
