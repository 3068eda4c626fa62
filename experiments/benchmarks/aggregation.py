"""How fast are the robust rules? Ratios to a plain mean of the same updates, beside peers, in one run.

    python experiments/benchmarks/aggregation.py --shapes 10x10000000 50x1000000

One thread, CPU seconds, the best of several calls after a warm-up. The machine is shared: only ratios within one run
mean something. Peers (byzfl 0.0.11, flwr, and a DOS made of scipy and pyod from its equations) are measured where they
are installed: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fedsec.attacks.poisoning.crafted import known_from
from fedsec.attacks.poisoning.rule_aware import search
from torch import Tensor

from fedsec import plugins
from fedsec.plugins import PluginSpec
from fedsec.robust.rule import Rule, WeightRule
from fedsec.types import Payload, RoundContext, Update

WEIGHT_RULES = (
    "fedavg",
    "norm_clip",
    "krum",
    "multi_krum",
    "geometric_median",
    "centered_clipping",
    "dnc",
    "dos",
    "dos_clipped",
    "dos_guarded",
)
COORDINATE_RULES = ("median", "trimmed_mean", "bulyan")
CTX = RoundContext(0, 1, 10)


@dataclass(frozen=True)
class Row:
    """One rule of one contender."""

    rule: str
    contender: str
    clients: int
    length: int
    seconds: float
    ratio: float
    peak_mb: float
    """Memory beyond the updates at its highest during one call, the result included."""
    difference: float | None = None
    """Largest difference from our result, relative to the largest entry."""


def resident(key: str) -> float:
    """MB of this process, from Linux: VmRSS now, VmHWM at its highest."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(key)) / 1024


def fresh_peak() -> float:
    """Forget the highest memory so far; returns the present one."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def cpu(call: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """(best CPU seconds, MB by which the process grew at its highest, result)."""
    before = fresh_peak()
    result = call()
    grown = resident("VmHWM") - before
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        best = min(best, time.process_time() - start)
    return best, grown, result


def updates_of(clients: int, length: int, malicious: int) -> Tensor:
    """Gaussian updates, the first few of them shifted."""
    x = torch.randn(clients, length, generator=torch.Generator().manual_seed(0)) * 0.01
    x[:malicious] += 0.02
    return x


def ours(rule: Rule, x: Tensor) -> Callable[[], Tensor]:
    """A whole round through the rule's aggregator, screening's norms given, as the server calls it."""
    norms = [float(row.norm()) for row in x]
    payloads = [Payload(k, Update(k, row, 100), row.numel() * 4, 100, norms[k]) for k, row in enumerate(x)]
    shares = dict.fromkeys(range(len(x)), 1 / len(x))

    def call() -> Tensor:
        aggregator = rule.aggregator()
        aggregator.begin(shares, CTX)
        for payload in payloads:
            aggregator.accumulate(payload, CTX)
        delta = aggregator.finish(CTX).delta
        assert delta is not None
        return delta

    return call


def byzfl_rules(f: int) -> dict[str, Any]:
    """byzfl's objects by our names."""
    try:
        import byzfl
    except ImportError:
        return {}
    return {
        "median": byzfl.Median(),
        "trimmed_mean": byzfl.TrMean(f=f),
        "krum": byzfl.Krum(f=f),
        "multi_krum": byzfl.MultiKrum(f=f),
        "geometric_median": byzfl.GeometricMedian(nu=0.1, T=3),
        "centered_clipping": byzfl.CenteredClipping(m=None, L=5, tau=100.0),
    }


def flwr_rules(clients: int, f: int) -> dict[str, Callable[[Any], Any]]:
    """flwr's functions by our names, on ([flat array], count) pairs."""
    try:
        from flwr.server.strategy import aggregate as rules
    except ImportError:
        return {}
    return {
        "median": rules.aggregate_median,
        "trimmed_mean": lambda results: rules.aggregate_trimmed_avg(results, f / clients),
        "krum": lambda results: rules.aggregate_krum(results, f, 0),
    }


def dos_by_its_authors(x: np.ndarray) -> np.ndarray:
    """Distances by scipy in float64, scores by pyod, softmax; the equations, not the authors' code."""
    from pyod.models.copod import COPOD
    from scipy.spatial import distance_matrix
    from scipy.spatial.distance import cdist

    wide = x.astype(np.float64)
    scores = np.zeros(len(x))
    for matrix in (distance_matrix(wide, wide), cdist(wide, wide, metric="cosine")):
        scores += COPOD().fit(matrix).decision_function(matrix)
    weights = np.exp(-(scores - scores.min()))
    return (weights / weights.sum()) @ x


def measure_shape(clients: int, length: int, repeats: int, peers: bool) -> list[Row]:
    """All contenders on one matrix of updates."""
    malicious = {10: 3, 50: 10, 100: 20}.get(clients, clients // 5)
    x = updates_of(clients, length, malicious)
    plain, _, _ = cpu(lambda: x.mean(0), max(5, repeats))
    rows = [Row("mean", "torch", clients, length, plain, 1.0, 0.0)]
    results: dict[str, Tensor] = {}
    for name in (*WEIGHT_RULES, *COORDINATE_RULES):
        f = min(malicious, (clients - 3) // 4) if name == "bulyan" else malicious
        rule = plugins.build("defenses", PluginSpec(name, {"declared_f": f}))
        seconds, grown, results[name] = cpu(ours(rule, x), repeats)
        rows.append(Row(name, "fedsec", clients, length, seconds, seconds / plain, grown))
    if not peers:
        return rows

    def add(name: str, contender: str, call: Callable[[], Any]) -> None:
        seconds, grown, found = cpu(call, 1 if plain > 0.02 else repeats)
        found = torch.as_tensor(np.asarray(found[0] if isinstance(found, list) else found))
        own = results[name]
        difference = float((found - own).abs().max() / own.abs().max())
        rows.append(Row(name, contender, clients, length, seconds, seconds / plain, grown, difference))

    for name, rule in byzfl_rules(malicious).items():
        add(name, "byzfl", lambda rule=rule: rule(x))
    arrays = [([row.numpy()], 1) for row in x]
    for name, function in flwr_rules(clients, malicious).items():
        add(name, "flwr", lambda function=function: function(arrays))
    if clients * length <= 10**7:
        try:
            import pyod  # noqa: F401

            add("dos", "scipy + pyod", lambda: dos_by_its_authors(x.numpy()))
        except ImportError:
            pass
    return rows


def measure_search(length: int, repeats: int, peers: bool) -> list[dict[str, Any]]:
    """The rule-aware search with 20 evaluations, 7 honest clients and 3 malicious ones."""
    x = updates_of(7, length, 0) + 0.01
    rows = []
    for name in ("krum", "multi_krum", "dos"):
        rule = plugins.build("defenses", PluginSpec(name, {"declared_f": 3}))
        assert isinstance(rule, WeightRule)
        seconds, _, found = cpu(lambda rule=rule: search(known_from(list(x)), rule, 3, families=("ipm",)), repeats)
        row = {
            "rule": name,
            "length": length,
            "seconds": seconds,
            "evaluations": found.evaluations,
            "found": found.value,
        }
        if peers and name != "dos":
            try:
                import byzfl

                aggregator = byzfl.Krum(f=3) if name == "krum" else byzfl.MultiKrum(f=3)
                attack = byzfl.Optimal_InnerProductManipulation(aggregator, [], f=3, evals=20)
                row["byzfl_seconds"], _, _ = cpu(lambda attack=attack: attack(x), 1)
            except ImportError:
                pass
        rows.append(row)
    return rows


def show(rows: Sequence[Row], searches: Sequence[dict[str, Any]]) -> None:
    """Tables on standard output."""
    for shape in dict.fromkeys((r.clients, r.length) for r in rows):
        print(f"\n{shape[0]} clients x {shape[1]:,} parameters")
        for r in [r for r in rows if (r.clients, r.length) == shape]:
            off = "" if r.difference is None else f"   differs {r.difference:.1e}"
            cost = f"{1e3 * r.seconds:10.1f} ms {r.ratio:9.1f} x mean {r.peak_mb:8.0f} MB"
            print(f"  {r.rule:18} {r.contender:13} {cost}{off}")
    for s in searches:
        peer = (
            f"   byzfl {1e3 * s['byzfl_seconds']:.0f} ms, {s['byzfl_seconds'] / s['seconds']:.0f} x"
            if "byzfl_seconds" in s
            else ""
        )
        print(
            f"search against {s['rule']:11} {s['length']:,} parameters, {s['evaluations']} evaluations: "
            f"{1e3 * s['seconds']:.1f} ms, |A-m|/|m| {s['found']:.2f}{peer}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["10x1000000", "10x10000000", "50x1000000"], metavar="NxD")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peers = not options.no_peers
    rows = []
    for shape in options.shapes:
        clients, length = (int(part) for part in shape.split("x"))
        rows += measure_shape(clients, length, options.repeats, peers)
    searches = measure_search(10**6, options.repeats, peers)
    show(rows, searches)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump({"rules": [vars(r) for r in rows], "search": searches}, file, indent=1)


if __name__ == "__main__":
    main()
