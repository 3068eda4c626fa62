"""What an adversary may do in a federated round: the base class `Attack`.

An attack is a frozen dataclass. Its fields are its parameters, exactly as for a defense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from fedsec.types import Seat

if TYPE_CHECKING:
    from torch import Tensor

    from fedsec.types import Findings, Limits, RoundContext, ServerView, Target, Update, VictimPlan


class Attack:
    """Does nothing until a hook is overridden. The seat decides which hooks the round calls.

    | seat | hooks |
    |---|---|
    | server | `on_view`, `victims`, `conclude` |
    | malicious-server | those of the server, and `on_broadcast` |
    | client | `controls`, `on_data`, `on_upload`, `conclude` |
    | outsider | `conclude` |

    The server and the outsider do not change the training: their evidence is kept with it, and any number of such
    attacks share one training. A malicious client or server is part of the training.
    """

    name: ClassVar[str]
    seat: ClassVar[Seat]
    goal: ClassVar[str]
    """One line for `fedsec list attacks`."""

    def controls(self, num_clients: int) -> frozenset[int]:
        """The clients that belong to the adversary."""
        return frozenset()

    def on_broadcast(self, params: Tensor, client: int, ctx: RoundContext) -> Tensor:
        """Malicious server: what this client is sent instead of `params`."""
        return params

    def on_data(self, x: Tensor, y: Tensor, ctx: RoundContext) -> tuple[Tensor, Tensor]:
        """Malicious client: the images and labels it trains on."""
        return x, y

    def on_upload(self, update: Update, peers: Sequence[Update], ctx: RoundContext) -> Update:
        """Malicious client, after and instead of its own defenses. `peers`: the updates it is assumed to see."""
        return update

    def on_view(self, view: ServerView, ctx: RoundContext) -> None:
        """Curious server, while training runs: what reached it in this round."""

    def victims(self) -> VictimPlan | None:
        """Curious server: uploads it wants to be shown after training (see `VictimPlan`)."""
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
