"""Do the two rank indices count what they say: against dense matrices, closed forms and known networks?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fedsec.attacks.gradinversion.candidate import NotApplicable
from fedsec.attacks.gradinversion.conv_solve import Geometry, forward_matrix, gradient_matrix
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.rank import (
    LayerRank,
    conv_rank,
    layer_ranks,
    rank_index_noise,
    rank_index_structural,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from . import cases


def ranks(net: nn.Module, prior: Prior, shape: tuple[int, int, int] = (1, 16, 16)) -> list[LayerRank]:
    data = cases.blobs(1, shape, seed=1)
    model = cases.Normalised(net)
    observation = cases.observation_of(model, data.images, data.labels, prior)
    return layer_ranks(observation.simulation, data.images, data.labels)


def chain(*layers: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 2)).requires_grad_(True)


@settings(deadline=None, max_examples=25)
@given(
    outputs=st.integers(1, 4),
    inputs=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dead=st.floats(0, 0.8),
    seed=st.integers(0, 99),
)
def test_rank_of_a_convolution_is_that_of_the_dense_system(
    outputs: int, inputs: int, stride: int, padding: int, dead: float, seed: int
) -> None:
    """All gradient rows of all channels, and the forward rows of known outputs, as one matrix."""
    generator = torch.Generator().manual_seed(seed)
    size, side = 6, (6 + 2 * padding - 3) // stride + 1
    shape = (stride, stride), (padding, padding), (1, 1)
    geometry = Geometry((inputs, size, size), (outputs, side, side), (3, 3), *shape)
    weight = torch.randn(outputs, inputs, 9, dtype=torch.float64, generator=generator)
    slope = torch.randn(outputs, side * side, dtype=torch.float64, generator=generator)
    slope[torch.rand(slope.shape, generator=generator) < dead] = 0
    dense = torch.block_diag(*[gradient_matrix(slope, geometry)] * inputs)
    forward = forward_matrix(weight, geometry).T[slope.reshape(-1) != 0]
    expected = int(np.linalg.matrix_rank(torch.cat([dense, forward]).numpy()))
    found = conv_rank("conv", weight, slope, geometry)
    assert (found.rank, found.unknowns, found.counted) == (expected, inputs * size * size, False)


def test_a_single_coarse_filter_leaves_pixels_open(blob_prior: Prior) -> None:
    """16x16 pixels, 3x3 kernel, stride 4: 9 gradient rows and 16 outputs for 256 unknowns.

    One of these equations follows from the others: Σ W·dW = Σ δ·z.
    """
    torch.manual_seed(0)
    found = ranks(chain(nn.Conv2d(1, 1, 3, 4), nn.Sigmoid(), features=16), blob_prior)
    assert [(r.layer, r.rank, r.unknowns) for r in found] == [("net.0", 24, 256), ("net.3", 16, 16)]
    assert rank_index_structural(found) == 24 / 256
    assert str(found[0]) == "net.0 has 24 independent equations for 256 unknowns"


def test_known_networks(blob_prior: Prior) -> None:
    assert rank_index_structural(ranks(cases.lenet(shape=(1, 16, 16)).net, blob_prior)) == 1
    assert rank_index_structural(ranks(cases.mlp(256).net, blob_prior)) == 1


def test_closed_units_and_pooling_hide_outputs(blob_prior: Prior) -> None:
    """Two filters at every pixel determine the image; if only the largest of 16 pixels counts, they do not."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 2, 3, padding=1)
    free = ranks(chain(conv, nn.Sigmoid(), features=512), blob_prior)
    pooled = ranks(chain(conv, nn.Sigmoid(), nn.MaxPool2d(4), features=32), blob_prior)
    assert free[0].index == 1
    assert pooled[0].rank <= 18 + 32


class Residual(nn.Module):
    """Two convolutions that read the same input: a coarse one beside a fine one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.coarse, self.fine = nn.Conv2d(1, 1, 1, 4), nn.Conv2d(1, 16, 4, 4)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.coarse(x) + self.fine(x).sum(1, keepdim=True)).flatten(1))


def test_of_layers_with_the_same_input_the_better_informed_counts(blob_prior: Prior) -> None:
    assert [r.layer for r in ranks(Residual(), blob_prior)] == ["net.fine", "net.head"]


def test_what_is_not_covered_is_named(blob_prior: Prior) -> None:
    with pytest.raises(NotApplicable, match=r"net\.1: grouped"):
        ranks(chain(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, groups=2), features=288), blob_prior)


def test_noise_index_counts_directions_that_beat_the_prior() -> None:
    assert rank_index_noise(torch.tensor([1e6, 2.0, 1.0, 0.5]), 8) == 0.25
