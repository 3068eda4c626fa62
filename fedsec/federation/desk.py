"""What a strategy has in its hands: one client's turn (`Site`), the server's desk (`Desk`), and what it declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedsec.federation.sharing import Sharing
from fedsec.types import LocalRecipe, RoundContext, Update

Key = TypeVar("Key", int, str)
Index = tuple[Tensor, ...]
"""Row numbers, or those of rows and columns, of a tensor's part."""
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images, labels) -> the mean loss of the batch."""


@dataclass(frozen=True)
class ByLogits:
    """An objective that for one image alone is a function of its logits: any such loss has a slope at the logits that
    the last layer's bias gradient shows."""

    whole: Objective

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of the batch."""
        return self.whole(model, x, y)


@dataclass(frozen=True)
class Report:
    """One thing that leaves a client beside its shared tensors."""

    name: str
    """Its key in `Update.extras`."""
    tells: str
    """What it gives away, in a few words."""
    required: bool = True
    """An update without it is turned away."""


@dataclass(frozen=True)
class Setting:
    """What is known of a federation before its first round."""

    image_shape: tuple[int, int, int]
    recipe: LocalRecipe
    clients: int
    ctx: RoundContext
    """Of round 0: the seed of whatever is initialised."""


@dataclass
class Site:
    """One client's turn as its strategy sees it; lives at the client."""

    client: int
    model: nn.Module
    """Holds what was broadcast and the client's local tensors when the turn begins."""
    sharing: Sharing
    params: Tensor
    """(d,) the shared trainable tensors as they were received."""
    recipe: LocalRecipe
    ctx: RoundContext
    own: dict[str, Tensor]
    """What the client keeps between its turns. `params` and `buffers` in it are its personal model."""
    received: Mapping[str, Tensor]
    """What the server sent beside the model."""
    x: Tensor
    y: Tensor
    loss: float = float("nan")
    """Mean training loss of this turn, once it is over."""
    scratch: dict[str, Any] = field(default_factory=dict)
    """For what one hook of a turn leaves to a later one; gone when the turn is over."""

    def shared(self) -> Tensor:
        """(d,) a copy of the model's shared trainable tensors as they are now."""
        return self.sharing.params.flatten(dict(self.model.state_dict(keep_vars=True)))

    def buffers(self) -> Tensor:
        """(b,) a copy of the model's shared buffers as they are now."""
        return self.sharing.buffers.flatten(dict(self.model.state_dict(keep_vars=True)))

    def keep_personal(self) -> None:
        """Make the model as it is now the client's personal one."""
        self.own["params"], self.own["buffers"] = self.shared(), self.buffers()


@dataclass
class ServerState:
    """What the server holds between rounds, and, for the simulation alone, what its clients keep."""

    params: Tensor
    buffers: Tensor
    local: dict[int, Tensor] = field(default_factory=dict)
    """Simulation only: the clients' personal tensors, which no server or attack hook can see."""
    own: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Simulation only: what each client's strategy keeps, by client id."""
    sent: dict[int, Tensor] = field(default_factory=dict)
    """Client -> its own shared tensors, where the strategy gives each client another model."""
    side: dict[str, Tensor] = field(default_factory=dict)
    """What the server sends beside the model, or keeps for its own use."""
    trained: set[int] = field(default_factory=set)
    """Clients that have replied at least once."""

    def params_for(self, client: int) -> Tensor:
        """(d,) what this client is sent."""
        return self.sent.get(client, self.params)

    def copy(self, device: torch.device | str = "cpu") -> ServerState:
        """On this device, sharing no memory."""

        def moved(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
            return {k: t.detach().to(device, copy=True) for k, t in tensors.items()}

        return ServerState(
            self.params.to(device, copy=True),
            self.buffers.to(device, copy=True),
            moved(self.local),
            {k: moved(kept) for k, kept in self.own.items()},
            moved(self.sent),
            moved(self.side),
            set(self.trained),
        )


@dataclass
class Desk:
    """The server after it has combined a round's updates: where a strategy finishes what its clients began."""

    state: ServerState
    """With the new shared model already in it."""
    before: Tensor
    """(d,) the shared model that was broadcast."""
    updates: tuple[Update, ...]
    """Those in clear that passed the screening, in client order; none where the rule hides individuals."""
    weights: Mapping[int, float]
    model: nn.Module
    """The architecture; its weights are those of nobody in particular."""
    sharing: Sharing
    ctx: RoundContext

    def uploaded(self, update: Update) -> Tensor:
        """(d,) the model that this client sent: what it had received plus its update."""
        return self.state.sent.get(update.client, self.before) + update.delta


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that teaches and is not taught: no gradients, evaluation mode, so that its statistics cannot drift."""
    import copy

    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return twin.eval()


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module whose initial weights depend on the seed alone; no global generator is moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        return build()
