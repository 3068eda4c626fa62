"""One question of a set with several labels an image: a finding against its absence, or any finding against none."""

from __future__ import annotations

import dataclasses
import difflib

import numpy as np

from fedsec.data.base import Dataset
from fedsec.data.digest import fingerprint
from fedsec.data.report import counts_by_part
from fedsec.errors import ConfigError

ANY = "any"
NOTHING = "no finding"
"""The label, where a set has one, that says that there is none."""


def one_finding(dataset: Dataset, finding: str) -> Dataset:
    """A multi-label set as a binary one.

    Soft labels count as present from 0.5. Images of which the answer is unknown are left out and counted: for `any`,
    those without a known finding of which not everything is known.

    Args:
        dataset: with several labels an image. finding: one of its labels, whatever its case, or `any`.

    Raises:
        ConfigError: one label an image, or no such finding, with the nearest one.
    """
    if dataset.task != "multilabel":
        raise ConfigError(
            f"{dataset.name}: finding={finding} needs several labels an image; this set is {dataset.task}"
        )
    known = [name.casefold() for name in dataset.class_names]
    if finding.casefold() == ANY:
        columns, names = [i for i, label in enumerate(known) if label != NOTHING], (NOTHING, "any finding")
    elif finding.casefold() in known:
        columns = [known.index(finding.casefold())]
        names = (f"no {dataset.class_names[columns[0]]}", dataset.class_names[columns[0]])
    else:
        near = difflib.get_close_matches(finding.casefold(), known, n=1)
        hint = (
            f"did you mean '{dataset.class_names[known.index(near[0])]}'?" if near else f"choose {ANY} or one of them"
        )
        raise ConfigError(f"{dataset.name}: no finding '{finding}' in {', '.join(dataset.class_names)}; {hint}")
    labels = dataset.labels[:, columns]
    present = (np.nan_to_num(labels) >= 0.5).any(1)
    answered = present | ~np.isnan(labels).any(1)
    kept = dataset if answered.all() else dataset.select(answered)
    binary, name = present[answered].astype(np.int64), names[1]
    unknown = {f"{name} unknown": len(dataset) - len(kept)} if len(kept) < len(dataset) else {}
    report = dataclasses.replace(
        dataset.report,
        rows_used=len(kept),
        left_out={**dataset.report.left_out, **unknown},
        unknown_labels={},
        policy={**dataset.report.policy, "finding": name},
        per_split=counts_by_part(binary, names, kept.split, kept.groups()),
    )
    return dataclasses.replace(
        kept,
        task="binary",
        labels=binary,
        class_names=names,
        positive_class=1,
        variant=f"{dataset.variant},finding={name}".strip(","),
        fingerprint=fingerprint(dataset.fingerprint, "finding", name),
        report=report,
    )
