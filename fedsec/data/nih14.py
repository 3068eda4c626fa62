"""How NIH ChestX-ray14, 112,120 chest X-rays with 14 findings, is read: its table and folders, or an npz file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedsec.data.adapter import Adapter
from fedsec.data.digest import fingerprint
from fedsec.data.files import ImageFiles, one_of
from fedsec.data.listing import Listing
from fedsec.data.medmnist_table import SETS, SetInfo
from fedsec.data.table import TableRows
from fedsec.errors import DataError

TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv.gz", "Data_Entry_2017.csv.gz")
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
REQUIRED = ("image index", "finding labels", "patient id", "patient age", "patient gender", "view position")
NO_FINDING = "No Finding"


@dataclass(frozen=True, kw_only=True)
class Nih14(Adapter):
    """NIH ChestX-ray14 (free use with attribution, not verified): 14 findings, patients; the folder, or an npz file."""

    view: Annotated[Literal["all", "PA", "AP"], Field(description="keep only this projection")] = "all"

    info: ClassVar[SetInfo] = SETS["nih14"]
    layout: ClassVar[str] = "Data_Entry_2017.csv beside images/ or images_001/ to images_012/"
    published: ClassVar[tuple[int, int] | None] = (1024, 1024)

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The table of images."""
        return one_of(folder, TABLES)

    def read(self, found: Path) -> Listing:
        """One row an image. The header's two unquoted commas give 11 names for 11 fields, and are harmless so."""
        listing = Listing(found.name, found.parent, id_name="Image Index", policy={"view": self.view})
        classes = {name: i for i, name in enumerate(self.info.class_names)}
        files, parts = ImageFiles(found.parent), _parts(found.parent, listing)
        table = TableRows(found, REQUIRED)
        at = [table.header.index(name) for name in REQUIRED]
        for row, values in table:
            image, findings, patient, age, sex, view = (values[i] for i in at)
            listing.rows_read += 1
            if self.view not in ("all", view.split(" ")[0].upper()):
                listing.left_out[f"{view or 'unknown'} (view={self.view})"] += 1
                continue
            label = [0.0] * len(classes)
            unknown = [text for text in findings.split("|") if text not in classes and text != NO_FINDING]
            if unknown:
                listing.reject(row, "D05", f"'{unknown[0]}' is not a finding of nih14 ({', '.join(classes)})")
                continue
            for text in findings.split("|"):
                if text in classes:
                    label[classes[text]] = 1.0
            path = files.named(image, f"{found}:{row}")
            part = parts.get(image, "")
            listing.add(
                row, image, path, label, part, patient=patient.lstrip("0") or "0", site="", sex=sex, age=age, view=view
            )
        listing.digests.append(fingerprint(table.digest, sorted(parts.items())))
        if files.substituted:
            listing.notes.append(f"{files.substituted:,} files have another ending than listed")
        return listing


def _parts(root: Path, listing: Listing) -> dict[str, str]:
    """Image -> part, from the official lists, where both are there."""
    found: dict[str, str] = {}
    paths = {part: root / name for part, name in LISTS.items()}
    there = [path.name for path in paths.values() if path.is_file()]
    if len(there) < len(paths):
        if there:
            listing.notes.append(f"{there[0]} is there but not its counterpart; parts were made by patient")
        return found
    for part, path in paths.items():
        for row, image in _names(path):
            if found.setdefault(image, part) != part:
                raise DataError("D11", f"{path}:{row}: {image} is also in {LISTS['train']}; remove one")
    return found


def _names(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for row, line in enumerate(file, start=1):
            if line.strip():
                yield row, line.strip()
