"""What becomes of a label that its reader was not sure of: the policies of CheXpert (Irvin et al., AAAI 2019)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from fedsec import plugins
from fedsec.errors import ConfigError

Policy = Literal["u_zeros", "u_ones", "u_ignore", "u_selftrained", "u_multiclass", "u_lsr_ones", "u_lsr_zeros"]
Blank = Literal["zero", "ignore"]
Labels = npt.NDArray[np.float32]
POLICIES = get_args(Policy)
UNCERTAIN = -1.0
SMOOTHED = {"u_lsr_ones": (0.55, 0.85), "u_lsr_zeros": (0.0, 0.3)}
"""Ranges of label smoothing regularisation (Pham et al., 2021; not verified)."""
MIXED: Mapping[str, Policy] = {"Atelectasis": "u_ones", "Edema": "u_ones"}


def policies(text: str, labels: Sequence[str]) -> tuple[Policy, ...]:
    """The policy of each label.

    Args:
        text: `mixed` (u_ones for Atelectasis and Edema, else u_zeros); one policy; or one and exceptions, such as
            `u_zeros+Edema:u_ones+Atelectasis:u_ignore`.
        labels: the L names.

    Raises:
        ConfigError: an unknown policy or label, or u_multiclass for some labels only.
    """
    if text == "mixed":
        return tuple(MIXED.get(name, "u_zeros") for name in labels)
    first, *rest = text.split("+")
    chosen = dict.fromkeys(labels, first)
    for item in rest:
        name, _, policy = item.partition(":")
        if name not in chosen:
            raise ConfigError(f"policy={text}: '{name}' is not one of the labels: {plugins.nearest(name, labels)}")
        chosen[name] = policy
    for policy in chosen.values():
        if policy not in POLICIES:
            raise ConfigError(
                f"policy={text}: unknown policy '{policy}': {plugins.nearest(policy, ('mixed', *POLICIES))}"
            )
    if "u_multiclass" in chosen.values() and set(chosen.values()) != {"u_multiclass"}:
        raise ConfigError(f"policy={text}: u_multiclass applies to all labels or to none")
    return tuple(chosen.values())  # type: ignore[arg-type]


def resolved(
    raw: Labels,
    chosen: Sequence[Policy],
    blank: Blank,
    ids: Sequence[str],
    predictions: Labels | None = None,
) -> Labels:
    """Targets from what the reader wrote.

    Args:
        raw: (N, L) 1, 0, -1 (uncertain) or NaN (not mentioned). chosen: L policies.
        blank: not mentioned is 0 (`zero`) or unknown (`ignore`).
        ids: N image ids; label smoothing draws by them, so that an image's target depends on nothing else.
        predictions: (N, L) probabilities of a model trained with u_ignore, for u_selftrained.

    Returns:
        (N, L) in [0, 1], NaN where unknown; for u_multiclass (N, 3 L): present, absent, uncertain of each label.
    """
    out = raw.astype(np.float32)
    if blank == "zero":
        out = np.where(np.isnan(raw), np.float32(0), out)
    if chosen and chosen[0] == "u_multiclass":
        known = ~np.isnan(out)
        states = np.stack([np.where(known, out == value, np.nan) for value in (1.0, 0.0, UNCERTAIN)], axis=2)
        return states.reshape(len(out), -1).astype(np.float32)
    for column, policy in enumerate(chosen):
        unsure = np.flatnonzero(raw[:, column] == UNCERTAIN)
        out[unsure, column] = _target(policy, column, unsure, ids, predictions)
    return out


def multiclass_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Names of the columns that `resolved` returns for u_multiclass."""
    return tuple(f"{name}{state}" for name in labels for state in ("", ": absent", ": uncertain"))


def _target(
    policy: Policy, column: int, rows: npt.NDArray[np.int64], ids: Sequence[str], predictions: Labels | None
) -> Any:
    if policy in SMOOTHED:
        low, high = SMOOTHED[policy]
        return np.array([low + (high - low) * _uniform(f"{ids[i]}/{column}") for i in rows.tolist()])
    if policy == "u_selftrained":
        if predictions is None:
            raise ConfigError(
                "policy=u_selftrained needs predictions=FILE: a table with Path and the labels' columns, as a model "
                "trained with policy=u_ignore predicts them"
            )
        return predictions[rows, column]
    return {"u_ones": 1.0, "u_zeros": 0.0, "u_ignore": np.nan}[policy]


def _uniform(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
