"""Preparation for per-sample gradients: twelve torchvision nets, unchanged names, outputs, modes and copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from fedsec.defenses.dp_model import make_private
from fedsec.defenses.per_sample import per_sample_gradients
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec import models
from fedsec.errors import ConfigError
from fedsec.models.base import replace_batch_norm

QUICK = ["resnet18", "densenet121", "mobilenet_v2", "efficientnet_b0", "squeezenet1_1"]
SLOW = ["vgg11_bn", "resnet50", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "googlenet", "regnet_y_400mf"]
NETS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
STOCHASTIC = {
    "mobilenet_v2",
    "efficientnet_b0",
    "squeezenet1_1",
    "vgg11_bn",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "googlenet",
}


def network(name: str) -> nn.Module:
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=4, **options)
    return model


@pytest.mark.parametrize("name", NETS)
def test_torchvision_nets_take_a_private_step_and_stay_what_they_were(name: str) -> None:
    """P5, P6."""
    torch.manual_seed(0)
    original = replace_batch_norm(network(name))
    prepared = make_private(copy.deepcopy(original))
    x = torch.randn(2, 3, 64, 64)
    assert list(prepared.state_dict()) == list(original.state_dict())
    assert list(dict(prepared.named_parameters())) == list(dict(original.named_parameters()))
    with torch.no_grad():
        assert torch.equal(prepared.eval()(x), original.eval()(x))
        assert torch.equal(prepared(x), prepared(x))
        prepared.train()
        assert torch.equal(prepared(x), prepared(x)) == (name not in STOCHASTIC)
    for module in prepared.modules():
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm)
        if isinstance(module, nn.GroupNorm):
            assert module.num_channels // module.num_groups >= 2
    with per_sample_gradients(prepared, GradSampleModule.GRAD_SAMPLERS, 2):
        F.cross_entropy(prepared(x), torch.tensor([0, 3])).backward()
        assert all(p.grad_sample is not None and len(p.grad_sample) == 2 for p in prepared.parameters())


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_prepared_models_can_be_copied_and_sent_to_processes(name: str) -> None:
    prepared = make_private(network(name)).eval()
    x = torch.randn(1, 3, 64, 64)
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(twin(x), prepared(x))
        assert isinstance(twin, type(network(name)))
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert not torch.equal(next(twin.parameters()), next(prepared.parameters()))


@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet18", "densenet121"])
def test_our_models_need_no_rewriting(name: str) -> None:
    model = models.build(name, num_classes=2, in_channels=1, image_size=32)
    types = [type(m) for m in model.modules()]
    assert [type(m) for m in make_private(model).modules()] == types
    switched = make_private(models.build(name, num_classes=2, in_channels=1, image_size=32, norm="batch"))
    assert [type(m) for m in switched.modules()] == types
    assert switched.embed(torch.rand(1, 1, 32, 32)).shape == (1, model.embed_dim)


class InPlace(nn.Module):
    """Every spelling of an in-place operation, with later uses of what was overwritten, and functional dropout."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        alias = a
        a += 1
        a *= 2
        a -= 0.5
        a /= 3
        b = self.second(a)
        b.add_(alias).relu_()
        F.relu(b, inplace=True)
        torch.sigmoid_(b)
        F.leaky_relu_(b, 0.1)
        return F.dropout(F.hardtanh(b, -0.7, 0.7, True), self.drop, self.training) + alias


def test_every_spelling_of_in_place_is_rewritten_with_its_meaning() -> None:
    original = InPlace()
    prepared = make_private(copy.deepcopy(original))
    x = torch.randn(6, 4)
    torch.testing.assert_close(prepared(x), original(x), rtol=0, atol=0)
    assert type(prepared) is not InPlace
    assert isinstance(prepared, InPlace)
    leaves = prepared.first(x)
    versions = []
    handle = prepared.first.register_forward_hook(lambda m, i, o: versions.append(o))
    prepared(x)
    handle.remove()
    assert torch.equal(versions[0], leaves)
    assert versions[0]._version == 0


def test_functional_dropout_follows_the_mode_after_rewriting() -> None:
    prepared = make_private(InPlace(drop=0.5))
    x = torch.randn(50, 4)
    assert not torch.equal(prepared.train()(x), prepared(x))
    assert torch.equal(prepared.eval()(x), prepared(x))


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        return self.fc(x)


def test_code_that_cannot_be_traced_is_left_alone() -> None:
    model = DataDependent()
    assert type(make_private(model)) is DataDependent


def test_statistics_of_private_images_are_refused_or_switched_off() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("seen", torch.zeros(1))

    with pytest.raises(ConfigError, match=r"layer '1' \(Counting\) keeps buffers"):
        make_private(nn.Sequential(nn.ReLU(), Counting()))
    layer = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    model = make_private(nn.Sequential(layer))
    assert not list(model.buffers())
    model(torch.rand(2, 3, 4, 4))


def test_batch_norm_alone_keeps_its_affine_parameters() -> None:
    layer = nn.BatchNorm2d(6, eps=1e-3)
    nn.init.normal_(layer.weight)
    group = make_private(layer)
    assert isinstance(group, nn.GroupNorm)
    assert group.weight is layer.weight
    assert (group.num_groups, group.eps) == (3, 1e-3)
    # P5: even on a 1x1 map the output is not constant.
    assert group(torch.randn(4, 6, 1, 1)).std() > 0.1
