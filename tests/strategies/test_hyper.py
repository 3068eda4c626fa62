"""HF-Fed: what travels, what stays, and what a protocol vector is worth to a hospital with one scanner."""

from __future__ import annotations

import pytest
import torch

from fedsec import models
from fedsec.strategies.hyper import SCANNERS, HFFed, protocol, set_scanner

from . import small

VECTORS = [
    (0.6667, 0.3594, 1.0333, 1.7858, 1.1125, 0.8515, 0.3997),
    (0.6667, 0.3076, 1.1111, 2.1154, 0.7500, 0.5000, 0.4458),
    (0.5975, 0.3223, 1.1000, 1.8077, 0.6250, 0.3750, 0.4807),
    (0.6073, 0.3418, 0.8889, 1.5000, 0.6250, 0.5000, 0.5088),
    (0.5975, 0.3418, 1.1111, 1.7308, 0.8750, 0.3750, 0.5323),
]


@pytest.mark.parametrize("number", range(5))
def test_protocol_vectors(number: int) -> None:
    assert protocol(*SCANNERS[number]) == pytest.approx(VECTORS[number], abs=6e-5)


def test_red_cnn_uploads_the_shared_part_alone() -> None:
    model = models.build("red_film", num_classes=0, in_channels=1, image_size=64, seed=0)
    sharing = HFFed().sharing(model)
    assert sharing.upload_bytes == 7_395_460
    assert sum(t for n, t in zip(sharing.local.names, sharing.local.sizes, strict=True) if "hyper" in n) == 331_650


def test_after_a_round_the_network_is_common_and_hypernetworks_differ() -> None:
    table, state, _ = small.trained(HFFed())
    assert not [n for n in table.sharing.params.names if "hyper" in n]
    assert all("hyper" in n for n in table.sharing.local.names)
    assert not torch.equal(state.local[0], state.local[1])
    x = small.clients()[0][0]
    for client, expected in enumerate(VECTORS[:3]):
        model = HFFed().personal_model(small.twin(table), table.sharing, client, state, x)
        assert model.net.protocol.tolist() == pytest.approx(expected, abs=6e-5)  # type: ignore[union-attr]


def test_a_hypernetwork_matters_and_the_protocol_hardly() -> None:
    """One protocol a client: another client's vector changes far less than another client's hypernetwork."""
    strategy = HFFed()
    table, state, _ = small.trained(strategy, number=4)
    x = small.clients()[0][0]

    def outputs(hyper_of: int, protocol_of: int) -> torch.Tensor:
        model = strategy.personal_model(small.twin(table), table.sharing, hyper_of, state, x)
        set_scanner(model, protocol_of)
        with torch.no_grad():
            return model.eval()(x)  # type: ignore[no-any-return]

    own = outputs(0, 0)
    assert float((outputs(0, 1) - own).norm()) < 0.5 * float((outputs(1, 0) - own).norm())
