"""Run folders: what a run leaves, and how it resumes. Finished cells are written atomically and never lost.

runs/<slug>-<hash8>/
  config.toml resolved.json env.json     asked, fully resolved, versions and device
  cells/<hash8>.json                     one finished cell; rerun = resume
  results.jsonl                          rebuilt from cells/
  ledger.jsonl                           every private release of every training, written before it happened
  artifacts/<hash8>/                     reconstructions, model.safetensors
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
from pathlib import Path
from typing import Any

import tomli_w

from fedsec.config import Cell, content_hash
from fedsec.errors import ConfigError
from fedsec.files import write_json, write_text

PACKAGES = ("fedsec", "torch", "torchvision", "opacus", "numpy", "scipy", "scikit-learn", "torchmetrics")


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

    def finish(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep a finished cell and rebuild results.jsonl."""
        write_json(self.path / "cells" / f"{key}.json", result)
        lines = [json.dumps(cell, sort_keys=True) for cell in self.results()]
        write_text(self.path / "results.jsonl", "".join(f"{line}\n" for line in lines))

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


def default_folder(cells: Sequence[Cell], root: Path = Path("runs")) -> Path:
    """`runs/<slug>-<hash8>`: the same request names the same folder, so typing it again resumes."""
    first = cells[0]
    attack = first.attack.name if first.attack else "train"
    defense = next((c.label().split(":")[0] for c in cells if c.defense), "none")
    name = Path(first.data.name).stem or "data"
    slug = re.sub(r"[^A-Za-z0-9]+", "-", f"{attack}-{defense}-{name}").strip("-").lower()
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
