from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedsec.data.images import ArrayImages, SelectedImages, resized, to_tensor
from fedsec.errors import ConfigError, DataError
from tests.data.conftest import make_dataset


def test_importing_data_does_not_import_torch() -> None:
    code = "import sys, fedsec.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_batch_is_float_nchw_in_unit_range() -> None:
    d = make_dataset([0, 1, 0])
    x, y = d.batch([2, 0])
    assert x.shape == (2, 1, 4, 4) and x.dtype == torch.float32
    assert torch.equal(x[0], torch.full((1, 4, 4), 2 / 255)) and torch.equal(y, torch.tensor([0, 0]))
    assert x.is_contiguous()


def test_mask_and_numbers_select_the_same_rows() -> None:
    d = make_dataset([0, 1, 0, 1])
    mask = np.array([False, True, False, True])
    assert torch.equal(d.batch(mask)[0], d.batch([1, 3])[0])
    with pytest.raises(ValueError, match="mask"):
        d.batch(mask[:2])


def test_select_is_a_view_of_images_labels_and_meta() -> None:
    d = make_dataset([0, 1, 2, 1], site=["a", "b", "a", "b"])
    part = d.select([3, 0])
    assert isinstance(part.images, SelectedImages)
    assert part.labels.tolist() == [1, 0] and part.meta["site"].tolist() == ["b", "a"]
    assert torch.equal(part.batch([0])[0], d.batch([3])[0])
    assert part.fingerprint not in (d.fingerprint, d.select([0, 3]).fingerprint)
    assert torch.equal(part.select([1]).batch([0])[0], d.batch([0])[0])


def test_where_combines_part_and_columns() -> None:
    d = make_dataset([0, 1, 0, 1], split=["train", "train", "test", "test"], site=["a", "b", "a", "b"])
    assert d.rows(split="test", site="b").tolist() == [3]
    assert len(d.where(site="a")) == 2
    x, y = d.tensors("train")
    assert len(x) == 2 and y.tolist() == [0, 1]
    with pytest.raises(ConfigError, match="no column 'view'; columns: image, site"):
        d.where(view="PA")
    with pytest.raises(ConfigError, match="no part 'trian'"):
        d.where(split="trian")


def test_groups_fall_back_to_lesion_then_image() -> None:
    d = make_dataset([0, 1, 0], lesion=["x", "", "x"])
    assert d.groups("patient").tolist() == ["x", "i00001", "x"]
    assert d.groups("image").tolist() == ["i00000", "i00001", "i00002"]


def test_channels_and_size_of_a_batch() -> None:
    rgb = np.zeros((1, 20, 30, 3), dtype=np.uint8)
    rgb[..., 0] = 255
    grey = to_tensor(rgb, channels=1)
    assert grey.shape == (1, 1, 20, 30) and torch.allclose(grey, torch.tensor(0.299), atol=1e-6)
    assert to_tensor(rgb, 16).shape == (1, 3, 16, 16)
    assert torch.equal(to_tensor(rgb[..., :1], channels=3)[0, 2], torch.ones(20, 30))
    with pytest.raises(ConfigError, match="size=8"):
        to_tensor(rgb, 8)
    with pytest.raises(ConfigError, match="channels=2"):
        to_tensor(rgb, channels=2)


def test_resizing_matches_pillow_within_one_level() -> None:
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (1, 64, 48, 1), dtype=np.uint8)
    ours = resized(image, 28)[0, ..., 0].astype(int)
    theirs = np.asarray(Image.fromarray(image[0, ..., 0]).resize((28, 28), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).max() <= 1


def test_bicubic_overshoot_is_clipped() -> None:
    edge = np.zeros((1, 32, 32, 1), dtype=np.uint8)
    edge[:, :, 16:] = 255
    x = to_tensor(edge, 64)
    assert x.min() >= 0 and x.max() <= 1


def test_three_grey_images_are_not_one_colour_image() -> None:
    assert make_dataset([0, 1, 0]).image_shape == (1, 4, 4)
    with pytest.raises(DataError, match="D09"):
        ArrayImages(np.zeros((3, 28, 28), dtype=np.uint8))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"labels": np.array([0, 1])}, "D10"),
        ({"labels": np.array([0, 1, 7])}, "D06"),
        ({"labels": np.array([0, 1, -1])}, "D06"),
        ({"labels": np.array([0.0, 1.0, 0.0])}, "D06"),
        ({"split": np.array(["train", "train", "holdout"])}, "D11"),
        ({"meta": {}}, "D02"),
    ],
)
def test_an_inconsistent_data_set_cannot_be_built(change: dict[str, object], code: str) -> None:
    with pytest.raises(DataError) as caught:
        dataclasses.replace(make_dataset([0, 1, 0]), **change)
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_unknown_multilabel_entries_stay_nan() -> None:
    d = make_dataset([[1, np.nan], [0, 1]])
    assert torch.isnan(d.batch([0])[1][0, 1])
    assert d.label_mask.tolist() == [[True, False], [True, True]]
    assert d.counts()["train"] == {"images": 2, "groups": 2, "classes": {"c0": 1, "c1": 1}}


def test_describe_names_parts_sites_and_licence() -> None:
    text = make_dataset([0, 1, 1], split=["train", "val", "test"], site=["a", "a", "b"]).describe()
    for word in ("toy: 3 rows read, 3 used", "licence unknown", "train", "site", "not for commercial use"):
        assert word in text


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_dataset([0, 1]).name = "other"
