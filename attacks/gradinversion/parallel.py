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
from typing import Literal

import torch
from torch import nn

from fedsec.errors import RunError
from fedsec.types import Reconstruction, ServerView, Target

from .auto import reconstruct
from .observation import observe
from .prior import Prior, fit_prior
from .settings import Settings


@dataclass(frozen=True)
class Job:
    """Everything that the attack on any view of a target needs."""

    model: nn.Module
    prior: Prior
    image_shape: tuple[int, int, int]
    device: torch.device
    settings: Settings
    adaptive: bool
    mode: Literal["train", "eval"] | None

    def run(self, view: ServerView, seed: int) -> Reconstruction:
        """Attack one view."""
        if len(view.updates) != 1:
            return self._nothing(view)
        generator = torch.Generator().manual_seed(seed)
        observation = observe(view, self.model, self.prior, self.image_shape, adaptive=self.adaptive, mode=self.mode)
        return reconstruct(observation, self.settings, generator)

    def _nothing(self, view: ServerView) -> Reconstruction:
        batch = max(1, view.recipe.batch_size)
        mean = self.prior.mean.cpu().expand(batch, *self.image_shape).clone()
        reason = f"the view holds {len(view.updates)} updates, not one"
        labels = torch.zeros(batch, dtype=torch.long)
        return Reconstruction(mean, labels, "prior", not_applicable={"all": reason})


def make_job(target: Target, settings: Settings, *, adaptive: bool, mode: Literal["train", "eval"] | None) -> Job:
    """Collect what is common to all views, on the target's device."""
    prior = fit_prior(target.public).to(target.device)
    return Job(target.model(), prior, target.image_shape, target.device, settings, adaptive, mode)


def run_all(job: Job, target: Target) -> tuple[Reconstruction, ...]:
    """Attack every view; results in the order of the views."""
    seeds = [target.ctx.entropy(f"gradinversion/view-{i}") for i in range(len(target.views))]
    workers = min(target.workers, len(target.views)) if job.device.type == "cpu" else 1
    if workers > 1:
        return _run_pool(job, workers, target.views, seeds, target.progress)
    done = []
    for view, seed in zip(target.views, seeds, strict=True):
        done.append(job.run(view, seed))
        target.progress(len(done), len(target.views))
    return tuple(done)


def _run_pool(
    job: Job, workers: int, views: Sequence[ServerView], seeds: Sequence[int], progress: Callable[[int, int], None]
) -> tuple[Reconstruction, ...]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Everything travels as bytes: torch's own way through shared memory fills a container's small /dev/shm.
    with ProcessPoolExecutor(workers, context, _start, (pickle.dumps(job),)) as pool:
        futures = {
            pool.submit(_work, pickle.dumps(view), seed): i
            for i, (view, seed) in enumerate(zip(views, seeds, strict=True))
        }
        results: dict[int, Reconstruction] = {}
        try:
            for future in as_completed(futures):
                results[futures[future]] = pickle.loads(future.result())
                progress(len(results), len(views))
        except BrokenProcessPool as error:
            raise RunError(f"gradinversion: a worker process died ({error}); run with fewer processes") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return tuple(results[i] for i in range(len(views)))


_job: Job | None = None


def _start(packed: bytes) -> None:
    global _job
    torch.set_num_threads(1)
    _job = pickle.loads(packed)


def _work(view: bytes, seed: int) -> bytes:
    assert _job is not None
    return pickle.dumps(_job.run(pickle.loads(view), seed))
