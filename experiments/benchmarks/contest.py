"""One row of the benchmark: a contender on the victims of one case, its images scored once the attack is over."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from fedsec.attacks.gradinversion.auto import METHODS, reconstruct
from fedsec.attacks.gradinversion.observation import observe
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.settings import ClockKind, Method, Settings
from torch import Tensor, nn

from fedsec.metrics.image import nearest_public_psnr, ssim

from . import peer_breaching, tracing, victims
from .tracing import Recorder

MARKS = (20, 30, 40)
"""dB to which the time is taken."""
BRIEF, REPEATS = 0.5, 3
"""Attacks shorter than so many CPU seconds are timed so often, and the run with the median time counts."""
WARM_UP_S, WARM_UP_STEPS = 1.0, 3
NAMED = {
    "lenet": ("dlg", "inverting_gradients"),
    "kermany64": ("inverting_gradients",),
    "mlp": ("peel", "spear"),
    "convnet": ("bn_prior", "inverting_gradients"),
    "convnet64": ("bn_prior",),
}
"""Our methods beside `auto`; those that this version does not have are left out."""


@dataclass(frozen=True)
class Ring:
    """One case in one state: everything that all contenders share."""

    case: victims.Case
    state: str
    """`untrained` or `trained`."""
    data: victims.XRays
    prior: Prior
    model: nn.Module
    told: bool
    budget_s: float
    clock: ClockKind = "cpu"
    """`work`: our budgets are counted work, the same however busy the machine is."""


@dataclass(frozen=True)
class Bout:
    """One contender on one victim batch."""

    images: Tensor
    """(B, C, H, W) as handed in."""
    labels: Tensor
    label_source: str
    method: str
    seconds: float
    """Net CPU seconds."""
    points: tuple[tracing.Point, ...]
    certified: int = 0
    est_psnr: float | None = None
    not_applicable: str = ""


class Contender(Protocol):
    """Attacks one upload with a seed and a budget of net CPU seconds; `short` only warms up."""

    def __call__(
        self, ring: Ring, victim: victims.Victim, seed: int, budget_s: float, *, short: bool = False
    ) -> Bout: ...


def ours(method: str, ring: Ring, victim: victims.Victim, seed: int, budget_s: float, *, short: bool = False) -> Bout:
    """One of our methods through the package's own building blocks; the budget is enough to make it short."""
    recorder = Recorder(tuple(victim.images.shape))
    shape = cast("tuple[int, int, int]", tuple(victim.images.shape[1:]))
    observation = tracing.recorded(observe(victim.view, ring.model, ring.prior, shape), recorder)
    settings = Settings(method=cast(Method, method), budget_s=budget_s, clock=ring.clock)
    done = reconstruct(observation, settings, torch.Generator().manual_seed(seed + 1))
    seconds = recorder.seconds
    source = "told" if ring.told else done.label_source
    reason = "" if method == "auto" else "; ".join(done.not_applicable.values())
    found = done.certified, done.est_psnr, reason
    return Bout(done.images, done.labels, source, done.method, seconds, tuple(recorder.points), *found)


def theirs(
    configuration: str, ring: Ring, victim: victims.Victim, seed: int, budget_s: float, *, short: bool = False
) -> Bout:
    """The peer, on the same gradient."""
    shape = cast("tuple[int, int, int]", tuple(victim.images.shape[1:]))
    observation = observe(victim.view, ring.model, ring.prior, shape)
    net = ring.model.get_submodule("net")
    level, spread = (ring.model.get_buffer(name).flatten() for name in ("mean", "std"))
    recorder = Recorder(tuple(victim.images.shape))
    done = peer_breaching.reconstruct(
        configuration,
        observation,
        net,
        level,
        spread,
        recorder,
        seed=seed + 1,
        budget_s=budget_s,
        iterations=WARM_UP_STEPS if short else None,
    )
    seconds = recorder.seconds
    method = configuration.removeprefix("breaching ")
    return Bout(done.images.detach(), done.labels, done.label_source, method, seconds, tuple(recorder.points))


def contenders(ring: Ring, methods: Sequence[str] | None, peers: bool) -> dict[str, Contender]:
    """Name -> contender: `auto`, our methods by name, and the peer's configurations."""
    named = ("auto", *NAMED[ring.case.network]) if methods is None else methods
    found: dict[str, Contender] = {f"fedsec {m}": partial(ours, m) for m in named if m in METHODS}
    if peers:
        found |= {name: partial(theirs, name) for name in peer_breaching.CONFIGURATIONS}
    return found


def warm_up(contender: Contender, ring: Ring) -> None:
    """First calls import, compile and allocate: a short attack on public images, before any clock runs."""
    public = ring.data.public
    size = ring.case.batch
    twin = victims.XRays("public", public.images, public.labels, (), public, ring.data.mean, ring.data.std)
    victim = victims.victim(ring.case, ring.model, twin, tuple(range(size)), 0, told=ring.told)
    contender(ring, victim, 0, WARM_UP_S, short=True)


def timed(contender: Contender, ring: Ring, victim: victims.Victim, seed: int) -> Bout:
    """One bout; brief ones are repeated, and that with the median time counts."""
    bouts = [contender(ring, victim, seed, ring.budget_s)]
    if bouts[0].seconds < BRIEF:
        bouts += [contender(ring, victim, seed, ring.budget_s) for _ in range(REPEATS - 1)]
    return sorted(bouts, key=lambda bout: bout.seconds)[len(bouts) // 2]


def row(name: str, contender: Contender, ring: Ring, shown: Sequence[victims.Victim], seeds: int) -> dict[str, Any]:
    """The contender on all victims of the ring, with every attack seed."""
    warm_up(contender, ring)
    results = [score(timed(contender, ring, v, s), v, ring) | {"seed": s} for s in range(seeds) for v in shown]

    def column(key: str) -> Iterator[Any]:
        return (result[key] for result in results)

    errors = [10 ** (-psnr / 10) for psnr in column("psnr")]
    methods = list(column("method"))
    return {
        "case": ring.case.name,
        "state": ring.state,
        "contender": name,
        "victims": len(results),
        "batch": ring.case.batch,
        "answered_by": max(set(methods), key=methods.count),
        "labels": ", ".join(sorted(set(column("label_source")))),
        "psnr": statistics.median(column("psnr")),
        "psnr_lowest": min(column("psnr")),
        "psnr_of_mean_mse": -10 * torch.tensor(statistics.fmean(errors)).clamp(min=1e-14).log10().item(),
        "ssim": statistics.median(column("ssim")),
        "cpu_seconds": statistics.median(column("cpu_seconds")),
        "cpu_seconds_slowest": max(column("cpu_seconds")),
        "seconds_to": {str(m): median_time([r["seconds_to"][str(m)] for r in results]) for m in MARKS},
        "certified": sum(column("certified")),
        "images": len(results) * ring.case.batch,
        "labels_right": statistics.fmean(column("labels_right")),
        "prior_psnr": statistics.median(column("prior_psnr")),
        "nearest_public_psnr": statistics.median(column("nearest_public_psnr")),
        "not_applicable": next((r["not_applicable"] for r in results if r["not_applicable"]), ""),
        "victim_rows": results,
    }


def score(bout: Bout, victim: victims.Victim, ring: Ring) -> dict[str, Any]:
    """Everything that needs the truth, after the attack."""
    truth, mean = victim.images, ring.prior.mean
    images = tracing.matched(bout.images, truth, mean)
    traced = tracing.curve(bout.points, bout.images, truth, ring.prior)
    final = tracing.batch_psnr(bout.images, truth, mean)
    if not traced or final > traced[-1][1]:
        traced.append((bout.seconds, final))
    similarity = ssim(images, truth)
    wanted, offered = victim.labels.sort()[0], bout.labels.flatten().sort()[0]
    return {
        "rows": list(victim.rows),
        "psnr": final,
        "ssim": float("nan") if similarity is None else float(similarity.mean()),
        "cpu_seconds": bout.seconds,
        "seconds_to": {str(mark): tracing.first_at(traced, mark) for mark in MARKS},
        "method": bout.method,
        "label_source": bout.label_source,
        "labels_right": float(len(offered) == len(wanted) and torch.equal(offered, wanted)),
        "certified": bout.certified,
        "est_psnr": bout.est_psnr,
        "prior_psnr": tracing.batch_psnr(mean.expand_as(truth), truth, mean),
        "nearest_public_psnr": float(nearest_public_psnr(truth, ring.data.public.images).mean()),
        "not_applicable": bout.not_applicable,
        "curve": tracing.thinned(traced),
    }


def median_time(seconds: Sequence[float | None]) -> float | None:
    """The median over victims, where never counts as longest; None where that is the median."""
    value = statistics.median_high([float("inf") if s is None else s for s in seconds])
    return None if value == float("inf") else value


def rings(
    cases: Sequence[victims.Case],
    *,
    states: Sequence[str],
    told: bool,
    budget_s: float,
    clock: ClockKind = "cpu",
    keep: Path | None,
    say: Callable[[str], None],
) -> Iterator[Ring]:
    """Every case in each of its states, after its network's check values have been reproduced.

    Raises:
        WrongVictimError: they have not.
    """
    loaded: dict[str, tuple[victims.XRays, Prior]] = {}
    checked: set[str] = set()
    for case in cases:
        if case.data not in loaded:
            data = victims.load(case.data)
            began = time.process_time()
            loaded[case.data] = data, victims.prior_of(data)
            say(f"{case.data}: prior of {len(data.public.images)} public images: {time.process_time() - began:.1f} s")
        data, prior = loaded[case.data]
        if case.network not in checked:
            checked.add(case.network)
            for name, (loss, norm) in victims.check(case.network, data).items():
                say(f"{name}: loss {loss:.6f}, gradient norm {norm:.6g}: as specified")
        for state in states:
            model = victims.build(case, data, trained=state == "trained", keep=keep)
            yield Ring(case, state, data, prior, model, told, budget_s, clock)
