"""Which tensors a federation shares, how clients train for it, what the server makes of it, and who is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsec.defense import LocalStep
from fedsec.federation.desk import Desk, Index, Objective, Report, ServerState, Setting, Site
from fedsec.federation.sharing import Sharing, load, resolve
from fedsec.types import Descent, LocalRecipe, RoundContext, Update, Wire

Label = Literal["faithful", "faithful, fixed", "reconstruction", "ours"]


@dataclass(frozen=True)
class Strategy:
    """Base class: share everything, train as the recipe says, weigh by capped sample counts.

    Source: McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data", eq. 1.
    The cap keeps a client that lies about its size at `max_weight` (default 2/n).

    Hooks, in the order of a round: `received`, `begin`, `objective` and `local_step`, `finish`, `report` at the
    client; `valid_report`, `reweigh`, `serve` at the server; `personal_model` and `unseen_model` when it is judged.
    `descent`, `part` and `remembered` say what a curious server knows of the client's side, so that it can imitate it.
    """

    name: ClassVar[str]
    goal: ClassVar[str]
    source: ClassVar[str] = "McMahan et al. 2017"
    label: ClassVar[Label] = "faithful"
    """How close to its source: from the paper's or released formulas, with named corrections, or a design of ours."""
    reports: ClassVar[tuple[Report, ...]] = ()
    """All that leaves a client beside its shared tensors; anything else is turned away by the server."""
    statistics: ClassVar[str] = "BatchNorm means and variances, where the model has BatchNorm"
    """What shared buffers tell of the images; they travel with every upload."""
    personal: ClassVar[bool] = False
    """Clients are judged on models of their own."""
    shares_nothing: ClassVar[bool] = False
    """No parameter of the model leaves a client."""
    remembered: ClassVar[tuple[str, ...]] = ()
    """Keys of `Site.own` that hold what the client uploaded last, so that whoever saw that has them too."""
    individuals: ClassVar[str] = ""
    """Why the server must see single updates; empty where their sum is enough."""
    own_rule: ClassVar[str] = ""
    """Why no other rule can combine the updates; empty where any can."""
    not_private: ClassVar[str] = ""
    """Why clipping the gradient of each image bounds nothing here; empty where it does."""
    server_seat: ClassVar[str] = ""
    """Why nobody can attack from the server's seat; empty where somebody can."""

    max_weight: Annotated[
        float | None, Field(gt=0, le=1, description="largest weight of one client; 2/n where not given, 1: no cap")
    ] = None
    uniform: Annotated[bool, Field(description="equal weights, whatever sizes the clients claim")] = False

    # --- before the first round -------------------------------------------------------------------------------------

    def prepare_model(self, model: nn.Module, setting: Setting) -> nn.Module:
        """Add what the strategy needs to the (already defended) model, seeded by the setting."""
        return model

    def auxiliary(self) -> tuple[str, ...]:
        """Beginnings of state keys that serve training alone and are left out of the released checkpoint."""
        return ()

    def local_selectors(self) -> tuple[str, ...]:
        """Selectors (`key:GLOB`, `type:CLASS`, `stat`) of the tensors that stay at their client."""
        return ()

    def recipe(self, recipe: LocalRecipe) -> LocalRecipe:
        """The strategy's changes to the clients' training."""
        return recipe

    def sharing(self, model: nn.Module) -> Sharing:
        """Resolve the selectors on a (prepared) model."""
        return resolve(model, self.local_selectors(), label=self.name, empty=self.shares_nothing)

    def initial_side(self, model: nn.Module, setting: Setting) -> dict[str, Tensor]:
        """What the server holds beside the model before the first round."""
        return {}

    # --- at the client ----------------------------------------------------------------------------------------------

    def begin(self, site: Site) -> None:
        """After the broadcast was loaded into `site.model`, before training; may change what is trained from."""

    def objective(self, site: Site, base: Objective) -> Objective:
        """What a step minimises, given what it would without this strategy."""
        return base

    def local_step(self, step: LocalStep, site: Site) -> LocalStep:
        """Wrap the optimiser's step. Defenses wrap the result, so that they clip what is really sent."""
        return step

    def part(self, model: nn.Module, client: int) -> tuple[nn.Module, Mapping[str, Index]] | None:
        """The network that this client trains as it computes in training, and the place of each of its tensors in the
        whole one; None: the whole one."""
        return None

    def descent(self) -> Descent:
        """What `local_step` does, in the form in which a curious server can imitate it."""
        return Descent()

    def finish(self, site: Site) -> None:
        """After training, before the update is taken: keep what the client needs next time in `site.own`."""

    def report(self, site: Site) -> dict[str, Tensor]:
        """The declared side reports of this turn."""
        return {}

    def wire(self, site: Site) -> Wire | None:
        """How short the update is on the wire; None: every shared number travels as float32."""
        return None

    @property
    def final_epochs(self) -> int:
        """Epochs that every client trains for itself after the last round; what comes out never leaves it."""
        return 0

    # --- at the server ----------------------------------------------------------------------------------------------

    def received(self, state: ServerState, client: int) -> Mapping[str, Tensor]:
        """What this client is sent beside the model; all of `state.side` by default."""
        return state.side

    def weights(self, sizes: Mapping[int, int | None]) -> dict[int, float]:
        """Client -> weight, summing to 1 over those present; equal weights where a size is hidden."""
        n = len(sizes)
        known = [s for s in sizes.values() if s is not None]
        if self.uniform or len(known) < n or sum(known) == 0:
            return dict.fromkeys(sizes, 1 / n)
        shares = {client: size / sum(known) for client, size in zip(sizes, known, strict=True)}
        return cap_weights(shares, min(1.0, 2 / n) if self.max_weight is None else max(self.max_weight, 1 / n))

    def valid_report(self, extras: Mapping[str, Tensor]) -> str | None:
        """What is wrong with a client's reports, whose names and finiteness are already checked."""
        return None

    def reweigh(
        self, weights: Mapping[int, float], reports: Mapping[int, Mapping[str, Tensor]], ctx: RoundContext
    ) -> dict[int, float]:
        """Weights that look at the reports; the sum over those present must stay 1."""
        return dict(weights)

    def serve(self, desk: Desk) -> None:
        """After the new shared model stands: make what else clients will be sent."""

    def visible(self, state: ServerState) -> frozenset[int] | None:
        """Whose uploads reach the curious party; None: everybody's."""
        return None

    # --- who is judged ----------------------------------------------------------------------------------------------

    def personal_model(
        self, model: nn.Module, sharing: Sharing, client: int, state: ServerState, images: Tensor
    ) -> nn.Module:
        """What this client uses: its own `params` and `buffers` where it keeps some, else what it is sent.

        `images` are those it trains on, without labels.
        """
        own = state.own.get(client, {})
        params, buffers = own.get("params", state.params_for(client)), own.get("buffers", state.buffers)
        load(model, sharing, params.to(state.params), buffers.to(state.buffers), state.local.get(client))
        return model

    def unseen_model(self, model: nn.Module, sharing: Sharing, state: ServerState, images: Tensor) -> nn.Module:
        """What a client that never took part uses; `images` are its own, without labels."""
        load(model, sharing, state.params, state.buffers, None)
        return model


def cap_weights(shares: Mapping[int, float], cap: float) -> dict[int, float]:
    """Limit every weight to `cap` and give the excess to the others in proportion; the sum stays 1.

    Args:
        shares: non-negative weights with sum 1. cap: at least 1/n, so that a solution exists.
    """
    weights = dict(shares)
    capped: set[int] = set()
    while over := {c for c, w in weights.items() if w > cap + 1e-12} - capped:
        capped |= over
        free = sum(shares[c] for c in shares if c not in capped)
        room = 1 - cap * len(capped)
        if free <= 0:  # only clients without images are left: they share what remains
            rest = len(shares) - len(capped)
            return {c: cap if c in capped else room / rest for c in shares}
        weights = {c: cap if c in capped else shares[c] / free * room for c in shares}
    return weights


def report_fault(strategy: Strategy, update: Update) -> str | None:
    """Why a client's side reports are not believed: undeclared, missing, no tensor, not finite, or out of range."""
    declared = {r.name for r in strategy.reports}
    if undeclared := sorted(update.extras.keys() - declared):
        return f"report: {', '.join(undeclared)} is not declared by {strategy.name}"
    if missing := sorted({r.name for r in strategy.reports if r.required} - update.extras.keys()):
        return f"report: {', '.join(missing)} is missing"
    for name, value in update.extras.items():
        if not isinstance(value, Tensor) or not bool(torch.isfinite(value.double()).all()):
            return f"report: {name} is not a finite tensor"
    problem = strategy.valid_report(update.extras)
    return f"report: {problem}" if problem else None


@dataclass(frozen=True)
class FedAvg(Strategy):
    """Every client trains locally, the server averages (McMahan et al. 2017)."""

    name: ClassVar[str] = "fedavg"
    goal: ClassVar[str] = "local training, weighted average; sample weights are capped at 2/n"


@dataclass(frozen=True)
class FedSGD(Strategy):
    """FedAvg with one plain local step: what travels is one gradient (McMahan et al. 2017)."""

    name: ClassVar[str] = "fedsgd"
    goal: ClassVar[str] = "one local step a round: the upload is one gradient"

    def recipe(self, recipe: LocalRecipe) -> LocalRecipe:
        """One step a round."""
        return dataclasses.replace(recipe, steps=1, epochs=None)


@dataclass(frozen=True)
class Partial(Strategy):
    """FedAvg on part of the model: tensors chosen by key or module type stay at their client.

    With the head local, the classification form of FedMRI (Feng et al. 2023): encoder shared, decoder personal.
    """

    name: ClassVar[str] = "partial"
    goal: ClassVar[str] = "FedAvg on part of the model: chosen tensors stay at their client"
    source: ClassVar[str] = "McMahan et al. 2017; with a local head as in Feng et al. 2023"
    personal: ClassVar[bool] = True
    local: Annotated[
        str, Field(min_length=1, description="what stays, such as key:net.fc.* or type:BatchNorm2d; join with |")
    ] = "type:Linear"

    def local_selectors(self) -> tuple[str, ...]:
        """The selectors of the `local` parameter."""
        return tuple(self.local.split("|"))
