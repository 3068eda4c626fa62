"""Every network trains under differential privacy and can be attacked: exact single-image gradients, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fedsec.defenses.dp_model import make_private
from fedsec.defenses.per_sample import per_sample_gradients
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn import functional as F

import fedsec
from fedsec import models, plugins

slow = pytest.mark.slow
# name, side, options that make it small
NETWORKS: list[tuple[str, int, dict[str, Any]]] = [
    ("cnn", 16, {}),
    ("cnn_spp", 16, {}),
    ("lenet", 16, {}),
    ("resnet18", 16, {}),
    ("resnet50", 16, {}),
    ("densenet121", 16, {}),
    ("hemf_tiny", 64, {}),
    ("redcnn", 21, {"width": 6}),
    ("red_film", 21, {"width": 6}),
    ("learn", 16, {"width": 4, "blocks": 2, "views": 10}),
    ("learn_film", 16, {"width": 4, "blocks": 2, "views": 10}),
]
LARGE = {"resnet18", "resnet50", "densenet121", "hemf"}
TORCHVISION = [("shufflenet_v2_x0_5", 32), ("resnet34", 32), ("mobilenet_v3_small", 32), ("regnet_y_400mf", 32)]


def test_the_table_is_complete() -> None:
    assert {name for name, _, _ in NETWORKS} | {"hemf"} == set(plugins.names("models"))


def one_by_one(model: nn.Module, x: Tensor, y: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    rows = [
        torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), parameters) for a, b in zip(x, y, strict=True)
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [pytest.param(*row, marks=slow if row[0] in LARGE else ()) for row in NETWORKS],
    ids=[row[0] for row in NETWORKS],
)
def test_single_image_gradients_are_exact(name: str, side: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = models.build(name, num_classes=3, in_channels=1, image_size=side, norm="batch", **options)
    model = make_private(model).double()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and "re" in name:  # weights of 0.01 leave no gradient
            nn.init.normal_(module.weight, std=0.1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    x, y = torch.rand(3, 1, side, side, dtype=torch.float64), torch.tensor([0, 2, 1])
    expected = one_by_one(model, x, y, parameters)
    with per_sample_gradients(model, GradSampleModule.GRAD_SAMPLERS, len(x)):
        F.cross_entropy(model(x), y).backward()
        for parameter, reference in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad_sample, reference, rtol=1e-8, atol=1e-11)
    assert sum(bool(reference.any()) for reference in expected) >= 0.9 * len(parameters)


def trained_and_attacked(
    name: str, side: int, options: dict[str, Any], out: Path, method: str = "inverting_gradients"
) -> None:
    done = fedsec.run(
        {
            "data": {"name": f"synthetic-cxr:images=260,size={side}", "max_train": 8, "min_images": 1},
            "model": {"name": name, "options": options, "norm": "group"},
            "federation": {"engine": "serial", "batch_size": 4},
        },
        attack=f"gradinversion:images=1,rounds=last,budget_s=1,method={method}",
        defense="dp:epsilon=8",
        clients=2,
        rounds=1,
        local_epochs=1,
        out=out,
    )
    plain, private = done["cells"]
    assert plain["leakage"]["psnr"]["n"] == private["leakage"]["psnr"]["n"] == 1
    assert 0 < private["privacy"]["epsilon"] <= 8
    assert plain["utility"]["auc"]["n"] == private["utility"]["auc"]["n"] > 0


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [pytest.param(*row, marks=() if row[0] == "red_film" else slow) for row in NETWORKS],
    ids=[row[0] for row in NETWORKS],
)
def test_it_trains_under_dp_and_is_attacked(name: str, side: int, options: dict[str, Any], tmp_path: Path) -> None:
    trained_and_attacked(name, side, options, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), TORCHVISION)
def test_torchvision_by_name_trains_under_dp_and_is_attacked(name: str, side: int, tmp_path: Path) -> None:
    trained_and_attacked(name, side, {}, tmp_path)
