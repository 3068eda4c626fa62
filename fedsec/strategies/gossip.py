"""Decentralised averaging: no server, every client mixes with its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from fedsec.errors import ConfigError
from fedsec.federation.desk import Desk, ServerState, Setting
from fedsec.federation.strategy import Label, Strategy
from fedsec.types import RoundContext

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Gossip(Strategy):
    """Local training, then `mix` times θ_i ← Σ_j W_ij θ_j over the neighbours, W the Metropolis weights.

    There is no server; the mean of all models, which is judged as the shared one, exists in the simulation alone. A
    curious party sits at a node (`observer`) and gets its neighbours' whole models in every round; it is granted the
    model that each of them trained from, which it knows only in part, so that what it finds is an upper bound.
    """

    name: ClassVar[str] = "gossip"
    goal: ClassVar[str] = "no server: clients average with their neighbours"
    source: ClassVar[str] = "Metropolis weights: Xiao and Boyd 2004"
    label: ClassVar[Label] = "ours"
    personal: ClassVar[bool] = True
    individuals: ClassVar[str] = "neighbours exchange whole models, and there is no server that could sum"
    own_rule: ClassVar[str] = "every client mixes with its neighbours, and there is no server to aggregate"
    graph: Annotated[Literal["ring", "star", "grid", "complete", "random"], Field(description="who talks to whom")] = (
        "ring"
    )
    degree: Annotated[int, Field(ge=1, description="neighbours of each node of the random graph, about")] = 3
    mix: Annotated[int, Field(ge=1, description="mixing steps a round")] = 1
    observer: Annotated[int | None, Field(ge=0, description="node at which a curious party sits")] = None

    @property
    def server_seat(self) -> str:  # type: ignore[override]
        """An attack from a server's seat needs a node to sit at."""
        if self.observer is not None:
            return ""
        return "there is no server under gossip; seat the attacker at a node: --strategy gossip:observer=0"

    def prepare_model(self, model: nn.Module, setting: Setting) -> nn.Module:
        """The model as it is.

        Raises:
            ConfigError: the graph cannot be made for so many clients, or the observer does not exist.
        """
        self.matrix(setting.clients, setting.ctx.seed)
        if self.observer is not None and self.observer >= setting.clients:
            raise ConfigError(f"gossip: observer={self.observer} is no client; they are 0 to {setting.clients - 1}")
        if self.observer is not None and self.graph == "random":
            raise ConfigError("gossip: an observer needs a graph that is known beforehand; choose ring, star or grid")
        return model

    def matrix(self, nodes: int, seed: int) -> Matrix:
        """(n, n) mixing weights of this federation's graph."""
        rng = RoundContext(seed, 0, 0).numpy("gossip-graph")
        return metropolis(adjacency(self.graph, nodes, self.degree, rng))

    def visible(self, state: ServerState) -> frozenset[int] | None:
        """The observer's neighbours; nobody where there is no observer."""
        if self.observer is None:
            return frozenset()
        drawn = adjacency(self.graph, int(state.side["nodes"]), self.degree, np.random.default_rng(0))
        return frozenset(np.flatnonzero(drawn[self.observer]).tolist())

    def serve(self, desk: Desk) -> None:
        """Mix; a client that is absent neither gives nor takes, and its weight stays with those who would mix."""
        if not desk.updates:
            return
        state = desk.state
        trained = {u.client: desk.uploaded(u) for u in desk.updates}
        nodes = int(state.side["nodes"])
        weights = self.matrix(nodes, desk.ctx.seed)
        present = sorted(trained)
        models = torch.stack([trained[k] for k in present])
        part = torch.as_tensor(among(weights, present), dtype=torch.float64, device=models.device)
        for _ in range(self.mix):
            models = (part @ models.double()).to(models.dtype)
        for client, model in zip(present, models, strict=True):
            state.sent[client] = model
        everybody = [state.sent.get(k, desk.before) for k in range(nodes)]
        state.params = torch.stack(everybody).mean(0)

    def initial_side(self, model: nn.Module, setting: Setting) -> dict[str, Tensor]:
        """How many nodes there are."""
        return {"nodes": torch.tensor(setting.clients)}


def adjacency(graph: str, nodes: int, degree: int, rng: np.random.Generator) -> Matrix:
    """(n, n) 0/1 matrix of an undirected graph without loops.

    Raises:
        ConfigError: too few nodes, or a random graph that is not connected after 100 draws.
    """
    if nodes < 2:
        raise ConfigError("gossip: one client has no neighbours")
    a = np.zeros((nodes, nodes))
    if graph == "complete":
        a[:] = 1
    elif graph == "star":
        a[0, 1:] = 1
    elif graph == "ring":
        a[np.arange(nodes), (np.arange(nodes) + 1) % nodes] = 1
    elif graph == "grid":
        width = next(w for w in range(int(np.sqrt(nodes)), 0, -1) if nodes % w == 0)
        for i in range(nodes):
            if (i + 1) % width:
                a[i, i + 1] = 1
            if i + width < nodes:
                a[i, i + width] = 1
    else:
        return random_graph(nodes, degree, rng)
    a = np.maximum(a, a.T)
    np.fill_diagonal(a, 0)
    return a


def random_graph(nodes: int, degree: int, rng: np.random.Generator) -> Matrix:
    """A connected graph in which each node draws its share of `degree` neighbours."""
    for _ in range(100):
        upper = np.triu(rng.random((nodes, nodes)) < min(1.0, degree / (nodes - 1)), 1)
        a = (upper | upper.T).astype(np.float64)
        if (np.linalg.matrix_power(a + np.eye(nodes), nodes) > 0).all():
            return a
    raise ConfigError(f"gossip: no connected random graph of degree {degree} on {nodes} nodes; raise degree")


def metropolis(a: Matrix) -> Matrix:
    """W_ij = 1/(1 + max(deg_i, deg_j)) on edges, the rest on the diagonal: symmetric, rows sum to 1."""
    degrees = a.sum(1)
    w = a / (1 + np.maximum(degrees[:, None], degrees[None, :]))
    return np.asarray(w + np.diag(1 - w.sum(1)))


def among(w: Matrix, present: list[int]) -> Matrix:
    """The mixing matrix of those present: what would go to the absent stays on the diagonal."""
    part = w[np.ix_(present, present)]
    return np.asarray(part + np.diag(1 - part.sum(1)))


def second_eigenvalue(w: Matrix) -> float:
    """λ₂(W): how fast disagreement shrinks."""
    return float(np.sort(np.abs(np.linalg.eigvalsh(w)))[-2])
