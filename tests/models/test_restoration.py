"""Networks that restore images: counts, identities, projections against closed forms, and modulation by a protocol."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor

from fedsec import models
from fedsec.errors import ConfigError
from fedsec.models.base import Normalised
from fedsec.models.projector import Projector

NAMES = ["redcnn", "red_film", "learn", "learn_film"]


def restorer(name: str, classes: int = 0, channels: int = 1, side: int = 24, **options: object) -> Normalised:
    small = {"width": 16, **({"blocks": 3} if "learn" in name else {}), **options}
    return models.build(name, num_classes=classes, in_channels=channels, image_size=side, **small)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # data-and-models specification, section 4.6; w = 16 there, too
        ("redcnn", {"width": 96}, 1_848_865),
        ("redcnn", {"width": 16}, 52_145),
        ("red_film", {"width": 96}, 1_848_865 + 331_650),
        ("red_film", {"width": 96}, 2_180_515),
        ("learn", {"width": 64, "blocks": 50}, 50 * 38_146),
        ("learn", {"width": 16, "blocks": 1}, 2_626),
        ("learn_film", {"width": 64, "blocks": 50}, 2_174_312),
    ],
)
def test_parameter_counts(name: str, options: dict, expected: int) -> None:
    assert count(restorer(name, **options)) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_images_out_or_logits(name: str, channels: int) -> None:
    x = torch.rand(2, channels, 24, 24)
    assert restorer(name, 0, channels)(x).shape == x.shape
    classifier = restorer(name, 5, channels)
    assert classifier(x).shape == (2, 5)
    torch.testing.assert_close(classifier.head(classifier.embed(x)), classifier(x), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="no classes"):
        restorer(name, 0, channels).head(torch.zeros(2, 64))


@pytest.mark.parametrize("name", ["redcnn", "red_film"])
def test_redcnn_without_weights_is_the_identity(name: str) -> None:
    model = restorer(name)
    with torch.no_grad():
        for module in (model.net.encoder, model.net.decoder):
            for parameter in module.parameters():
                parameter.zero_()
    x = torch.rand(2, 1, 24, 24)
    torch.testing.assert_close(model(x), x)
    torch.testing.assert_close(model.net(x - 0.5), (x - 0.5).clamp(min=0))  # ReLU(x)


def test_redcnn_adds_what_the_encoder_kept() -> None:
    """Encoder and decoder as two plain stacks, with sums behind the first, third and fifth layer."""
    torch.manual_seed(0)
    net = restorer("redcnn").net
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.rand(2, 1, 24, 24)
    e = [x]
    for layer in net.encoder:
        e.append(layer(e[-1]).relu())
    d = (net.decoder[0](e[5]) + e[4]).relu()
    d = net.decoder[1](d).relu()
    d = (net.decoder[2](d) + e[2]).relu()
    d = net.decoder[3](d).relu()
    torch.testing.assert_close(net(x), (net.decoder[4](d) + x).relu())


def test_modulation_uses_each_entry_where_the_papers_put_it() -> None:
    """Zero scales: only shifts are left, and the last layer has a scalar one."""
    net = restorer("red_film").net
    w = net.width
    film = net.film(torch.zeros(1, 1, 24, 24))
    assert film.gamma.shape == film.beta.shape == (1, 2 * w + 1)
    film.gamma.detach().zero_()
    beta = torch.zeros(1, 2 * w + 1)
    beta[0, -1] = 0.25
    x = torch.rand(1, 1, 24, 24)
    restored = net.restore(x, type(film)(torch.zeros_like(beta), beta))
    torch.testing.assert_close(restored, x + 0.25)


@pytest.mark.parametrize("name", ["red_film", "learn_film"])
def test_identity_start_equals_the_plain_network(name: str) -> None:
    plain = restorer({"red_film": "redcnn", "learn_film": "learn"}[name], seed=3)
    modulated = restorer(name, seed=4)
    for layer in modulated.net.hyper.layers:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.zeros_(layer.weight)
    missing = modulated.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(key.startswith("net.hyper.") for key in missing)
    x = torch.rand(2, 1, 24, 24)
    torch.testing.assert_close(modulated(x), plain(x))


def test_reference_start_switches_the_layers_off() -> None:
    film = restorer("red_film", init="reference").net.film(torch.zeros(1, 1, 24, 24), torch.ones(7))
    assert film.gamma.abs().max() < 1e-2
    assert (restorer("red_film").net.film(torch.zeros(1, 1, 24, 24), torch.ones(7)).gamma - 1).abs().max() < 1e-2


def test_the_protocol_is_the_hospital_s_own_and_can_differ_by_image() -> None:
    net = restorer("red_film").net
    with torch.no_grad():
        for layer in net.hyper.layers:
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.normal_(layer.weight, std=0.2)
    x = torch.rand(1, 1, 24, 24).expand(2, -1, -1, -1)
    one, two = torch.zeros(7), torch.ones(7)
    mixed = net.restore(x, net.film(x, torch.stack([one, two])))
    for number, protocol in enumerate((one, two)):
        net.protocol = protocol
        torch.testing.assert_close(net(x)[number], mixed[number], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[0], mixed[1], atol=1e-3)
    shared = restorer("red_film").state_dict()
    assert not any("protocol" in key for key in shared)


# --- projections -------------------------------------------------------------------------------------------------


def disk(side: int, radius: float, fine: int = 8) -> Tensor:
    """A disk of density 1, each pixel by the share of it inside."""
    centres = (torch.arange(side * fine, dtype=torch.float64) + 0.5) * 2 / (side * fine) - 1
    inside = (centres[:, None] ** 2 + centres**2 < radius**2).double()
    return torch.nn.functional.avg_pool2d(inside[None], fine)[0]


@pytest.mark.parametrize(("side", "views"), [(64, 60), pytest.param(128, 90, marks=pytest.mark.slow)])
def test_projections_of_a_disk_are_its_chords(side: int, views: int) -> None:
    bins = side
    projector = Projector(side, views, bins)
    t = (torch.arange(bins, dtype=torch.float64) + 0.5) * 2 * math.sqrt(2) / bins - math.sqrt(2)
    expected = 2 * (0.36 - t**2).clamp(min=0).sqrt().expand(views, -1)
    found = projector.project(disk(side, 0.6))
    assert (found - expected).norm() / expected.norm() <= 0.03


def test_backprojection_is_the_exact_transpose() -> None:
    projector = Projector(64, 60, 64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, dtype=torch.float64, generator=generator)
    y = torch.randn(60, 64, dtype=torch.float64, generator=generator)
    left, right = (projector.project(x) * y).sum(), (x * projector.backproject(y)).sum()
    assert abs(left - right) <= 1e-13 * projector.project(x).norm() * y.norm()
    assert projector.norm_squared == pytest.approx(2.56, abs=0.005)  # specification, section 4.6


def test_projections_differentiate_twice_and_under_transforms() -> None:
    projector = Projector(8, 5, 8)
    x = torch.rand(2, 8, 8, dtype=torch.float64, requires_grad=True)

    def cubed(image: Tensor) -> Tensor:
        return projector.project(image).pow(3).sum()

    assert torch.autograd.gradcheck(cubed, (x,))
    assert torch.autograd.gradgradcheck(cubed, (x,))
    by_image = torch.func.vmap(torch.func.grad(cubed))(x.detach())
    torch.testing.assert_close(by_image, torch.autograd.grad(cubed(x), x)[0])
    _, moved = torch.func.jvp(projector.project, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(moved, projector.project(torch.ones_like(x)).detach())


def test_copies_and_other_precisions_share_the_matrix() -> None:
    projector = Projector(8, 5, 8)
    assert copy.deepcopy(projector) is projector
    x = torch.rand(3, 1, 8, 8)
    assert projector.project(x).dtype is torch.float32
    assert projector.project(x).shape == (3, 1, 5, 8)
    twin = pickle.loads(pickle.dumps(projector))
    torch.testing.assert_close(twin.project(x), projector.project(x), rtol=0, atol=0)


@torch.no_grad()
def test_learn_without_a_prior_is_gradient_descent_that_converges() -> None:
    model = restorer("learn", blocks=20, side=32)
    net = model.net
    with torch.no_grad():
        for block in net.blocks:
            block.step.size.fill_(10.0)  # above the cap 1.9/‖A‖²
            for layer in (block.conv1, block.conv2, block.conv3):
                layer.weight.zero_()
    truth = disk(32, 0.6).float()[None, None]
    measured = net.projector.project(truth)
    residuals, x = [], torch.zeros_like(truth)
    for block in net.blocks:
        gap = net.projector.project(x) - measured
        residuals.append(gap.square().sum().item())
        expected = (x - 1.9 / net.projector.norm_squared * net.projector.backproject(gap)).relu()
        x = block(x, net.projector.backproject(gap), None)
        torch.testing.assert_close(x, expected)
    assert all(after < before for before, after in itertools.pairwise(residuals))
    assert residuals[-1] < 0.02 * residuals[0]
    torch.testing.assert_close(net.restore(torch.zeros_like(truth), None, measured), x)


def test_a_step_at_its_cap_has_no_gradient() -> None:
    net = restorer("learn", blocks=1).net
    x = torch.rand(1, 1, 24, 24)
    for size, free in ((0.1, True), (10.0, False), (0.001, False)):
        net.blocks[0].step.size.data.fill_(size)
        net.zero_grad()
        net.restore(x, None, net.projector.project(torch.rand(1, 1, 24, 24))).sum().backward()
        assert bool(net.blocks[0].step.size.grad != 0) == free


@pytest.mark.parametrize(
    ("name", "side", "options", "words"),
    [
        ("redcnn", 20, {}, "too small, it needs 21"),
        ("learn", 160, {"blocks": 1}, "fits up to 128"),
        ("red_film", 28, {"init": "zeros"}, "identity or reference"),
    ],
)
def test_refusals(name: str, side: int, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        restorer(name, side=side, **options)
