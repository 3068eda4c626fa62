"""Was this image trained on? The plugin `membership`.

Scores are computed without any label of membership; the frame compares them with the truth once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedsec.attack import Attack
from fedsec.errors import ConfigError
from fedsec.plugins import nearest

if TYPE_CHECKING:
    from fedsec.findings import CandidatePlan, Findings, Target

SHADOWLESS = ("loss", "label_only")
SHADOWED = ("lira", "lira_offline", "rmia", "rmia_offline")
WATCHING = ("grad_cos", "grad_diff", "loss_series", "all_for_one")
METHODS = (*SHADOWLESS, *SHADOWED, *WATCHING)


@dataclass(frozen=True)
class Membership(Attack):
    """Membership inference on the released model, or from the server's seat on the updates of the training.

    Shadow models are trained by the target's own recipe, on halves of the candidates. The server's methods look at
    every client's update, or at the sum where a defense hides them.
    """

    name: ClassVar[str] = "membership"
    seat: ClassVar[Literal["outsider"]] = "outsider"
    goal: ClassVar[str] = "tell whether an image was trained on: LiRA, RMIA, loss, decisions only, or clients' updates"

    methods: Annotated[
        str,
        Field(description="joined by +: loss, label_only, lira, rmia; with the updates grad_cos, all_for_one and more"),
    ] = "loss+lira+rmia"
    shadows: Annotated[int, Field(ge=0, description="shadow models, an even number; 0: none")] = 8
    a: Annotated[float, Field(ge=0, le=1, description="offline RMIA: how far the out-mean is from the mean")] = 0.3
    gamma: Annotated[float, Field(gt=0, description="RMIA: ratio from which one image beats another")] = 1.0
    rounds: Annotated[int, Field(ge=1, description="server's methods: rounds that they look at, evenly spaced")] = 10

    def __post_init__(self) -> None:
        for method in self.asked:
            if method not in METHODS:
                raise ConfigError(f"membership: unknown method '{method}': {nearest(method, METHODS)}")
        if self.shadows % 2:
            raise ConfigError(
                f"membership: shadows={self.shadows}: give an even number: every image is in half of them"
            )
        if self.shadows == 0 and not set(self.asked) - set(SHADOWED):
            raise ConfigError(f"membership: {self.methods} needs shadows; give shadows=8, or methods=loss")
        if self.watches:
            self.take_seat("server")

    @property
    def asked(self) -> tuple[str, ...]:
        """The methods, each once."""
        return tuple(dict.fromkeys(self.methods.split("+")))

    @property
    def watches(self) -> bool:
        """One of the methods needs the server's seat."""
        return bool(set(self.asked) & set(WATCHING))

    def candidates(self) -> CandidatePlan:
        """Images that may have been trained on, and the views of the training where a method reads them."""
        from fedsec.findings import CandidatePlan

        return CandidatePlan(history=self.watches)

    def conclude(self, target: Target) -> Findings:
        """Scores of every method that can be applied."""
        from fedsec.findings import Findings

        from .released import released_scores

        assert target.candidates is not None
        found, notes = released_scores(self, target)
        sources: tuple[Any, ...] = ()
        if self.watches:
            from .federated import watched_scores

            more, sources, remarks = watched_scores(self, target)
            found, notes = (*found, *more), (*notes, *remarks)
        assumptions: Mapping[str, Any] = {
            "labels": "true labels of the candidates are known",
            "view": "updates" if self.watches else "released model",
            "shadows": self.shadows if any(item.shadows for item in found) else 0,
        }
        return Findings(assumptions=assumptions, notes=notes, memberships=found, sources=sources)
