"""Checkpoints: round trips, foreign key names, and files that must not be executed."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fedsec import checkpoint, models
from fedsec.errors import ConfigError, RefusedError, UnsafeFileError


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_round_trip_with_record(tmp_path: Path) -> None:
    model = small()
    record = {"model": "small", "normalisation": {"mean": [0.5], "std": [0.25]}}
    checkpoint.save(tmp_path / "m.safetensors", model.state_dict(), record)
    tensors, loaded = checkpoint.load(tmp_path / "m.safetensors")
    assert loaded == record
    assert all(torch.equal(tensors[k], v) for k, v in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {f"module.{k}": v for k, v in s.items()}]
)
def test_torch_state_dicts_load(tmp_path: Path, wrap: object) -> None:
    source, target = small(), small()
    torch.save(wrap(source.state_dict()), tmp_path / "m.pt")  # type: ignore[operator]
    assert checkpoint.load_into(target, tmp_path / "m.pt") == ()
    assert torch.equal(target[0].weight, source[0].weight)


def test_another_classifier_is_left_as_initialised(tmp_path: Path) -> None:
    source, target = small(), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    torch.save(source.state_dict(), tmp_path / "m.pt")
    notes = checkpoint.load_into(target, tmp_path / "m.pt")
    assert "1.weight" in notes[0]
    assert torch.equal(target[0].weight, source[0].weight)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path: Path, suffix: str) -> None:
    path, target = tmp_path / f"m{suffix}", tmp_path / "executed"
    torch.save({"weights": Bomb(target)}, path)
    with pytest.raises(UnsafeFileError) as caught:
        checkpoint.load(path)
    assert caught.value.exit_code == 4
    path.write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(UnsafeFileError):
        checkpoint.load(path)
    assert not target.exists()
    assert "\n" not in str(caught.value)


def test_executable_formats_and_broken_files(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"PK")
    with pytest.raises(UnsafeFileError):
        checkpoint.load(tmp_path / "m.pt2")
    for name in ("broken.safetensors", "broken.pt"):
        (tmp_path / name).write_bytes(b"not a model")
        with pytest.raises((ConfigError, UnsafeFileError)):
            checkpoint.load(tmp_path / name)
    with pytest.raises(ConfigError, match="no such"):
        checkpoint.load(tmp_path / "absent.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="another architecture"):
        checkpoint.load_into(small(), tmp_path / "other.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="not a state dict"):
        checkpoint.load(tmp_path / "list.pt")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(small()), str(tmp_path / "m.pt"))
    with pytest.raises(UnsafeFileError):
        checkpoint.load(tmp_path / "m.pt")


def densenet(channels: int, classes: int, seed: int = 0) -> nn.Module:
    return models.build(
        "densenet121", num_classes=classes, in_channels=channels, image_size=32, norm="batch", seed=seed
    )


def test_published_densenet_weights_start_a_grey_model_of_other_classes(tmp_path: Path) -> None:
    """Names of 2017, a wrapper's prefixes, three channels and 14 classes, as CheXpert and ChestX-ray14 files have."""
    source, target = densenet(3, 14, seed=1), densenet(1, 5, seed=2)
    initial = target.net.classifier.weight.detach().clone()
    old = {
        re.sub(r"(denselayer[0-9]+\.(?:norm|conv))([12])\.", r"\1.\2.", f"module.model.{k}"): v
        for k, v in source.net.state_dict().items()
    }
    assert any(".norm.1." in k for k in old)
    torch.save(old, tmp_path / "old.pth")
    notes = " ".join(checkpoint.load_into(target, tmp_path / "old.pth"))
    for name, tensor in target.net.state_dict().items():
        if not name.startswith(("classifier", "features.conv0")):
            assert torch.equal(tensor, source.net.state_dict()[name]), name
    stem = source.net.features.conv0.weight.sum(1, keepdim=True)
    torch.testing.assert_close(target.net.features.conv0.weight, stem, rtol=0, atol=0)
    assert torch.equal(target.net.classifier.weight, initial)
    for words in ("summed over its 3 channels", "left as initialised: net.classifier.bias", "normalised with"):
        assert words in notes


def test_the_files_normalisation_is_the_model_s_unless_the_user_chose(tmp_path: Path) -> None:
    source = models.build("cnn", num_classes=2, in_channels=1, image_size=28, mean=0.4, std=0.3)
    record = {"normalisation": {"mean": [0.4], "std": [0.3]}}
    checkpoint.save(tmp_path / "m.safetensors", source.state_dict(), record)
    target = models.build("cnn", num_classes=2, in_channels=1, image_size=28)
    assert checkpoint.load_into(target, tmp_path / "m.safetensors") == ()
    assert (target.mean.item(), target.std.item()) == pytest.approx((0.4, 0.3))
    chosen = models.build("cnn", num_classes=2, in_channels=1, image_size=28, mean=0.1, std=0.9)
    checkpoint.load_into(chosen, tmp_path / "m.safetensors", keep=("mean", "std"))
    assert (chosen.mean.item(), chosen.std.item()) == pytest.approx((0.1, 0.9))


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    checkpoint.save(tmp_path / "m.safetensors", model.state_dict(), {})
    with pytest.raises(RefusedError, match=r"0\.weight.*NaN"):
        checkpoint.load_into(small(), tmp_path / "m.safetensors")
