"""The defense `he`: its parameters, and what they imply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from fedsec.defense import Defense
from fedsec.types import FederationPlan

if TYPE_CHECKING:
    from .aggregator import HomomorphicSum


@dataclass(frozen=True)
class HE(Defense):
    """The server adds up CKKS ciphertexts and never sees one client's update (Cheon et al. 2017).

    Encryption hides uploads, not what the sum and the released model give away.
    """

    name: ClassVar[str] = "he"
    protects: ClassVar[str] = "hides each client's update from the server: it adds up ciphertexts it cannot read"

    backend: Annotated[
        Literal["tenseal", "seal"],
        Field(description="tenseal: 7.5 x the bytes of fp32; seal: 1.9 x with topology=shared, 3.8 x with keyholder"),
    ] = "tenseal"
    topology: Annotated[
        Literal["auto", "keyholder", "shared"],
        Field(description="who has the secret key: a party of its own, or all hospitals; auto: shared for seal"),
    ] = "auto"
    select: Annotated[
        str,
        Field(
            pattern=r"^(all|first:.+|layers:.+)$",
            description="what is encrypted: all, first:0.2 (share of entries, from the input side) or layers:REGEX",
        ),
    ] = "all"
    max_abs: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="largest entry a client may send; fixes the scale")
    ] = 8.0
    min_clients: Annotated[int, Field(ge=3, description="a sum of fewer clients is never opened")] = 3
    flood_lambda: Annotated[
        int | None,
        Field(ge=1, le=128, description="bits of security of the noise on an opened sum; none: no noise"),
    ] = None
    degree: Annotated[int | None, Field(gt=0, description="ring degree; none: the backend's")] = None
    primes: Annotated[
        str | None,
        Field(pattern=r"^\d+(-\d+)*$", description="bits of the primes, such as 60-40-40; none: the backend's"),
    ] = None
    workers: Annotated[
        int | None, Field(ge=1, description="processes that encrypt a large upload; none: one a core")
    ] = None
    plan: FederationPlan | None = field(default=None, repr=False, metadata={"internal": True})
    """Filled in by `calibrate`."""

    @property
    def held(self) -> Literal["keyholder", "shared"]:
        """Who has the secret key."""
        if self.topology == "auto":
            return "shared" if self.backend == "seal" else "keyholder"
        return self.topology

    def calibrate(self, plan: FederationPlan) -> Self:
        """Refuse what cannot be safe with this federation.

        Raises:
            ConfigError: too few clients, or parameters that are not safe, not exact enough or do not exist.
        """
        from fedsec.federation.hidden import enough

        from .selection import clear_entries

        enough(self.name, plan, self.min_clients)
        if plan.layout is not None:
            clear_entries(self.select, plan.layout)
        ready = replace(self, plan=plan)
        _ = ready.aggregator().parameters
        return ready

    def aggregator(self) -> HomomorphicSum:
        """The encrypted sum."""
        from .aggregator import HomomorphicSum

        return HomomorphicSum(self)

    def public_knowledge(self, client: int) -> Mapping[str, Any]:
        """Which entries can be read, where not all are encrypted."""
        from .selection import clear_entries

        if self.plan is None or self.plan.layout is None:
            return {}
        mask = clear_entries(self.select, self.plan.layout)
        return {} if mask is None else {"mask": mask}
