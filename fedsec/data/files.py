"""Which image file a row of a label file means; nothing outside the data set's own folder is ever opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fedsec.errors import RefusedError

SUFFIXES = (".png", ".jpg", ".jpeg")
PICTURES = frozenset({*SUFFIXES, ".bmp", ".tif", ".tiff", ".webp", ".gif"})
DICOM = frozenset({".dcm", ".dicom"})
IGNORED = frozenset({"__MACOSX", "masks"})
"""Folders whose images are no images of the set."""


class ImageFiles:
    """The image files under a folder.

    Args:
        root: the folder.
        suffixes: lower-case endings of image files.
    """

    def __init__(self, root: Path, suffixes: frozenset[str] = PICTURES) -> None:
        self.root, self.suffixes = root, suffixes
        self.substituted = 0
        """Files found under another ending than the listed one."""
        self._inside = root.resolve()
        self._safe: dict[str, bool] = {}
        self._index: dict[str, Path] | None = None
        self._drop = 0

    def at(self, listed: str, place: str) -> Path | None:
        """The file at a listed path. Leading folders that do not exist here are dropped, other endings are tried.

        Args:
            listed: relative path. place: file and row, for messages.

        Raises:
            RefusedError: the path or a link leaves the folder (D16).
        """
        parts = self._parts(listed, place)
        drops = [self._drop, *(d for d in range(len(parts)) if d != self._drop)]
        for drop in drops:
            if drop < len(parts) and (found := self._existing(Path(*parts[drop:]))):
                self._drop = drop
                return self._checked(found)
        return None

    def named(self, name: str, place: str) -> Path | None:
        """The file of this name (or stem) anywhere below the folder.

        Raises:
            RefusedError: as `at` does.
        """
        (*folders, last) = self._parts(name, place)
        if folders:
            return self.at(name, place)
        if last in self.index:
            return self.index[last]
        stem = last if Path(last).suffix.lower() not in self.suffixes else Path(last).stem
        found = self.index.get(stem)
        if found is not None and stem != last:
            self.substituted += 1
        return found

    @property
    def index(self) -> dict[str, Path]:
        """Name and stem -> file; of two files with one name, the first by path."""
        if self._index is None:
            self._index = {}
            for path in self.walk():
                self._index.setdefault(path.name, path)
                self._index.setdefault(path.stem, path)
        return self._index

    def walk(self, folder: Path | None = None) -> Iterator[Path]:
        """All image files below the folder, in the order of their paths.

        Raises:
            RefusedError: a link leads out of the folder (D16).
        """
        try:
            entries = sorted(os.scandir(folder or self.root), key=lambda entry: entry.name)
        except OSError:
            return
        for entry in entries:
            if entry.name.startswith(".") or entry.name in IGNORED:
                continue
            path = Path(entry.path)
            if entry.is_symlink():
                self._checked(path)
                if entry.is_dir():  # inside the folder, and so walked under its own name
                    continue
            if entry.is_dir():
                yield from self.walk(path)
            elif path.suffix.lower() in self.suffixes:
                yield path

    def _parts(self, listed: str, place: str) -> tuple[str, ...]:
        plain = PurePosixPath(listed.replace("\\", "/"))
        if plain.is_absolute() or ".." in plain.parts or (plain.parts and ":" in plain.parts[0]):
            raise RefusedError(f"{place}: '{listed}' leaves the folder; give paths below {self.root.name}/ [D16]")
        return plain.parts or ("",)

    def _existing(self, relative: Path) -> Path | None:
        path = self.root / relative
        if path.is_file():
            return path
        stem = path.with_suffix("") if path.suffix.lower() in self.suffixes else path
        for suffix in (*SUFFIXES, *(s.upper() for s in SUFFIXES[:2])):
            other = stem.with_name(stem.name + suffix)
            if other.is_file():
                self.substituted += stem != path
                return other
        return None

    def _checked(self, path: Path) -> Path:
        folder = str(path.parent)
        if folder not in self._safe:
            self._safe[folder] = Path(folder).resolve().is_relative_to(self._inside)
        if not self._safe[folder] or (path.is_symlink() and not path.resolve().is_relative_to(self._inside)):
            raise RefusedError(f"{path}: leads out of {self.root}; copy the image into the folder [D16]")
        return path


def one_of(folder: Path, names: tuple[str, ...], deep: bool = True) -> Path | None:
    """The first file or folder of one of these names (any case) in a folder, else in its direct subfolders."""
    if not folder.is_dir():
        return None
    wanted = {name.lower(): rank for rank, name in enumerate(names)}
    places = [folder]
    if deep:
        places += sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for place in places:
        try:
            found = [entry for entry in place.iterdir() if entry.name.lower() in wanted]
        except OSError:
            continue
        if found:
            return min(found, key=lambda entry: (wanted[entry.name.lower()], entry.name))
    return None
