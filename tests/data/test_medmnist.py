from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsec import data
from fedsec.data.medmnist_table import MEDMNIST
from fedsec.errors import DataError, FedsecError, UnsafeFileError
from tests.data.conftest import npz_arrays

Write = Callable[..., Path]


def test_round_trip(write_npz: Write) -> None:
    arrays = npz_arrays(classes=3, colour=True)
    d = data.load(write_npz(defaults=arrays))
    assert (d.name, d.task, d.num_classes, d.image_shape) == ("mine", "multiclass", 3, (3, 28, 28))
    assert d.split.tolist() == ["train"] * 12 + ["val"] * 6 + ["test"] * 6
    for part in ("train", "val", "test"):
        x, y = d.tensors(part)
        expected = torch.from_numpy(arrays[f"{part}_images"]).permute(0, 3, 1, 2) / 255
        assert torch.equal(x, expected) and y.tolist() == arrays[f"{part}_labels"][:, 0].tolist()


def test_labels_lose_their_second_axis(write_npz: Write) -> None:
    d = data.load(write_npz())
    assert d.labels.shape == (24,) and d.task == "binary" and d.positive_class == 1


def test_three_images_of_28_rows_stay_grey(write_npz: Write) -> None:
    arrays = {"train_images": np.zeros((3, 28, 28), np.uint8), "train_labels": np.array([[0], [1], [0]])}
    assert data.load(write_npz(defaults=arrays)).image_shape == (1, 28, 28)


def test_a_file_with_only_a_test_part(write_npz: Write) -> None:
    arrays = {k: v for k, v in npz_arrays().items() if k.startswith("test")}
    assert set(data.load(write_npz(defaults=arrays)).split) == {"test"}


def test_optional_columns(write_npz: Write) -> None:
    d = data.load(
        write_npz(
            train_patient=np.arange(12) // 2,
            val_patient=np.arange(6) + 100,
            test_patient=np.full(6, 0),
            train_source=np.array(["a", "b"] * 6),
            train_age=np.array([57.0, np.nan, 130.0] * 4, dtype=np.float32),
            train_sex=np.array(["female", "unknown"] * 6),
            test_subtype=np.array([0, 1, 2] * 2),
            subtype_names=np.array(["none", "bacteria", "virus"]),
            train_file=np.array([f"{i}.png" for i in range(12)]),
            class_names=np.array(["well", "ill"]),
        )
    )
    assert d.class_names == ("well", "ill")
    assert d.meta["patient"][:4].tolist() == ["0", "0", "1", "1"] and d.report.patient_known
    assert d.report.official_leak == 6  # patient 0 is in train and test
    assert d.meta["site"][:2].tolist() == ["a", "b"] and d.meta["site"][12] == ""
    assert d.meta["sex"][:2].tolist() == ["F", ""]
    assert d.meta["subtype"][18:21].tolist() == ["none", "bacteria", "virus"]
    assert d.report.unknown_age == 8 + 12  # NaN and impossible in train; val and test have none
    assert any("impossible" in note and "4" in note for note in d.report.notes)
    assert d.rows(site="a").tolist() == [0, 2, 4, 6, 8, 10]


def test_multilabel_with_unknown_entries(write_npz: Write) -> None:
    labels = np.array([[1, 0, np.nan], [0, 0, 1]] * 6, dtype=np.float32)
    arrays = {"train_images": npz_arrays()["train_images"], "train_labels": labels}
    d = data.load(write_npz(defaults=arrays, label_names=np.array(["a", "b", "c"])))
    assert d.task == "multilabel" and d.labels.dtype == np.float32
    assert d.report.unknown_labels == {"c": 6}
    assert d.counts()["train"]["classes"] == {"a": 6, "b": 0, "c": 6}


def test_rows_of_unknown_label_are_left_out_and_counted(write_npz: Write) -> None:
    labels = np.array([[0], [1], [np.nan], [-1]] * 3)
    d = data.load(write_npz(train_labels=labels))
    assert d.report.left_out == {"of unknown label": 6} and d.report.rows_read == 24
    assert len(d) == d.report.rows_used == 18
    assert d.meta["row"][:3].tolist() == [1, 2, 5]


def test_size_resizes_and_says_so_when_enlarged(write_npz: Write) -> None:
    path = write_npz()
    assert data.load(path, size=16).image_shape == (1, 16, 16)
    large = data.load(path, size=32)
    assert large.image_shape == (1, 32, 32) and "enlarged from 28 x 28 to 32 x 32" in large.report.warnings[0]
    assert len({data.load(path).fingerprint, large.fingerprint, data.load(path, size=16).fingerprint}) == 3


def test_md5_of_another_file_is_a_warning_unless_strict(write_npz: Write) -> None:
    path = write_npz("pneumoniamnist.npz")
    d = data.load(path)
    assert d.licence == "CC BY 4.0" and any("D15" in w for w in d.report.warnings)
    with pytest.raises(DataError, match=MEDMNIST["pneumoniamnist"].md5[28]):
        data.load(path, strict=True)


def test_unused_arrays_are_named(write_npz: Write) -> None:
    d = data.load(write_npz(train_boxes=np.zeros((12, 4))))
    assert "arrays not used: train_boxes" in d.report.warnings


def test_duplicates_are_counted_by_part_and_label(write_npz: Write) -> None:
    arrays = npz_arrays()
    arrays["train_images"][1] = arrays["train_images"][0]  # labels 0 and 1
    arrays["test_images"][0] = arrays["train_images"][2]  # label 0 and 0
    d = data.load(write_npz(defaults=arrays))
    found = d.report.duplicates
    assert found.inside == {"train": 1} and found.across == {"train/test": 1} and found.conflicting == 2
    assert data.load(write_npz(defaults=arrays), splits="safe").report.duplicates.across == {}


def test_flat_images_are_counted(write_npz: Write) -> None:
    arrays = npz_arrays()
    arrays["val_images"][:2] = 9
    assert data.load(write_npz(defaults=arrays)).report.constant_images == 2


IMAGES = npz_arrays()["train_images"]


@pytest.mark.parametrize(
    ("arrays", "code", "words"),
    [
        ({"train_images": IMAGES.astype(float)}, "D09", r"expected uint8 \(0 to 255\), found \(12,28,28\) float64"),
        ({"train_images": np.full((12, 28, 28), np.nan)}, "D21", r"train_images\[0\] has NaN"),
        ({"train_images": np.zeros((12, 28), np.uint8)}, "D09", r"expected \(N, H, W\)"),
        ({"train_images": np.zeros((12, 28, 28, 28), np.uint8)}, "D09", "3-D volumes"),
        ({"train_images": np.zeros((12, 32, 32), np.uint8)}, "D09", "all parts need one size"),
        ({"train_images": np.array(5)}, "D09", r"expected \(N, H, W\)"),
        ({"train_images": IMAGES[:11]}, "D10", "train_images has 11 rows, train_labels has 12"),
        ({"train_patient": np.arange(7)}, "D10", "train_patient has 7"),
        ({"train_labels": None}, "D02", "train_images has no train_labels"),
        ({"test_images": None}, "D02", "test_labels has no test_images"),
        (
            {"train_labels": np.full((12, 1), 3), "class_names": np.array(["a", "b"])},
            "D06",
            r"train_labels\[0\] = 3, cl",
        ),
        ({"train_labels": np.array([[0]] * 11 + [[-2]])}, "D06", r"train_labels\[11\] = -2"),
        ({"train_labels": np.array([[0]] * 11 + [[0.5]])}, "D06", r"train_labels\[11\] = 0.5"),
        ({"train_labels": np.array([[0]] * 11 + [[np.inf]])}, "D06", r"train_labels\[11\] = inf"),
        ({"train_labels": np.array(["a"] * 12)}, "D09", "expected class numbers"),
        ({"train_labels": np.zeros((12, 3), int)}, "D09", "different numbers of labels"),
        ({"train_labels": np.zeros((12, 1, 1), int)}, "D09", r"expected \(N,\)"),
        ({"train_image_id": np.array(["a"] * 12)}, "D12", "'a' stands in rows 0 and 1"),
    ],
)
def test_broken_arrays_are_one_line_with_a_code(
    write_npz: Write, arrays: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        data.load(write_npz(**arrays))
    message = str(caught.value)
    assert caught.value.code == code and caught.value.exit_code == 2
    assert "\n" not in message and "mine.npz" in message


def test_multilabel_value_out_of_range(write_npz: Write) -> None:
    labels = np.zeros((12, 2))
    labels[3, 1] = -1
    arrays = {"train_images": IMAGES, "train_labels": labels}
    with pytest.raises(DataError, match=r"train_labels\[3, 1\] = -1, expected 0 to 1"):
        data.load(write_npz(defaults=arrays))


def test_all_labels_unknown(write_npz: Write) -> None:
    arrays = {"train_images": IMAGES, "train_labels": np.full((12, 1), -1)}
    with pytest.raises(DataError, match="no image is left: 12 rows, 12 of them of unknown label") as caught:
        data.load(write_npz(defaults=arrays))
    assert caught.value.code == "D13"


def test_class_order_that_contradicts_the_set(write_npz: Write) -> None:
    path = write_npz("kermany_28.npz", class_names=np.array(["pneumonia", "normal"]))
    with pytest.raises(DataError, match="this set's order is normal, pneumonia") as caught:
        data.load(path)
    assert caught.value.code == "D05"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/nonexistent").joinpath, ("fired",))


@pytest.mark.parametrize("key", ["train_images", "train_labels", "notes"])
def test_object_arrays_are_refused_wherever_they_are(write_npz: Write, key: str) -> None:
    with pytest.raises(UnsafeFileError, match=f"'{key}' holds Python objects.*D14") as caught:
        data.load(write_npz(**{key: np.array([Bomb()] * 12, dtype=object)}))
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)


def test_a_pickle_under_the_name_of_an_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    path.write_bytes(pickle.dumps({"train_images": [1]}))
    with pytest.raises(UnsafeFileError, match="is a pickle"):
        data.load(path)


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "flipped", "npy", "header"])
def test_damaged_files(write_npz: Write, kind: str) -> None:
    path = write_npz()
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[len(content) // 3] ^= 0xFF
    if kind == "header":
        content = content.replace(b"(12, 28, 28)", b"(12, 28, ??)", 1)
    path.write_bytes({"empty": b"", "text": b"hello", "truncated": content[: len(content) // 2]}.get(kind, content))
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    with pytest.raises(DataError) as caught:
        data.load(path)
    assert caught.value.code in ("D08", "D09") and "\n" not in str(caught.value) and "mine.npz" in str(caught.value)


def test_volumes_are_refused(write_npz: Write) -> None:
    with pytest.raises(DataError, match="three-dimensional"):
        data.load(write_npz("organmnist3d.npz"))
    with pytest.raises(DataError, match="three-dimensional"):
        data.load("nodulemnist3d")


def test_every_error_is_a_fedsec_error() -> None:
    assert issubclass(DataError, FedsecError) and issubclass(UnsafeFileError, FedsecError)


def test_fingerprint_follows_content(write_npz: Write) -> None:
    first = data.load(write_npz("a.npz")).fingerprint
    arrays = npz_arrays()
    arrays["train_images"][0, 0, 0] ^= 1
    assert data.load(write_npz("a.npz")).fingerprint == first
    assert data.load(write_npz("a.npz", defaults=arrays)).fingerprint != first
    assert data.load(write_npz("a.npz", train_patient=np.arange(12))).fingerprint != first
