"""Batches in front of a fully connected layer with ReLU: uploads, gradients without an optimiser, null cases."""

from __future__ import annotations

import copy
from typing import Any

import torch
from fedsec.attacks.gradinversion.deflation import Proof
from fedsec.attacks.gradinversion.observation import Observation, observe
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.relu_layer import ReluLayer, find_relu_layer
from fedsec.attacks.gradinversion.trace import trace
from torch import Tensor, nn

from . import cases

EXACT = 2.0**30
"""A rate at which stored parameters round nothing; a power of two, so that -delta/rate is what torch computed."""
SHAPE = (1, 12, 12)


def small_mlp(classes: int = 2, seed: int = 0, pixels: int = 144, width: int = 96) -> cases.Normalised:
    """pixels-96-48-C with ReLU."""
    torch.manual_seed(seed)
    layers = [
        nn.Flatten(),
        nn.Linear(pixels, width),
        nn.ReLU(),
        nn.Linear(width, 48),
        nn.ReLU(),
        nn.Linear(48, classes),
    ]
    return cases.Normalised(nn.Sequential(*layers)).eval()


def gradient(model: nn.Module, x: Tensor, y: Tensor, multilabel: bool = False) -> Tensor:
    """The flat gradient of the mean loss, float32."""
    twin = copy.deepcopy(model)
    loss = nn.functional.binary_cross_entropy_with_logits if multilabel else nn.functional.cross_entropy
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(twin(x), y), list(twin.parameters()))])


def observed(
    model: nn.Module, x: Tensor, y: Tensor, prior: Prior, *, noise: float = 0.0, seed: int = 0, **changes: Any
) -> Observation:
    """The gradient as torch gives it, with Gaussian noise of `noise` times its norm."""
    task = changes.pop("task", "multiclass")
    g = gradient(model, x, y, task == "multilabel")
    if noise:
        std = noise * float(g.norm()) / len(g) ** 0.5
        g = g + std * torch.randn(len(g), generator=torch.Generator().manual_seed(seed))
        if changes.pop("declared", False):
            changes["knowledge"] = {"gaussian": {"noise": "gaussian", "noise_std": std * EXACT}}
    plan = cases.recipe(lr=EXACT, task=task)
    return observe(cases.view_of(model, -EXACT * g, len(x), plan, **changes), model, prior, tuple(x.shape[1:]))


def null_case(kind: str, number: int, prior: Prior, data: tuple[Tensor, Tensor]) -> tuple[Observation, Tensor]:
    """Nothing that may be certified: the gradient of another model, Gaussian numbers, or noise that nobody declared.

    Batches of 2 to 8; returns the observation and the images.
    """
    batch = 2 + number % 7
    rows = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(number))[:batch]
    x, y = data[0][rows], data[1][rows]
    model = small_mlp(pixels=x[0].numel())
    if kind == "noise":
        return observed(model, x, y, prior, noise=1e-3, seed=number), x
    g = gradient(small_mlp(seed=1 + number, pixels=x[0].numel()), x, y)
    if kind == "gaussian":
        g = torch.randn(len(g), generator=torch.Generator().manual_seed(number)) * g.norm() / len(g) ** 0.5
    plan = cases.recipe(lr=EXACT)
    return observe(cases.view_of(model, -EXACT * g, batch, plan), model, prior, tuple(x.shape[1:])), x


def layer_of(observation: Observation) -> ReluLayer:
    return find_relu_layer(observation, trace(observation.simulation.model, observation.prior.mean[None].clone()))


def scores(proof: Proof, x: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR (k,) of each input that was found, and which of the images x it is."""
    images = proof.known.layer.to_pixels(proof.known.inputs, tuple(x.shape[1:])).clamp(0, 1).double()
    error = ((images.flatten(1)[:, None] - x.double().flatten(1)[None]) ** 2).mean(2)
    least, which = error.min(1)
    return -10 * least.clamp(min=1e-14).log10(), which


def check(proof: Proof, x: Tensor, y: Tensor | None = None) -> int:
    """No claim is false: proven images are different ones, at most 20 dB worse than estimated. Their number."""
    value, which = scores(proof, x)
    sure = proof.proven
    assert len(set(which[sure].tolist())) == int(sure.sum())
    assert bool((value[sure] >= proof.decibel[sure].clamp(max=140) - 20).all())
    if y is not None:
        assert torch.equal(proof.known.layer.labels(proof.known.which)[sure], y[which][sure])
    return int(sure.sum())
