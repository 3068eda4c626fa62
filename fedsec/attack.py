"""What an adversary may do in a federated round: the base class `Attack`.

An attack is a frozen dataclass. Its fields are its parameters, exactly as for a defense.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from fedsec.types import Seat

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedsec.findings import CandidatePlan, Findings, Limits, PublicData, Target, VictimPlan
    from fedsec.types import FederationPlan, LocalRecipe, Peers, Probe, RoundContext, ServerView, Update


class Attack:
    """Does nothing until a hook is overridden. The seat decides which hooks the round calls.

    | seat | hooks |
    |---|---|
    | server | `on_view`, `victims`, `candidates`, `conclude` |
    | malicious-server | those of the server, `craft` and `on_broadcast` |
    | client | `controls`, `on_data`, `on_upload`, `conclude` |
    | outsider | `candidates`, `conclude` |

    The server and the outsider do not change the training: their evidence is kept with it, and any number of such
    attacks share one training. So does a malicious server that only crafts what its victims are sent. A malicious
    client, or a server that changes what it broadcasts, is part of the training.
    """

    name: ClassVar[str]
    seat: ClassVar[Seat]
    """Of the attack as it is listed; parameters may put an instance on another (see `take_seat`)."""
    goal: ClassVar[str]
    """One line for `fedsec list attacks`."""
    reads_parameters: ClassVar[bool] = True
    """It needs the model's parameters or updates of them; False: what is sent beside them is enough."""
    needs_sgd: ClassVar[bool] = False
    """It rebuilds what a gradient says; an adaptive optimiser's step is none, so that it would look harmless."""
    on_request: ClassVar[bool] = False
    """It costs so much that an audit leaves it out unless it is named."""

    def take_seat(self, seat: Seat) -> None:
        """Sit elsewhere than the class says; for `__post_init__`, where a parameter decides it."""
        object.__setattr__(self, "seat", seat)

    @property
    def changes_training(self) -> bool:
        """The federation trains otherwise than it would without this attack."""
        crafts_all = self.seat == "malicious-server" and type(self).on_broadcast is not Attack.on_broadcast
        return self.seat == "client" or crafts_all

    def calibrate(self, plan: FederationPlan, ctx: RoundContext) -> Self:
        """Before training: fix what depends on client sizes and the task, such as the seats."""
        return self

    def controls(self, num_clients: int) -> frozenset[int]:
        """The clients that belong to the adversary."""
        return frozenset()

    def on_broadcast(self, params: Tensor, client: int, ctx: RoundContext) -> Tensor:
        """Malicious server: what this client is sent instead of `params`."""
        return params

    def on_data(self, x: Tensor, y: Tensor, ctx: RoundContext) -> tuple[Tensor, Tensor]:
        """Malicious client: the images and labels it trains on."""
        return x, y

    def sees(self, honest: Sequence[int], ctx: RoundContext) -> Collection[int]:
        """Malicious client: the honest clients whose updates it knows before it sends its own; all by default."""
        return honest

    @property
    def knows_rule(self) -> bool:
        """Malicious client: it knows how the server aggregates."""
        return False

    def on_upload(self, update: Update, peers: Peers, ctx: RoundContext) -> Update:
        """Malicious client, after and instead of its own defenses. `peers`: what it is assumed to see."""
        return update

    def probe(self, x: Tensor, y: Tensor) -> Probe | None:
        """Simulation only: held-out images turned into those that show whether a backdoor works."""
        return None

    def on_view(self, view: ServerView, ctx: RoundContext) -> None:
        """Curious server, while training runs: what reached it in this round."""

    def victims(self) -> VictimPlan | None:
        """Curious server: uploads it wants to be shown after training (see `VictimPlan`)."""
        return None

    def candidates(self) -> CandidatePlan | None:
        """Outsider or curious server: it wants images that may have been trained on (`Target.candidates`)."""
        return None

    def craft(
        self, model: nn.Module, views: Sequence[ServerView], public: PublicData, recipe: LocalRecipe, ctx: RoundContext
    ) -> nn.Module | None:
        """Malicious server: the model that a victim is sent in the next query, instead of the broadcast one.

        Args:
            model: a copy of the broadcast model, the attack's own to change; further layers may be added.
            views: what the earlier queries of the same victim, on the same batch, brought.
            public: images that anybody could have.
            recipe: how the victim trains.
            ctx: the victim's; the same for all its queries.

        Returns:
            what to send; None: nothing more to ask. A victim that is never asked is sent the broadcast model once.
        """
        return None

    def conclude(self, target: Target) -> Findings | None:
        """After training, from what the target holds and nothing else."""
        return None

    def limits(self, target: Target, truths: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Limits]:
        """Simulation only, after `conclude`: how well could any attack have done on each view?

        Args:
            target: as for `conclude`.
            truths: (images, labels) behind each view, in order.

        Returns:
            one entry a view, or nothing where no limit is known.
        """
        return ()
