"""Site-aware label graphs: the CNN is shared, a graph network over labels stays at the hospital."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.errors import ConfigError
from fedsec.federation.desk import Setting, Site, seeded
from fedsec.federation.strategy import Label, Strategy
from fedsec.models.base import Backbone, Normalised

WIDTH = 64
HEAD = "net.label_graph"


class LabelGraph(nn.Module):
    """H₀[l] = W_l f + b_l; H = ReLU(Â H₀ Θ₁); H = Â H Θ₂ + H₀; logit_l = ⟨u_l, H[l]⟩ + c_l."""

    adjacency: Tensor

    def __init__(self, features: int, labels: int, width: int = WIDTH) -> None:
        super().__init__()
        self.labels, self.width = labels, width
        self.nodes = nn.Linear(features, labels * width)
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.readout = nn.Parameter(torch.randn(labels, width) / width**0.5)
        self.offset = nn.Parameter(torch.zeros(labels))
        self.register_buffer("adjacency", torch.eye(labels))

    def embedded(self, features: Tensor) -> Tensor:
        """H₀ (B, L, d) of features (B, F)."""
        return self.nodes(features).view(-1, self.labels, self.width)  # type: ignore[no-any-return]

    def propagate(self, h0: Tensor) -> Tensor:
        """Logits (B, L) of H₀."""
        h = F.relu(self.adjacency @ self.first(h0))
        h = self.adjacency @ self.second(h) + h0
        logits: Tensor = (self.readout * h).sum(-1) + self.offset
        return logits

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features."""
        return self.propagate(self.embedded(features))


class GraphHeaded(Backbone):
    """A backbone whose last layer is replaced by a label graph."""

    def __init__(self, net: Backbone, labels: int) -> None:
        super().__init__()
        self.net = net
        self.embed_dim, self.input = net.embed_dim, net.input
        self.label_graph = LabelGraph(net.embed_dim, labels)

    def embed(self, x: Tensor) -> Tensor:
        """Features of the backbone."""
        return self.net.embed(x)

    def head(self, features: Tensor) -> Tensor:
        """Logits of the graph."""
        return self.label_graph(features)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SiteAwareGNN(Strategy):
    """CNN shared, graph over labels personal: its edges are the client's own label co-occurrence. Chakravarty 2021.

    A[i, j] = P(j | i) where that is at least τ, from the client's training labels; Â is (A + I) with rows that sum
    to 1. The backbone's own last layer is not used, and does not travel.
    """

    name: ClassVar[str] = "siteaware_gnn"
    goal: ClassVar[str] = "shared CNN, a personal graph network over labels"
    source: ClassVar[str] = "Chakravarty et al., ISBI 2021 (abstract)"
    label: ClassVar[Label] = "reconstruction"
    personal: ClassVar[bool] = True
    not_private: ClassVar[str] = "the graph's edges follow the client's own labels"
    tau: Annotated[float, Field(ge=0, le=1, description="τ: smallest P(j|i) that makes an edge")] = 0.1
    nodes: Annotated[Literal["local", "shared"], Field(description="where label embeddings and readout live")] = "local"

    def prepare_model(self, model: nn.Module, setting: Setting) -> nn.Module:
        """Put the graph in the place of the last layer.

        Raises:
            ConfigError: a network that is not one of ours.
        """
        if not isinstance(model, Normalised):
            raise ConfigError("siteaware_gnn: the model offers no features; choose a registered one")
        old = model.net
        seed = setting.ctx.entropy("label-graph")
        model.net = seeded(seed, lambda: GraphHeaded(old, setting.recipe.num_classes))  # type: ignore[assignment]
        for name, parameter in old.named_parameters():
            if name.rpartition(".")[0] in unused_layers(old):
                parameter.requires_grad_(False)
        return model

    def local_selectors(self) -> tuple[str, ...]:
        """The graph, with or without what hangs on its nodes."""
        if self.nodes == "local":
            return (f"key:{HEAD}.*",)
        return (f"key:{HEAD}.first.*", f"key:{HEAD}.second.*", f"key:{HEAD}.adjacency")

    def begin(self, site: Site) -> None:
        """Edges from this client's labels."""
        graph = next(m for m in site.model.modules() if isinstance(m, LabelGraph))
        with torch.no_grad():
            graph.adjacency.copy_(normalised(co_occurrence(site.y, site.recipe.num_classes, self.tau)))


def unused_layers(net: Backbone) -> set[str]:
    """Names of the layers of a backbone that only its own `head` uses."""
    used: set[str] = set()
    names = {module: name for name, module in net.named_modules()}
    handles = [
        m.register_forward_hook(lambda m, *_: used.add(names[m])) for m in net.modules() if not list(m.children())
    ]
    training = net.training
    try:
        side = max(net.input.size, 28)
        with torch.no_grad():
            net.eval().embed(torch.zeros(1, net.input.channels, side, side))
    finally:
        for handle in handles:
            handle.remove()
        net.train(training)
    return {name for module, name in names.items() if not list(module.children()) and name not in used}


def co_occurrence(y: Tensor, labels: int, tau: float) -> Tensor:
    """(L, L) P(j | i) where it is at least τ, else 0; labels (N,) classes or (N, L) 0/1, NaN counting as 0."""
    one_hot = F.one_hot(y.long(), labels).float() if y.ndim == 1 else torch.nan_to_num(y.float())
    together = one_hot.T @ one_hot
    share = together / together.diagonal().clamp(min=1)[:, None]
    return torch.where(share >= tau, share, torch.zeros_like(share))


def normalised(a: Tensor) -> Tensor:
    """Rows of (A with a unit diagonal) divided by their sums."""
    whole = a.clone()
    whole.fill_diagonal_(1.0)
    return whole / whole.sum(1, keepdim=True)
