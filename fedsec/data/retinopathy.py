"""How Kaggle's diabetic retinopathy set (2015), 35,126 fundus photographs in five grades, is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from fedsec.data.adapter import Adapter
from fedsec.data.decode import Look
from fedsec.data.files import ImageFiles, one_of
from fedsec.data.listing import Listing
from fedsec.data.medmnist_table import SetInfo
from fedsec.data.table import TableRows

TABLES = ("trainLabels.csv", "trainLabels.csv.gz")


@dataclass(frozen=True, kw_only=True)
class DiabeticRetinopathy(Adapter):
    """Kaggle diabetic retinopathy (competition rules): fundus photographs, grades 0 to 4, both eyes of a patient."""

    trim: Annotated[bool, Field(description="crop the black border before scaling")] = False

    info: ClassVar[SetInfo] = SetInfo(
        task="ordinal",
        channels=3,
        class_names=("0", "1", "2", "3", "4"),
        licence="rules of the Kaggle competition (EyePACS)",
        citation="EyePACS, Kaggle Diabetic Retinopathy Detection, 2015",
        homepage="https://www.kaggle.com/c/diabetic-retinopathy-detection",
    )
    layout: ClassVar[str] = "trainLabels.csv beside train/10_left.jpeg"

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The table of grades."""
        return one_of(folder, TABLES)

    def look(self, size: int, channels: int) -> Look:
        """As every set's, without the border on request."""
        return replace(super().look(size, channels), trim=self.trim)

    def read(self, found: Path) -> Listing:
        """One row an eye; the patient is what stands before `_left` or `_right`."""
        listing, files = Listing(found.name, found.parent, policy={"trim": self.trim}), ImageFiles(found.parent)
        table = TableRows(found, ("image", "level"))
        image_at, level_at = (table.header.index(name) for name in ("image", "level"))
        for row, values in table:
            image, level = values[image_at], values[level_at]
            listing.rows_read += 1
            patient, _, side = image.rpartition("_")
            if level not in self.info.class_names:
                listing.reject(row, "D06", f"level is '{level}', expected 0 to 4")
            elif not patient or side not in ("left", "right"):
                listing.reject(row, "D05", f"image '{image}' does not end in _left or _right")
            else:
                path = files.named(image, f"{found}:{row}")
                listing.add(row, image, path, int(level), listed=f"{image}.jpeg", patient=patient, view=side)
        listing.digests.append(table.digest)
        return listing
