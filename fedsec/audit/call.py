"""`fedsec.audit(...)`: the audit as a Python call, with plain words for what the command line has as options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedsec.errors import ConfigError

if TYPE_CHECKING:
    from fedsec.progress import Progress


def audit(
    model: str | Path,
    *,
    architecture: str | None = None,
    attacks: Sequence[str] = (),
    shadows: int = 8,
    claim: float | None = None,
    thresholds: Mapping[str, float] | None = None,
    fail_on: Literal["lower", "point", "upper"] = "lower",
    budget: float | None = None,
    report: str | Path | None = None,
    redact: bool = False,
    cell: str | None = None,
    data_dir: str | Path | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    **said: Any,
) -> dict[str, Any]:
    """What does a trained model give away? `fedsec audit` in Python; called as `fedsec.audit(...)`.

    Args:
        model: run folder, or model file.
        architecture: of a bare file, or `package.module:factory`, as `--model` on the command line.
        attacks: as on the command line; by default all that need the released model alone.
        claim: claimed epsilon; a run knows its own. thresholds: `{"auc": 0.6}`, compared as `fail_on` says.
        budget: seconds. report: where to write the page; redact: without images.
        said: what a bare file does not say: `data`, `members`, `nonmembers`, `population`, `recipe`, `delta`, `unit`,
            `ledger`, `history`, `seed`.

    Returns:
        the report, see docs/audit.md; `exit_code` is 1 where a threshold was exceeded or a claim is contradicted.

    Raises:
        FedsecError: see `fedsec.errors` for the kinds; RefusedError for a comparison that would prove nothing.
    """
    from fedsec.audit import run as audits
    from fedsec.audit.gates import parse
    from fedsec.audit.subjects import Said

    unknown = set(said) - ({field.name for field in dataclasses.fields(Said)} - {"model", "epsilon"})
    if unknown:
        raise ConfigError(f"fedsec.audit: unknown word '{min(unknown)}'")
    paths = {key: Path(said[key]) for key in ("recipe", "ledger", "history") if said.get(key) is not None}
    wanted = audits.Wanted(
        attacks=tuple(attacks),
        shadows=shadows,
        fail_above=parse([f"{key}={limit}" for key, limit in (thresholds or {}).items()]),
        fail_on=fail_on,
        budget=budget,
        redact=redact,
        report=None if report is None else Path(report),
    )
    places = [None if place is None else Path(place) for place in (data_dir, cache)]
    return audits.audit(
        model,
        Said(**{**said, **paths, "epsilon": claim, "model": architecture}),
        wanted,
        cell=cell,
        data_dir=places[0],
        cache=places[1],
        progress=progress,
    )
