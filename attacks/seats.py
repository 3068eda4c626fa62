"""Who is malicious, and when: dials that poisoning and backdoors share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from fedsec.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, lt=1, description="share of the clients that is malicious, rounded")]
Seats = Annotated[Literal["random", "largest", "smallest"], Field(description="which clients; drawn once a run")]
When = Annotated[
    str,
    Field(pattern=r"^(always|(from|every|only):[1-9]\d*)$", description="rounds: always, from:R, every:K or only:R"),
]


def choose_seats(label: str, fraction: float, seats: Seats, sizes: Sequence[int], draw: int) -> frozenset[int]:
    """round(fraction·n) clients.

    Args:
        label: how messages name the attack. fraction: of the clients. seats: which of them.
        sizes: training images of each client. draw: seed of a random choice.

    Raises:
        ConfigError: the fraction is less than one client.
    """
    import numpy as np

    count = round(fraction * len(sizes))
    if count == 0 and fraction > 0:
        least = 0.5 / len(sizes)
        raise ConfigError(
            f"{label}: fraction={fraction:g} of {len(sizes)} clients is nobody; give more than {least:.2g}"
        )
    if seats == "random":
        chosen = np.random.default_rng(draw).permutation(len(sizes))[:count]
    else:
        order = np.array(sizes)
        chosen = np.argsort(order if seats == "smallest" else -order, kind="stable")[:count]
    return frozenset(int(k) for k in chosen)


def acts(when: When, number: int) -> bool:
    """Does it act in this round?"""
    kind, _, count = when.partition(":")
    if kind == "always":
        return True
    r = int(count)
    return number >= r if kind == "from" else number % r == 0 if kind == "every" else number == r
