"""Property inference: how often is the share of a group told from a model, and was the guess right here?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsec.findings import PropertyGuess
from fedsec.metrics.membership import Interval
from fedsec.metrics.statistics import clopper_pearson

if TYPE_CHECKING:
    from fedsec.audit.exam import Exam


def compare_properties(guesses: Sequence[PropertyGuess], exam: Exam) -> dict[str, Any]:
    """Accuracy on models that the classifier was not fitted on, with Clopper-Pearson; and the members' true share."""
    rows: list[dict[str, Any]] = []
    for guess in guesses:
        low, high = (float(v) for v in clopper_pearson(guess.right, guess.shadows))
        share = guess.right / guess.shadows
        values = exam.classes_by_number() if guess.trait == "class" else exam.traits()[guess.trait]
        own = values[exam.cohort.rows[exam.cohort.member]]
        known = own != ""
        rows.append(
            {
                "trait": guess.trait,
                "value": guess.value,
                "shares": list(guess.shares),
                "shadows": guess.shadows,
                "accuracy": Interval(share, low, high, guess.shadows, "clopper-pearson"),
                "guess": guess.shares[int(guess.large)],
                "truth": float(np.mean(own[known] == guess.value)) if known.any() else None,
            }
        )
    told = [row for row in rows if row["accuracy"].low > 0.5]
    text = "; ".join(_sentence(row, row in told) for row in rows)
    return {"rows": rows, "verdict": text}


def _sentence(row: dict[str, Any], told: bool) -> str:
    small, large = (f"{share:.0%}" for share in row["shares"])
    return (
        f"Models trained with {small} and with {large} of {row['trait']} = {row['value']} are told apart in "
        f"{row['accuracy'].value:.0%} of cases" + ("" if told else ", which guessing may do as well")
    )
