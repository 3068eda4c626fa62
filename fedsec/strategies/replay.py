"""Generative replay: a decoder trained across clients fills up the classes that a client lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.errors import ConfigError
from fedsec.federation.desk import Desk, Report, Setting, Site, seeded
from fedsec.federation.strategy import Label, Strategy
from fedsec.types import Layout

LATENT, HIDDEN = 16, 256


class Generator(nn.Module):
    """Conditional VAE: encoder pixels + L -> 256 -> 2·16, decoder 16 + L -> 256 -> pixels, Bernoulli likelihood."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.shape, self.classes = shape, classes
        pixels = shape[0] * shape[1] * shape[2]
        self.encoder = nn.Sequential(nn.Linear(pixels + classes, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT + classes, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, pixels))

    def loss(self, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Mean negative evidence bound of images (B, C, H, W) in [0, 1]; noise: (B, 16)."""
        label = F.one_hot(y, self.classes).float()
        mean, log_var = self.encoder(torch.cat([x.flatten(1), label], 1)).chunk(2, 1)
        z = mean + noise * (0.5 * log_var).exp()
        logits = self.decoder(torch.cat([z, label], 1))
        likelihood = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(1)
        divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
        bound: Tensor = (likelihood + divergence).mean()
        return bound

    @torch.no_grad()
    def sample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of classes (N,)."""
        z = torch.randn(len(y), LATENT, generator=generator).to(y.device)
        logits = self.decoder(torch.cat([z, F.one_hot(y, self.classes).float()], 1))
        images: Tensor = torch.sigmoid(logits).view(-1, *self.shape)
        return images


@dataclass(frozen=True)
class Replay(Strategy):
    """A decoder is averaged for the first rounds; then clients add its samples until their classes are balanced.

    After Qu et al. 2022, of which only the abstract was readable: the generator is ours, a conditional VAE whose
    encoder stays at the client. It is fully connected at any size of image.
    """

    name: ClassVar[str] = "replay"
    goal: ClassVar[str] = "FedAvg on real and replayed images of a generator trained across clients"
    source: ClassVar[str] = "Qu et al., Medical Image Analysis 2022 (abstract)"
    label: ClassVar[Label] = "reconstruction"
    reports: ClassVar[tuple[Report, ...]] = (
        Report("decoder", "a generator of images like its own, which may have memorised some", required=False),
    )
    not_private: ClassVar[str] = "the generator is trained without noise"
    generator_rounds: Annotated[
        int, Field(ge=0, description="first rounds, in which the generator is trained; 0: off")
    ] = 5
    generator_epochs: Annotated[int, Field(ge=1, description="epochs of the generator in each of them")] = 5
    generator_lr: Annotated[float, Field(gt=0, description="Adam step of the generator")] = 1e-3

    def prepare_model(self, model: nn.Module, setting: Setting) -> nn.Module:
        """The model as it is.

        Raises:
            ConfigError: several labels an image.
        """
        if setting.recipe.task == "multilabel":
            raise ConfigError("replay: balances classes; multilabel data have several an image")
        return model

    def initial_side(self, model: nn.Module, setting: Setting) -> dict[str, Tensor]:
        """The common start of all decoders."""
        if self.generator_rounds == 0:
            return {}
        build = seeded(
            setting.ctx.entropy("generator"), lambda: Generator(setting.image_shape, setting.recipe.num_classes)
        )
        return {"decoder": flat(build.get_submodule("decoder"))}

    def begin(self, site: Site) -> None:
        """Add replayed images, once the generator is done."""
        if not self.generator_rounds or site.ctx.round <= self.generator_rounds:
            return
        built = self.build(site)
        counts = torch.bincount(site.y, minlength=site.recipe.num_classes)
        wanted = torch.repeat_interleave(
            torch.arange(len(counts), device=site.y.device), (counts.max() - counts).to(site.y.device)
        )
        if len(wanted):
            new = built.sample(wanted, site.ctx.generator("replay"))
            site.x, site.y = torch.cat([site.x, new]), torch.cat([site.y, wanted])

    def build(self, site: Site) -> Generator:
        """The generator with the received decoder and this client's own encoder."""
        shape = (site.x.shape[1], site.x.shape[2], site.x.shape[3])
        common = site.ctx.common("generator")
        built: Any = seeded(common, lambda: Generator(shape, site.recipe.num_classes)).to(site.x.device)
        unflat(built.decoder, site.received["decoder"])
        if "encoder" in site.own:
            unflat(built.encoder, site.own["encoder"])
        generator: Generator = built
        return generator

    def finish(self, site: Site) -> None:
        """Train the generator in the first rounds."""
        if not 0 < site.ctx.round <= self.generator_rounds:
            return
        built = self.build(site)
        optimizer = torch.optim.Adam(built.parameters(), lr=self.generator_lr)
        rng = site.ctx.generator("generator")
        for _ in range(self.generator_epochs):
            for rows in torch.randperm(len(site.x), generator=rng).split(site.recipe.batch_size):
                noise = torch.randn(len(rows), LATENT, generator=rng).to(site.x.device)
                optimizer.zero_grad()
                built.loss(site.x[rows.to(site.x.device)], site.y[rows.to(site.x.device)], noise).backward()
                optimizer.step()
        site.own["encoder"] = flat(built.encoder)
        site.scratch["decoder"] = flat(built.decoder)

    def report(self, site: Site) -> dict[str, Tensor]:
        """The decoder, in the first rounds."""
        return {"decoder": site.scratch["decoder"]} if "decoder" in site.scratch else {}

    def valid_report(self, extras: Mapping[str, Tensor]) -> str | None:
        """A flat vector."""
        return "decoder is no vector" if "decoder" in extras and extras["decoder"].ndim != 1 else None

    def serve(self, desk: Desk) -> None:
        """The weighted mean of the decoders."""
        side = desk.state.side
        sent = {u.client: u.extras["decoder"] for u in desk.updates if "decoder" in u.extras}
        sent = {k: d for k, d in sent.items() if "decoder" in side and d.shape == side["decoder"].shape}
        total = sum(desk.weights.get(k, 0.0) for k in sent)
        if sent and total > 0:
            side["decoder"] = sum((d * (desk.weights[k] / total) for k, d in sent.items()), torch.zeros(1))


def flat(module: nn.Module) -> Tensor:
    """All parameters of a module in one vector."""
    tensors = dict(module.named_parameters())
    return Layout.of(tensors).flatten(tensors)


@torch.no_grad()
def unflat(module: nn.Module, vector: Tensor) -> None:
    """The inverse of `flat`."""
    tensors = dict(module.named_parameters())
    for name, view in Layout.of(tensors).views(vector).items():
        tensors[name].copy_(view)
