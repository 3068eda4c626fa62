"""What sharing trainings saves: 40 cells on 8 trainings, against the 8 trainings alone and the attacks.

    FEDSEC_DATA=… python experiments/benchmarks/sharing.py

Two sweeps in turn, each of one job and one thread, in seconds of an idle machine:

1. the 8 trainings with nothing attacked;
2. 40 cells: five attacks on each of the trainings, whose own seconds the cells say.

Said: the second, divided by the first and the attacks. The goal is 1.3 at most. Process starts are in both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """
seeds = 2

[data]
name = "pneumoniamnist"
max_train = 1000

[model]
name = "cnn"

[federation]
clients = 4
rounds = 4
local_epochs = 2
engine = "serial"

[[defense]]
name = "none"

[[defense]]
name = "topk"

[[defense]]
name = "gaussian"
sigma = [0.001, 0.01]
"""
ATTACKS = """
[[attack]]
name = "gradinversion"
images = 1
rounds = "last"
budget_s = 0.5
bound = false
tv = [0.001, 0.01]

[[attack]]
name = "membership"
shadows = 0
methods = ["loss", "loss_series+loss"]

[[attack]]
name = "extras"
"""


def swept(folder: Path, name: str, recipe: str) -> tuple[float, list[dict[str, object]]]:
    """Seconds of one sweep, and its cells."""
    path = folder / f"{name}.toml"
    path.write_text(recipe)
    start = time.perf_counter()
    command = [sys.executable, "-m", "fedsec", "sweep", str(path), "--jobs", "1", "--out", str(folder / name)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    spent = time.perf_counter() - start
    return spent, [json.loads(line) for line in (folder / name / "results.jsonl").read_text().splitlines()]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as made:
        alone, trainings = swept(Path(made), "trainings", RECIPE)
        whole, cells = swept(Path(made), "sweep", RECIPE + ATTACKS)
    attacks = sum(float(c["cost"]["attack_seconds"]) for c in cells)  # type: ignore[index]
    shared = len({c["training"] for c in cells})
    print(f"{len(trainings)} trainings alone: {alone:.0f} seconds")
    print(f"{len(cells)} cells on {shared} trainings: {whole:.0f} seconds, of which attacks {attacks:.0f}")
    print(f"ratio to trainings and attacks: {whole / (alone + attacks):.2f} (goal 1.3)")
    sys.exit(0 if len(cells) == 5 * shared and whole <= 1.3 * (alone + attacks) else 1)


if __name__ == "__main__":
    main()
