"""Every adapter reads its miniature tree, and says in one line what is wrong with a broken one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsec import data, plugins
from fedsec.data.adapter import Adapter
from fedsec.data.registry import layouts
from fedsec.errors import ConfigError, DataError, RefusedError
from tests.data.trees import TREES, edit, picture

NAMES = sorted(TREES)
ROWS = {"rsna_pneumonia": 24 + 6}


def test_every_registered_adapter_has_a_tree() -> None:
    registered = {n for n in plugins.names("datasets") if isinstance(plugins.load("datasets", n), type)}
    assert registered - {"dicom"} == set(TREES)  # DICOM: test_dicom.py
    for name in registered:
        assert issubclass(plugins.load("datasets", name), Adapter)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    tree = TREES[name]
    root = tree.make(tmp_path / "set")
    assert layouts(root)[0] == name
    d = data.load(root, size=16)
    assert d.name == name and len(d) == tree.images and d.image_shape == (tree.channels, 16, 16)
    assert d.report.rows_read == ROWS.get(name, tree.images) and d.report.n_bad == 0
    assert len(set(d.meta["image"].tolist())) == len(d)
    x, y = d.batch(np.arange(len(d)))
    assert x.min() >= 0 and x.max() <= 1 and len(y) == len(d)
    # Every part has images, and no patient (else lesion) lies in two of them; Fed-ISIC's published folds do that.
    parts = {part: set(d.groups()[d.split == part].tolist()) for part in ("train", "val", "test")}
    assert parts["train"] and parts["test"]
    if name != "fed_isic2019":
        assert not parts["train"] & parts["test"] and not parts["train"] & parts["val"]
    # The pixels are those of the listed file, in the listed order.
    for i in (0, len(d) // 2, len(d) - 1):
        path = next(p for p in (root / d.meta["file"][i], *root.glob(f"*/{d.meta['file'][i]}")) if p.is_file())
        with Image.open(path) as image:
            mode = "L" if tree.channels == 1 else "RGB"
            expected = np.asarray(image.convert(mode).resize((16, 16), Image.Resampling.BICUBIC))
        assert np.array_equal(d.images.read(np.array([i]))[0].squeeze(), expected)
    again = data.load(root, size=16)
    assert again.fingerprint == d.fingerprint
    assert np.array_equal(again.images.read(np.arange(len(d))), d.images.read(np.arange(len(d))))
    assert data.load(root, size=20).fingerprint != d.fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_named_in_a_data_folder_and_below_a_top_folder(name: str, tmp_path: Path) -> None:
    TREES[name].make(tmp_path / name)
    assert data.load(name, data_dir=tmp_path, size=16).name == name
    if name not in ("csv", "isic2018"):  # a table's own folder is its root; ISIC 2018's tables lie one level down
        assert len(data.load(tmp_path, size=16)) == TREES[name].images


def failure(root: Path, name: str, **options: object) -> DataError:
    with pytest.raises(DataError) as caught:
        data.load(root, size=16, layout=name, **options)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize("name", [n for n in NAMES if TREES[n].column])
def test_missing_column(name: str, tmp_path: Path) -> None:
    tree = TREES[name]
    root = tree.make(tmp_path)
    path = root / tree.table
    header, _, rest = path.read_text().partition("\n")
    path.write_text(re.sub(rf"(?<![^,]){re.escape(tree.column)}(?![^,])", "other", header) + "\n" + rest)
    error = failure(path if name == "csv" else root, name) if name not in ("rsna_breast",) else None
    if error is None:  # without its column, the table is not recognised
        assert name not in layouts(root)
        error = failure(root, name)
        assert error.code == "D01" and "train.csv" in str(error)
        return
    assert error.code == "D02"
    assert path.name in str(error) and (tree.column.lower() in str(error) or "no column of label" in str(error))


@pytest.mark.parametrize("name", [n for n in NAMES if TREES[n].table and n not in ("imagefolder",)])
def test_missing_image(name: str, tmp_path: Path) -> None:
    tree = TREES[name]
    root = tree.make(tmp_path)
    (root / tree.picture).unlink()
    error = failure(root, name)
    assert error.code == "D07" and Path(tree.table).name + f":{tree.row}: " in str(error)
    assert re.search(r"not found; 1 of \d+ listed files are missing", str(error))
    d = data.load(root, size=16, layout=name, on_bad="skip", max_bad=0.5)
    assert len(d) == tree.images - 1 and d.report.n_bad == 1 and d.report.left_out["bad (on_bad=skip)"] == 1
    assert failure(root, name, on_bad="skip", max_bad=0.001).code == "D20"


def test_a_listed_file_of_covid19_ct_is_missing(tmp_path: Path) -> None:
    tree = TREES["covid19_ct"]
    root = tree.make(tmp_path)
    (root / tree.picture).unlink()
    error = failure(root, "covid19_ct")
    assert error.code == "D07" and "Data-split names 3.png" in str(error)


@pytest.mark.parametrize("name", NAMES)
def test_corrupt_image(name: str, tmp_path: Path) -> None:
    tree = TREES[name]
    root = tree.make(tmp_path)
    path = root / tree.picture
    path.write_bytes(path.read_bytes()[:100])
    error = failure(root, name)
    assert (
        error.code == "D08" and Path(tree.picture).name in str(error) and "(100 bytes) cannot be decoded" in str(error)
    )
    d = data.load(root, size=16, layout=name, on_bad="skip", max_bad=0.5)
    assert len(d) == tree.images - 1 and d.report.n_bad == 1
    assert Path(tree.picture).name in d.report.bad[0].detail and d.report.bad[0].row == tree.row
    assert len(d.batch(np.arange(len(d)))[0]) == len(d)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["RGBA", "I;16", "L", "RGB", "1", "P"])
def test_odd_modes(name: str, mode: str, tmp_path: Path) -> None:
    tree = TREES[name]
    root = tree.make(tmp_path)
    path = root / tree.picture
    image = (
        Image.fromarray(np.full((30, 50), 40_000, dtype=np.uint16)) if mode == "I;16" else Image.new(mode, (50, 30), 1)
    )
    image.save(path, format="PNG")  # whatever its ending says
    d = data.load(root, size=16, layout=name)
    assert len(d) == tree.images and d.report.constant_images == 1
    if mode == "I;16":
        row = next(i for i, file in enumerate(d.meta["file"]) if file.endswith(Path(tree.picture).name))
        row = int(np.flatnonzero([np.ptp(d.images.read(np.array([i]))) == 0 for i in range(len(d))])[0])
        value = float(d.batch([row])[0].mean())
        assert value == pytest.approx(40_000 / 65_535, abs=1 / 255)


@pytest.mark.parametrize("name", NAMES)
def test_too_small(name: str, tmp_path: Path) -> None:
    tree = TREES[name]
    root = tree.make(tmp_path)
    Image.new("RGB", (8, 30)).save(root / tree.picture, format="PNG")
    error = failure(root, name)
    assert error.code == "D09" and "8 x 30 pixels; 16 a side" in str(error)


@pytest.mark.parametrize("name", [n for n in NAMES if TREES[n].label])
def test_label_outside_range(name: str, tmp_path: Path) -> None:
    tree = TREES[name]
    root = tree.make(tmp_path)
    assert tree.label is not None
    row, old, new, code = tree.label
    edit(root / tree.table, row, old, new)
    options = {"labels": "all14"} if name == "chexpert" else {}
    error = failure(root, name, **options)
    shown = 4 if name == "covidx" else row  # a list has no header
    assert error.code == code and f"{Path(tree.table).name}:{shown}: " in str(error)
    d = data.load(root, size=16, layout=name, on_bad="skip", max_bad=0.5, **options)
    assert len(d) == tree.images - 1 and d.report.n_bad == 1


def test_unknown_class_of_an_own_table(tmp_path: Path) -> None:
    root = TREES["csv"].make(tmp_path)
    edit(root / "labels.csv", 4, "yes", "maybee")
    error = failure(root, "csv", classes="no+yes")
    assert error.code == "D05" and "labels.csv:4: 'maybee' is not a class (no, yes)" in str(error)
    assert len(data.load(root, size=16, classes="no+yes", on_bad="skip", max_bad=0.1)) == 23
    edit(root / "labels.csv", 4, "maybee", "unknown")
    d = data.load(root, size=16)
    assert len(d) == 23 and d.report.left_out == {"of unknown label": 1}


@pytest.mark.parametrize("name", [n for n in NAMES if TREES[n].leak and n != "chexpert"])
def test_patient_in_two_parts(name: str, tmp_path: Path) -> None:
    tree = TREES[name]
    root = tree.make(tmp_path)
    assert tree.leak is not None
    edit(root / tree.table, *tree.leak)
    error = failure(root, name)
    assert (
        error.code == "D11"
        and "splits=safe" in str(error)
        and re.search(r":\d+: patient \S+ is in train \(\d\)", str(error))
    )
    d = data.load(root, size=16, on_bad="skip")
    assert sum(n for reason, n in d.report.left_out.items() if "D11" in reason) >= 1
    assert d.report.official_leak == 0
    safe = data.load(root, size=16, splits="safe")
    assert len(safe) == tree.images and safe.report.official_leak == 0
    parts = [set(safe.groups()[safe.split == part].tolist()) for part in ("train", "val", "test")]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_patient_in_two_parts_of_chexpert_and_covidx(tmp_path: Path) -> None:
    root = TREES["chexpert"].make(tmp_path / "a")
    picture(root / "valid" / "patient00001" / "study1" / "view1_frontal.jpg", 5)
    edit(root / "valid.csv", 1, "patient90001", "patient00001")
    assert failure(root, "chexpert").code == "D11"
    root = TREES["covidx"].make(tmp_path / "b")
    edit(root / "test_COVIDx9A.txt", 0, "100 ", "1 ")
    error = failure(root, "covidx")
    assert error.code == "D11" and "test_COVIDx9A.txt:1: patient 1 is in train (2) and test (1)" in str(error)


@pytest.mark.parametrize("name", NAMES)
def test_empty_folder(name: str, tmp_path: Path) -> None:
    error = failure(tmp_path, name)
    assert error.code == "D01" and "the folder is empty" in str(error) and "expected" in str(error)
    with pytest.raises(DataError, match="no known layout, the folder is empty"):
        data.load(tmp_path)


@pytest.mark.parametrize("name", [n for n in NAMES if TREES[n].table and n not in ("imagefolder", "covidx")])
def test_a_table_without_rows(name: str, tmp_path: Path) -> None:
    root = TREES[name].make(tmp_path)
    for path in root.rglob("*.csv"):
        path.write_text(path.read_text().partition("\n")[0] + "\n")
    assert failure(root, name).code in ("D13", "D06")


@pytest.mark.parametrize("name", [n for n in NAMES if TREES[n].table and n not in ("imagefolder", "covidx")])
def test_a_row_of_another_length(name: str, tmp_path: Path) -> None:
    tree = TREES[name]
    root = tree.make(tmp_path)
    path = root / tree.table
    lines = path.read_text().splitlines()
    lines[4] += ",more"
    path.write_text("\n".join(lines) + "\n")
    error = failure(root, name)
    assert error.code == "D04" and f"{path.name}:4: " in str(error)


@pytest.mark.parametrize("name", ["csv", "chexpert", "covidx", "nih14", "diabetic_retinopathy"])
def test_paths_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    tree = TREES[name]
    root = tree.make(tmp_path / "set")
    picture(tmp_path / "secret.png", 1)
    texts = {"covidx": (3, "train3.png"), "diabetic_retinopathy": (4, "1_right"), "nih14": (4, "00000002_001.png")}
    row, old = texts.get(name, (4, "pictures/3.png" if name == "csv" else "CheXpert-v1.0-small/"))
    new = (
        "../secret_right" if name == "diabetic_retinopathy" else "../../secret.png" if name != "chexpert" else "../../"
    )
    edit(root / tree.table, row, old, new)
    with pytest.raises(RefusedError, match="D16"):
        data.load(root, size=16)


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    outside = picture(tmp_path / "secret.png", 1)
    root = TREES["csv"].make(tmp_path / "set")
    (root / "pictures" / "3.png").unlink()
    (root / "pictures" / "3.png").symlink_to(outside)
    with pytest.raises(RefusedError, match="leads out of"):
        data.load(root, size=16)


def test_options_are_checked(tmp_path: Path) -> None:
    root = TREES["chexpert"].make(tmp_path)
    with pytest.raises(ConfigError, match="unknown parameter 'polisy': did you mean 'policy'"):
        data.load(f"{root}:polisy=u_ones")
    with pytest.raises(ConfigError, match="on_bad=maybe is not allowed"):
        data.load(f"{root}:on_bad=maybe")
    with pytest.raises(ConfigError, match="unknown dataset 'chexprt'"):
        data.load(f"{root}:layout=chexprt")
