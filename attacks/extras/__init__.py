"""What side reports and shared statistics give away beyond the parameters. The plugin `extras`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedsec.attack import Attack

if TYPE_CHECKING:
    from fedsec.findings import CandidatePlan, Findings, Target


@dataclass(frozen=True)
class Extras(Attack):
    """A curious server reads everything that reached it beside the parameters, and says which image is whose.

    It knows the protocol, so it knows what each report means; it never looks at a strategy's name. Readings that tell
    whether an image was trained on (a generator, inverted images, personal models) give membership scores, all of them
    a guess at each image's hospital. Labels of the candidates are known to it.
    """

    name: ClassVar[str] = "extras"
    seat: ClassVar[Literal["server"]] = "server"
    goal: ClassVar[str] = "tell an image's hospital, or that it was trained on, from what is sent beside the parameters"

    reads_parameters: ClassVar[bool] = False
    samples: Annotated[int, Field(ge=1, description="images drawn of a generator for each class")] = 200

    def candidates(self) -> CandidatePlan:
        """Images of the clients and others, and the views of all rounds."""
        from fedsec.findings import CandidatePlan

        return CandidatePlan(history=True)

    def conclude(self, target: Target) -> Findings:
        """One answer for each kind of thing that was sent."""
        from fedsec.findings import Findings

        from .readings import read

        assert target.candidates is not None
        memberships, sources, notes = read(target, self.samples)
        assumptions: Mapping[str, Any] = {
            "labels": "true labels of the candidates are known",
            "view": "updates",
            "shadows": 0,
        }
        return Findings(assumptions=assumptions, notes=notes, memberships=memberships, sources=sources)
