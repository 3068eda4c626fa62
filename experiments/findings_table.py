"""Trained federations on chest X-rays with several findings, beside a linear baseline on the same split.

    python experiments/findings_table.py runs/nih14_densenet

Prints a row for each cell of the run and one for PCA + logistic regression (60 components, balanced classes, one model
a finding): the macro AUC over the findings that the test part has positives and negatives of, the AUC of "any finding",
and each finding's own. `--json` prints everything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsec import config
from fedsec.data.base import Dataset
from fedsec.experiment import open_stage
from fedsec.federation.assemble import dataset_of
from fedsec.metrics import utility as measures
from fedsec.models.loss import probabilities

Array = NDArray[np.float64]
COMPONENTS = 60
DRAWS = 1000
BATCH = 128


def measured(scores: Array, labels: Array, groups: Any, names: Sequence[str]) -> dict[str, Any]:
    """Macro AUC, AUC of any finding, and each finding's, with intervals that resample patients."""
    generator = np.random.default_rng(0)
    found = measures.utility(
        scores, labels, "multilabel", class_names=names, groups=groups, generator=generator, draws=DRAWS
    )
    any_score = 1 - np.prod(1 - scores, axis=1)
    two = np.stack([1 - any_score, any_score], axis=1)
    anything = measures.utility(
        two, labels.max(axis=1).astype(np.int64), "binary", groups=groups, generator=generator, draws=DRAWS
    )
    return {
        "auc": found["auc"].to_json(),
        "any_finding": anything["auc"].to_json(),
        "by_finding": {name: item.to_json() for name, item in found["auc_by_class"].items()},
        "absent": found["auc_skipped"],
    }


def linear_baseline(dataset: Dataset) -> dict[str, Any]:
    """PCA and one balanced logistic regression for each finding, and one for any, on all training images."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = {part: np.flatnonzero(dataset.split == part) for part in ("train", "test")}
    parts = {part: dataset.batch(r) for part, r in rows.items()}
    x = {part: images.flatten(1).numpy() for part, (images, _) in parts.items()}
    y = {part: labels.numpy() for part, (_, labels) in parts.items()}

    def scores(target: NDArray[Any]) -> Array:
        model = make_pipeline(
            PCA(COMPONENTS, random_state=0),
            StandardScaler(),
            LogisticRegression(class_weight="balanced", max_iter=2000),
        )
        result: Array = model.fit(x["train"], target).predict_proba(x["test"])[:, 1]
        return result

    columns = [
        scores(y["train"][:, k]) if len(np.unique(y["train"][:, k])) == 2 else np.zeros(len(x["test"]))
        for k in range(y["train"].shape[1])
    ]
    groups = dataset.groups()[rows["test"]]
    result = measured(np.stack(columns, axis=1), y["test"], groups, dataset.class_names)
    direct = scores(y["train"].max(axis=1))
    anything = measures.utility(
        np.stack([1 - direct, direct], axis=1),
        y["test"].max(axis=1).astype(np.int64),
        "binary",
        groups=groups,
        generator=np.random.default_rng(0),
        draws=DRAWS,
    )
    result["any_finding"] = anything["auc"].to_json()
    return result


def network(cell: config.Cell, folder: Path, data_dir: Path | None) -> dict[str, Any]:
    """The same measures of a cell's released model, from the run's kept training."""
    stage = open_stage(cell, folder / "artifacts", data_dir)
    federation, training = stage.federation, stage.training
    model = federation.build_model(training.snapshots[cell.federation.rounds + 1]).eval()
    dataset = federation.dataset
    rows = np.flatnonzero(dataset.split == "test")
    x, y = dataset.batch(rows)
    with torch.no_grad():
        batches = x.to(federation.device).split(BATCH)
        scores = torch.cat([probabilities(model(b), dataset.task) for b in batches]).double().cpu().numpy()
    return measured(scores, y.numpy(), dataset.groups()[rows], dataset.class_names)


def table(folder: Path, data_dir: Path | None) -> dict[str, dict[str, Any]]:
    """Row name -> measures."""
    resolved = json.loads((folder / "resolved.json").read_text(encoding="utf-8"))["cells"]
    cells = [config.Cell.from_json(content) for content in resolved]
    rows: dict[str, dict[str, Any]] = {"PCA + logistic regression": linear_baseline(dataset_of(cells[0], data_dir))}
    for cell in cells:
        finished = json.loads((folder / "cells" / f"{cell.key()}.json").read_text(encoding="utf-8"))
        name = f"{cell.model.name}, {cell.federation.topology}, {cell.label()}, seed {cell.seed}"
        utility = finished["utility"]
        by_finding, absent = utility["auc_by_class"], utility["auc_skipped"]
        rows[name] = {"auc": utility["auc"], "by_finding": by_finding, "absent": absent}
        if cell.federation.topology != "local":  # whose hospitals have a model each
            rows[name]["any_finding"] = network(cell, folder, data_dir)["any_finding"]
    return rows


def shown(estimate: Mapping[str, Any] | None, interval: bool = True) -> str:
    """`0.73 [0.70, 0.76]`."""
    if not estimate or estimate["value"] is None:
        return ""
    text = f"{estimate['value']:.3f}"
    return f"{text} [{estimate['low']:.3f}, {estimate['high']:.3f}]" if interval else text


def printed(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a model, a column a finding."""
    findings = list(next(iter(rows.values()))["by_finding"])
    lines = ["| | macro AUC | any finding | " + " | ".join(findings) + " |", "|---" * (3 + len(findings)) + "|"]
    for name, row in rows.items():
        own = [shown(row["by_finding"].get(finding), interval=False) for finding in findings]
        lines.append(f"| {name} | {shown(row['auc'])} | {shown(row.get('any_finding'))} | " + " | ".join(own) + " |")
    absent = next(iter(rows.values()))["absent"]
    lines.append(f"\nMean over {len(findings)} findings; absent from the test part: {', '.join(absent) or 'none'}.")
    return "\n".join(lines)


def main() -> None:
    """Read a run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = table(options.folder, options.data_dir)
    print(json.dumps(rows, indent=1) if options.json else printed(rows))


if __name__ == "__main__":
    main()
