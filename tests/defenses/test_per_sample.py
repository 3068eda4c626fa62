"""Per-image gradients against batches of one image, for all kinds of layers, memory formats and modes."""

from __future__ import annotations

import copy

import pytest
import torch
from fedsec.defenses.per_sample import per_sample_gradients
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec import models
from fedsec.errors import ConfigError

RULES = GradSampleModule.GRAD_SAMPLERS


def one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The definition: the gradient of each image's own loss.

    Always in contiguous memory: PyTorch 2.15 itself is wrong for one channels_last image under grouped convolutions.
    """
    model, x = copy.deepcopy(model).to(memory_format=torch.contiguous_format), x.contiguous()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), parameters) for a, b in zip(x, y, strict=True)
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def all_at_once(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    with per_sample_gradients(model, RULES, len(x)):
        F.cross_entropy(model(x), y).backward()
        return [p.grad_sample for p in parameters]


def assert_equal(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for ours, reference in zip(all_at_once(model, x, y), one_by_one(model, x, y), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet18", "densenet121"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_our_models(name: str, memory: torch.memory_format) -> None:
    model = models.build(name, num_classes=3, in_channels=1, image_size=16).double().to(memory_format=memory)
    x = torch.rand(3, 1, 16, 16, dtype=torch.float64).to(memory_format=memory)
    assert_equal(model.train(name != "cnn"), x, torch.tensor([0, 2, 1]))


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 2, "padding": (2, 0)},
    {"groups": 4, "bias": False},
    {"padding": 1, "padding_mode": "reflect"},
    {"stride": (1, 3), "padding": 2, "padding_mode": "circular"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_convolutions(options: dict, memory: torch.memory_format) -> None:
    layer = nn.Conv2d(4, 8, (3, 2), **options)
    model = nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)).double()
    model = model.to(memory_format=memory)
    x = torch.rand(4, 4, 9, 8, dtype=torch.float64).to(memory_format=memory)
    assert_equal(model, x, torch.tensor([0, 1, 2, 0]))


class Scaled(nn.Module):
    """A kind of layer that no rule knows: a parameter of its own beside a child."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))
        self.child = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) * self.scale + self.scale.sum()


def test_shared_frozen_and_unknown_layers() -> None:
    model = nn.Sequential(nn.Flatten(), Scaled(), nn.Tanh(), tied := nn.Linear(4, 4), nn.Tanh(), tied).double()
    model.append(nn.Linear(4, 4).double().requires_grad_(False))
    model.append(nn.Linear(4, 3).double())
    assert_equal(model, torch.rand(5, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]))


def test_nothing_stays_behind() -> None:
    model = models.build("cnn", num_classes=2, in_channels=1, image_size=16)
    parameters, names = list(model.parameters()), [name for name, _ in model.named_parameters()]
    for _ in range(3):
        all_at_once(model, torch.rand(2, 1, 16, 16), torch.tensor([0, 1]))
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None and p.grad_sample is None for p in parameters)
    assert names == [name for name, _ in model.named_parameters()]
    F.cross_entropy(model(torch.rand(2, 1, 16, 16)), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad_sample is None for p in parameters)


def test_an_error_inside_leaves_the_model_usable() -> None:
    model = models.build("cnn", num_classes=2, in_channels=1, image_size=16)
    with pytest.raises(RuntimeError), per_sample_gradients(model, RULES, 2):
        model(torch.rand(2, 3, 16, 16))
    assert all(p.requires_grad for p in model.parameters())


class Patches(nn.Module):
    """Cuts every image into four rows: clipping rows would let one image contribute four times the bound."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(-1, 4)).view(len(x), -1, 3).mean(1)


def test_rows_that_are_not_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="'fc' works on 8 rows for 2 images"):
        all_at_once(Patches(), torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
