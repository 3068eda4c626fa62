"""Run folders: what a run leaves, and how it resumes. Finished cells are written atomically and never lost.

runs/<slug>-<hash8>/
  config.toml resolved.json env.json     asked, fully resolved, versions and device
  cells/<hash8>.json                     one finished cell; rerun = resume
  failed/<hash8>.json                    why a cell has no result; removed when it has one
  results.jsonl                          rebuilt from cells/
  ledger.jsonl                           every private release, rebuilt from artifacts/ledgers/, which are written ahead
  artifacts/<hash8>/                     reconstructions, model.safetensors
  breakdown.json                         of a search for breakdown points: every pair of attack and rule
  figures/
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from fedsec.config import Cell, content_hash
from fedsec.errors import ConfigError
from fedsec.files import write_json, write_text
from fedsec.privacy.ledger import PARTS

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

PACKAGES = ("fedsec", "torch", "torchvision", "opacus", "numpy", "scipy", "scikit-learn", "torchmetrics")


BREAKDOWN = "breakdown.json"
"""What a search of `fedsec.grid.breakdown` leaves in its run folder."""


class RunFolder:
    """One run's folder.

    Args:
        path: created where it does not exist.

    Raises:
        ConfigError: the folder cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            for name in ("cells", "artifacts"):
                (path / name).mkdir(parents=True, exist_ok=True)
            handle, probe = tempfile.mkstemp(dir=path)
            os.close(handle)
            Path(probe).unlink()
        except OSError as error:
            raise ConfigError(
                f"{path}: this output folder cannot be written ({error.strerror}); choose one with --out"
            ) from None

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run folder, for reading.

        Raises:
            ConfigError: it does not exist or is no run folder.
        """
        if not (path / "cells").is_dir():
            raise ConfigError(f"{path}: not a run folder (it has no cells/); runs are written by fedsec run --out DIR")
        return cls(path)

    def begin(self, tables: Mapping[str, Any], cells: Sequence[Cell], device: str) -> None:
        """Write down what was asked, what it resolved to, and on what machine."""
        write_text(self.path / "config.toml", tomli_w.dumps(_without_none(tables)))
        write_json(self.path / "resolved.json", {"cells": [{"id": c.key(), **c.to_json()} for c in cells]})
        write_json(self.path / "env.json", environment(device))

    def finished(self, key: str) -> dict[str, Any] | None:
        """The result of a finished cell; None where it has to be computed."""
        path = self.path / "cells" / f"{key}.json"
        try:
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return result

    def finish(self, key: str, result: Mapping[str, Any], rebuild: bool = True) -> None:
        """Keep a finished cell and rebuild results.jsonl; who finishes many cells rebuilds it once, at the end."""
        write_json(self.path / "cells" / f"{key}.json", result)
        (self.path / "failed" / f"{key}.json").unlink(missing_ok=True)
        if rebuild:
            self.rebuild()

    def rebuild(self) -> None:
        """Write results.jsonl from the finished cells, and ledger.jsonl from the ledgers of their trainings."""
        lines = [json.dumps(cell, sort_keys=True) for cell in self.results()]
        write_text(self.path / "results.jsonl", "".join(f"{line}\n" for line in lines))
        ledgers = sorted((self.path / "artifacts" / PARTS).glob("*.jsonl"))
        write_text(self.path / "ledger.jsonl", "".join(part.read_text(encoding="utf-8") for part in ledgers))

    def fail(self, key: str, record: Mapping[str, Any]) -> None:
        """Record why a cell has no result; it is tried again when the run is started again."""
        write_json(self.path / "failed" / f"{key}.json", record)

    def failed(self) -> list[dict[str, Any]]:
        """The records of failed cells that have not succeeded since."""
        paths = sorted((self.path / "failed").glob("*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from computing in this folder; a kill frees it as well.

        Raises:
            ConfigError: another process is at work in it.
        """
        with (self.path / ".lock").open("w") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(
                        f"{self.path}: another process is computing in this run folder; wait for it, or choose --out"
                    ) from None
                except OSError:
                    pass  # a network file system without locks: the user has to know
            yield

    def results(self) -> Iterator[dict[str, Any]]:
        """All finished cells, in the order in which they were asked."""
        order = {c["id"]: i for i, c in enumerate(self.resolved())}
        paths = sorted((self.path / "cells").glob("*.json"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
        for path in paths:
            yield json.loads(path.read_text(encoding="utf-8"))

    def resolved(self) -> list[dict[str, Any]]:
        """The resolved configuration of every cell."""
        path = self.path / "resolved.json"
        return list(json.loads(path.read_text(encoding="utf-8"))["cells"]) if path.is_file() else []

    def artifacts(self, key: str) -> Path:
        """The folder of one cell's or training's artifacts."""
        return self.path / "artifacts" / key


def default_folder(cells: Sequence[Cell], root: Path = Path("runs"), name: str | None = None) -> Path:
    """`runs/<slug>-<hash8>`: the same request names the same folder, so typing it again resumes."""
    if name is not None:
        return root / f"{name}-{content_hash([c.to_json() for c in cells])}"
    first = cells[0]
    attack = first.attack.name if first.attack else "train"
    defense = next((c.label().split(":")[0] for c in cells if c.defense), "none")
    data = Path(first.data.name).stem or "data"
    slug = re.sub(r"[^A-Za-z0-9]+", "-", f"{attack}-{defense}-{data}").strip("-").lower()
    return root / f"{slug}-{content_hash([c.to_json() for c in cells])}"


def environment(device: str) -> dict[str, Any]:
    """Versions and machine, for the record."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device,
        "packages": versions,
        "command": sys.argv,
    }


def _without_none(value: Any) -> Any:
    """TOML has no null: leave such keys out."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, (list, tuple)) else value
