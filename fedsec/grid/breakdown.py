"""How many malicious clients does each rule bear? A sweep that adds the cells it needs as it goes.

Every pair of attack and rule is a search of its own (`metrics.breakdown`); one generation tries the next number of
attackers of all pairs at once, so that all processes have work. Cells and trainings are those of any sweep: the search
resumes, and `fedsec plot` draws the same cells.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsec.config import Cell, expand
from fedsec.errors import ConfigError
from fedsec.files import write_json
from fedsec.grid.run import Plan, carry_out, plan_of, serial_by_default
from fedsec.metrics.breakdown import DROP, auc_drop, breakdown, broken, next_to_try
from fedsec.plugins import PluginSpec
from fedsec.progress import Progress
from fedsec.store import BREAKDOWN, RunFolder
from fedsec.types import Estimate

if TYPE_CHECKING:
    from fedsec.federation.assemble import Federation


@dataclass
class Series:
    """One rule against one attack with more and fewer malicious clients."""

    calm: Cell
    """The federation without an attack."""
    attack: PluginSpec
    drops: dict[int, Estimate] = field(default_factory=dict)
    """Number of malicious clients -> paired loss of test AUC."""
    reason: str = ""
    """Why the search ended early."""

    @property
    def clients(self) -> int:
        """n."""
        return int(self.calm.federation.clients or 0)

    @property
    def limit(self) -> int:
        """Most malicious clients that are tried: fewer than half."""
        return (self.clients - 1) // 2

    def cell(self, f: int) -> Cell:
        """The federation with f malicious clients; without any, the calm one."""
        if f == 0:
            return self.calm
        params = {**self.attack.params, "fraction": round(f / self.clients, 6)}
        return replace(self.calm, attack=PluginSpec(self.attack.name, params))

    def wanted(self, threshold: float) -> int | None:
        """The next number to try."""
        if self.reason:
            return None
        return next_to_try({f: broken(d, threshold) for f, d in self.drops.items()}, self.limit)

    def to_json(self, threshold: float) -> dict[str, Any]:
        """The result, finished or not."""
        found = breakdown({f: broken(d, threshold) for f, d in self.drops.items()}, self.limit)
        return {
            "attack": {k: v for k, v in self.attack.to_table().items() if k != "fraction"},
            "defense": [spec.to_table() for spec in self.calm.defense],
            "data": self.calm.data.name,
            "partition": self.calm.data.partition,
            "seed": self.calm.seed,
            "clients": self.clients,
            "point": found.point,
            "limit": found.limit,
            "monotone": found.monotone,
            "finished": not self.reason and self.wanted(threshold) is None,
            "reason": self.reason,
            "auc_drop": {str(f): self.drops[f].to_json() for f in sorted(self.drops)},
        }


def series_of(tables: Mapping[str, Any]) -> tuple[list[Series], float]:
    """The searches that a recipe with `[sweep.breakdown]` asks for, and the loss that counts as broken.

    Raises:
        ConfigError: no attack, no number of clients, or unknown settings.
    """
    sweep = dict(tables.get("sweep", {}))
    settings = sweep.pop("breakdown", {})
    if settings.keys() - {"drop"}:
        raise ConfigError(f"[sweep.breakdown] knows drop (loss of AUC, {DROP} by default), not {', '.join(settings)}")
    threshold = float(settings.get("drop", DROP))
    if not 0 < threshold < 0.5:
        raise ConfigError(f"[sweep.breakdown] drop = {threshold}: a loss of AUC between 0 and 0.5")
    plain = serial_by_default({**tables, "sweep": sweep, "baseline": False})
    found: dict[str, Series] = {}
    for cell in expand(plain):
        if cell.attack is None or "fraction" in cell.attack.params:
            raise ConfigError("[sweep.breakdown] needs attacks, and finds their fraction itself: leave it out")
        if not cell.federation.clients or cell.federation.clients < 3:
            raise ConfigError("[sweep.breakdown] needs federation.clients, 3 at least")
        found[cell.key()] = Series(replace(cell, attack=None), cell.attack)
    return list(found.values()), threshold


def search(
    tables: Mapping[str, Any],
    *,
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    jobs: int | None = None,
    max_minutes: float | None = None,
    progress: Progress | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Find the breakdown point of every attack and rule of a recipe; the same call again goes on.

    Returns:
        What `grid.run.sweep` returns, and `breakdown`: one entry for each pair, also in `breakdown.json`.

    Raises:
        FedsecError: the recipe cannot be carried out as written. A cell that fails ends its own search only.
    """
    every, threshold = series_of(tables)
    progress, where = progress or Progress(), Path(data_dir) if data_dir else None
    end = time.monotonic() + 60 * max_minutes if max_minutes is not None else None
    first = plan_of([s.calm for s in every], tables, Path(out) if out else None, jobs, name)
    folder = RunFolder(first.folder)
    judge = _Judge(folder, where)
    cells = {s.calm.key(): s.calm for s in every}
    with folder.alone():
        while True:
            tries = [(s, f) for s in every if (f := s.wanted(threshold)) is not None]
            cells |= {cell.key(): cell for s, f in tries for cell in [s.cell(f)]}
            asked = plan_of(list(cells.values()), tables, folder.path, jobs)
            left = None if end is None else max(0.0, (end - time.monotonic()) / 60)
            result = carry_out(asked, folder, where, progress, left)
            _judge(tries, asked, result, judge)
            content = [s.to_json(threshold) for s in every]
            write_json(folder.path / BREAKDOWN, {"drop": threshold, "series": content})
            if not tries or result["unfinished"]:
                return {**result, "breakdown": content}


def _judge(tries: Sequence[tuple[Series, int]], asked: Plan, result: Mapping[str, Any], judge: _Judge) -> None:
    """Enter what a generation has shown."""
    from fedsec.federation.assemble import resolve

    reasons = {record["id"]: record["reason"] for record in result["failed"]}
    for series, f in tries:
        calm, hit = resolve(series.calm), resolve(series.cell(f))
        failed = reasons.get(calm.key()) or reasons.get(hit.key())
        if failed:
            series.reason = failed
        elif calm.key() in asked.finished and hit.key() in asked.finished:
            series.drops[f] = judge.drop(calm, hit)


class _Judge:
    """Compares released models on the same test images."""

    def __init__(self, folder: RunFolder, data_dir: Path | None) -> None:
        self.folder, self.data_dir = folder, data_dir
        self._calm: dict[str, tuple[Federation, np.ndarray, np.ndarray]] = {}

    def drop(self, calm: Cell, hit: Cell) -> Estimate:
        """Loss of AUC from the calm federation to the attacked one, with its paired interval."""
        from fedsec.federation.assemble import assemble
        from fedsec.types import RoundContext

        if calm.key() not in self._calm:
            federation = assemble(calm, self.data_dir)
            self._calm[calm.key()] = (federation, *self._scores(federation, calm))
        federation, reference, labels = self._calm[calm.key()]
        dataset = federation.dataset
        return auc_drop(
            reference,
            self._scores(federation, hit)[0],
            labels,
            dataset.task,
            generator=RoundContext(calm.seed, 0, 0).numpy("breakdown-bootstrap"),
            positive_class=dataset.positive_class,
            groups=np.concatenate(federation.test_groups),
        )

    def _scores(self, federation: Federation, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
        from fedsec.experiment import training_key_of
        from fedsec.federation.desk import ServerState
        from fedsec.federation.evaluation import shared_scores
        from fedsec.federation.training import Training

        kept = Training.open(self.folder.artifacts(training_key_of(cell)), (), federation.dataset.fingerprint)
        assert kept is not None, "a finished cell has its training"
        params, buffers = (t.to(federation.device) for t in kept.snapshots[cell.federation.rounds + 1])
        pieces = shared_scores(federation, "test", ServerState(params, buffers))
        scores, labels = zip(*((s.numpy(), y.numpy()) for s, y in pieces), strict=True)
        return np.concatenate(scores), np.concatenate(labels)
