"""The defense `secagg`: its parameters, and what they imply."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field

from fedsec.defense import Defense
from fedsec.types import FederationPlan

if TYPE_CHECKING:
    from .aggregator import SecureSum


@dataclass(frozen=True)
class SecAgg(Defense):
    """Pairwise masks cancel in the sum: the server learns it, and nobody's own update (Bonawitz et al. 2017).

    Masks hide uploads, not what the sum and the released model give away.
    """

    name: ClassVar[str] = "secagg"
    protects: ClassVar[str] = "hides each client's update from the server: masks cancel in the sum alone"

    bits: Annotated[Literal[16, 24, 32], Field(description="bits of one masked value on the wire")] = 24
    max_abs: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="largest entry a client may send; fixes the scale")
    ] = 1.0
    min_clients: Annotated[int, Field(ge=3, description="a sum of fewer clients is never opened")] = 3
    plan: FederationPlan | None = field(default=None, repr=False, metadata={"internal": True})
    """Filled in by `calibrate`."""

    def calibrate(self, plan: FederationPlan) -> Self:
        """Remember the federation.

        Raises:
            ConfigError: too few clients.
        """
        from fedsec.federation.hidden import enough

        enough(self.name, plan, self.min_clients)
        return replace(self, plan=plan)

    def aggregator(self) -> SecureSum:
        """The masked sum."""
        from .aggregator import SecureSum

        return SecureSum(self)
