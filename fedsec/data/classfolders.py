"""How sets whose folders name the class are read: Kvasir, COVID-19 Radiography, COVID19-CT, Kermany, any other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedsec.data.adapter import Adapter
from fedsec.data.digest import fingerprint
from fedsec.data.files import IGNORED, PICTURES, ImageFiles
from fedsec.data.listing import Listing
from fedsec.data.medmnist_table import SETS, SetInfo
from fedsec.data.table import read_table
from fedsec.errors import DataError

PARTS = {
    **dict.fromkeys(("train", "training", "training_set", "train_set"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validation_set", "val_set"), "val"),
    **dict.fromkeys(("test", "testing", "test_set"), "test"),
}
"""Lower-case folder -> part."""
META = ("patient", "lesion", "site", "view", "sex", "age")
KERMANY = re.compile(r"(person\d+)_(bacteria|virus)|((?:NORMAL2-)?IM-\d+)", re.IGNORECASE)


def folders_of(folder: Path) -> dict[str, Path]:
    """Lower-case name -> direct subfolder, in the order of names."""
    if not folder.is_dir():
        return {}
    found = (e for e in sorted(folder.iterdir()) if e.is_dir() and not e.name.startswith(".") and e.name not in IGNORED)
    return {entry.name.lower(): entry for entry in found}


def holding(folder: Path, names: set[str]) -> Path | None:
    """The folder, or a direct subfolder, that has all these subfolders."""
    for place in (folder, *folders_of(folder).values()):
        if names <= set(folders_of(place)):
            return place
    return None


@dataclass(frozen=True, kw_only=True)
class _Folders(Adapter):
    """Base of the sets here: a folder a class, and nothing else that tells the class."""

    classes: ClassVar[dict[str, int]] = {}
    """Lower-case folder name -> class number."""

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The folder that holds one folder a class."""
        return holding(folder, set(cls.classes))

    def read(self, found: Path) -> Listing:
        """All images of the class folders, in the order of the classes, then of their paths."""
        listing, files = Listing(found.name, found), ImageFiles(found)
        folders = folders_of(found)
        for name, label in sorted(self.classes.items(), key=lambda item: item[1]):
            for path in files.walk(folders[name]):
                self.add(listing, path, label)
        return self.finish(listing)

    def add(self, listing: Listing, path: Path, label: int, part: str = "", **meta: str) -> None:
        """One file; its path is its id."""
        listing.rows_read += 1
        listing.add(listing.rows_read, path.relative_to(listing.root).as_posix(), path, label, part, **meta)

    def finish(self, listing: Listing) -> Listing:
        """Messages about a folder name the file; the listing itself is the label file."""
        listing.digests.append(fingerprint(*listing.columns.get("image", [])))
        return listing


@dataclass(frozen=True, kw_only=True)
class Kvasir(_Folders):
    """Kvasir endoscopy images (research and education only, not verified): eight classes, no patients."""

    info: ClassVar[SetInfo] = SetInfo(
        task="multiclass",
        channels=3,
        class_names=(
            *("dyed-lifted-polyps", "dyed-resection-margins", "esophagitis", "normal-cecum"),
            *("normal-pylorus", "normal-z-line", "polyps", "ulcerative-colitis"),
        ),
        licence="research and education only (not verified)",
        citation="Pogorelov et al., Kvasir, MMSys 2017",
        homepage="https://datasets.simula.no/kvasir/",
    )
    classes: ClassVar[dict[str, int]] = {name: i for i, name in enumerate(info.class_names)}
    layout: ClassVar[str] = "eight folders, dyed-lifted-polyps/ to ulcerative-colitis/"


@dataclass(frozen=True, kw_only=True)
class Covid19Radiography(_Folders):
    """COVID-19 Radiography Database (licences by source): four classes, no patients, class and source confounded."""

    info: ClassVar[SetInfo] = SetInfo(
        task="multiclass",
        channels=1,
        class_names=("COVID", "Normal", "Lung_Opacity", "Viral Pneumonia"),
        licence="by source (RSNA, Kermany CC BY 4.0, six COVID-19 collections)",
        citation="Chowdhury et al., IEEE Access 8, 2020; Rahman et al., 2021",
        homepage="https://www.kaggle.com/datasets/tawsifurrahman/covid19-radiography-database",
    )
    classes: ClassVar[dict[str, int]] = {"covid": 0, "normal": 1, "lung_opacity": 2, "viral pneumonia": 3}
    sources: ClassVar[dict[int, str]] = {2: "rsna", 3: "kermany"}
    layout: ClassVar[str] = "COVID/images/, Normal/images/, Lung_Opacity/images/ and Viral Pneumonia/images/"
    published: ClassVar[tuple[int, int] | None] = (299, 299)

    def add(self, listing: Listing, path: Path, label: int, part: str = "", **meta: str) -> None:
        """With the source that its class is from, where that is one."""
        super().add(listing, path, label, part, site=self.sources.get(label, ""), **meta)

    def finish(self, listing: Listing) -> Listing:
        """Say what a network can learn here instead of disease."""
        listing.notes.append(
            "class and source are confounded: all Lung_Opacity is from RSNA, all Viral Pneumonia from Kermany; never "
            "use it beside kermany, pneumoniamnist or RSNA sets as another hospital"
        )
        return super().finish(listing)


@dataclass(frozen=True, kw_only=True)
class Covid19Ct(_Folders):
    """COVID19-CT slices (licence unclear): COVID-19 or not, cut from papers, official parts where the lists are."""

    info: ClassVar[SetInfo] = SetInfo(
        task="binary",
        channels=1,
        class_names=("NonCOVID", "COVID"),
        positive_class=1,
        licence="unclear: figures cut from papers",
        citation="Yang et al., COVID-CT-Dataset, arXiv 2003.13865",
        homepage="https://github.com/UCSD-AI4H/COVID-CT",
    )
    classes: ClassVar[dict[str, int]] = {"ct_noncovid": 0, "ct_covid": 1}
    layout: ClassVar[str] = "CT_COVID/ and CT_NonCOVID/, with or without Data-split/COVID/trainCT_COVID.txt"

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The folder above the images, which may lie in Images-processed/."""
        if holding(folder, set(cls.classes)) is None:
            return None
        return folder

    def read(self, found: Path) -> Listing:
        """All images; the part is that of the list that names it."""
        images = holding(found, set(self.classes)) or found
        listing, files, parts = Listing(found.name, found), ImageFiles(found), self._parts(found)
        missing = set(parts)
        for name, label in self.classes.items():
            for path in files.walk(folders_of(images)[name]):
                missing.discard((label, path.name.strip().lower()))
                self.add(listing, path, label, parts.get((label, path.name.strip().lower()), ""))
        for _, name in sorted(missing):
            listing.rows_read += 1
            listing.add(listing.rows_read, name, None, 0, listed=f"Data-split names {name}, which was")
        listing.notes.append("images are cut from papers: text and arrows in them can give the label away")
        return self.finish(listing)

    def _parts(self, root: Path) -> dict[tuple[int, str], str]:
        """(class, file name) -> part."""
        found: dict[tuple[int, str], str] = {}
        for place in (root, *folders_of(root).values()):
            for label, name in enumerate(self.info.class_names):
                for part in ("train", "val", "test"):
                    path = place / "Data-split" / name / f"{part}CT_{name}.txt"
                    if not path.is_file():
                        continue
                    for row, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                        key = label, line.strip().lower()
                        if line.strip() and found.setdefault(key, part) != part:
                            problem = f"{line.strip()} is also in the {found[key]} list"
                            raise DataError("D11", f"{path}:{row}: {problem}; remove one")
        return found


@dataclass(frozen=True, kw_only=True)
class Kermany(_Folders):
    """Chest X-rays of children, Kermany et al. (CC BY 4.0): normal or pneumonia, patients; folder or npz file."""

    info: ClassVar[SetInfo] = SETS["kermany"]
    classes: ClassVar[dict[str, int]] = {"normal": 0, "pneumonia": 1}
    layout: ClassVar[str] = "chest_xray/train/NORMAL/, train/PNEUMONIA/, test/…"
    # Patient numbers start again in the test folder: one key may stand for two people, which is the safe direction.
    leaks: ClassVar[bool] = True

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The folder of the parts."""
        for place in (folder, *folders_of(folder).values()):
            if set(cls.classes) == set(folders_of(place / "train")):
                return place
        return None

    def read(self, found: Path) -> Listing:
        """All images of the three parts; the file's name gives the patient and the cause."""
        listing, files = Listing(found.name, found), ImageFiles(found)
        odd = 0
        for part in ("train", "val", "test"):
            for name, label in self.classes.items():
                folder = folders_of(found / part).get(name)
                for path in files.walk(folder) if folder else ():
                    match = KERMANY.match(path.stem)
                    odd += match is None
                    patient = ((match[1] or match[3]) if match else "") or ""
                    cause = (match[2] or "normal").lower() if match else ""
                    self.add(listing, path, label, part, patient=patient, subtype=cause)
        if odd:
            listing.notes.append(f"{odd:,} file names do not tell the patient")
        listing.notes.append(
            "patient numbers start again in the test folder, so that one number may mean two children; these are "
            "PneumoniaMNIST's pictures: never use both as two hospitals"
        )
        return self.finish(listing)


@dataclass(frozen=True, kw_only=True)
class ImageFolder(_Folders):
    """Your own folders of images, one a class, with or without train/, val/ and test/ above them."""

    layout: ClassVar[str] = "train/CLASS/ and test/CLASS/, or CLASS/ alone, with images in at least two of them"
    suffixes: ClassVar[frozenset[str]] = PICTURES

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The folder, or its only subfolder, where at least two class folders hold images."""
        inside = list(folders_of(folder).values())
        places: list[Path] = [folder, *inside] if len(inside) == 1 else [folder]
        for place in places:
            names = {name for _, _, name, _ in cls._classes(place)}
            if len(names) > 1:
                return place
        return None

    @classmethod
    def _classes(cls, root: Path) -> Iterator[tuple[str, str, str, Path]]:
        """Part, its folder, class and folder of every class that holds an image or a folder of images."""
        folders = folders_of(root)
        parts = {name: PARTS[name] for name in folders if name in PARTS}
        tops = [(part, folders[name].name, folders[name]) for name, part in parts.items()] or [("", "", root)]
        for part, top, place in tops:
            for folder in folders_of(place).values():
                if next(ImageFiles(root, cls.suffixes).walk(folder), None) is not None:
                    yield part, top, folder.name, folder

    def read(self, found: Path) -> Listing:
        """All images of all class folders; `metadata.csv` (column `file`) adds patients, sites and so on."""
        listing, files = Listing(found.name, found), ImageFiles(found, self.suffixes)
        places = list(self._classes(found))
        listing.class_names = self._names(found, {name for _, _, name, _ in places})
        listing.task = "binary" if len(listing.class_names) == 2 else "multiclass"
        facts, used = _metadata(found, listing), 0
        for part, _, name, folder in places:
            for path in files.walk(folder):
                meta = facts.get(path.relative_to(found).as_posix(), {})
                used += bool(meta)
                label = listing.class_names.index(name)
                self.add(listing, path, label, part, **(dict.fromkeys(self._columns(facts), "") | meta))
        if len(facts) > used:
            listing.notes.append(f"metadata.csv names {len(facts) - used:,} files that are not here")
        if others := self._others(found, places):
            listing.left_out["files that are no images of a class"] = others
            listing.rows_read += others
        return self.finish(listing)

    def _names(self, root: Path, present: set[str]) -> tuple[str, ...]:
        """`classes.txt`, else the folders in sorted order."""
        path = root / "classes.txt"
        if not path.is_file():
            return tuple(sorted(present))
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        if unknown := sorted(present - set(names)):
            raise DataError("D05", f"{path}: folder '{unknown[0]}' is not one of its classes ({', '.join(names)})")
        return names

    @staticmethod
    def _columns(facts: dict[str, dict[str, str]]) -> tuple[str, ...]:
        return tuple(next(iter(facts.values()), {}))

    def _others(self, root: Path, places: list[tuple[str, str, str, Path]]) -> int:
        """Files beside or among the class folders that were not read."""
        known = {"metadata.csv", "classes.txt", "README.txt", "README.md", "LICENSE"}
        used = {folder for _, _, _, folder in places}
        inside = (p for folder in used for p in folder.rglob("*") if p.suffix.lower() not in self.suffixes)
        beside = (p for top in {root, *(folder.parent for folder in used)} for p in top.iterdir())
        return sum(p.is_file() and p.name not in known and not p.name.startswith(".") for p in (*inside, *beside))


def _metadata(root: Path, listing: Listing) -> dict[str, dict[str, str]]:
    """File -> columns of `metadata.csv`, where it is there."""
    path = root / "metadata.csv"
    if not path.is_file():
        return {}
    table = read_table(path, ("file",), META)
    listing.digests.append(table.digest)
    names = [name for name in META if name in table.columns]
    values = zip(*(table.columns[name] for name in names), strict=True) if names else [()] * len(table)
    return {file: dict(zip(names, row, strict=True)) for file, row in zip(table.columns["file"], values, strict=True)}
