"""How good and how fast are the gradient inversion attacks, beside the peer toolkit `breaching` on the same uploads?

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.gradinversion --images 8 --json results.json --plot results.png

Every contender gets the same upload of one real step of SGD, the same knowledge of labels, the same seed and the same
CPU budget. One thread, CPU seconds after a warm-up; iterates are recorded at no cost to the clock and scored with the
truth once the attack is over. The peer is optional: `pip install -e .[bench]`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedsec.machine import prepare_for_small_networks
from fedsec.types import to_json

from . import contest, peer_breaching, scoreboard, victims

CASES = "lenet-b1,lenet-b4,mlp-b8,convnet-b1,convnet-b4,kermany64-b1,noise"
ROOT = Path(__file__).resolve().parents[2]


class ThreadsError(Exception):
    """More than one thread: times would mean nothing."""


def refuse_threads() -> None:
    """Small convolutions are 10-50 times slower with more threads than free cores; and rates differ between sides.

    Raises:
        ThreadsError: torch would use more than one.
    """
    if torch.get_num_threads() != 1:
        raise ThreadsError(f"{torch.get_num_threads()} threads: run again with OMP_NUM_THREADS=1")


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the seeds."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "breaching": peer_breaching.version(),
        "fedsec": commit or None,
    }


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def parse(words: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="NETWORK-bB[@NOISE], comma-separated (%(default)s)")
    parser.add_argument("--images", type=int, default=4, help="attacked images of each case, in batches of its size")
    parser.add_argument("--seeds", type=int, default=1, help="attack seeds, from 0")
    parser.add_argument("--budget", type=float, default=20.0, help="CPU seconds for one victim batch and contender")
    parser.add_argument(
        "--clock", choices=("cpu", "work"), default="cpu", help="ours stop by; work: counted, for a busy machine"
    )
    parser.add_argument("--methods", help="ours, comma-separated; default: auto and those that suit the network")
    parser.add_argument("--labels", choices=("recovered", "told"), default="recovered")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--states", default="untrained,trained", help="victims before and after training (%(default)s)")
    parser.add_argument("--keep", type=Path, default=ROOT / "runs/benchmark", help="folder for the trained victims")
    parser.add_argument("--json", type=Path, dest="json_file", help="write everything, curves included")
    parser.add_argument("--markdown", type=Path, help="write the table for docs/benchmarks.md")
    parser.add_argument("--plot", type=Path, help="write PSNR against CPU seconds (.png, .svg or .pdf)")
    return parser.parse_args(words)


def measure(arguments: argparse.Namespace, peers: bool, say: Any) -> list[dict[str, Any]]:
    """All rows."""
    rows = []
    methods = None if arguments.methods is None else arguments.methods.split(",")
    told = arguments.labels == "told"
    found = contest.rings(
        victims.parse(arguments.cases),
        states=arguments.states.split(","),
        told=told,
        budget_s=arguments.budget,
        clock=arguments.clock,
        keep=arguments.keep,
        say=say,
    )
    for ring in found:
        batches = victims.rows_of(ring.case, ring.data, max(1, arguments.images // ring.case.batch))
        shown = [victims.victim(ring.case, ring.model, ring.data, r, k, told=told) for k, r in enumerate(batches)]
        for name, contender in contest.contenders(ring, methods, peers).items():
            rows.append(contest.row(name, contender, ring, shown, arguments.seeds))
            say(scoreboard.line(rows[-1]))
    return rows


def main(words: list[str] | None = None) -> int:
    """Exit codes: 0 measured; 2 the request, the machine or the data do not allow it; 3 not the specified victims."""
    arguments = parse(words)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        errors.print(text, markup=False)

    peers = arguments.peers and peer_breaching.version() is not None
    try:
        refuse_threads()
        prepare_for_small_networks()  # the peer, in the same process, has the benefit of it too
        if arguments.peers and not peers:
            say("breaching is not installed (pip install -e .[bench]): our side alone")
        rows = measure(arguments, peers, say)
    except (ThreadsError, ValueError, FileNotFoundError) as error:
        say(f"error: {error}")
        return 2
    except victims.WrongVictimError as error:
        say(f"error: {error}")
        return 3
    scoreboard.show(rows)
    if arguments.json_file:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
        content = {**environment(), "settings": settings, "goals": scoreboard.goals(rows), "rows": rows}
        arguments.json_file.write_text(json.dumps(to_json(content), indent=1, allow_nan=False), encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(scoreboard.markdown(rows), encoding="utf-8")
    if arguments.plot:
        scoreboard.plot(rows, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
