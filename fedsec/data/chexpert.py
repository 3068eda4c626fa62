"""How CheXpert, 224,316 chest X-rays of 65,240 patients with labels that may be uncertain, is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedsec import plugins
from fedsec.data.adapter import Adapter
from fedsec.data.digest import fingerprint
from fedsec.data.files import ImageFiles, one_of
from fedsec.data.listing import Listing
from fedsec.data.medmnist_table import SetInfo
from fedsec.data.table import TableRows
from fedsec.data.uncertainty import UNCERTAIN, Labels, multiclass_names, policies, resolved
from fedsec.errors import ConfigError, DataError

LABELS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other"),
    *("Fracture", "Support Devices"),
)
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
PARTS = {"train": ("train.csv",), "val": ("valid.csv",), "test": ("test_labels.csv", "test.csv")}
"""Part -> its table. `test.csv` as published has no labels; `test_labels.csv` came later."""
VALUES = {"": float("nan"), "1.0": 1.0, "1": 1.0, "0.0": 0.0, "0": 0.0, "-1.0": UNCERTAIN, "-1": UNCERTAIN}
PATIENT = re.compile(r"(patient\d+)/(study\d+)/")


@dataclass
class _Reading:
    """What is shared by the tables of one set."""

    listing: Listing
    files: ImageFiles
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CheXpert(Adapter):
    """CheXpert chest X-rays (Stanford's research agreement), five labels, patients, uncertainty policies."""

    labels: Annotated[str, Field(description="competition (five), all14, or names joined by +")] = "competition"
    policy: Annotated[
        str, Field(description="of uncertain labels: mixed, u_zeros, u_ones, u_ignore, u_selftrained, u_multiclass, …")
    ] = "mixed"
    blank: Annotated[Literal["zero", "ignore"], Field(description="what a label that is not mentioned means")] = "zero"
    view: Annotated[Literal["frontal", "lateral", "all"], Field(description="which projections are used")] = "frontal"
    predictions: Annotated[str | None, Field(description="table of probabilities, for policy=u_selftrained")] = None

    info: ClassVar[SetInfo] = SetInfo(
        task="multilabel",
        channels=1,
        class_names=LABELS,
        licence="Stanford University Dataset Research Use Agreement: no redistribution",
        citation="Irvin et al., CheXpert, AAAI 2019",
        homepage="https://stanfordmlgroup.github.io/competitions/chexpert/",
    )
    layout: ClassVar[str] = "train.csv and valid.csv beside train/patient00001/study1/view1_frontal.jpg"

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The training table, which has CheXpert's columns."""
        found = one_of(folder, PARTS["train"])
        if found is None:
            return None
        with found.open(encoding="utf-8-sig", errors="replace") as file:
            start = file.readline(4096).lower()
        return found if "enlarged cardiomediastinum" in start and "path" in start else None

    def read(self, found: Path) -> Listing:
        """One row an image. Uncertain and blank labels are resolved at the end, by policy."""
        labels = self._labels()
        chosen = policies(self.policy, labels)
        listing = Listing(found.name, found.parent, id_name="Path")
        reading = _Reading(listing, ImageFiles(found.parent), labels)
        for part, names in PARTS.items():
            table = one_of(found.parent, names, deep=False)
            if table is not None:
                self._read_part(reading, table, part)
        raw = np.asarray(listing.labels, dtype=np.float32).reshape(-1, len(labels))
        ids = listing.columns.get("image", [])
        soft = self._predictions(listing, labels, ids) if "u_selftrained" in chosen else None
        listing.labels = list(resolved(raw, chosen, self.blank, ids, soft))
        listing.class_names = multiclass_names(labels) if chosen[0] == "u_multiclass" else labels
        listing.policy = {
            "view": self.view,
            "labels": self.labels,
            "policy": dict(zip(labels, chosen, strict=True)),
            "blank": self.blank,
            "weak_labels": "training labels, also of a validation part cut from them, were mined from reports",
        }
        listing.digests.append(fingerprint(self.policy, self.blank))
        return listing

    def _labels(self) -> tuple[str, ...]:
        if self.labels in ("competition", "all14"):
            return COMPETITION if self.labels == "competition" else LABELS
        named = {name.lower(): name for name in LABELS}
        found = []
        for text in self.labels.split("+"):
            if text.strip().lower() not in named:
                raise ConfigError(f"chexpert: labels={self.labels}: '{text}': {plugins.nearest(text, LABELS)}")
            found.append(named[text.strip().lower()])
        return tuple(found)

    def _read_part(self, reading: _Reading, path: Path, part: str) -> None:
        listing = reading.listing
        wanted = tuple(name.lower() for name in reading.labels)
        table = TableRows(path, ("path",))
        if part == "test" and not set(wanted) <= set(table.header):
            listing.notes.append(f"{path.name} has no labels; its images are not used")
            return
        table = TableRows(path, ("path", *wanted))
        at = {name: table.header.index(name) for name in table.header}
        columns = [at[name] for name in wanted]
        for row, values in table:
            listing.rows_read += 1
            name = values[at["path"]]
            view = values[at["frontal/lateral"]] if "frontal/lateral" in at else ""
            view = (view or ("lateral" if "lateral" in name.lower() else "frontal")).lower()
            if self.view not in ("all", view):
                listing.left_out[f"{view} (view={self.view})"] += 1
                continue
            raw = [VALUES.get(values[i]) for i in columns]
            if problem := _problem(raw, [values[i] for i in columns], reading.labels, path.name, part):
                listing.reject(row, "D06", problem, path.name)
                continue
            match = PATIENT.search(name.replace("\\", "/"))
            if match is None:
                listing.reject(row, "D07", f"Path '{name}' has no patientNNNNN/studyN folder", path.name)
                continue
            listing.add(
                row,
                name,
                reading.files.at(name, f"{path}:{row}"),
                raw,
                part,
                source=path.name,
                patient=match[1],
                study=f"{match[1]}/{match[2]}",
                site="",
                sex=values[at["sex"]] if "sex" in at else "",
                age=values[at["age"]] if "age" in at else "",
                view=values[at["ap/pa"]] or view[:1].upper() if "ap/pa" in at else view[:1].upper(),
            )
        listing.digests.append(table.digest)

    def _predictions(self, listing: Listing, labels: tuple[str, ...], ids: list[str]) -> Labels | None:
        if self.predictions is None:
            return None
        path = Path(self.predictions).expanduser()
        table = TableRows(path, ("path", *(name.lower() for name in labels)))
        at = [table.header.index(name.lower()) for name in ("path", *labels)]
        found = {}
        for row, values in table:
            try:
                numbers = [float(values[i]) for i in at[1:]]
            except ValueError:
                numbers = [-1.0]
            if not all(0 <= number <= 1 for number in numbers):
                raise DataError("D06", f"{path}:{row}: a probability lies outside 0 to 1")
            found[values[at[0]]] = numbers
        listing.digests.append(table.digest)
        missing = [image for image in ids if image not in found]
        if missing:
            raise DataError("D07", f"{path}: no row for {missing[0]}, and {len(missing):,} such images in all")
        return np.array([found[image] for image in ids], dtype=np.float32)


def _problem(raw: list[float | None], texts: list[str], labels: tuple[str, ...], file: str, part: str) -> str | None:
    """What is wrong with a row's labels: no code at all, or an uncertain one where radiologists decided."""
    for value, text, label in zip(raw, texts, labels, strict=True):
        if value is None:
            return f"'{label}' is '{text}'; expected 1.0, 0.0, -1.0 (uncertain) or nothing"
        if part != "train" and (value == UNCERTAIN or value != value):
            return f"'{label}' is '{text}'; {file} was labelled by radiologists, 0 or 1"
    return None
