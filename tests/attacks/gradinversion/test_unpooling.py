"""From the head back through ReLU and max pooling: positions, exact maps, refusals, certificates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fedsec.attacks.gradinversion.auto import reconstruct
from fedsec.attacks.gradinversion.blocks import find_blocks
from fedsec.attacks.gradinversion.candidate import NotApplicable
from fedsec.attacks.gradinversion.certificate import assess
from fedsec.attacks.gradinversion.clock import Clock
from fedsec.attacks.gradinversion.conv_solve import Geometry
from fedsec.attacks.gradinversion.feature_inversion import Whitening, conditioner, curvature, invert
from fedsec.attacks.gradinversion.observation import Observation, observe
from fedsec.attacks.gradinversion.pooled_layer import PooledLayer
from fedsec.attacks.gradinversion.prior import Prior, fit_prior
from fedsec.attacks.gradinversion.settings import Settings
from fedsec.attacks.gradinversion.trace import trace
from fedsec.attacks.gradinversion.unpooling import unpooling
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec import models

from . import cases
from .clients import view_of_round

SHAPE = (1, 16, 16)


def pooling_net(middle: bool = False) -> cases.Normalised:
    """16x16 -> two pooled blocks, one without pooling in between -> head; running statistics are not 0 and 1."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, width, pool in ((1, 24, True), *(((24, 24, False),) if middle else ()), (24, 16, True)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    side = nn.Sequential(*layers)(torch.zeros(2, *SHAPE)).shape[-1]
    model = cases.Normalised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * side**2, 2)))
    with torch.no_grad():
        model.train()(cases.blobs(32, seed=9).images)
    return model.eval()


def observed(model: nn.Module, prior: Prior, mode: str = "eval", seed: int = 1) -> tuple[Observation, Tensor, Tensor]:
    data = cases.blobs(1, seed=seed)
    plan = cases.recipe(mode=mode)
    return observe(view_of_round(model, data.images, data.labels, plan), model, prior, SHAPE), data.images, data.labels


def attack(observation: Observation, labels: Tensor, budget: float = 60.0, head: str = "net.9") -> list[object]:
    recorded = trace(observation.simulation.model, observation.prior.mean[None].clone())
    blocks, _ = find_blocks(recorded, f"{head}.weight", observation.complete)
    return unpooling(observation, blocks, (f"{head}.weight", f"{head}.bias"), labels, Clock(budget))  # type: ignore[return-value]


def layer_case(kernel: int, stride: int, padding: int = 1) -> tuple[PooledLayer, Tensor, Tensor]:
    """A pooled layer with δ drawn at random, dW by autograd through torch's own pooling, and the true input."""
    generator = torch.Generator().manual_seed(kernel + 10 * stride)
    smooth = F.interpolate(torch.rand(1, 10, 4, 4, generator=generator), (9, 9), mode="bicubic")[0]
    x = (smooth + 0.05 * torch.rand(10, 9, 9, generator=generator)).double().clamp(min=0)
    weight = torch.randn(40, 10, 3, 3, generator=generator).double().requires_grad_(True)
    z = F.conv2d(x[None], weight, padding=padding)
    pooled, where = F.max_pool2d(z, kernel, stride, return_indices=True)
    delta = torch.randn(pooled.shape, generator=generator).double() * (pooled > pooled.mean())
    (dw,) = torch.autograd.grad((delta * pooled).sum(), weight)
    side = z.shape[-1]
    number = torch.arange(side * side, dtype=torch.float64).view(1, 1, side, side)
    windows = F.unfold(number, kernel, stride=stride)[0].T.long()
    geometry = Geometry((10, 9, 9), tuple(z.shape[1:]), (3, 3), (1, 1), (padding, padding), (1, 1))  # type: ignore[arg-type]
    ones, zeros = torch.ones(40, 1).double(), torch.zeros(40, 1).double()
    layer = PooledLayer(
        geometry=geometry,
        weight=weight.detach().flatten(2),
        gain=ones,
        shift=zeros,
        windows=windows,
        weight_gradient=dw.flatten(2),
        delta=delta[0].flatten(1),
        pooled=pooled.detach()[0].flatten(1),
        low=0.0,
    )
    return layer, x.flatten(1), where[0].flatten(1)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 3), (2, 2), (3, 2)])
def test_largest_positions_are_those_of_torch(kernel: int, stride: int) -> None:
    layer, x, where = layer_case(kernel, stride)
    assert torch.equal(layer.largest(x), where)
    assert layer.mismatch(x) < 1e-10
    left = layer.rows - layer.matrix(where) @ x.T
    assert float(left.norm() / layer.rows.norm()) < 1e-12
    assert float(layer.mismatch(x + 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)))) > 1e-2


@pytest.mark.parametrize(("kernel", "stride"), [(3, 3), (2, 2), (3, 2)])
def test_vague_input_becomes_exact(kernel: int, stride: int) -> None:
    """From a guess with a fifth of the variation wrong, where some positions are."""
    layer, x, where = layer_case(kernel, stride)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(x.shape, generator=generator).double()
    guess = x + 0.2 * x.std() * noise
    alive = layer.delta != 0
    assert bool((layer.largest(guess) != where)[alive].any())
    found, certain = layer.solve(guess)
    assert int(certain.sum()) >= 70  # of 81: a window at the border need not touch its corner
    assert float((found - x)[:, certain].norm() / x.norm()) < 1e-6
    if bool(certain.all()):
        assert torch.equal(layer.largest(found)[alive], where[alive])


def test_another_layers_gradient_is_not_explained() -> None:
    """What cannot be right must not pass the forward check."""
    layer, x, _ = layer_case(3, 3)
    shuffled = layer.weight_gradient[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    wrong = replace(layer, weight_gradient=shuffled)
    assert wrong.mismatch(wrong.solve(x)[0]) > 0.1


def test_whitening_inverts_and_measures_prior_energy() -> None:
    for shape in (SHAPE, (1, 40, 40)):  # a complete basis, and one of 11 components
        prior = fit_prior(cases.blobs(12 if shape[1] > 16 else 300, shape))
        images = cases.blobs(3, shape, seed=4).images
        point = Whitening(prior).point(images)
        assert torch.allclose(Whitening(prior).images(point), images, atol=1e-4)
        assert torch.allclose((point**2).flatten(1).sum(1), prior.energy(images), rtol=3e-2)


def test_conditioner_makes_the_hessian_round() -> None:
    """With all components, T'(J'J/s² + I)T = I for linear features."""
    prior = fit_prior(cases.blobs(300, (1, 6, 6)))
    torch.manual_seed(0)
    slopes = torch.randn(80, 36)
    gram = curvature(lambda x: x.flatten(1) @ slopes.T, prior.mean[None], prior, 36)
    whitened = (slopes * 1.0) @ prior.basis * prior.variance.sqrt()
    assert torch.allclose(gram.float(), whitened.T @ whitened, rtol=1e-3, atol=1e-4)
    apply = conditioner(gram, prior.basis, 0.1)
    columns = apply(torch.eye(36).view(36, 1, 6, 6)).flatten(1).T
    inside = whitened @ prior.basis.T  # J in the coordinates ξ
    hessian = columns.T @ (inside.T @ inside / 0.01 + torch.eye(36)) @ columns
    assert torch.allclose(hessian, torch.eye(36), atol=2e-2)


def test_feature_inversion_of_linear_features_is_the_posterior_mean() -> None:
    prior = fit_prior(cases.blobs(300, (1, 6, 6)))
    torch.manual_seed(1)
    slopes, truth = torch.randn(12, 36), cases.blobs(1, (1, 6, 6), seed=3).images
    target = truth.flatten(1) @ slopes.T
    found = invert(
        lambda x: x.flatten(1) @ slopes.T, target, prior, prior.mean[None], Clock(20), widenings=(1e-9,), error=0.05
    )
    cov = (prior.basis * prior.variance) @ prior.basis.T
    gain = cov @ slopes.T @ torch.linalg.inv(slopes @ cov @ slopes.T + 0.05**2 * torch.eye(12))
    expected = prior.mean.flatten() + gain @ (target[0] - slopes @ prior.mean.flatten())
    assert torch.allclose(found.flatten(), expected, atol=2e-3)


@pytest.mark.parametrize(("middle", "head"), [(False, "net.9"), (True, "net.12")])
def test_pooled_relu_net_with_batchnorm_is_exact_and_proven(middle: bool, head: str) -> None:
    model, prior = pooling_net(middle), fit_prior(cases.blobs(300))
    observation, truth, labels = observed(model, prior)
    found = assess(attack(observation, labels, head=head)[0], observation)  # type: ignore[arg-type]
    assert found.method == "unpooling"
    assert "exact down to the input of net.4.weight" in found.notes[0]
    assert cases.psnr(found.images, truth) > 60
    assert found.est_psnr is not None
    assert abs(found.est_psnr - cases.psnr(found.images, truth)) < 15
    assert found.certified == 1


def test_wrong_gradients_are_never_proven() -> None:
    """Another model's upload: no layer below the head is explained, or the residual shows it."""
    prior = fit_prior(cases.blobs(300))
    observation, _, labels = observed(pooling_net(), prior)
    noise = torch.randn(observation.gradient.shape, generator=torch.Generator().manual_seed(0))
    scale = observation.norm / float(noise.norm())
    g, head = observation.gradient, 514
    for gradient in (g.flip(0), scale * noise, torch.cat([g[:-head].flip(0), g[-head:]])):
        wrong = replace(observation, gradient=gradient)
        found = attack(wrong, labels, 5)
        assert [c.method for c in found] == ["feature_inversion"]  # type: ignore[attr-defined]
        assert assess(found[0], wrong).certified == 0  # type: ignore[arg-type]


def test_what_cannot_be_walked_is_named() -> None:
    prior = fit_prior(cases.blobs(64))
    for model, head, words in (
        (cases.small_cnn(), "net.9", "group_norm"),
        (pooling_net(), "net.9", "train mode"),
    ):
        mode = "train" if "train" in words else "eval"
        observation, _, _ = observed(model, prior, mode)
        recorded = trace(observation.simulation.model, prior.mean[None].clone())
        blocks, stopped = find_blocks(recorded, f"{head}.weight", observation.complete)
        assert blocks == []
        assert words in stopped


def test_batches_are_refused_and_features_alone_beat_the_prior(blob_prior: Prior) -> None:
    model, gains = cases.small_cnn(), []
    for seed in range(1, 4):
        observation, truth, labels = observed(model, blob_prior, seed=seed)
        found = attack(observation, labels, 20)[0]
        assert found.method == "feature_inversion"  # type: ignore[attr-defined]
        gains.append(
            cases.psnr(found.images, truth) - cases.psnr(blob_prior.mean[None], truth)  # type: ignore[attr-defined]
        )
    assert min(gains) > 2
    assert sum(gains) / 3 > 5
    pair = cases.blobs(2, seed=1)
    both = observe(view_of_round(model, pair.images, pair.labels, cases.recipe()), model, blob_prior, SHAPE)
    with pytest.raises(NotApplicable, match="mixture of 2"):
        attack(both, pair.labels)


def test_inferred_moments_tell_what_train_mode_hides() -> None:
    model, prior = pooling_net(), fit_prior(cases.blobs(300))
    observation, truth, _ = observed(model, prior, "train")
    psnr = {}
    for bn in ("none", "inferred"):
        settings = Settings(method="unpooling", bn=bn, budget_s=20)  # type: ignore[arg-type]
        found = reconstruct(observation, settings, torch.Generator().manual_seed(0))
        assert found.method == "feature_inversion"
        psnr[bn] = cases.psnr(found.images, truth)
    assert psnr["inferred"] > psnr["none"] + 3


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 28, 28), (1, 32, 24)])
def test_any_channels_and_sides(shape: tuple[int, int, int]) -> None:
    model = models.build("cnn", num_classes=2, in_channels=shape[0], image_size=24, seed=0, norm="batch").eval()
    data = cases.blobs(1, shape, seed=1)
    seen = view_of_round(model, data.images, data.labels, cases.recipe(mode="eval"))
    observation = observe(seen, model, fit_prior(cases.blobs(20, shape)), shape)
    found = attack(observation, data.labels, 1.0, head="net.fc")
    assert found[0].images.shape == data.images.shape  # type: ignore[attr-defined]


@pytest.mark.slow
def test_goal_5(xrays: tuple[Tensor, Tensor], xray_prior: Prior) -> None:
    """ReLU and BatchNorm, image 872 in 60 CPU seconds; the specification asks for 22 dB."""
    images, labels = xrays
    observation = cases.observation_of(cases.convnet().eval(), images[872:873], labels[872:873], xray_prior)
    found = reconstruct(observation, Settings(budget_s=60), torch.Generator().manual_seed(1))
    assert found.method == "unpooling"
    assert cases.psnr(found.images, images[872:873]) > 50
