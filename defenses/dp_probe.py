"""Which per-sample engine a run uses: one private step on made-up images, before training starts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedsec.errors import ConfigError
from fedsec.federation.local import PlainStep
from fedsec.types import LocalRecipe

from .dp_engines import Engine, HeldOptimizer, zeros_for
from .dp_step import ENGINES

IMAGES = 8
PATIENT_ENGINES = ("hooks", "microbatch", "vmap", "ghost")
SAMPLE_ENGINES = ("ghost", "hooks", "microbatch", "vmap")
"""In the order of speed that was measured (docs/privacy.md). The first that works is taken and none is timed: engines
differ in the last digits, and a run must not depend on what else the machine was doing."""
RECIPE = LocalRecipe("multiclass", 2, 0.1, momentum=0.0, weight_decay=0.0, batch_size=IMAGES, epochs=None, steps=1)
"""Cross-entropy of the first output: what a step costs does not depend on the task."""


def choose(
    model: nn.Module, image_shape: tuple[int, int, int], units: int, repeated: bool, max_bytes: int
) -> tuple[str, str]:
    """The first engine that works on this model within its memory, and a sentence that names it.

    Args:
        model: prepared; it is copied.
        units: clipped gradients in an expected batch.
        repeated: a unit may have several images.
        max_bytes: memory for the gradients of single images.

    Raises:
        ConfigError: no engine can take a private step of this model.
    """
    count = max(1, min(units, IMAGES))
    problems: dict[str, str] = {}
    for name in PATIENT_ENGINES if repeated else SAMPLE_ENGINES:
        try:
            _try(model, name, image_shape, count, max_bytes)
        except Exception as error:  # whatever a foreign architecture does wrong, another engine may do it right
            problems[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            continue
        without = f"; {', '.join(problems)} cannot work on this model within max_memory" if problems else ""
        return name, f"dp: gradients are clipped by engine={name}{without}"
    layer = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    raise ConfigError(f"dp: no engine can take a private step of this model ({layer}); choose another model")


def _try(model: nn.Module, name: str, image_shape: tuple[int, int, int], count: int, max_bytes: int) -> None:
    """Take one private step of a copy and check it.

    Raises:
        ConfigError: the step is not a private one: the sum is above its bound.
    """
    twin = copy.deepcopy(model).train()
    engine = ENGINES[name](twin, max_bytes)
    if engine.bytes_per_image() > max_bytes:
        raise ConfigError(f"one image takes {engine.bytes_per_image() / 2**30:.1f} GB")
    device = engine.parameters[0].device
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, *image_shape, generator=generator).to(device, memory_format=torch.channels_last)
    y = torch.zeros(count, dtype=torch.long, device=device)
    with torch.random.fork_rng(devices=[]):
        total = _clipped_sum(engine, x, y)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.double()) for t in total]))
        if not norm <= count * (1 + 1e-5):
            raise ConfigError(f"{count} gradients clipped to 1 have a sum of norm {norm:g}")


def _clipped_sum(engine: Engine, x: Tensor, y: Tensor) -> list[Tensor]:
    step = PlainStep(engine.model, RECIPE)
    held = HeldOptimizer(step.optimizer)
    step.optimizer = held  # type: ignore[assignment]

    def run(images: Tensor, labels: Tensor, collect: Callable[[], None]) -> Tensor:
        held.collect = collect
        return step(images, labels)

    sums = zeros_for(engine.parameters)
    engine.add(run, x, y, torch.arange(len(x), device=x.device), 1.0, sums)
    return list(sums.values())
