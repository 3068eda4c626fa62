"""The published tables, read by their adapters: the counts of their README and of the specification."""

from __future__ import annotations

import gzip
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedsec import data
from fedsec.data.columns import ages, sexes
from fedsec.data.covidx import Covidx
from fedsec.data.files import ImageFiles
from fedsec.data.ham10000 import Ham10000
from fedsec.data.isic import CENTRES, FedIsic2019, Isic2018, Isic2019
from fedsec.data.listing import Listing
from fedsec.data.nih14 import Nih14
from fedsec.data.table import read_table


@pytest.fixture
def without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables lie here without their images: every listed file counts as found."""
    for name in ("named", "at"):
        monkeypatch.setattr(ImageFiles, name, lambda self, listed, place: self.root / listed)
    monkeypatch.setattr(ImageFiles, "walk", lambda self, folder=None: iter(()))


def table(shared: Path, folder: Path, **names: str) -> Path:
    """Some of the shared tables under the names that their publishers gave them."""
    for published, ours in names.items():
        shutil.copy(shared / "metadata" / ours, folder / published.replace("__", "."))
    return folder


def counts(listing: Listing) -> list[int]:
    labels = Counter(listing.labels)
    return [labels[k] for k in range(max(labels) + 1)]


@pytest.mark.usefixtures("without_images")
def test_nih14(shared_data: Path, tmp_path: Path) -> None:
    table(shared_data, tmp_path, Data_Entry_2017_v2020__csv__gz="Data_Entry_2017_v2020.csv.gz")
    found = Nih14.find(tmp_path)
    assert found is not None
    listing = Nih14().read(found)
    assert listing.rows_read == len(listing) == 112_120 and not listing.bad
    assert len(set(listing.columns["patient"])) == 30_805
    assert Counter(listing.columns["sex"]) == {"M": 63_340, "F": 48_780}
    assert Counter(listing.columns["view"]) == {"PA": 67_310, "AP": 44_810}
    years = ages(np.array(listing.columns["age"]))
    assert (years.years.min(), years.years.max(), years.impossible) == (0, 95, 0)
    labels = np.array(listing.labels)
    by_name = dict(zip(Nih14.info.class_names, labels.sum(0).astype(int).tolist(), strict=True))
    assert by_name == {
        "Atelectasis": 11_559,
        "Cardiomegaly": 2_776,
        "Effusion": 13_317,
        "Infiltration": 19_894,
        "Mass": 5_782,
        "Nodule": 6_331,
        "Pneumonia": 1_431,
        "Pneumothorax": 5_302,
        "Consolidation": 4_667,
        "Edema": 2_303,
        "Emphysema": 2_516,
        "Fibrosis": 1_686,
        "Pleural_Thickening": 3_385,
        "Hernia": 227,
    }
    assert (labels.sum(1) == 0).sum() == 60_361 and (labels.sum(1) > 1).sum() == 20_796


def test_nih14_box_list_has_a_longer_header_than_rows(shared_data: Path) -> None:
    # Nine names, the last three empty; six fields a row. Two commas of the header stand inside a name.
    with gzip.open(shared_data / "metadata" / "BBox_List_2017.csv.gz", "rt") as file:
        assert file.readline().rstrip("\n").count(",") == 8


def test_nih14_raw_sample(shared_data: Path) -> None:
    d = data.load(shared_data / "raw_samples" / "NIH", size=32)
    assert len(d) == 9 and d.report.n_bad == 0 and d.image_shape == (1, 32, 32) and d.split_origin == "official"
    assert np.sum(d.split == "test") == 3 and d.report.patient_known


@pytest.mark.usefixtures("without_images")
def test_covidx_9a(shared_data: Path, tmp_path: Path) -> None:
    table(
        shared_data, tmp_path, train_COVIDx9A__txt__gz="train_COVIDx9A.txt.gz", test_COVIDx9A__txt="test_COVIDx9A.txt"
    )
    found = Covidx.find(tmp_path)
    assert found is not None
    listing = Covidx().read(found)
    assert listing.rows_read == 30_530 and not listing.bad
    split, labels = np.array(listing.split), np.array(listing.labels)
    patients, sites = np.array(listing.columns["patient"]), np.array(listing.columns["site"])
    assert listing.class_names == ("normal", "pneumonia", "COVID-19")
    assert [int((labels[split == "train"] == k).sum()) for k in range(3)] == [8_085, 5_555, 16_490]
    assert [int((labels[split == "test"] == k).sum()) for k in range(3)] == [100, 100, 200]
    train, test = set(patients[split == "train"].tolist()), set(patients[split == "test"].tolist())
    assert (len(train), len(test)) == (16_424, 378) and not train & test
    covid = Counter(sites[(split == "train") & (labels == 2)].tolist())
    assert covid == {
        "stonybrook": 14_132,
        "sirm": 943,
        "ricord": 896,
        "cohen": 270,
        "bimcv": 200,
        "actmed": 25,
        "fig1": 24,
    }
    assert any("199 rows name the source rnsa" in text for text in listing.notes)
    assert any("class and source are confounded" in text for text in listing.notes)


@pytest.mark.usefixtures("without_images")
def test_isic2019(shared_data: Path, tmp_path: Path) -> None:
    names = {f"ISIC_2019_Training_{w}__csv__gz": f"ISIC_2019_Training_{w}.csv.gz" for w in ("GroundTruth", "Metadata")}
    table(shared_data, tmp_path, **names)
    found = Isic2019.find(tmp_path)
    assert found is not None
    listing = Isic2019().read(found)
    assert listing.rows_read == len(listing) == 25_331 and not listing.bad
    assert counts(listing) == [4_522, 12_875, 3_323, 867, 2_624, 239, 253, 628]
    lesions = np.array(listing.columns["lesion"])
    assert (lesions == "").sum() == 2_084 and len(set(lesions.tolist()) - {""}) == 11_847
    assert Counter(listing.columns["site"]) == {"bcn": 12_413, "ham": 10_015, "msk": 819, "": 2_084}
    assert set(sexes(np.array(listing.columns["sex"]))) == {"F", "M", ""}  # the column is called gender here
    assert sum(image.endswith("_downsampled") for image in listing.columns["image"]) == 2_074
    refined = Isic2019(ham_metadata=str(shared_data / "metadata" / "HAM10000_metadata_dataverse.csv")).read(found)
    sites = Counter(refined.columns["site"])
    assert [sites[s] for s in ("vidir_molemax", "vidir_modern", "rosendahl", "vienna_dias")] == [3954, 3363, 2259, 439]
    assert sites["ham"] == 0


@pytest.mark.usefixtures("without_images")
def test_fed_isic2019(shared_data: Path, tmp_path: Path) -> None:
    table(
        shared_data,
        tmp_path,
        train_test_split__csv__gz="fed_isic2019_flamby_train_test_split.csv.gz",
        ISIC_2019_Training_Metadata__csv__gz="ISIC_2019_Training_Metadata.csv.gz",
    )
    found = FedIsic2019.find(tmp_path)
    assert found is not None
    listing = FedIsic2019().read(found)
    assert listing.rows_read == len(listing) == 23_247 and not listing.bad
    site, split = np.array(listing.columns["site"]), np.array(listing.split)
    lesion, labels = np.array(listing.columns["lesion"]), np.array(listing.labels)
    sizes = [
        (int(((site == c) & (split == "train")).sum()), int(((site == c) & (split == "test")).sum())) for c in CENTRES
    ]
    assert sizes == [(9_930, 2_483), (3_163, 791), (2_691, 672), (1_807, 452), (655, 164), (351, 88)]
    by_class = [[int(((site == c) & (labels == k)).sum()) for k in range(8)] for c in CENTRES]
    assert by_class == [
        [2857, 4206, 2809, 737, 1138, 124, 111, 431],
        [24, 3720, 2, 0, 124, 30, 54, 0],
        [680, 1832, 211, 21, 475, 51, 82, 11],
        [342, 803, 296, 109, 490, 30, 3, 186],
        [215, 415, 0, 0, 189, 0, 0, 0],
        [67, 350, 5, 0, 10, 4, 3, 0],
    ]
    train = set(lesion[split == "train"].tolist())
    leaked = np.isin(lesion[split == "test"], list(train))
    assert leaked.sum() == 3_066 and len(leaked) == 4_650 and "" not in train
    assert len(train & set(lesion[split == "test"].tolist())) == 2_302 and len(set(lesion.tolist())) == 11_847
    by_centre = [int(leaked[site[split == "test"] == c].sum()) for c in CENTRES]
    assert by_centre == [2_301, 1, 487, 223, 5, 49]


@pytest.mark.usefixtures("without_images")
def test_isic2018_test_truth(shared_data: Path, tmp_path: Path) -> None:
    table(shared_data, tmp_path, ISIC2018_Task3_Test_GroundTruth__csv="ISIC2018_Task3_Test_GroundTruth.csv")
    found = Isic2018.find(tmp_path)
    assert found is not None
    listing = Isic2018().read(found)
    assert listing.rows_read == len(listing) and not listing.bad and set(listing.split) == {"test"}
    raw = read_table(found, ("mel", "nv"), None)
    names = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    assert counts(listing) == [sum(v == "1.0" for v in raw.columns[name]) for name in names]


@pytest.mark.usefixtures("without_images")
def test_ham10000_tables(shared_data: Path, tmp_path: Path) -> None:
    table(shared_data, tmp_path, HAM10000_metadata="HAM10000_metadata_dataverse.csv")
    found = Ham10000.find(tmp_path)
    assert found is not None
    listing = Ham10000().read(found)
    assert len(listing) == 10_015 and len(set(listing.columns["lesion"])) == 7_470
    assert counts(listing) == [327, 514, 1_099, 115, 1_113, 6_705, 142]
    assert Counter(listing.columns["dx_type"]) == {"histo": 5_340, "follow_up": 3_704, "consensus": 902, "confocal": 69}
    sex = Counter(sexes(np.array(listing.columns["sex"])).tolist())
    assert sex == {"M": 5_406, "F": 4_552, "": 57}
    assert int(np.isnan(ages(np.array(listing.columns["age"])).years).sum()) == 57
    sites = Counter(listing.columns["site"])
    assert sites == {"vidir_molemax": 3_954, "vidir_modern": 3_363, "rosendahl": 2_259, "vienna_dias": 439}
    kaggle = tmp_path / "kaggle"
    kaggle.mkdir()
    table(shared_data, kaggle, HAM10000_metadata__csv="HAM10000_metadata_kaggle.head200.csv")
    found = Ham10000.find(kaggle)
    assert found is not None
    assert any("four natural sites are unknown" in note for note in Ham10000().read(found).notes)


def test_folder_of_the_subset_archive(shared_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(shared_data / "archives" / "ham10000_224_subset.zip") as archive:
        archive.extractall(tmp_path)
    d = data.load(tmp_path, size=32)
    assert d.name == "imagefolder" and len(d) == 280 and d.image_shape == (3, 32, 32)
    assert d.class_names == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    assert np.bincount(d.labels).tolist() == [40] * 7 and d.report.n_bad == 0


@pytest.mark.slow
def test_whole_ham10000_archive(shared_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(shared_data / "archives" / "ham10000_200x150.zip") as archive:
        archive.extractall(tmp_path)
    d = data.load(tmp_path)
    assert len(d) == 10_015 and d.report.n_bad == 0 and len(set(d.meta["lesion"].tolist())) == 7_470
    sites = dict(zip(*np.unique(d.meta["site"], return_counts=True), strict=True))
    assert sites == {"rosendahl": 2_259, "vidir_modern": 3_363, "vidir_molemax": 3_954, "vienna_dias": 439}


def test_odd_xrays_and_their_table(shared_data: Path, tmp_path: Path) -> None:
    samples = shared_data / "raw_samples" / "figure1_original"
    shutil.copytree(samples, tmp_path / "images")
    names = sorted(path.name for path in samples.iterdir())
    lines = "\n".join(f"images/{name},{('a', 'b')[i % 2]}" for i, name in enumerate(names))
    (tmp_path / "labels.csv").write_text(f"file,label\n{lines}\n")
    d = data.load(tmp_path / "labels.csv", size=32, channels="1")
    assert len(d) == 5 and d.report.n_bad == 0 and d.report.constant_images == 0
    x, _ = d.batch(np.arange(5))
    assert x.min() >= 0 and x.max() <= 1
    latin = shared_data / "metadata" / "figure1_metadata.csv"
    with pytest.raises(data_error(), match=r"byte 0x\w\w at \d+ is not UTF-8"):
        read_table(latin, ("patientid",))
    assert len(read_table(latin, ("patientid", "finding"), None, encoding="latin-1")) == 55
    assert len(read_table(shared_data / "metadata" / "actualmed_metadata.csv", ("imagename",), None)) == 238


def data_error() -> type[Exception]:
    from fedsec.errors import DataError

    return DataError
