"""How a hospital brings its own images: any table with a column of files and one or more columns of labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from fedsec import plugins
from fedsec.data.adapter import Adapter
from fedsec.data.classfolders import PARTS
from fedsec.data.columns import UNKNOWN
from fedsec.data.files import DICOM, PICTURES, ImageFiles
from fedsec.data.listing import Listing, natural
from fedsec.data.table import Table, read_table
from fedsec.errors import ConfigError, DataError

GUESSES = {
    "image": ("file", "image", "path", "filename", "file_name", "image_path", "image_id", "img", "image index"),
    "label": ("label", "labels", "class", "target", "diagnosis", "dx", "finding", "level", "category"),
    "patient": ("patient", "patient_id", "patientid", "patient id", "subject", "subject_id", "case"),
    "site": ("site", "hospital", "center", "centre", "clinic", "scanner", "source", "institution", "dataset"),
    "split": ("split", "part", "fold", "subset", "set"),
}
EXTRA = {
    "lesion": ("lesion", "lesion_id"),
    "view": ("view", "view position", "view_position"),
    "sex": ("sex", "gender"),
    "age": ("age", "age_approx", "patient_age"),
}
TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
VALUES = {"0": 0.0, "0.0": 0.0, "false": 0.0, "no": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0, "yes": 1.0}
MAX_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class OwnCsv(Adapter):
    """Your own table (CSV): a column of image files, one or more of labels; patients and sites if you have them."""

    image_column: Annotated[str | None, Field(description="of file names; None: the first of file, image, path, …")] = (
        None
    )
    label_column: Annotated[
        str | None, Field(description="of class names; several joined by + are yes/no labels side by side")
    ] = None
    group_column: Annotated[str | None, Field(description="of patients, who are never split")] = None
    site_column: Annotated[str | None, Field(description="of hospitals or scanners")] = None
    split_column: Annotated[str | None, Field(description="of train, val and test")] = None
    classes: Annotated[str | None, Field(description="class names joined by +, in the order of their numbers")] = None
    root: Annotated[str | None, Field(description="folder of the images; None: the table's own")] = None
    encoding: Annotated[str, Field(description="of the table")] = "utf-8"

    layout: ClassVar[str] = "a table (CSV) with a column of image files and a column of labels"

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The table itself, or the only one in the folder that has a column of files and one of labels."""
        if folder.is_file():
            return folder
        if not folder.is_dir():
            return None
        tables = [entry for entry in sorted(folder.iterdir()) if entry.name.lower().endswith(TABLES)]
        fitting = [path for path in tables if cls._fits(path)]
        named = [path for path in fitting if path.name.lower().startswith(("labels.", "metadata.", "index."))]
        chosen = named or fitting
        return chosen[0] if len(chosen) == 1 or named else None

    @staticmethod
    def _fits(path: Path) -> bool:
        try:
            header = read_header(path)
        except (DataError, OSError):
            return False
        return all(set(GUESSES[kind]) & set(header) for kind in ("image", "label"))

    def read(self, found: Path) -> Listing:
        """One row an image."""
        root = Path(self.root).expanduser() if self.root else found.parent
        if not root.is_dir():
            raise DataError("D01", f"{root}: no such folder; root= is the folder of the images")
        header = read_header(found, self.encoding)
        chosen = self._columns(header, found)
        wanted = tuple({name for names in chosen.values() for name in names})
        table = read_table(found, wanted, (), self.encoding, None)
        listing = Listing(found.name, root, rows_read=len(table), digests=[table.digest])
        listing.policy = {kind: "+".join(names) for kind, names in chosen.items()}
        labels = self._labels(listing, table, chosen["label"])
        columns = {kind: table.columns[names[0]] for kind, names in chosen.items() if kind not in ("label", "image")}
        parts = columns.pop("split", [""] * len(table))
        files = ImageFiles(root, PICTURES | DICOM)
        for i, (name, label, part) in enumerate(zip(table.columns[chosen["image"][0]], labels, parts, strict=True)):
            if label is None:
                continue
            part = part.lower()
            if part not in PARTS and part not in UNKNOWN:
                listing.reject(i + 1, "D11", f"part '{part}' is unknown; use train, val or test")
                continue
            place = f"{found}:{i + 1}"
            path = files.at(name, place) or files.named(name, place) if name else None
            meta = {kind: column[i] for kind, column in columns.items()}
            listing.add(i + 1, name or f"row {i + 1}", path, label, PARTS.get(part, ""), **meta)
        if "patient" not in columns:
            listing.notes.append("no column of patients: images of one patient count as independent; see group_column")
        if files.substituted:
            listing.notes.append(f"{files.substituted:,} files have another ending than listed")
        return listing

    def _columns(self, header: Sequence[str], path: Path) -> dict[str, tuple[str, ...]]:
        """Image, label, patient, site and so on -> lower-case columns."""
        asked = {
            "image": self.image_column,
            "label": self.label_column,
            "patient": self.group_column,
            "site": self.site_column,
            "split": self.split_column,
        }
        found: dict[str, tuple[str, ...]] = {}
        for kind, guesses in {**GUESSES, **EXTRA}.items():
            if text := asked.get(kind):
                names = tuple(part.strip().lower() for part in text.split("+"))
                for name in names:
                    if name not in header:
                        hint = plugins.nearest(name, header)
                        raise DataError("D02", f"{path}: column '{name}' is missing: {hint}")
                found[kind] = names
            elif guess := next((name for name in guesses if name in header), None):
                found[kind] = (guess,)
            elif kind in ("image", "label"):
                columns = ", ".join(header[:30]) or "none"
                option = f"{kind}_column=NAME"
                raise DataError("D02", f"{path}: no column of {kind}s; columns are: {columns}; give {option}")
        return found

    def _labels(self, listing: Listing, table: Table, names: tuple[str, ...]) -> list[int | list[float] | None]:
        """One class or one row of values an image; None: rejected or left out."""
        if len(names) > 1:
            listing.class_names, listing.task = names, "multilabel"
            return [
                self._values(listing, i, row, names)
                for i, row in enumerate(zip(*(table.columns[n] for n in names), strict=True))
            ]
        texts = table.columns[names[0]]
        known = self._classes(texts, table.path, names[0])
        listing.class_names, listing.task = known, "binary" if len(known) == 2 else "multiclass"
        return [self._class(listing, i, text, known) for i, text in enumerate(texts)]

    def _classes(self, texts: list[str], path: Path, column: str) -> tuple[str, ...]:
        if self.classes:
            return tuple(name.strip() for name in self.classes.split("+"))
        found = sorted({text for text in texts if text.lower() not in UNKNOWN}, key=natural)
        if len(found) < 2:
            raise DataError("D06", f"{path}: column '{column}' has {len(found)} classes; at least two are needed")
        if len(found) > MAX_CLASSES:
            problem = f"column '{column}' has {len(found):,} different values; is it a column of classes?"
            raise DataError("D06", f"{path}: {problem}")
        return tuple(found)

    @staticmethod
    def _class(listing: Listing, i: int, text: str, known: tuple[str, ...]) -> int | None:
        if text in known:
            return known.index(text)
        if text.lower() in UNKNOWN:
            listing.left_out["of unknown label"] += 1
        else:
            listing.reject(i + 1, "D05", f"'{text}' is not a class ({', '.join(known[:20])})")
        return None

    @staticmethod
    def _values(listing: Listing, i: int, row: Sequence[str], names: tuple[str, ...]) -> list[float] | None:
        values = []
        for text, name in zip(row, names, strict=True):
            value = math.nan if text.lower() in UNKNOWN else VALUES.get(text.lower())
            if value is None:
                listing.reject(i + 1, "D06", f"'{name}' is '{text}', expected 0, 1 or nothing")
                return None
            values.append(value)
        return values


def read_header(path: Path, encoding: str = "utf-8") -> list[str]:
    """The column names of a table.

    Raises:
        DataError: as `TableRows` raises it; ConfigError for an unknown encoding.
    """
    from fedsec.data.table import TableRows

    try:
        "".encode(encoding)
    except LookupError:
        raise ConfigError(f"encoding={encoding}: unknown; try utf-8 or latin-1") from None
    return TableRows(path, (), encoding, None).header
