"""LEARN: gradient descent on projection data, unrolled into blocks that each learn their own prior."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.models.base import InputSize, Norm, check_size
from fedsec.models.film import Film, FilmInit
from fedsec.models.projector import Projector
from fedsec.models.redcnn import modulate
from fedsec.models.restoration import Restorer, start_small

SMALLEST = 8
VIEWS = 60
STEP, STEP_STD = 0.02, 0.001
"""Of the released initialisation of s_t (Yang et al. 2022)."""
SHORTEST_STEP = 0.01
STABLE = 1.9
"""Steps below 2/‖A‖² make gradient descent converge; this leaves some room."""


class Step(nn.Module):
    """The step α = max(0.01, min(γ₀ s + β₀, m)) along the data gradient; the cap m carries no gradient."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.size = nn.Parameter(STEP + STEP_STD * torch.randn(()))
        self.cap = cap

    def forward(self, gradient: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """α times the gradient (B, C, H, W); scale and shift (B, 1)."""
        alpha = (self.size * scale + shift).clamp(max=self.cap).clamp(min=SHORTEST_STEP)
        return alpha[:, :, None, None] * gradient


class Block(nn.Module):
    """One iteration: x ← ReLU(x − α Aᵀ(Ax − y) + C(x)), with C three 3x3 convolutions."""

    def __init__(self, channels: int, width: int, cap: float) -> None:
        super().__init__()
        self.step = Step(cap)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, gradient: Tensor, film: Film | None) -> Tensor:
        """The next image of the current one (B, C, H, W) and the gradient of ½‖Ax − y‖² there."""
        w = self.conv1.out_channels
        one = x.new_ones(len(x), 1)
        scale, shift = (one, 0 * one) if film is None else film.part(0, 1)
        first, second, last = (
            (None,) * 3 if film is None else (film.part(1, w + 1), film.part(w + 1, 2 * w + 1), film.part(-1, None))
        )
        learned = F.relu(modulate(self.conv1(x), first))
        learned = F.relu(modulate(self.conv2(learned), second))
        learned = modulate(self.conv3(learned), last)
        return F.relu(x - self.step(gradient, scale, shift) + learned)


class LEARN(Restorer):
    """Unrolled reconstruction from projections, of an image's own where no others are given.

    Sources: Chen et al. 2018, "LEARN: learned experts' assessment-based reconstruction network for sparse-data CT";
    modulation: Yang et al. 2022 (HyperFed). Their cap on the step was fitted to one scanner geometry; this is
    1.9/‖A‖² of our projector. 38,146 parameters a block of width 64, and 267,012 of a hypernetwork.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        in_channels: int,
        image_size: int,
        width: int,
        blocks: int,
        views: int,
        film: bool,
        init: FilmInit = "identity",
        dropout: float = 0.0,
    ) -> None:
        check_size(name, image_size, SMALLEST)
        size = InputSize(in_channels, image_size, exact=True)
        super().__init__(num_classes, in_channels, size, 2 * width + 2 if film else None, init, dropout)
        self.projector = Projector(image_size, views, image_size)
        cap = STABLE / self.projector.norm_squared
        self.blocks = nn.ModuleList(Block(in_channels, width, cap) for _ in range(blocks))
        start_small(self)

    def restore(self, x: Tensor, film: Film | None, sinogram: Tensor | None = None) -> Tensor:
        """Images that explain projections.

        Args:
            x: (B, C, side, side) where the iteration starts.
            sinogram: (B, C, V, B') measured projections; those of x where not given, so that x is cleaned.
        """
        measured = self.projector.project(x) if sinogram is None else sinogram
        for block in self.blocks:
            gradient = self.projector.backproject(self.projector.project(x) - measured)
            x = block(x, gradient, film)
        return x


def learn(
    num_classes: int,
    in_channels: int,
    image_size: int,
    norm: Norm = "group",
    width: int = 64,
    blocks: int = 50,
    views: int = VIEWS,
) -> LEARN:
    """LEARN (1.9M parameters): unrolled CT reconstruction up to 128 pixels; with classes, a linear layer behind it.

    Source: Chen et al. 2018, "LEARN: learned experts' assessment-based reconstruction network for sparse-data CT".
    """
    return LEARN("learn", num_classes, in_channels, image_size, width, blocks, views, film=False)


def learn_film(
    num_classes: int,
    in_channels: int,
    image_size: int,
    norm: Norm = "group",
    width: int = 64,
    blocks: int = 50,
    views: int = VIEWS,
    init: FilmInit = "identity",
    dropout: float = 0.0,
) -> LEARN:
    """LEARN modulated by a hypernetwork that reads the scanner protocol (2.2M parameters).

    Source: Yang et al. 2022, "Hypernetwork-based physics-driven personalized federated learning for CT imaging".
    """
    return LEARN("learn_film", num_classes, in_channels, image_size, width, blocks, views, True, init, dropout)
