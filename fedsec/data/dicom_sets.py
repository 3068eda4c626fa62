"""How sets of DICOM files are read: RSNA's breast and pneumonia challenges, and any tree of class folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from fedsec.data.adapter import Adapter
from fedsec.data.classfolders import ImageFolder
from fedsec.data.decode import ImageFault, Look
from fedsec.data.dicom import Header, library, parse_window, read_header
from fedsec.data.files import DICOM, PICTURES, ImageFiles, one_of
from fedsec.data.listing import Listing
from fedsec.data.medmnist_table import SetInfo
from fedsec.data.table import TableRows
from fedsec.errors import DataError

BREAST = ("patient_id", "image_id", "cancer")
PNEUMONIA = "stage_2_train_labels.csv"


@dataclass(frozen=True, kw_only=True)
class _Dicom(Adapter):
    """What sets of DICOM files share: the window."""

    window: Annotated[str, Field(description="file, minmax, percentile, or CENTRE/WIDTH")] = "file"

    def look(self, size: int, channels: int) -> Look:
        """With the window, which is checked here."""
        parse_window(self.window)
        return replace(super().look(size, channels), window=self.window)


@dataclass(frozen=True, kw_only=True)
class RsnaBreast(_Dicom):
    """RSNA screening mammography 2022 (non-commercial research): cancer or not, patients, two hospitals."""

    info: ClassVar[SetInfo] = SetInfo(
        task="binary",
        channels=1,
        class_names=("no cancer", "cancer"),
        positive_class=1,
        licence="non-commercial research use (publisher's page)",
        citation="RSNA Screening Mammography Breast Cancer Detection, 2022",
        homepage="https://www.kaggle.com/competitions/rsna-breast-cancer-detection",
    )
    layout: ClassVar[str] = "train.csv beside train_images/PATIENT/IMAGE.dcm"

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The table with the outcome."""
        return _with_columns(one_of(folder, ("train.csv",)), BREAST)

    def read(self, found: Path) -> Listing:
        """One row an image; `site_id` is the hospital, `machine_id` the scanner."""
        listing, files = (
            Listing(found.name, found.parent, id_name="image_id"),
            ImageFiles(found.parent, PICTURES | DICOM),
        )
        table = TableRows(found, BREAST)
        at = {name: i for i, name in enumerate(table.header)}

        def value(values: list[str], name: str) -> str:
            return values[at[name]] if name in at else ""

        for row, values in table:
            listing.rows_read += 1
            patient, image, cancer = (values[at[name]] for name in BREAST)
            if cancer not in ("0", "1"):
                listing.reject(row, "D06", f"cancer is '{cancer}', expected 0 or 1")
                continue
            place = f"{found}:{row}"
            nested, flat = f"train_images/{patient}/{image}.dcm", f"train_images/{image}.dcm"
            path = files.at(nested, place) or files.at(flat, place)
            site = value(values, "site_id")
            more = {"view": value(values, "view"), "age": value(values, "age"), "scanner": value(values, "machine_id")}
            listing.add(
                row, image, path, int(cancer), listed=nested, patient=patient, site=site and f"site {site}", **more
            )
        listing.digests.append(table.digest)
        return _needing_pydicom(listing)


@dataclass(frozen=True, kw_only=True)
class RsnaPneumonia(_Dicom):
    """RSNA pneumonia 2018 (non-commercial research; columns not verified): opacity or not, one image a patient."""

    info: ClassVar[SetInfo] = SetInfo(
        task="binary",
        channels=1,
        class_names=("no pneumonia", "pneumonia"),
        positive_class=1,
        licence="non-commercial research use (publisher's page, not verified)",
        citation="Shih et al., Radiology: Artificial Intelligence 1(1), 2019",
        homepage="https://www.kaggle.com/c/rsna-pneumonia-detection-challenge",
    )
    layout: ClassVar[str] = f"{PNEUMONIA} beside stage_2_train_images/PATIENT.dcm"

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The table of boxes."""
        return one_of(folder, (PNEUMONIA,))

    def read(self, found: Path) -> Listing:
        """Several rows a patient, one a box; one image, positive where any row is."""
        listing, files = (
            Listing(found.name, found.parent, id_name="patientId"),
            ImageFiles(found.parent, PICTURES | DICOM),
        )
        table = TableRows(found, ("patientid", "target"))
        patient_at, target_at = (table.header.index(name) for name in ("patientid", "target"))
        seen: dict[str, tuple[int, int]] = {}
        for row, values in table:
            listing.rows_read += 1
            patient, target = values[patient_at], values[target_at]
            if target not in ("0", "1"):
                listing.reject(row, "D06", f"Target is '{target}', expected 0 or 1")
                continue
            first, label = seen.get(patient, (row, 0))
            if patient in seen:
                listing.left_out["further boxes of an image"] += 1
            seen[patient] = first, max(label, int(target))
        for patient, (row, label) in seen.items():
            listed = f"stage_2_train_images/{patient}.dcm"
            path = files.at(listed, f"{found}:{row}")
            listing.add(row, patient, path, label, listed=listed, patient=patient)
        listing.digests.append(table.digest)
        return _needing_pydicom(listing)


@dataclass(frozen=True, kw_only=True)
class DicomTree(ImageFolder, _Dicom):
    """Your own DICOM files in class folders; patients and sites from the headers, as numbers."""

    layout: ClassVar[str] = "folders of DICOM files, one a class, with or without train/, val/ and test/ above them"
    suffixes: ClassVar[frozenset[str]] = DICOM
    info: ClassVar[SetInfo] = SetInfo(channels=1)

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The folder of the classes; the folder itself where it holds DICOM files without classes."""
        found = super().find(folder)
        return found or (folder if next(ImageFiles(folder, DICOM).walk(), None) is not None else None)

    def read(self, found: Path) -> Listing:
        """As image folders, with what the headers say of patient, institution, sex, age and view."""
        library()
        if super().find(found) is None:
            raise DataError(
                "D02",
                f"{found}: DICOM files without labels; sort them into one folder a class, or put a labels.csv with the "
                "columns file and label beside them",
            )
        listing = super().read(found)
        _add_headers(listing)
        return listing


def _add_headers(listing: Listing) -> None:
    """Patient, site, sex, age and view of each file; ids become numbers in the order of the files."""
    patients, sites = _numbered("patient"), _numbered("site")
    burned, unknown = 0, Counter[str]()
    columns: dict[str, list[str]] = {name: [] for name in ("patient", "site", "sex", "age", "view")}
    for path in listing.paths:
        try:
            header = read_header(path)
        except ImageFault:
            header = Header("", "", "", "", "", "", False)  # decoding says what is wrong with it
        unknown["patient"] += not header.patient
        burned += header.burned_in
        row = patients(header.patient), sites(header.institution), header.sex, header.age, header.view
        for name, value in zip(columns, row, strict=True):
            columns[name].append(value)
    for name, values in columns.items():
        given = listing.columns.get(name, [""] * len(values))
        listing.columns[name] = [own or value for own, value in zip(given, values, strict=True)]
    if burned:
        listing.notes.append(f"{burned:,} files say that text is burned into their pixels, which may name the patient")
    if unknown["patient"]:
        listing.notes.append(f"{unknown['patient']:,} files have no patient id; each counts as a patient of its own")


def _numbered(word: str) -> Callable[[str], str]:
    """Replaces ids by numbers in order of appearance; the empty id stays empty."""
    known: dict[str, str] = {}

    def number(text: str) -> str:
        return known.setdefault(text, f"{word} {len(known) + 1}") if text else ""

    return number


def _with_columns(path: Path | None, columns: tuple[str, ...]) -> Path | None:
    if path is None:
        return None
    try:
        return path if set(columns) <= set(TableRows(path).header) else None
    except DataError:
        return None


def _needing_pydicom(listing: Listing) -> Listing:
    """Say at once that pydicom is missing, instead of 50,000 times that a file cannot be decoded."""
    if any(path.suffix.lower() in DICOM for path in listing.paths):
        library()
    return listing
