"""The normal form of patient data beside the images: age, sex, view and ids, from the spellings found in the wild."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

UNKNOWN = frozenset({"", "unknown", "unk", "na", "n/a", "nan", "none", "-"})
YEARS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25, "": 1.0}
MAX_AGE = 120.0
AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([YMWDymwd]?)(\+?)")


@dataclass(frozen=True)
class Ages:
    """Ages in years, and what was odd about them."""

    years: npt.NDArray[np.float32]
    """(N,) NaN where unknown or impossible."""
    censored: int = 0
    """Values such as `50+`, kept as 50."""
    impossible: int = 0
    """Values outside 0 to 120 years or not an age, now NaN."""


def texts(values: npt.ArrayLike) -> npt.NDArray[np.str_]:
    """Stripped text in which unknown tokens are empty."""
    found = names(values)
    return np.where(np.isin(np.char.lower(found), list(UNKNOWN)), "", found)


def names(values: npt.ArrayLike) -> npt.NDArray[np.str_]:
    """Stripped text; bytes are read as UTF-8 and whole floats lose their `.0`. A class may be called `none`."""
    array = np.asarray(values).reshape(-1)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    elif array.dtype.kind == "f":
        array = np.array(
            ["" if np.isnan(v) else f"{v:g}" if v != int(v) else str(int(v)) for v in array], dtype=np.str_
        )
    return np.char.strip(array.astype(np.str_))


def sexes(values: npt.ArrayLike) -> npt.NDArray[np.str_]:
    """`F`, `M` or empty."""
    first = np.char.upper(texts(values)).astype("<U1")
    return np.where(np.isin(first, ["F", "M"]), first, "")


def views(values: npt.ArrayLike) -> npt.NDArray[np.str_]:
    """`PA`, `AP`, `LL`, … in capitals, without what follows (`AP supine` is `AP`)."""
    return np.array([(text.split() or [""])[0].upper() for text in texts(values).tolist()], dtype=np.str_)


def ages(values: npt.ArrayLike) -> Ages:
    """Years from numbers and from texts such as `57`, `057Y`, `011M`, `023D`, `50+`."""
    array = np.asarray(values).reshape(-1)
    if array.dtype.kind in "fiu":
        years = array.astype(np.float32)
        bad = (years < 0) | (years > MAX_AGE)
        return Ages(np.where(bad, np.float32(np.nan), years), impossible=int(bad.sum()))
    parsed = [_age(text) for text in texts(array).tolist()]
    return Ages(
        np.array([year for year, _, _ in parsed], dtype=np.float32),
        censored=sum(plus for _, plus, _ in parsed),
        impossible=sum(bad for _, _, bad in parsed),
    )


def _age(text: str) -> tuple[float, bool, bool]:
    """Years, whether censored, whether impossible."""
    if not text:
        return float("nan"), False, False
    match = AGE.fullmatch(text)
    if match is None:
        return float("nan"), False, True
    years = float(match[1]) * YEARS[match[2].upper()]
    return (years, bool(match[3]), False) if years <= MAX_AGE else (float("nan"), False, True)


def normalised(name: str, values: npt.ArrayLike) -> tuple[npt.NDArray[Any], dict[str, int]]:
    """One metadata column in its normal form, and the count of each oddity."""
    if name == "sex":
        return sexes(values), {}
    if name == "view":
        return views(values), {}
    if name == "age":
        result = ages(values)
        odd = {"age censored (kept at its bound)": result.censored, "age impossible (now unknown)": result.impossible}
        return result.years, {reason: count for reason, count in odd.items() if count}
    return texts(values), {}
