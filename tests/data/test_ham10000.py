from __future__ import annotations

import csv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsec import data
from fedsec.data import pixels
from fedsec.data.decode import Look, decode
from fedsec.data.ham10000 import INFO, Ham10000
from fedsec.errors import ConfigError, DataError, FedsecError, RefusedError

HEADER = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "dataset"]
CLASSES = INFO.class_names


def rows(n: int) -> list[dict[str, str]]:
    return [
        {
            "lesion_id": f"HAM_{i // 2:07d}",
            "image_id": f"ISIC_{i:07d}",
            "dx": CLASSES[i // 2 % 7],
            "dx_type": "histo",
            "age": "" if i % 10 == 0 else "45.0",
            "sex": "male" if i % 2 else "unknown",
            "localization": "back",
            "dataset": ["rosendahl", "vidir_modern"][i // 2 % 2],
        }
        for i in range(n)
    ]


def tree(root: Path, table: list[dict[str, str]], header: list[str] = HEADER, skip: tuple[str, ...] = ()) -> Path:
    folders = [root / "HAM10000_images_part_1", root / "HAM10000_images_part_2"]
    for folder in folders:
        folder.mkdir(parents=True)
    for i, row in enumerate(table):
        if row["image_id"] not in skip:
            image = Image.new("RGB", (60, 45), (2 * i, 100, 50))
            image.save(folders[i % 2] / f"{row['image_id']}.jpg")
    with (root / "HAM10000_metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)
    return root


def test_round_trip_of_the_usual_folder(tmp_path: Path) -> None:
    root = tree(tmp_path / "skin", rows(84))
    assert Ham10000.recognises(root)
    d = data.load(root)
    assert (d.name, len(d), d.image_shape, d.class_names) == ("ham10000", 84, (3, 28, 28), CLASSES)
    assert d.meta["image"].tolist() == [f"ISIC_{i:07d}" for i in range(84)]  # the label file's order
    assert [CLASSES[c] for c in d.labels[:6]] == ["akiec", "akiec", "bcc", "bcc", "bkl", "bkl"]
    red = d.batch(np.arange(84))[0][:, 0].mean((1, 2)) * 255
    np.testing.assert_allclose(red, 2 * np.arange(84), atol=4)  # JPEG
    assert set(d.meta["site"]) == {"rosendahl", "vidir_modern"}
    assert d.report.unknown_age == 9 and not d.report.patient_known and not d.commercial
    assert d.meta["sex"][:2].tolist() == ["", "M"] and d.meta["row"][0] == 1
    assert d.meta["file"][0] == "HAM10000_images_part_1/ISIC_0000000.jpg"
    lesions = {p: set(d.meta["lesion"][d.rows(split=p)]) for p in ("train", "val", "test")}
    assert not lesions["train"] & lesions["test"] and d.split_origin == "derived"
    assert len(d.groups()) == 84 and len(set(d.groups())) == 42


def test_size_and_lookup_by_name(tmp_path: Path) -> None:
    tree(tmp_path / "ham10000", rows(28))
    assert data.load("ham10000", data_dir=tmp_path, size=16).image_shape == (3, 16, 16)
    assert data.load("ham10000", data_dir=tmp_path / "ham10000").variant == "size=28"
    with pytest.raises(ConfigError, match="size=4"):
        data.load("ham10000", data_dir=tmp_path, size=4)


def test_second_load_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, rows(20))
    first = data.load(root)
    monkeypatch.setattr(pixels, "decode", lambda *_: pytest.fail("decoded twice"))
    second = data.load(root)
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(first.images.read(np.arange(20)), second.images.read(np.arange(20)))


def test_kaggle_copy_has_no_sites_until_the_other_table_is_given(tmp_path: Path) -> None:
    table = rows(28)
    root = tree(tmp_path / "kaggle", table, HEADER[:-1])
    d = data.load(root)
    assert set(d.meta["site"]) == {""} and any("natural sites are unknown" in w for w in d.report.warnings)
    other = tree(tmp_path / "dataverse", table[:20]) / "HAM10000_metadata.csv"
    joined = data.load(root, metadata=str(other))
    assert joined.meta["site"][:20].tolist() == [row["dataset"] for row in table[:20]]
    assert "8 images are of unknown site" in joined.report.warnings
    assert joined.fingerprint != d.fingerprint


def test_unlisted_images_are_counted(tmp_path: Path) -> None:
    root = tree(tmp_path, rows(20))
    Image.new("RGB", (9, 9)).save(root / "HAM10000_images_part_1" / "extra.png")
    assert "1 images in the folder are not in HAM10000_metadata.csv" in data.load(root).report.warnings


def broken(**change: str) -> list[dict[str, str]]:
    table = rows(20)
    table[3] = table[3] | change
    return table


@pytest.mark.parametrize(
    ("table", "header", "skip", "code", "words"),
    [
        (broken(dx="melanomaa"), HEADER, (), "D05", r"HAM10000_metadata.csv:4: 'melanomaa' is not a class"),
        (rows(20), HEADER, ("ISIC_0000003", "ISIC_0000009"), "D07", r":4: ISIC_0000003.jpg not found; 2 of 20 listed"),
        (broken(image_id="ISIC_0000001"), HEADER, (), "D12", r":4: image_id 'ISIC_0000001' stands in rows 2 and 4"),
        (rows(20), ["image_id", "dx"], (), "D02", "column 'lesion_id' is missing"),
    ],
)
def test_broken_trees(tmp_path: Path, table: Any, header: Any, skip: Any, code: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        data.load(tree(tmp_path, table, header, skip))
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_undecodable_images(tmp_path: Path) -> None:
    root = tree(tmp_path, rows(140))
    damaged = root / "HAM10000_images_part_2" / "ISIC_0000003.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(DataError, match=r":4: .*ISIC_0000003.jpg \(200 bytes\) cannot be decoded") as caught:
        data.load(root)
    assert caught.value.code == "D08"
    d = data.load(root, on_bad="skip")
    assert len(d) == 139 and d.report.n_bad == 1 and d.report.left_out == {"bad (on_bad=skip)": 1}
    assert "ISIC_0000003" not in d.meta["image"] and d.report.bad[0].row == 4
    with pytest.raises(DataError, match=r"1 of 140 rows are bad, more than max_bad=0.001 \(D08 1\)") as caught:
        data.load(root, on_bad="skip", max_bad=0.001)
    assert caught.value.code == "D20"


def test_paths_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"D16"):
        data.load(tree(tmp_path / "a", broken(image_id="../../etc/passwd"), skip=("../../etc/passwd",)))
    root = tree(tmp_path / "b", rows(20))
    secret = tmp_path / "secret.jpg"
    Image.new("RGB", (9, 9)).save(secret)
    link = root / "HAM10000_images_part_1" / "ISIC_0000000.jpg"
    link.unlink()
    link.symlink_to(secret)
    with pytest.raises(RefusedError, match="leads out of") as caught:
        data.load(root)
    assert caught.value.exit_code == 4


def test_odd_image_modes_become_upright_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "1", "RGBA", "CMYK"):
        path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
        Image.new(mode, (40, 30)).save(path)
        assert decode(path.read_bytes(), Look(16, 3)).shape == (16, 16, 3)
    picture = Image.new("RGB", (40, 20))
    picture.paste((255, 255, 255), (0, 0, 20, 20))  # left half white
    exif = picture.getexif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter: left becomes top
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = decode((tmp_path / "turned.png").read_bytes(), Look(16, 3)).astype(int)
    assert upright[:4].mean() > 250 and upright[-4:].mean() < 5


def test_options_of_the_npz_form(tmp_path: Path, shared_data: Path) -> None:
    with pytest.raises(ConfigError, match="on_bad only applies to the folder"):
        data.load(shared_data / "ham10000_28.npz", on_bad="skip")


def test_a_folder_without_the_table(tmp_path: Path) -> None:
    with pytest.raises(FedsecError, match=r"no known layout, the folder is empty; docs/datasets.md"):
        data.load(tmp_path)


def test_part_of_the_real_archive(shared_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(shared_data / "archives" / "ham10000_200x150.zip") as archive:
        members = [m for m in archive.namelist() if m.endswith(".jpg")][:250]
        archive.extractall(tmp_path, [*members, "HAM10000/HAM10000_metadata.csv"])
    table = tmp_path / "HAM10000" / "HAM10000_metadata.csv"
    here = {Path(m).stem for m in members}
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *(line for line in lines[1:] if line.split(",")[1] in here)]))
    d = data.load(tmp_path)  # the archive's own top folder is found
    assert len(d) == 250 and d.report.n_bad == 0
    npz = data.load("ham10000", data_dir=shared_data)
    place = {image: i for i, image in enumerate(npz.meta["image"])}
    others = npz.select([place[image] for image in d.meta["image"]])
    assert (d.labels == others.labels).all() and (d.meta["site"] == others.meta["site"]).all()
    assert (d.meta["lesion"] == others.meta["lesion"]).all()
    # Other JPEG sizes, and a crop or not, but the same pictures.
    ours, theirs = d.batch(range(250))[0].flatten(1).numpy(), others.batch(range(250))[0].flatten(1).numpy()
    same = [np.corrcoef(a, b)[0, 1] for a, b in zip(ours, theirs, strict=True)]
    assert np.median(same) > 0.95
