"""Networks of other libraries by name: built without weights, with our classes, channels, sizes and normalisation."""

from __future__ import annotations

import sys

import pytest
import torch
import torchvision
from torch import nn

from fedsec import models
from fedsec.errors import ConfigError
from fedsec.models.library import torchvision_names


def build(name: str, **arguments: object) -> nn.Module:
    return models.build(name, **{"num_classes": 4, "in_channels": 3, "image_size": 64, **arguments})


@pytest.mark.parametrize("name", ["resnet34", "torchvision:resnet34"])
def test_a_torchvision_network_by_name(name: str) -> None:
    model = build(name, norm="batch").eval()
    reference = torchvision.models.resnet34(weights=None, num_classes=4).eval()
    reference.load_state_dict(model.net.net.state_dict())
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(x), reference((x - 0.5) / 0.25))
    torch.testing.assert_close(model.head(model.embed(x)), model(x))
    assert model.embed(x).shape == (2, 512)


def test_norm_group_replaces_every_batch_norm_and_keeps_the_count() -> None:
    group, batch = build("resnet34"), build("resnet34", norm="batch")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in group.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in batch.modules()) == 36
    assert sum(p.numel() for p in group.parameters()) == sum(p.numel() for p in batch.parameters())


def test_ours_come_before_torchvision_s() -> None:
    assert type(build("resnet18").net).__module__ == "fedsec.models.resnet"
    assert type(build("torchvision:resnet18").net.net).__module__ == "torchvision.models.resnet"


def test_initial_weights_follow_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.detach().flatten()[:100] for p in build("shufflenet_v2_x0_5", seed=seed).parameters()])

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = weights(7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, weights(7)) and not torch.equal(first, weights(8))


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("mobilenet_v3_small", 32),
        ("vit_b_32", 64),
        pytest.param("googlenet", 64, marks=pytest.mark.slow),
        pytest.param("inception_v3", 96, marks=pytest.mark.slow),
        pytest.param("swin_t", 64, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", 64, marks=pytest.mark.slow),
        pytest.param("maxvit_t", 224, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", 64, marks=pytest.mark.slow),
    ],
)
def test_families_that_need_to_be_told_something(name: str, side: int) -> None:
    model = build(name, in_channels=1, image_size=side)
    assert model.train()(torch.rand(2, 1, side, side)).shape == (2, 4)


@pytest.mark.slow
def test_torchvision_networks_are_all_known() -> None:
    names = torchvision_names()
    assert {"alexnet", "densenet201", "swin_v2_t", "vgg19_bn"} <= set(names)
    assert all(callable(torchvision.models.get_model_builder(n)) for n in names)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("torchvision:resnet3", {}, "did you mean 'resnet34'"),
        ("resnet34", {"norm": "none"}, "group or batch"),
        ("alexnet", {"image_size": 16}, "cannot take 3x16x16"),
        ("resnet34", {"depth": 3}, "with these options"),
        ("squeezenet1_1", {}, "no fully connected layer"),
        ("resnet34", {"mean": [0.1, 0.2]}, "2 values for 3 channels"),
    ],
)
def test_refusals(name: str, arguments: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(name, **arguments)


@pytest.mark.parametrize("name", ["timm:resnet26", "torchxrayvision:densenet"])
def test_a_library_that_is_not_installed_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name.partition(":")[0], None)
    with pytest.raises(ConfigError, match=r"pip install 'fedsec\[(timm|xray)\]'"):
        build(name)


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchxrayvision:densenet"])
def test_extras_where_they_are_installed(name: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    model = build(name, in_channels=1)
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with pytest.raises(ConfigError, match=r"did you mean|write torchxrayvision"):
        build(name + "x")


def test_mean_and_std_are_the_user_s_to_choose() -> None:
    model = build("cnn", in_channels=3, mean=[0.485, 0.456, 0.406], std=0.2)
    x = torch.rand(1, 3, 64, 64)
    expected = (x - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / 0.2
    torch.testing.assert_close(model.normalise(x), expected)
