"""Finished cells, handed on to the tracker that a team already looks at: TensorBoard or MLflow.

Fed from the result cells alone, so that a tracker can be filled at any time, again, and on another machine. Nothing
here runs during training. Pictures of patients are never handed on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from fedsec.errors import ConfigError
from fedsec.progress import Progress
from fedsec.store import RunFolder
from fedsec.tradeoff import attack_label, command_of, defense_label

Tracker = Literal["tensorboard", "mlflow"]
SECTIONS = ("utility", "leakage", "robustness", "fairness", "privacy", "cost")
"""Of a cell, whose numbers are handed on."""
CELL = "fedsec.cell"
"""Tag of an MLflow run: the id of the cell, by which a second call knows what is there."""


def track(
    run: str | Path,
    to: Tracker,
    *,
    uri: str | None = None,
    experiment: str = "fedsec",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Hand all finished cells of a run folder on to a tracker; those that it has already are left alone.

    Args:
        run: run folder.
        to: the tracker.
        uri: of TensorBoard the folder of the event files, by default `RUN/tensorboard`; of MLflow the tracking server,
            `sqlite:///FILE` or a folder, by default what `MLFLOW_TRACKING_URI` says, else `RUN/mlflow.db`.
        experiment: of MLflow; made where it does not exist.
        progress: told how far it is.

    Returns:
        `{"uri": where, "written": n, "present": n}`.

    Raises:
        ConfigError: not a run folder, nothing finished, or the extra `fedsec[track]` is not installed.
    """
    folder, report = RunFolder.open(Path(run)), progress or Progress()
    cells = list(folder.results())
    if not cells:
        raise ConfigError(f"{run}: no finished cell to hand on; fedsec show says what is missing")
    asked = {item["id"]: item for item in folder.resolved()}
    open_writer = {"tensorboard": _tensorboard, "mlflow": _mlflow}[to]
    where, known, write = open_writer(folder.path, uri, experiment)
    report.stage(f"cells to {to}", len(cells))
    written = 0
    for count, cell in enumerate(cells, 1):
        if cell["id"] not in known:
            write(cell, parameters(cell), dict(numbers(cell)), curves(folder, cell), _command(asked, cell, folder))
            written += 1
        report.advance(count)
    return {"uri": where, "written": written, "present": len(cells) - written}


Curves = Mapping[str, list[tuple[int, float]]]
Write = Callable[[Mapping[str, Any], Mapping[str, str], Mapping[str, float], Curves, str], None]


def parameters(cell: Mapping[str, Any]) -> dict[str, str]:
    """What was asked of a cell, each under one word."""
    return {
        "dataset": str(cell["dataset"]),
        "model": str(cell["model"]),
        "attack": attack_label(cell),
        "defense": defense_label(cell),
        "strategy": str(cell.get("strategy", "")),
        "seed": str(cell["seed"]),
    }


def numbers(cell: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(dotted path, value) of every number in a cell's result; of an estimate its value, `.low` and `.high`.

    Rows of single images or clients, and what is not finite, are left out.
    """
    for section in SECTIONS:
        yield from _numbers(section, cell.get(section))


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        if math.isfinite(value):
            yield path, float(value)
    elif isinstance(value, Mapping):
        if "value" in value and "low" in value:
            for key in ("value", "low", "high"):
                yield from _numbers(path if key == "value" else f"{path}.{key}", value.get(key))
            return
        for key, item in value.items():
            yield from _numbers(f"{path}.{key}", item)


def curves(folder: RunFolder, cell: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Name -> (round, value) of what was recorded in each round of a cell's training."""
    path = folder.artifacts(cell["training"]) / "training.json"
    if not path.is_file():
        return {}
    history = json.loads(path.read_text(encoding="utf-8"))["history"]
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if key != "round" and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(f"round.{key}", []).append((int(entry["round"]), float(value)))
    return found


def _command(asked: Mapping[str, Any], cell: Mapping[str, Any], folder: RunFolder) -> str:
    item = asked.get(cell["id"])
    return command_of(item, str(folder.path)) if item else ""


def _tensorboard(run: Path, uri: str | None, experiment: str) -> tuple[str, set[str], Write]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("TensorBoard is not installed: pip install 'fedsec[track]'") from None
    root = Path(uri) if uri else run / "tensorboard"
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".*"):  # of a call that was killed
        shutil.rmtree(left, ignore_errors=True)

    def write(
        cell: Mapping[str, Any], words: Mapping[str, str], values: Mapping[str, float], lines: Curves, command: str
    ) -> None:
        # Whole or not at all: the folder gets its name when everything is in it.
        draft = Path(tempfile.mkdtemp(prefix=".", dir=root))
        with SummaryWriter(str(draft)) as writer:
            for name, points in lines.items():
                for step, value in points:
                    writer.add_scalar(name.replace(".", "/"), value, step)
            for name, value in values.items():
                writer.add_scalar(name.replace(".", "/", 1), value, 0)
            text = "\n".join(f"- **{key}**: {value}" for key, value in words.items())
            writer.add_text("cell", f"{text}\n\n`{command}`", 0)
        draft.chmod(0o755)
        draft.rename(root / cell["id"])

    return str(root), {path.name for path in root.iterdir() if path.is_dir()}, write


def _mlflow(run: Path, uri: str | None, experiment: str) -> tuple[str, set[str], Write]:
    # A hospital's machine tells nobody outside what it does.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise ConfigError("MLflow is not installed: pip install 'fedsec[track]'") from None
    where = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run / 'mlflow.db').resolve()}"
    try:
        client = MlflowClient(tracking_uri=where)
        found = client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else client.create_experiment(experiment)
        known, token = set(), None
        while True:
            page = client.search_runs([number], "attributes.status = 'FINISHED'", page_token=token)
            known |= {item.data.tags[CELL] for item in page if CELL in item.data.tags}
            token = page.token
            if not token:
                break
    except (MlflowException, OSError, ImportError) as error:
        raise ConfigError(f"{where}: MLflow cannot use this store ({str(error).splitlines()[0]})") from None

    def write(
        cell: Mapping[str, Any], words: Mapping[str, str], values: Mapping[str, float], lines: Curves, command: str
    ) -> None:
        name = f"{words['attack']} on {words['defense']}, seed {words['seed']}"
        made = client.create_run(number, run_name=name, tags={CELL: cell["id"], "fedsec.command": command[:5000]})
        at = made.info.start_time
        metrics = [Metric(key, value, at, 0) for key, value in values.items()]
        metrics += [Metric(key, value, at, step) for key, points in lines.items() for step, value in points]
        params = [Param(key, value[:6000]) for key, value in words.items()]
        for start in range(0, len(metrics), 1000):  # MLflow's limit of one request
            client.log_batch(made.info.run_id, metrics[start : start + 1000])
        client.log_batch(made.info.run_id, params=params, tags=[RunTag("fedsec.training", cell["training"])])
        client.set_terminated(made.info.run_id, "FINISHED")

    return where, known, write
