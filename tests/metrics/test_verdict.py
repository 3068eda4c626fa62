"""Does the sentence say what the numbers allow, and never sell a failed attack as privacy?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsec.metrics.verdict import Standing, verdict

PRIOR = 18.9


@pytest.mark.parametrize(
    ("attack", "bound", "expected"),
    [
        (18.9, 19.8, "The update carries almost no image information beyond the prior"),
        (25.3, 26.0, "Leakage measured, attack near the limit"),
        (49.3, 49.0, "Leakage measured, attack near the limit"),
        (19.0, 20.5, "Little leakage measured, attack near the limit"),
        (30.0, 33.0, "Leakage at least this large"),
        (30.6, 51.0, "The attack failed; privacy not shown"),
        (18.0, 26.0, "The attack failed; privacy not shown"),
        (40.0, 26.0, "The bound's assumptions do not hold here"),
        (18.5, None, "Not shown to be private"),
        (19.9, None, "Not shown to be private"),
        (25.0, None, "a better attack may obtain more"),
        (130.0, None, "Leakage measured: the images were recovered"),
    ],
)
def test_sentences_by_the_thresholds_of_the_specification(attack: float, bound: float | None, expected: str) -> None:
    text = verdict(Standing(attack, PRIOR, bound))
    assert expected in text
    assert not text.endswith(".")


def test_numbers_of_the_sentence() -> None:
    text = verdict(Standing(30.6, PRIOR, 51.0))
    assert "20.4 dB more" in text and "11.7 dB better than the public mean image" in text
    assert "1.5 dB worse" in verdict(Standing(17.4, PRIOR))


@given(st.floats(5, 140), st.floats(5, 40), st.none() | st.floats(5, 140), st.booleans())
def test_only_a_bound_without_room_says_that_there_is_little_to_find(
    attack: float, prior: float, bound: float | None, identified: bool
) -> None:
    text = verdict(Standing(attack, prior, bound, identified))
    reassuring = "almost no image information" in text
    assert not reassuring or (bound is not None and bound <= prior + 1)
    if bound is None or (bound - attack > 6 and bound > prior + 1):
        assert any(words in text for words in ("not shown", "Not shown", "Leakage measured"))
    if identified and not (bound is not None and attack > bound + 3):
        assert "point at their patients" in text


def test_a_blur_that_points_at_its_patient_is_a_leak() -> None:
    assert verdict(Standing(19.0, PRIOR, None, identified=True)).startswith("Leakage measured")
    assert "that is a leak" in verdict(Standing(18.9, PRIOR, 19.5, identified=True))
    assert verdict(Standing(19.0, PRIOR, 20.5, identified=True)).startswith("Leakage measured")
