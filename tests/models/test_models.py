"""Architectures: parameter counts of the specification, torchvision's keys and outputs, initialisation, refusals."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from fedsec import models
from fedsec.errors import ConfigError
from fedsec.models.base import num_groups, replace_batch_norm

COUNTS = [
    # name, classes, channels, side, options, parameters (data-and-models specification, section 4.2)
    ("cnn", 2, 1, 28, {}, 57_218),
    ("cnn", 7, 3, 28, {}, 60_679),
    ("cnn", 14, 1, 64, {}, 64_142),
    ("lenet", 2, 1, 28, {}, 8_714),
    ("lenet", 7, 3, 28, {}, 12_259),
    ("lenet", 10, 3, 32, {}, 15_826),
    ("lenet", 2, 1, 64, {}, 13_682),
    ("resnet18", 2, 1, 64, {}, 11_171_266),
    ("resnet18", 7, 3, 64, {}, 11_180_103),
    ("resnet18", 1000, 3, 224, {}, 11_689_512),
    ("resnet18", 2, 1, 28, {}, 11_168_706),
    ("resnet18", 7, 3, 64, {"stem": "small"}, 11_172_423),
    ("resnet18", 2, 3, 32, {}, 11_169_858),
    ("resnet50", 2, 1, 64, {}, 23_505_858),
    ("resnet50", 7, 3, 64, {}, 23_522_375),
    ("resnet50", 1000, 3, 224, {}, 25_557_032),
    ("resnet50", 2, 1, 28, {}, 23_503_298),
    ("resnet50", 7, 3, 64, {"stem": "small"}, 23_514_695),
    ("cnn_spp", 2, 1, 28, {}, 437_570),
    ("cnn_spp", 7, 3, 28, {}, 438_791),
    ("cnn_spp", 4, 1, 64, {}, 437_828),
    ("densenet121", 2, 1, 64, {}, 6_949_634),
    ("densenet121", 7, 3, 64, {}, 6_961_031),
    ("densenet121", 5, 3, 64, {}, 6_958_981),
    ("densenet121", 5, 1, 64, {}, 6_952_709),
    ("densenet121", 14, 3, 64, {}, 6_968_206),
    ("densenet121", 14, 1, 64, {}, 6_961_934),
    ("densenet121", 1000, 3, 224, {}, 7_978_856),
    ("densenet121", 5, 3, 32, {}, 6_951_301),
    ("densenet121", 5, 1, 32, {}, 6_950_149),
]
SMALL = {"cnn": 28, "cnn_spp": 28, "lenet": 28, "resnet18": 28, "resnet50": 28, "densenet121": 32}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "classes", "channels", "side", "options", "expected"), COUNTS)
def test_parameter_counts(name, classes, channels, side, options, expected) -> None:
    model = models.build(name, num_classes=classes, in_channels=channels, image_size=side, **options)
    assert count(model) == expected


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_embed_then_head_equals_forward(name: str, channels: int) -> None:
    side = SMALL[name]
    model = models.build(name, num_classes=5, in_channels=channels, image_size=side).eval()
    x = torch.rand(2, channels, side, side)
    logits, features = model(x), model.embed(x)
    assert logits.shape == (2, 5)
    assert features.shape == (2, model.embed_dim)
    torch.testing.assert_close(model.head(features), logits, rtol=0, atol=0)
    assert model.input.channels == channels
    assert model.input.size <= side


def test_images_are_normalised_once_by_fixed_buffers() -> None:
    model = models.build("lenet", num_classes=2, in_channels=3, image_size=16)
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model(x), model.net((x - 0.5) / 0.25))
    assert set(model.normalisation_keys) <= set(model.state_dict())
    assert not set(model.normalisation_keys) & {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121"])
@pytest.mark.parametrize("training", [True, False])
def test_large_nets_are_torchvision_nets(name: str, training: bool) -> None:
    ours = models.build(name, num_classes=10, in_channels=3, image_size=64, norm="batch").net
    theirs = getattr(torchvision.models, name)(weights=None, num_classes=10)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_norm_is_a_choice_that_leaves_the_rest(name: str) -> None:
    kinds, counts = {}, {}
    for norm in ("group", "batch", "none"):
        model = models.build(name, num_classes=2, in_channels=1, image_size=SMALL[name], norm=norm)
        kinds[norm] = [type(m) for m in model.modules()]
        counts[norm] = count(model)
    assert nn.BatchNorm2d not in kinds["group"] + kinds["none"]
    assert nn.GroupNorm not in kinds["batch"] + kinds["none"]
    assert counts["group"] == counts["batch"]
    if name != "lenet":
        assert kinds["group"].count(nn.GroupNorm) == kinds["batch"].count(nn.BatchNorm2d) > 0
    with_batch_norm = models.build(name, num_classes=2, in_channels=1, image_size=SMALL[name], norm="batch")
    assert [type(m) for m in replace_batch_norm(with_batch_norm).modules()] == kinds["group"]


def test_how_many_normalisation_layers_there_are() -> None:
    for name, expected in (("densenet121", 121), ("resnet18", 20), ("resnet50", 53)):
        model = models.build(name, num_classes=5, in_channels=3, image_size=64, norm="batch")
        assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == expected


@pytest.mark.parametrize("shape", [(28, 28), (64, 48), (16, 16)])
def test_spatial_pyramid_takes_every_size(shape: tuple[int, int]) -> None:
    model = models.build("cnn_spp", num_classes=3, in_channels=1, image_size=28)
    x = torch.rand(2, 1, *shape)
    assert model(x).shape == (2, 3)
    assert model.net.pyramid(model.net.features(x)).shape == (2, 2_688)


def test_a_pyramid_of_one_level_is_global_max_pooling() -> None:
    net = models.build("cnn_spp", num_classes=3, in_channels=1, image_size=28, levels="1").net
    features = torch.randn(2, 128, 7, 7)
    torch.testing.assert_close(net.pyramid(features), features.amax((2, 3)), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 16, 24, 32, 40, 64, 116, 1024])
def test_groups_are_the_most_that_leave_two_channels_each(channels: int) -> None:
    groups = num_groups(channels)
    allowed = [g for g in range(1, 33) if channels % g == 0 and channels // g >= 2]
    assert groups == max(allowed, default=1)


def test_initialisation_is_a_function_of_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = models.build("cnn", num_classes=2, in_channels=1, image_size=28, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(weights(7), first)
    assert not torch.equal(weights(8), first)


def test_lenet_is_drawn_uniformly() -> None:
    model = models.build("lenet", num_classes=10, in_channels=3, image_size=32)
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert values.abs().max() <= 0.5
    # The standard deviation of U(-1/2, 1/2) is 1/sqrt(12); 15,826 draws.
    assert values.std().item() == pytest.approx(12**-0.5, rel=0.02)
    default = models.build("lenet", num_classes=10, in_channels=3, image_size=32, init="default")
    assert (model.net.init, default.net.init) == ("uniform", "default")
    assert default.net.features[0].weight.abs().max() < 0.2  # bound of the framework's default: 1/sqrt(75)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("resnet1", {}, "did you mean 'resnet18'"),
        ("cnn", {"image_size": 8}, "too small, it needs 16"),
        ("resnet18", {"stem": "imagenet"}, "use stem=small"),
        ("densenet121", {"stem": "imagenet"}, "use stem=small"),
        ("resnet18", {"stem": "tiny"}, "auto, small or imagenet"),
        ("resnet18", {"stm": "small"}, "did you mean 'stem'"),
        ("cnn", {"norm": "layer"}, "group, batch or none"),
        ("lenet", {"init": "zeros"}, "uniform or default"),
        ("cnn_spp", {"levels": "1-two"}, "such as 1-2-4"),
    ],
)
def test_refusals_name_the_way_out(name: str, arguments: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        models.build(name, **{"num_classes": 2, "in_channels": 1, "image_size": 28, **arguments})


def test_importing_the_registry_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, fedsec.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
