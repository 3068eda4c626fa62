"""Feature-wise modulation: a hospital's scanner protocol becomes a scale and a shift for every channel."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

PROTOCOL_LENGTH = 7
"""Views, bins, pixel pitch, detector pitch, source and detector distance, photons (Yang et al. 2022)."""
REFERENCE_PROTOCOL = (0.6667, 0.3594, 1.0333, 1.7858, 1.1125, 0.8515, 0.3997)
"""Of the first scanner of Yang et al. 2022. A vector of zeros would keep a hypernetwork from learning."""
HIDDEN = (256, 512)

FilmInit = Literal["identity", "reference"]


class Film(NamedTuple):
    """Scales and shifts (B, F) of one network, for F feature channels."""

    gamma: Tensor
    beta: Tensor

    def part(self, start: int, stop: int | None) -> Film:
        """The entries of channels start to stop - 1, or to the end."""
        return Film(self.gamma[:, start:stop], self.beta[:, start:stop])

    def __call__(self, features: Tensor) -> Tensor:
        """γ ⊙ u + β for features u (B, C, H, W), where this part has C channels or one for all (Perez et al. 2018)."""
        return self.gamma[:, :, None, None] * features + self.beta[:, :, None, None]


class HyperNetwork(nn.Module):
    """Scale and shift of every channel, from a protocol vector: linear, ReLU, linear, ReLU, linear.

    Source: Yang et al. 2022 (HyperFed), arXiv 2206.03709; weights 133,632 + 513 · 2F for F channels.

    Args:
        channels: F. protocol: length of the vector.
        init: `identity` starts with γ = 1 and β = 0; `reference` with γ ≈ 0, as the released code does.
        dropout: the released code uses 0.5 after both hidden layers. A hospital with one protocol always puts the
            same vector in, so that there is nothing to regularise, and the draws would differ between engines.
    """

    def __init__(
        self, channels: int, protocol: int = PROTOCOL_LENGTH, init: FilmInit = "identity", dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = protocol
        for width in HIDDEN:
            layers += [nn.Linear(before, width), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
            before = width
        last = nn.Linear(before, 2 * channels)
        self.layers = nn.Sequential(*layers, last)
        for module in self.layers:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1e-3)
                nn.init.zeros_(module.bias)
        if init == "identity":
            with torch.no_grad():
                last.bias[:channels].fill_(1)

    def forward(self, protocol: Tensor) -> Film:
        """Scales and shifts (B, F) of protocol vectors (B, 7)."""
        gamma, beta = self.layers(protocol).chunk(2, dim=1)
        return Film(gamma, beta)
