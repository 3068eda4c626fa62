"""Shadow models: the same federation, trained again on halves of the images whose membership is in question.

Each candidate is in exactly half of the shadows: they come in pairs, of which one is trained on a random half of the
patients and the other on the rest. Everything else is the target's: architecture, optimiser, schedule, number of
clients, rounds, defenses. Every finished shadow is kept, so that an interrupted audit goes on where it was.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsec import checkpoint
from fedsec.config import content_hash
from fedsec.data.digest import fingerprint
from fedsec.data.partition import partition
from fedsec.errors import ConfigError, RunError
from fedsec.federation.aggregate import WeightedMean
from fedsec.federation.assemble import Federation, federate
from fedsec.federation.desk import ServerState
from fedsec.federation.engines.base import ClientData
from fedsec.federation.engines.serial import Serial
from fedsec.federation.participation import Participation
from fedsec.federation.round import run_round
from fedsec.federation.seats import Seats
from fedsec.findings import Shadows
from fedsec.machine import prepare_for_small_networks, usable_cores
from fedsec.progress import Progress
from fedsec.types import RoundContext

Weights = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ShadowJob:
    """One shadow's whole training, light enough to travel to another process."""

    seats: Seats
    clients: ClientData
    participation: Participation
    rounds: int
    seed: int
    start: ServerState

    def run(self) -> Weights:
        """All rounds; the parameters and buffers of the model."""
        state = self.start.copy()
        with Serial(self.seats, self.clients) as engine:
            for number in range(1, self.rounds + 1):
                ctx = RoundContext(self.seed, number, self.rounds)
                run_round(self.seats, state, self.participation.select(len(self.clients), ctx), ctx, engine.train)
        return state.params.cpu(), state.buffers.cpu()


def halves(groups: NDArray[np.str_], count: int, seed: int) -> NDArray[np.bool_]:
    """(count, N) bool: who is in which shadow. Shadows 2j and 2j+1 are complements; patients are never split.

    A pair depends on the seed and j alone: more shadows keep the first ones.

    Raises:
        ConfigError: an odd number, or none.
    """
    if count < 2 or count % 2:
        raise ConfigError(f"shadows={count}: give an even number, so that every image is in half of them")
    _, index = np.unique(groups, return_inverse=True)
    sizes = np.bincount(index)
    rows = []
    for pair in range(count // 2):
        order = RoundContext(seed, pair, 0).numpy("shadow-halves").permutation(len(sizes))
        before = np.cumsum(sizes[order]) - sizes[order] / 2
        chosen = np.zeros(len(sizes), dtype=bool)
        chosen[order[before < len(groups) / 2]] = True
        rows += [chosen[index], ~chosen[index]]
    return np.array(rows)


def train_shadows(
    federation: Federation,
    rows: NDArray[np.int64],
    count: int,
    folder: Path,
    progress: Progress | None = None,
    deadline: float | None = None,
) -> Shadows:
    """Train the shadows of a federation, or find them.

    Args:
        federation: the target's. rows: data set rows (N,) of the candidates. count: of shadows, even.
        folder: finished shadows are kept in `shadows-<hash>` below it, a file each.
        deadline: `time.monotonic()` by which to be done: pairs that would not be are left out, but for the first.

    Raises:
        RunError: a worker process died.
    """
    progress = progress or Progress()
    seed = RoundContext(federation.cell.seed, 0, 0).entropy("shadows")
    contains = halves(federation.dataset.groups()[rows], count, seed)
    place = folder / f"shadows-{recipe_hash(federation, rows)}"
    paths = [place / f"{number:03d}.safetensors" for number in range(count)]
    missing = [n for n, path in enumerate(paths) if not path.is_file()]
    if missing:
        progress.stage("training shadow models", count)

        def job(number: int) -> ShadowJob:
            return shadow_job(federation, rows[contains[number]], RoundContext(seed, number, 1).entropy("shadow"))

        _fill(job, paths, missing, federation, progress, deadline)
    complete = [n for n in range(0, count, 2) if paths[n].is_file() and paths[n + 1].is_file()]
    kept = [n for first in complete for n in (first, first + 1)]
    contains = contains[kept]
    loaded = [checkpoint.load(paths[n])[0] for n in kept]
    device = federation.device
    trained = [(t["params"].to(device), t["buffers"].to(device)) for t in loaded]
    return Shadows(contains, tuple(partial(federation.build_model, pair) for pair in trained))


def train_models(
    federation: Federation,
    rows: NDArray[np.int64],
    sets: Sequence[NDArray[np.int64]],
    folder: Path,
    progress: Progress | None = None,
) -> tuple[Callable[[], nn.Module], ...]:
    """Train one model on each set of images, by the recipe of a federation, or find them.

    Args:
        rows: data set rows. sets: positions in `rows`.
    """
    progress = progress or Progress()
    seed = RoundContext(federation.cell.seed, 0, 0).entropy("models")
    chosen = [rows[positions] for positions in sets]
    place = folder / f"models-{recipe_hash(federation, np.concatenate(chosen))}"
    paths = [place / f"{number:03d}-{fingerprint(own)[:8]}.safetensors" for number, own in enumerate(chosen)]
    missing = [n for n, path in enumerate(paths) if not path.is_file()]
    if missing:
        progress.stage("training models to compare with", len(paths))

        def job(number: int) -> ShadowJob:
            return shadow_job(federation, chosen[number], RoundContext(seed, number, 1).entropy("shadow"))

        _fill(job, paths, missing, federation, progress)
    loaded = [checkpoint.load(path)[0] for path in paths]
    device = federation.device
    return tuple(partial(federation.build_model, (t["params"].to(device), t["buffers"].to(device))) for t in loaded)


def _fill(
    job: Callable[[int], ShadowJob],
    paths: Sequence[Path],
    missing: Sequence[int],
    federation: Federation,
    progress: Progress,
    deadline: float | None = None,
) -> None:
    """Train what is missing and keep each as soon as it is there; with a deadline in pairs, as long as they fit."""
    pooled = federation.cell.federation.engine == "processes"
    workers = min(usable_cores(), len(missing)) if pooled else 1
    start, trained = time.monotonic(), 0
    for block in [missing] if deadline is None else _pairs(missing):
        for number, weights in _run(job, block, workers):
            checkpoint.save(paths[number], dict(zip(("params", "buffers"), weights, strict=True)), {})
            progress.advance(sum(path.is_file() for path in paths))
        trained += len(block)
        next_pair = (time.monotonic() - start) / trained * 2
        if deadline is not None and time.monotonic() + next_pair > deadline:
            return


def _pairs(numbers: Sequence[int]) -> list[list[int]]:
    """Shadow 2j with shadow 2j + 1."""
    return [[n for n in numbers if n // 2 == pair] for pair in sorted({n // 2 for n in numbers})]


def recipe_hash(federation: Federation, rows: NDArray[np.int64]) -> str:
    """Eight hex digits of everything that a shadow depends on, beside its number."""
    content = replace(federation.cell, attack=None).to_json()
    for neutral in ("engine", "device", "client_timeout", "shadow_rules"):
        content["federation"].pop(neutral)
    return content_hash([content, federation.dataset.fingerprint, fingerprint(np.sort(rows))])


def shadow_job(federation: Federation, rows: NDArray[np.int64], seed: int) -> ShadowJob:
    """The target's federation on other images, with other initial weights and other draws."""
    cell = replace(federation.cell, attack=None, seed=seed)
    dealt = partition(federation.dataset, np.sort(rows), cell.data, len(federation.partition.clients), seed)
    twin = federate(cell, federation.dataset, dealt)
    seats = twin.seats
    if not seats.aggregator.sees_individuals:
        seats = replace(seats, aggregator=WeightedMean())  # encryption does not change the model
    return ShadowJob(seats, twin.clients, twin.participation, cell.federation.rounds, seed, twin.initial_state())


def parity(federation: Federation, candidates: int) -> dict[str, str]:
    """What of the target's recipe the shadows share, for the report; `size` says how far their training sets differ."""
    own, theirs = sum(federation.plan.client_sizes), candidates / 2
    share = theirs / own
    same = "same" if abs(share - 1) <= 0.02 else f"{share:.2f} times the target's {own:,}: the attack may be weaker"
    return {
        "architecture": "same",
        "optimiser": "same",
        "clients": "same number",
        "rounds": "same",
        "defenses": "same",
        "initial weights": "same checkpoint" if federation.cell.model.weights else "fresh, as the target's",
        "training images": same,
    }


def _run(job: Callable[[int], ShadowJob], numbers: Sequence[int], workers: int) -> Iterator[tuple[int, Weights]]:
    """(number, weights) as they finish; jobs are made as workers become free, since each holds its images."""
    if workers < 2:
        yield from ((number, job(number).run()) for number in numbers)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, prepare_for_small_networks) as pool:
        queue = deque(numbers)
        futures: dict[Future[bytes], int] = {}
        try:
            while queue or futures:
                while queue and len(futures) < workers:
                    number = queue.popleft()
                    # As bytes: torch's own way through shared memory fills a container's small /dev/shm.
                    futures[pool.submit(_one, pickle.dumps(job(number)))] = number
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    yield futures.pop(future), pickle.loads(future.result())
        except BrokenProcessPool as error:
            raise RunError(f"a shadow's worker process died ({error}); run with --engine serial") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one(job: bytes) -> bytes:
    return pickle.dumps(pickle.loads(job).run())
