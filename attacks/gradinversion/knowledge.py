"""What does the adversary know of the defenses? Their standard keys, read together.

See `fedsec.defense.Defense.public_knowledge`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from .simulation import Clip


@dataclass(frozen=True)
class Known:
    """What the standard keys of `Defense.public_knowledge` say, all defenses of a stack together."""

    sample_clip: Clip | None = None
    update_clip: Clip | None = None
    """In units of the update."""
    divisor: float | None = None
    step_std: float = 0.0
    """Noise on each step's sum of gradients."""
    update_std: float = 0.0
    """Noise on each entry of the update."""
    unknown_noise: bool = False
    noise: Literal["gaussian", "laplace"] = "gaussian"
    mask: Tensor | None = None
    sparse: bool = False
    """Entries that are exactly zero were not sent."""
    quantisation_step: Tensor | float | None = None
    """In units of the update, where it does not follow the data."""
    quantisation_levels: int | None = None
    quantisation_scope: str = "tensor"
    stochastic_rounding: bool = False
    pruned_layers: tuple[str, ...] = ()
    stochastic: tuple[str, ...] = ()
    """Modules that draw at random."""
    used: tuple[str, ...] = ()


def read(knowledge: Mapping[str, Mapping[str, Any]]) -> Known:
    """Combine what the defenses of a stack publish; a key that is missing is unknown to the adversary."""
    clips: dict[str, Clip] = {}
    divisor, mask = None, None
    step_variance = update_variance = 0.0
    unknown, noise, used = False, "gaussian", []
    for name, known in knowledge.items():
        if known.get("clip_norm") is not None:
            scope = str(known.get("clip_scope", "update"))
            clips[scope] = Clip(float(known["clip_norm"]), int(known.get("clip_order", 2)))
            used.append(f"{name}: clip_norm={clips[scope].norm:g} ({scope})")
        if known.get("batch_divisor") is not None:
            divisor = float(known["batch_divisor"])
            used.append(f"{name}: batch_divisor={divisor:g}")
        if known.get("noise_multiplier") is not None and known.get("batch_divisor") is not None:
            step_variance += (float(known["noise_multiplier"]) * float(known.get("clip_norm", 1.0))) ** 2
            used.append(f"{name}: noise_multiplier={known['noise_multiplier']:g}")
        elif known.get("noise_std") is not None:
            update_variance += float(known["noise_std"]) ** 2
            used.append(f"{name}: noise_std={known['noise_std']:g}")
        elif known.get("noise") is not None:
            unknown = True
            used.append(f"{name}: noise of unknown size")
        noise = str(known.get("noise", noise))
        if known.get("mask") is not None:
            mask = known["mask"] if mask is None else mask & known["mask"]
            used.append(f"{name}: mask")
        used += _words(name, known)
    kind: Literal["gaussian", "laplace"] = "laplace" if noise == "laplace" else "gaussian"
    return Known(
        sample_clip=clips.get("sample"),
        update_clip=clips.get("update"),
        divisor=divisor,
        step_std=step_variance**0.5,
        update_std=update_variance**0.5,
        unknown_noise=unknown,
        noise=kind,
        mask=mask,
        used=tuple(used),
        **_shape_of_upload(knowledge.values()),
    )


def _shape_of_upload(knowledge: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What is left out, rounded, pruned or drawn; of two roundings the last one counts."""
    found: dict[str, Any] = {"sparse": False, "pruned_layers": (), "stochastic": ()}
    for known in knowledge:
        found["sparse"] |= bool(known.get("sparse"))
        found["pruned_layers"] += (known["pruned_layer"],) if known.get("pruned_layer") else ()
        found["stochastic"] += tuple(known.get("stochastic", ()))
        for key in ("quantisation_step", "quantisation_levels", "quantisation_scope", "stochastic_rounding"):
            if known.get(key) is not None:
                found[key] = known[key]
    return found


def _words(name: str, known: Mapping[str, Any]) -> list[str]:
    words = [f"{name}: {key}={known[key]}" for key in ("pruned_layer", "quantisation_levels") if known.get(key)]
    if known.get("quantisation_step") is not None:
        words.append(f"{name}: quantisation_step")
    if known.get("sparse"):
        words.append(f"{name}: sparse")
    return words + [f"{name}: {module} draws at random" for module in known.get("stochastic", ())]
