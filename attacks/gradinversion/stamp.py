"""What did an attack assume? The stamp without which none of its numbers may be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from fedsec.findings import Reconstruction, Target
from fedsec.types import LocalRecipe, ServerView

from .batch_statistics import read_statistics, used_by
from .knowledge import read
from .observation import images_each
from .settings import Settings


def stamp(
    target: Target,
    settings: Settings,
    *,
    oracle: bool,
    adaptive: bool,
    mode: Literal["train", "eval"] | None,
    model: nn.Module,
    reconstructions: Sequence[Reconstruction] = (),
) -> Mapping[str, Any]:
    """Assumptions of one run, in JSON form; `reconstructions` say where their labels came from."""
    view = target.views[0]
    hidden = view.clients_in_sum > 1
    batches = sorted({u.num_samples or v.clients_in_sum * images_each(v) for v in target.views for u in v.updates})
    momentum = f" with momentum {view.recipe.momentum:g}" if view.recipe.momentum else ""
    return {
        "labels": "oracle" if oracle else _sources(reconstructions),
        "batch_size": "claimed" if not hidden else "known",
        "victim_batch": batches[0] if len(batches) == 1 else batches,
        "victim_mode": _mode(view, model, mode or view.recipe.mode),
        "bn_statistics": used_by(view, model, mode or view.recipe.mode, settings.bn),
        "local_steps": view.local_steps,
        "epochs": _epochs(view.recipe, view.local_steps, batches),
        "lr_known": True,
        "client_optimizer": f"SGD{momentum}",
        "view": "aggregate only" if hidden else "individual",
        "clients_in_sum": view.clients_in_sum,
        "adaptive": list(read(view.knowledge).used) if adaptive else False,
        "public_prior": {"name": target.public.name, "size": len(target.public.images)},
        "box_known": True,
        "normalisation_known": True,
        "init": "public mean and components" if settings.method == "auto" else "per method",
        "restarts": settings.restarts,
        "selection": "certificate, then residual or posterior",
        "precision": "float32, closed forms in float64",
        "budget_s": settings.budget_s,
        "noise_seed_policy": "the attack's generators are independent of every defense's",
    }


def _sources(reconstructions: Sequence[Reconstruction]) -> str | list[str]:
    found = sorted({item.label_source for item in reconstructions}) or ["recovered"]
    return found[0] if len(found) == 1 else list(found)


def _epochs(recipe: LocalRecipe, steps: int, batches: Sequence[int]) -> float:
    """Passes over the victim's images."""
    return round(steps * min(recipe.batch_size, max(batches, default=1)) / max(batches, default=1), 3)


def _mode(view: ServerView, model: nn.Module, mode: Literal["train", "eval"]) -> str:
    """`train+shared`: the client trained in train mode, and what it made of its BatchNorm statistics is visible."""
    return "train+shared" if mode == "train" and read_statistics(view, model, mode).shared else mode
