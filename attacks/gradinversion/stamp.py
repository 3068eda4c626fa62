"""What did an attack assume? The stamp without which none of its numbers may be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from fedsec.types import Target

from .knowledge import read
from .settings import Settings


def stamp(
    target: Target,
    settings: Settings,
    *,
    oracle: bool,
    adaptive: bool,
    mode: Literal["train", "eval"] | None,
    model: nn.Module,
) -> Mapping[str, Any]:
    """Assumptions of one run, in JSON form."""
    view = target.views[0]
    hidden = view.clients_in_sum > 1
    batches = sorted({u.num_samples or v.clients_in_sum * v.recipe.batch_size for v in target.views for u in v.updates})
    momentum = f" with momentum {view.recipe.momentum:g}" if view.recipe.momentum else ""
    return {
        "labels": "oracle" if oracle else "recovered",
        "batch_size": "claimed" if not hidden else "known",
        "victim_batch": batches[0] if len(batches) == 1 else batches,
        "victim_mode": mode or view.recipe.mode,
        "bn_statistics": _statistics(model, mode or view.recipe.mode),
        "local_steps": view.local_steps,
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


def _statistics(model: nn.Module, mode: str) -> str:
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if not batch_norm:
        return "none"
    return "running" if mode == "eval" else "batch"
