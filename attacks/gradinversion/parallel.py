"""How are the views of a target shared among processes?

Every view has its own generator, so that results do not depend on the number of workers. One thread a process: small
convolutions are 10-50 times slower with more threads than free cores.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from fedsec.errors import RunError
from fedsec.findings import Reconstruction, Target
from fedsec.machine import COMPILER
from fedsec.types import ServerView

from .auto import reconstruct
from .observation import observe
from .prior import Prior, fit_prior
from .settings import Settings

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """Everything that the attack on any view of a target needs."""

    model: nn.Module
    prior: Prior
    image_shape: tuple[int, int, int]
    device: torch.device
    settings: Settings
    mode: Literal["train", "eval"] | None

    def run(self, view: ServerView, seed: int, adaptive: bool) -> Reconstruction:
        """Attack one view, with or without what is publicly known of the defense."""
        if len(view.updates) != 1:
            return self._nothing(view)
        generator = torch.Generator().manual_seed(seed)
        observation = observe(view, self.model, self.prior, self.image_shape, adaptive=adaptive, mode=self.mode)
        return reconstruct(observation, self.settings, generator)

    def _nothing(self, view: ServerView) -> Reconstruction:
        batch = max(1, view.recipe.batch_size)
        mean = self.prior.mean.cpu().expand(batch, *self.image_shape).clone()
        reason = f"the view holds {len(view.updates)} updates, not one"
        labels = torch.zeros(batch, dtype=torch.long)
        return Reconstruction(mean, labels, "prior", not_applicable={"all": reason})


def make_job(target: Target, settings: Settings, *, mode: Literal["train", "eval"] | None) -> Job:
    """Collect what is common to all views, on the target's device."""
    prior = fit_prior(target.public).to(target.device)
    return Job(target.model(), prior, target.image_shape, target.device, settings, mode)


def run_all(job: Job, target: Target, adaptive: tuple[bool, ...] = (True,)) -> list[tuple[Reconstruction, ...]]:
    """Attack every view; for each kind of adversary, adaptive or naive, the results in the order of the views."""
    count = len(target.views)
    seeds = [target.ctx.entropy(f"gradinversion/view-{i}") for i in range(count)]
    items = [(view, seed, kind) for kind in adaptive for view, seed in zip(target.views, seeds, strict=True)]
    found = run_each(job.run, items, target)
    return [tuple(found[start : start + count]) for start in range(0, len(found), count)]


def run_each(work: Callable[..., Result], items: Sequence[tuple[Any, ...]], target: Target) -> list[Result]:
    """Results of `work(*item)` for each item, in their order, in as many processes as the target allows on the CPU.

    Args:
        work: can be pickled, such as a method of a dataclass.
        items: its arguments, one tuple for each result.
        target: says how many workers there are, and is told of the progress.
    """
    workers = min(target.workers, len(items)) if target.device.type == "cpu" else 1
    if workers > 1:
        return _run_pool(work, workers, items, target.progress)
    done = []
    for item in items:
        done.append(work(*item))
        target.progress(len(done), len(items))
    return done


def _run_pool(
    work: Callable[..., Result],
    workers: int,
    items: Sequence[tuple[Any, ...]],
    progress: Callable[[int, int], None],
) -> list[Result]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, COMPILER])
    # Everything travels as bytes: torch's own way through shared memory fills a container's small /dev/shm.
    with ProcessPoolExecutor(workers, context, _start, (pickle.dumps(work),)) as pool:
        futures = {pool.submit(_one, pickle.dumps(item)): i for i, item in enumerate(items)}
        results: dict[int, Result] = {}
        try:
            for future in as_completed(futures):
                results[futures[future]] = pickle.loads(future.result())
                progress(len(results), len(items))
        except BrokenProcessPool as error:
            raise RunError(f"gradinversion: a worker process died ({error}); run with fewer processes") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[i] for i in range(len(items))]


_work: Callable[..., Any] | None = None


def _start(packed: bytes) -> None:
    global _work
    torch.set_num_threads(1)
    _work = pickle.loads(packed)


def _one(item: bytes) -> bytes:
    assert _work is not None
    return pickle.dumps(_work(*pickle.loads(item)))
