"""Can a curious server rebuild the clients' images from what reaches it? The plugin `gradinversion`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fedsec.attack import Attack

from .settings import Method, Settings

if TYPE_CHECKING:
    from fedsec.types import Findings, Target, VictimPlan


@dataclass(frozen=True)
class GradInversion(Attack):
    """Gradient inversion from the server's seat: exact methods first, then optimisation, within a CPU budget.

    By default it is adaptive (it uses what is publicly known of the defense), recovers the labels itself, and attacks
    the untrained and the last broadcast model. Every reconstruction names its method and the reasons why stronger ones
    did not apply.
    """

    name: ClassVar[str] = "gradinversion"
    seat: ClassVar[Literal["server"]] = "server"
    goal: ClassVar[str] = "rebuild training images from the update that a client sends"

    method: Annotated[
        Method, Field(description="auto: the strongest that applies, stopping at a proof of exactness")
    ] = "auto"
    images: Annotated[int, Field(ge=1, description="victim images; intervals need 20 or more")] = 20
    batch: Annotated[int, Field(ge=1, description="images in one victim's batch")] = 1
    restarts: Annotated[int, Field(ge=1, description="starts of inverting_gradients, fewer where time is short")] = 8
    adaptive: Annotated[
        bool, Field(description="use the defense's public knowledge; false: treat the update as undefended")
    ] = True
    labels: Annotated[
        Literal["recovered", "oracle"], Field(description="oracle: the labels are told in advance, and results say so")
    ] = "recovered"
    rounds: Annotated[
        Literal["first", "last", "both"] | Annotated[int, Field(ge=1)],
        Field(description="whose broadcast model is attacked: first (untrained), last, both, or a round's number"),
    ] = "both"
    local_steps: Annotated[int, Field(ge=1, description="local steps behind a victim's update")] = 1
    split: Annotated[
        Literal["train", "test"], Field(description="victims among the clients' training images or unseen images")
    ] = "train"
    budget_s: Annotated[float, Field(gt=0, description="CPU seconds for each victim batch")] = 6.0
    iterations: Annotated[int, Field(ge=1, description="steps of inverting_gradients at most")] = 2400
    tv: Annotated[float, Field(ge=0, description="total variation weight of inverting_gradients")] = 0.001
    mode: Annotated[
        Literal["train", "eval"] | None,
        Field(description="mode of the victims' normalisation layers; none: as the clients train"),
    ] = None

    def victims(self) -> VictimPlan:
        """The uploads to be shown."""
        from fedsec.types import VictimPlan

        named = {"first": (1,), "last": (-1,), "both": (1, -1)}
        return VictimPlan(
            rounds=named[self.rounds] if isinstance(self.rounds, str) else (self.rounds,),
            images=self.images,
            batch=self.batch,
            local_steps=self.local_steps,
            split=self.split,
            mode=self.mode,
            oracle_labels=self.labels == "oracle",
        )

    def conclude(self, target: Target) -> Findings:
        """Attack every view."""
        from fedsec.types import Findings

        from .parallel import make_job, run_all
        from .stamp import stamp

        if not target.views:
            return Findings(notes=("no view reached the server",))
        settings = Settings(self.method, self.restarts, self.iterations, self.tv, self.budget_s)
        job = make_job(target, settings, adaptive=self.adaptive, mode=self.mode)
        oracle = self.labels == "oracle"
        return Findings(
            reconstructions=run_all(job, target),
            assumptions=stamp(target, settings, oracle=oracle, adaptive=self.adaptive, mode=self.mode, model=job.model),
            notes=("labels were told in advance: not a result for the headline",) if oracle else (),
        )
