"""How the skin lesion sets of the ISIC archive are read: ISIC 2018 task 3, ISIC 2019, Fed-ISIC2019's centres."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from fedsec.data.adapter import Adapter
from fedsec.data.decode import Look
from fedsec.data.files import ImageFiles, one_of
from fedsec.data.ham10000 import INFO as HAM
from fedsec.data.ham10000 import METADATA as HAM_TABLES
from fedsec.data.listing import Listing
from fedsec.data.medmnist_table import SetInfo
from fedsec.data.table import Table, TableRows, read_table

CLASSES_2018 = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
CLASSES_2019 = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
UNKNOWN = "unk"
"""A column of the truth, not a class."""
CENTRES = ("bcn", "vidir_molemax", "vidir_modern", "rosendahl", "msk", "vienna_dias")
"""Fed-ISIC2019's centres 0 to 5, named by joining its table with HAM10000's and the prefixes of lesion ids."""
PREFIXES = {"BCN": "bcn", "MSK4": "msk", "MSK": "msk", "HAM": "ham"}
SPLIT_TABLES = tuple(
    f"{stem}{ending}"
    for stem in ("train_test_split", "fed_isic2019_flamby_train_test_split", "fed_isic2019_train_test_split")
    for ending in (".csv", ".csv.gz", "")
)
INFO_2019 = SetInfo(
    task="multiclass",
    channels=3,
    class_names=CLASSES_2019,
    licence="CC BY-NC 4.0",
    redistributable=True,
    citation="Tschandl et al., 2018; Codella et al., arXiv 1710.05006; Combalia et al., BCN20000, arXiv 1908.02288",
    homepage="https://challenge.isic-archive.com/data/",
)
METADATA_2019 = ("image", "age_approx", "anatom_site_general", "lesion_id")


@dataclass(frozen=True, kw_only=True)
class _Isic(Adapter):
    """What the three sets share: one-hot truth tables beside folders of JPEGs."""

    color_constancy: Annotated[bool, Field(description="remove the light's colour: shades of gray, p = 6")] = False

    def look(self, size: int, channels: int) -> Look:
        """As every set's, with the colour of the light removed on request."""
        return replace(super().look(size, channels), color_constancy=self.color_constancy)


@dataclass(frozen=True, kw_only=True)
class Isic2018(_Isic):
    """ISIC 2018 task 3 (CC BY-NC 4.0): HAM10000 as training part, 193 and 1,512 images to validate and to test."""

    info: ClassVar[SetInfo] = replace(HAM, citation=f"{HAM.citation}; Codella et al., arXiv 1902.03368")
    layout: ClassVar[str] = "ISIC2018_Task3_Training_GroundTruth.csv beside ISIC2018_Task3_Training_Input/"
    parts: ClassVar[dict[str, str]] = {"train": "Training", "val": "Validation", "test": "Test"}

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The first truth table."""
        return one_of(folder, tuple(f"ISIC2018_Task3_{part}_GroundTruth.csv" for part in cls.parts.values()))

    def read(self, found: Path) -> Listing:
        """One-hot rows; the class order becomes HAM10000's."""
        root = _root(found)
        listing, files = Listing(found.name, root), ImageFiles(root)
        order = [self.info.class_names.index(name.lower()) for name in CLASSES_2018]
        for part, word in self.parts.items():
            path = one_of(root, (f"ISIC2018_Task3_{word}_GroundTruth.csv",))
            if path is None:
                continue
            lesions = _lesions(one_of(root, (f"ISIC2018_Task3_{word}_LesionGroupings.csv",)), listing)
            for row, image, label in _truth(path, CLASSES_2018, listing):
                listing.add(
                    row,
                    image,
                    files.named(image, f"{path}:{row}"),
                    order[label],
                    part,
                    listed=f"{image}.jpg",
                    source=path.name,
                    lesion=lesions.get(image, ""),
                )
        return listing


@dataclass(frozen=True, kw_only=True)
class Isic2019(_Isic):
    """ISIC 2019 (CC BY-NC 4.0): 25,331 skin images, eight classes, lesions, and the clinics they come from."""

    ham_metadata: Annotated[
        str | None, Field(description="HAM10000's table, which splits that source into its four sites")
    ] = None

    info: ClassVar[SetInfo] = INFO_2019
    layout: ClassVar[str] = "ISIC_2019_Training_GroundTruth.csv beside ISIC_2019_Training_Input/"
    parts: ClassVar[dict[str, str]] = {"train": "Training", "test": "Test"}

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The training truth, unless Fed-ISIC's split lies beside it."""
        found = one_of(folder, ("ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_GroundTruth.csv.gz"))
        return None if found is None or FedIsic2019.find(folder) else found

    def read(self, found: Path) -> Listing:
        """One-hot rows, joined with the metadata."""
        root = _root(found)
        listing, files = Listing(found.name, root), ImageFiles(root)
        parts = {part: _table(root, f"ISIC_2019_{word}_GroundTruth") for part, word in self.parts.items()}
        tested = parts["test"] is not None
        for part, path in parts.items():
            if path is None:
                continue
            facts = Facts(_table(root, f"ISIC_2019_{self.parts[part]}_Metadata"), root, self.ham_metadata, listing)
            for row, image, label in _truth(path, CLASSES_2019, listing):
                place = f"{path}:{row}"
                listing.add(
                    row,
                    image,
                    files.named(image, place),
                    label,
                    part if tested else "",
                    listed=f"{image}.jpg",
                    source=path.name,
                    **facts.of(image),
                )
        return listing


@dataclass(frozen=True, kw_only=True)
class FedIsic2019(_Isic):
    """Fed-ISIC2019 (CC BY-NC 4.0): ISIC 2019 by six centres, with FLamby's folds, which share lesions."""

    info: ClassVar[SetInfo] = replace(
        INFO_2019, citation=f"{INFO_2019.citation}; Ogier du Terrail et al., FLamby, NeurIPS 2022"
    )
    layout: ClassVar[str] = (
        "FLamby's train_test_split (columns image, target, center, fold) beside the ISIC 2019 images"
    )
    leaks: ClassVar[bool] = True

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The split table."""
        return one_of(folder, SPLIT_TABLES)

    def read(self, found: Path) -> Listing:
        """One row an image, with centre and fold."""
        root = _root(found)
        listing, files = Listing(found.name, root), ImageFiles(root)
        facts = Facts(_table(root, "ISIC_2019_Training_Metadata"), root, None, listing)
        if not facts.known:
            listing.notes.append(
                "ISIC_2019_Training_Metadata.csv is not here, so that lesions are unknown; the published folds share "
                "2,302 lesions"
            )
        table = TableRows(found, ("image", "target", "center", "fold"))
        at = [table.header.index(name) for name in ("image", "target", "center", "fold")]
        for row, values in table:
            image, target, centre, fold = (values[i] for i in at)
            listing.rows_read += 1
            if not target.isdecimal() or int(target) >= len(CLASSES_2019):
                listing.reject(row, "D06", f"target is '{target}', class count is {len(CLASSES_2019)}")
            elif not centre.isdecimal() or int(centre) >= len(CENTRES):
                listing.reject(row, "D06", f"center is '{centre}'; there are {len(CENTRES)}, from 0")
            elif fold not in ("train", "test"):
                listing.reject(row, "D06", f"fold is '{fold}'; expected train or test")
            else:
                path = files.named(image, f"{found}:{row}")
                more = {**facts.of(image), "site": CENTRES[int(centre)]}
                listing.add(row, image, path, int(target), fold, listed=f"{image}.jpg", **more)
        listing.digests.append(table.digest)
        return listing


class Facts:
    """What ISIC 2019's metadata tells of an image: lesion, source, age, sex (also spelt gender).

    Args:
        path: of the metadata; None: nothing is known.
        root: where HAM10000's table is looked for. ham: its path, where given. listing: takes notes and digests.
    """

    def __init__(self, path: Path | None, root: Path, ham: str | None, listing: Listing) -> None:
        self.known = path is not None
        self._rows: dict[str, dict[str, str]] = {}
        if path is None:
            return
        table = read_table(path, METADATA_2019, ("sex", "gender"))
        listing.digests.append(table.digest)
        sexes = table.first("sex", "gender") or [""] * len(table)
        sources = _ham_sources(Path(ham) if ham else one_of(root, HAM_TABLES), listing)
        columns = (table.columns[name] for name in METADATA_2019)
        for image, age, place, lesion, sex in zip(*columns, sexes, strict=True):
            site = sources.get(image) or PREFIXES.get(lesion.partition("_")[0], "")
            self._rows[image] = {"lesion": lesion, "site": site, "age": age, "sex": sex, "localization": place}

    def of(self, image: str) -> dict[str, str]:
        """The columns of one image; empty texts where it has no row."""
        if not self.known:
            return {"lesion": "", "site": ""}
        return self._rows.get(image) or dict.fromkeys(("lesion", "site", "age", "sex", "localization"), "")


def _ham_sources(path: Path | None, listing: Listing) -> dict[str, str]:
    """Image -> one of HAM10000's four sites, where the table that knows them is here."""
    if path is None:
        return {}
    table: Table = read_table(path, ("image_id",), ("dataset",), delimiter=None)
    listing.digests.append(table.digest)
    return dict(zip(table.columns["image_id"], table.columns.get("dataset", []), strict=False))


def _truth(path: Path, classes: tuple[str, ...], listing: Listing) -> Iterator[tuple[int, str, int]]:
    """Row, image and class of each row with exactly one class; others are rejected, or left out as unknown."""
    names = tuple(name.lower() for name in classes)
    table = TableRows(path, ("image", *names))
    columns = [table.header.index(name) for name in names]
    unknown = table.header.index(UNKNOWN) if UNKNOWN in table.header else None
    for row, values in table:
        listing.rows_read += 1
        image = values[table.header.index("image")]
        ones = [i for i, column in enumerate(columns) if values[column] in ("1.0", "1")]
        odd = [values[column] for column in columns if values[column] not in ("1.0", "1", "0.0", "0")]
        if odd:
            listing.reject(row, "D06", f"{image}: '{odd[0]}' is neither 0 nor 1", path.name)
        elif not ones and unknown is not None and values[unknown] in ("1.0", "1"):
            listing.left_out["of unknown class (UNK)"] += 1
        elif len(ones) != 1:
            listing.reject(row, "D06", f"{image} has {len(ones)} classes, expected exactly one", path.name)
        else:
            yield row, image, ones[0]
    listing.digests.append(table.digest)


def _lesions(path: Path | None, listing: Listing) -> dict[str, str]:
    if path is None:
        return {}
    table = read_table(path, ("image", "lesion_id"), ())
    listing.digests.append(table.digest)
    return dict(zip(table.columns["image"], table.columns["lesion_id"], strict=True))


def _table(root: Path, stem: str) -> Path | None:
    return one_of(root, (f"{stem}.csv", f"{stem}.csv.gz"))


def _root(found: Path) -> Path:
    """The folder of the whole set: downloads unpack each table into a folder of its own name."""
    stem = found.name.partition(".")[0]
    return found.parent.parent if found.parent.name == stem else found.parent
