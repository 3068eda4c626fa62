"""What does a measured leakage mean, in a sentence that a data protection officer can use?

The thresholds are those of the report row "prior | attack | bound | gap": a failed attack is never sold as privacy.
"""

from __future__ import annotations

from dataclasses import dataclass

NO_ROOM = 1.0
"""dB above the public mean image up to which a bound says that there is almost nothing to find."""
NEAR = 2.0
"""dB below the bound down to which an attack is near the limit."""
FAR = 6.0
"""dB below the bound from which an attack has failed."""
BEATEN = 3.0
"""dB above the bound from which its assumptions are in doubt: means over 20 images exceed it by some 0.4 dB."""
RECOVERED = 40.0
"""dB from which a reconstruction is the same image to the eye."""
CLEAR = 2.0
"""dB above the public mean image from which reconstructions are clearly more than that."""


MEAN_IMAGE = "the public mean image"
MATCHED = "as many public images that are matched with the truth in the same way"


@dataclass(frozen=True)
class Standing:
    """PSNRs in dB of mean squared errors, all on the same images."""

    attack: float
    prior: float
    """Of the baseline: what anybody has without the update."""
    bound: float | None = None
    """None: no bound is known."""
    identified: bool = False
    baseline: str = MEAN_IMAGE
    """The reconstructions point at their patients more often than chance."""

    @property
    def gain(self) -> float:
        """dB of the attack above the baseline."""
        return self.attack - self.prior


def verdict(standing: Standing) -> str:
    """One or two sentences. Nothing but a bound without room above public images says that little was there to find."""
    if standing.bound is None:
        return _without_bound(standing)
    room, gap = standing.bound - standing.prior, standing.bound - standing.attack
    if gap < -BEATEN:
        return (
            f"Leakage measured{_so_far(standing, ': ')}, and {-gap:.1f} dB better than the bound. The bound's "
            "assumptions do not hold here; do not rely on it"
        )
    if room <= NO_ROOM:
        extra = f". {_POINTING}" if standing.identified else ""
        return (
            "The update carries almost no image information beyond the prior: by the bound, no attack is expected to "
            f"be more than {max(room, 0):.1f} dB better than {standing.baseline}{extra}"
        )
    if gap > FAR:
        so_far = _so_far(standing, ". Even so, " if standing.gain > 0 else ": ")
        return f"The attack failed; privacy not shown{so_far}. The update allows {gap:.1f} dB more"
    if gap > NEAR:
        return f"Leakage at least this large{_so_far(standing, ': ')}. A better attack may gain up to {gap:.1f} dB more"
    kind = "Leakage measured" if standing.gain > NO_ROOM or standing.identified else "Little leakage measured"
    return f"{kind}, attack near the limit{_so_far(standing, ': ')}. The bound allows {room:.1f} dB"


_POINTING = "Yet the reconstructions point at their patients more often than chance: that is a leak"


def _so_far(standing: Standing, start: str, what: str = "on average the images are") -> str:
    how = "better" if standing.gain > 0 else "worse"
    extra = ", and they point at their patients more often than chance" if standing.identified else ""
    return f"{start}{what} {abs(standing.gain):.1f} dB {how} than {standing.baseline}{extra}"


def _without_bound(standing: Standing) -> str:
    if standing.attack >= RECOVERED:
        return f"Leakage measured: the images were recovered{_so_far(standing, ', ', 'on average')}"
    if standing.gain > CLEAR or standing.identified:
        return f"Leakage measured{_so_far(standing, ': ')}. No bound is known here: a better attack may obtain more"
    return (
        f"Not shown to be private{_so_far(standing, ': ')}, so this attack failed, and no bound says what a better one "
        "would obtain"
    )
