"""How the COVIDx lists (Wang, Lin, Wong, Scientific Reports 2020) are read: every published version's layout."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from fedsec.data.adapter import Adapter
from fedsec.data.digest import fingerprint
from fedsec.data.files import ImageFiles
from fedsec.data.listing import Listing, natural
from fedsec.data.medmnist_table import SetInfo
from fedsec.errors import ConfigError, DataError

CLASSES = (("normal", "pneumonia", "COVID-19"), ("negative", "positive"), ("level1", "level2"))
"""Class words of versions up to 9A, of those that end in B, and of the severity lists."""
WORDS = {word.lower(): (word, group) for group in CLASSES for word in group}
SPELLINGS = {"rnsa": "rsna"}
LIST = re.compile(r"(train|test)_COVIDx(?P<version>[\w-]*)\.txt(\.gz)?", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One line of a list."""

    patient: str
    file: str
    label: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Covidx(Adapter):
    """COVIDx lists (lists AGPL-3.0, images by source): chest X-rays with and without COVID-19, patients, sources."""

    version: Annotated[str | None, Field(description="of the lists, such as 9A; None: the last one here")] = None

    info: ClassVar[SetInfo] = SetInfo(
        channels=1,
        licence="lists AGPL-3.0; images by source (cohen, sirm, rsna, ricord, bimcv, stonybrook, actmed, fig1)",
        citation="Wang, Lin, Wong, COVID-Net, Scientific Reports 10:19549, 2020",
        homepage="https://github.com/lindawangg/COVID-Net",
    )
    layout: ClassVar[str] = "train_COVIDx9A.txt and test_COVIDx9A.txt beside train/ and test/"

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The folder of the lists."""
        for place in (folder, *sorted(entry for entry in folder.iterdir() if entry.is_dir())):
            if any(LIST.fullmatch(entry.name) for entry in place.iterdir()):
                return place
        return None

    def read(self, found: Path) -> Listing:
        """One line an image."""
        version = self._version(found)
        paths = {
            match[1].lower(): entry
            for entry in sorted(found.iterdir())
            if (match := LIST.fullmatch(entry.name)) and match["version"].lower() == version.lower()
        }
        listing = Listing(next(iter(paths.values())).name, found, policy={"version": version})
        files, misspelt, pairs = ImageFiles(found), 0, Counter[tuple[str, str]]()
        group: tuple[str, ...] = ()
        for part, path in sorted(paths.items(), reverse=True):  # train first
            lines = []
            for number, line in _lines(path):
                lines.append(line)
                listing.rows_read += 1
                row = parse(line)
                if row is None:
                    listing.reject(number, "D05", f"no class word in '{line[:80]}'", path.name)
                    continue
                word, classes = WORDS[row.label.lower()]
                if group and classes != group:
                    problem = f"'{row.label}' in a list of {', '.join(group)}"
                    listing.reject(number, "D05", problem, path.name)
                    continue
                group = classes
                misspelt += row.source in SPELLINGS
                source = SPELLINGS.get(row.source, row.source)
                place = files.at(f"{part}/{row.file}", f"{path}:{number}")
                pairs[word, source] += 1
                listing.add(
                    number,
                    row.file,
                    place,
                    classes.index(word),
                    part,
                    source=path.name,
                    patient=row.patient,
                    site=source,
                )
            listing.digests.append(fingerprint(*lines))
        listing.class_names, listing.task = group, "binary" if len(group) == 2 else "multiclass"
        if misspelt:
            listing.notes.append(f"{misspelt:,} rows name the source rnsa; it was merged with rsna")
        if sources := {source for (_, source) in pairs if source}:
            shown = "; ".join(f"{w} from {_sources(pairs, w)}" for w in group)
            if len(sources) > 1:
                listing.notes.append(f"class and source are confounded: {shown}")
        return listing

    def _version(self, folder: Path) -> str:
        found = {m["version"] for e in folder.iterdir() if (m := LIST.fullmatch(e.name))}
        if self.version is None:
            return max(found, key=natural)
        known = {version.lower(): version for version in found}
        if self.version.lower() not in known:
            raise ConfigError(f"covidx: version={self.version}: here are {', '.join(sorted(found, key=natural))}")
        return known[self.version.lower()]


def parse(line: str) -> Row | None:
    """One line, read from the right: the source may be missing, and the patient may be two words. None: no class."""
    words = line.split()
    source = ""
    if len(words) > 1 and words[-1].lower() not in WORDS:
        source = words.pop().lower()
    if len(words) < 3 or words[-1].lower() not in WORDS:
        return None
    *patient, file, label = words
    return Row(" ".join(patient), file, label, source)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.strip()
    except UnicodeDecodeError as error:
        raise DataError("D03", f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (OSError, EOFError) as error:
        raise DataError("D08", f"{path}: cannot be read: {error}") from None


def _sources(pairs: Counter[tuple[str, str]], word: str) -> str:
    found = Counter({source or "unnamed": n for (label, source), n in pairs.items() if label == word})
    return ", ".join(f"{source} {n:,}" for source, n in found.most_common(3))
