"""What a client could notice: silent on honest models, trained or not, and on which crafts they fire."""

from __future__ import annotations

import copy

import pytest
import torch
from fedsec.attacks.gradinversion import fishing, imprint
from fedsec.attacks.gradinversion.client_detectors import Detection, duplicate_share, inspect, summarise
from torch import nn

from fedsec import models
from fedsec.findings import PublicData

from . import cases

SHAPE = (1, 16, 16)


def fired(model: nn.Module) -> set[str]:
    parameters = dict(model.named_parameters())
    return {name for name, look in inspect(parameters, "net.7.weight").items() if look.fires}


@pytest.mark.parametrize("name", ["lenet", "cnn"])
def test_honest_models_raise_no_alarm(name: str) -> None:
    model = models.build(name, num_classes=2, in_channels=1, image_size=28)
    head = {"lenet": "net.fc.weight", "cnn": "net.fc.weight"}[name]
    assert not any(look.fires for look in inspect(dict(model.named_parameters()), head).values())


def test_a_trained_model_raises_no_alarm(trained_lenet: cases.Normalised) -> None:
    assert fired(trained_lenet) == set()


def test_both_crafts_are_noticed(blobs: PublicData) -> None:
    honest = cases.lenet(shape=SHAPE)
    assert fired(honest) == set()
    generator = torch.Generator()
    block = imprint.craft(copy.deepcopy(honest), blobs, cases.recipe(), bins=64, kind="mean", generator=generator)
    assert fired(block) == {"duplicate_rows"}
    lever = fishing.find_lever(copy.deepcopy(honest), blobs, "multiclass")
    hooked = fishing.craft(copy.deepcopy(honest), lever, 1.0)
    assert fired(hooked) == {"bias_range", "zero_head_rows"}


def test_shares() -> None:
    assert duplicate_share(torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])) == 0.5
    looks = [
        {"a": Detection(1.0, 2.0)},
        {"a": Detection(3.0, 2.0)},
        {"a": Detection(2.0, 2.0), "b": Detection(0.0, 1.0)},
    ]
    assert summarise(looks) == {
        "a": {"value": 3.0, "limit": 2.0, "fires": 2 / 3},
        "b": {"value": 0.0, "limit": 1.0, "fires": 0.0},
    }
