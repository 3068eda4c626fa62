"""Thresholds that fail a build: `--fail-above auc=0.6`, compared with the lower confidence limit by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedsec.errors import ConfigError
from fedsec.metrics.membership import Interval
from fedsec.plugins import nearest

Side = Literal["lower", "point", "upper"]
FIELDS = {"lower": "low", "point": "value", "upper": "high"}
PLACES: Mapping[str, tuple[str, ...]] = {
    "auc": ("membership", "headline", "auc"),
    "advantage": ("membership", "headline", "advantage"),
    "tpr_at_1pct_fpr": ("membership", "headline", "tpr_at_1pct_fpr"),
    "tpr_at_01pct_fpr": ("membership", "headline", "tpr_at_01pct_fpr"),
    "epsilon": ("dp_audit", "proven"),
    "source_lift": ("source", "lift"),
    "inversion_log10p": ("inversion", "log10p"),
}
ALIASES = {"tpr@1%": "tpr_at_1pct_fpr", "tpr@0.1%": "tpr_at_01pct_fpr"}


@dataclass(frozen=True)
class Gate:
    """One threshold and what came of it."""

    key: str
    limit: float
    compared: float | None
    result: Literal["passed", "failed", "undecided"]
    text: str

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return dict(vars(self))


def parse(words: Sequence[str]) -> dict[str, float]:
    """Thresholds from `key=value` words.

    Raises:
        ConfigError: an unknown key, or no number.
    """
    found = {}
    for word in words:
        key, _, text = word.partition("=")
        key = ALIASES.get(key.strip(), key.strip())
        if key not in PLACES:
            raise ConfigError(f"--fail-above {word}: unknown key '{key}': {nearest(key, PLACES)}")
        try:
            found[key] = float(text)
        except ValueError:
            raise ConfigError(f"--fail-above {word}: write {key}=NUMBER") from None
    return found


def gate(result: Mapping[str, Any], limits: Mapping[str, float], side: Side = "lower") -> list[Gate]:
    """Compare a result (before it is JSON) with the thresholds.

    Raises:
        ConfigError: a threshold on something that this audit did not compute.
    """
    gates = []
    for key, limit in limits.items():
        value: Any = result
        for part in PLACES[key]:
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            raise ConfigError(f"--fail-above {key}: this audit did not compute it; choose the attack that does")
        if isinstance(value, Mapping):
            gates.append(Gate(key, limit, None, "undecided", f"{key}: {value['not_resolvable']}"))
            continue
        if isinstance(value, Interval):
            compared, level = float(getattr(value, FIELDS[side])), f"{100 * value.level:.4g} %"
            told = f"{key} {value.value:.4g} [{value.low:.4g}, {value.high:.4g}] at {level}"
        else:
            compared, told = float(value), f"{key} {float(value):.4g}"
        failed = compared > limit
        sign = ">" if failed else "≤"
        text = f"{side if isinstance(value, Interval) else 'proven'} {compared:.4g} {sign} {limit:g} ({told})"
        gates.append(Gate(key, limit, compared, "failed" if failed else "passed", text))
    return gates
