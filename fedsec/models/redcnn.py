"""RED-CNN: a residual encoder-decoder that cleans images, alone or modulated by a scanner protocol."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.models.base import InputSize, Norm, check_size
from fedsec.models.film import Film, FilmInit
from fedsec.models.restoration import Restorer, start_small

SMALLEST = 21
"""Five 5x5 convolutions without padding leave one pixel of it."""
DEPTH = 5
KEPT = (2, 4)
"""Encoder outputs that the decoder adds again."""


class REDCNN(Restorer):
    """Five 5x5 convolutions and five transposed ones, without normalisation layers.

    Sources: Chen et al. 2017, "Low-dose CT with a residual encoder-decoder convolutional neural network"; modulation
    after every layer: Yang et al. 2022 (HyperFed). Width w = 96: 1,848,865 parameters, and 331,650 of a hypernetwork.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        in_channels: int,
        image_size: int,
        width: int,
        film: bool,
        init: FilmInit = "identity",
        dropout: float = 0.0,
    ) -> None:
        check_size(name, image_size, SMALLEST)
        size = InputSize(in_channels, SMALLEST)
        super().__init__(num_classes, in_channels, size, 2 * width + 1 if film else None, init, dropout)
        self.width = width
        before = [in_channels] + [width] * (DEPTH - 1)
        self.encoder = nn.ModuleList(nn.Conv2d(channels, width, 5) for channels in before)
        self.decoder = nn.ModuleList(nn.ConvTranspose2d(width, channels, 5) for channels in reversed(before))
        start_small(self)

    def restore(self, x: Tensor, film: Film | None) -> Tensor:
        """Clean images of degraded ones (B, C, H, W), H and W at least 21; `film` has 2w + 1 features."""
        w = self.width
        down, up, last = (
            (None, None, None) if film is None else (film.part(0, w), film.part(w, 2 * w), film.part(-1, None))
        )
        kept = [x]
        for number, layer in enumerate(self.encoder, start=1):
            x = F.relu(modulate(layer(x), down))
            if number in KEPT:
                kept.append(x)
        for number, layer in enumerate(self.decoder, start=1):
            x = modulate(layer(x), last if number == DEPTH else up)
            # The sums stand behind the first, third and fifth layer, where the sides match again.
            x = F.relu(x + kept.pop() if number % 2 else x)
        return x


def modulate(features: Tensor, film: Film | None) -> Tensor:
    """Scaled and shifted features; as they are where nothing modulates."""
    return features if film is None else film(features)


def redcnn(num_classes: int, in_channels: int, image_size: int, norm: Norm = "group", width: int = 96) -> REDCNN:
    """RED-CNN (1.8M parameters), which cleans images; with classes, a linear layer on the cleaned image.

    Source: Chen et al. 2017, "Low-dose CT with a residual encoder-decoder convolutional neural network".
    """
    return REDCNN("redcnn", num_classes, in_channels, image_size, width, film=False)


def red_film(
    num_classes: int,
    in_channels: int,
    image_size: int,
    norm: Norm = "group",
    width: int = 96,
    init: FilmInit = "identity",
    dropout: float = 0.0,
) -> REDCNN:
    """RED-CNN modulated by a hypernetwork that reads the scanner protocol (2.2M parameters).

    Source: Yang et al. 2022, "Hypernetwork-based physics-driven personalized federated learning for CT imaging".
    """
    return REDCNN("red_film", num_classes, in_channels, image_size, width, True, init, dropout)
