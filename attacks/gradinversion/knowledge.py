"""What does the adversary know of the defenses? Their standard keys, read together.

See `fedsec.defense.Defense.public_knowledge`.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    kind: Literal["gaussian", "laplace"] = "laplace" if noise == "laplace" else "gaussian"
    std = step_variance**0.5, update_variance**0.5
    return Known(clips.get("sample"), clips.get("update"), divisor, *std, unknown, kind, mask, tuple(used))
