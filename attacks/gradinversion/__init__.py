"""Can a curious server rebuild the clients' images from what reaches it? The plugin `gradinversion`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import Field

from fedsec.attack import Attack

from .settings import BatchStatistics, ClockKind, Malicious, MaliciousMethod, Method, Settings, SortBy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from fedsec.findings import Findings, Limits, PublicData, Target, VictimPlan
    from fedsec.types import LocalRecipe, RoundContext, ServerView


@dataclass(frozen=True)
class GradInversion(Attack):
    """Gradient inversion from the server's seat: exact methods first, then optimisation, within a CPU budget.

    By default it is adaptive (it uses what is publicly known of the defense), recovers the labels itself, and attacks
    the untrained and the last broadcast model. Every reconstruction names its method and the reasons why stronger ones
    did not apply.
    """

    name: ClassVar[str] = "gradinversion"
    seat: ClassVar[Literal["server", "malicious-server"]] = "server"
    goal: ClassVar[str] = "rebuild training images from the update that a client sends"
    needs_sgd: ClassVar[bool] = True

    method: Annotated[
        Method | MaliciousMethod,
        Field(description="auto: the strongest that applies, stopping at a proof; imprint, fishing: server=malicious"),
    ] = "auto"
    images: Annotated[int, Field(ge=1, description="victim images; intervals need 20 or more")] = 20
    batch: Annotated[int, Field(ge=1, description="images in one victim's batch")] = 1
    restarts: Annotated[int, Field(ge=1, description="starts of inverting_gradients, fewer where time is short")] = 8
    adaptive: Annotated[
        bool | Literal["both"],
        Field(description="use the defense's public knowledge; false: treat the update as undefended; both: compare"),
    ] = True
    labels: Annotated[
        Literal["recovered", "oracle", "joint"],
        Field(description="oracle: told in advance, and results say so; joint: optimised with the images, by dlg"),
    ] = "recovered"
    rounds: Annotated[
        Literal["first", "last", "both"] | Annotated[int, Field(ge=1)],
        Field(description="whose broadcast model is attacked: first (untrained), last, both, or a round's number"),
    ] = "both"
    local_steps: Annotated[int, Field(ge=1, description="local steps behind a victim's update")] = 1
    local_epochs: Annotated[int | None, Field(ge=1, description="local epochs instead of local_steps")] = None
    local_batch: Annotated[int | None, Field(ge=1, description="images in a local step; none: the whole batch")] = None
    split: Annotated[
        Literal["train", "test"], Field(description="victims among the clients' training images or unseen images")
    ] = "train"
    budget_s: Annotated[float, Field(gt=0, description="seconds for each victim batch, on the clock below")] = 6.0
    clock: Annotated[
        ClockKind,
        Field(description="cpu: CPU seconds; work: counted work worth about as much, so that reruns agree to the bit"),
    ] = "cpu"
    bound: Annotated[
        bool, Field(description="the least error that noise allows, beside the attack's; some CPU seconds an image")
    ] = True
    iterations: Annotated[int, Field(ge=1, description="steps of inverting_gradients at most")] = 2400
    tv: Annotated[float, Field(ge=0, description="total variation weight of inverting_gradients")] = 0.001
    mode: Annotated[
        Literal["train", "eval"] | None,
        Field(description="mode of the victims' normalisation layers; none: as the clients train"),
    ] = None
    bn: Annotated[
        BatchStatistics,
        Field(description="BatchNorm moments that images must match; auto: the strongest honest ones, see the docs"),
    ] = "auto"

    server: Annotated[
        Literal["honest", "malicious"],
        Field(description="malicious: it sends victims crafted models, for imprint and fishing"),
    ] = "honest"
    bins: Annotated[int, Field(ge=2, description="bins of imprint: images beyond one in a bin are lost")] = 512
    sort_by: Annotated[
        SortBy, Field(description="imprint sorts images by mean pixel, a random direction, or the first cosine mode")
    ] = "mean"
    queries: Annotated[int, Field(ge=1, description="models that fishing sends at most for one batch")] = 32

    def __post_init__(self) -> None:
        crafting = self.method in get_args(MaliciousMethod)
        if crafting != (self.server == "malicious"):
            problem = (
                f"method={self.method} breaks the protocol; to say so, write method={self.method},server=malicious"
                if crafting
                else f"server=malicious is for method=imprint and method=fishing, not for method={self.method}"
            )
            raise ValueError(problem)
        if crafting and (self.local_steps != 1 or self.local_epochs is not None or self.local_batch is not None):
            raise ValueError(
                f"method={self.method} reads a single local step; leave local_steps, local_epochs and local_batch out"
            )
        if self.local_epochs is not None and self.local_steps != 1:
            raise ValueError("give local_epochs or local_steps, not both")
        if self.labels == "joint" and self.method not in ("auto", "dlg"):
            raise ValueError(f"labels=joint is for method=dlg, not for method={self.method}")
        if crafting:
            self.take_seat("malicious-server")

    def victims(self) -> VictimPlan:
        """The uploads to be shown."""
        from fedsec.findings import VictimPlan

        named = {"first": (1,), "last": (-1,), "both": (1, -1)}
        return VictimPlan(
            rounds=named[self.rounds] if isinstance(self.rounds, str) else (self.rounds,),
            images=self.images,
            batch=self.batch,
            local_steps=self.local_steps,
            epochs=self.local_epochs,
            batch_size=self.local_batch,
            split=self.split,
            mode=self.mode,
            oracle_labels=self.labels == "oracle",
            queries=self.queries if self.method == "fishing" else 1,
        )

    def craft(
        self, model: nn.Module, views: Sequence[ServerView], public: PublicData, recipe: LocalRecipe, ctx: RoundContext
    ) -> nn.Module | None:
        """What a malicious server sends a victim next."""
        from . import malicious

        plan, adaptive = self._malicious, self.adaptive is not False
        return malicious.craft(plan, model, views, public, recipe, ctx, adaptive=adaptive) if plan else None

    @property
    def _malicious(self) -> Malicious | None:
        method = self.method
        return Malicious(method, self.bins, self.sort_by) if method == "imprint" or method == "fishing" else None

    def conclude(self, target: Target) -> Findings:
        """Attack every view."""
        from fedsec.findings import Findings

        from .parallel import make_job, run_all
        from .stamp import stamp

        if not target.views:
            return Findings(notes=("no view reached the server",))
        if self._malicious is not None:
            return self._conclude_malicious(target, self._malicious)
        assert self.method != "imprint" and self.method != "fishing"
        settings = Settings(
            method=self.method,
            restarts=self.restarts,
            iterations=self.iterations,
            tv=self.tv,
            budget_s=self.budget_s,
            bn=self.bn,
            joint=self.labels == "joint",
            clock=self.clock,
        )
        job = make_job(target, settings, mode=self.mode)
        oracle, adaptive = self.labels == "oracle", self.adaptive is not False
        results = run_all(job, target, (True, False) if self.adaptive == "both" else (adaptive,))
        assumed = stamp(
            target,
            settings,
            oracle=oracle,
            adaptive=adaptive,
            mode=self.mode,
            model=job.model,
            reconstructions=results[0],
        )
        return Findings(
            reconstructions=results[0],
            naive=results[1] if len(results) > 1 else (),
            assumptions=assumed,
            notes=("labels were told in advance: not a result for the headline",) if oracle else (),
        )

    def _conclude_malicious(self, target: Target, plan: Malicious) -> Findings:
        from fedsec.findings import Findings

        from . import malicious
        from .stamp import stamp

        settings = Settings("auto", self.restarts, self.iterations, self.tv, self.budget_s, clock=self.clock)
        job = malicious.make_job(plan, target, settings, mode=self.mode)
        adaptive = self.adaptive is not False
        results = malicious.run_all(job, target, (True, False) if self.adaptive == "both" else (adaptive,))
        known = stamp(target, settings, oracle=False, adaptive=adaptive, mode=self.mode, model=job.model)
        return Findings(
            reconstructions=results[0],
            naive=results[1] if len(results) > 1 else (),
            assumptions={**known, **malicious.stamp(job, target)},
        )

    def limits(self, target: Target, truths: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Limits]:
        """The Bayesian Cramér–Rao indicator and the rank indices of every view."""
        # A malicious server's bounds would be those of the crafted model, which nobody defends.
        if not self.bound or self._malicious is not None:
            return ()
        from .limits import limits_of

        return limits_of(target, truths, self.mode)
