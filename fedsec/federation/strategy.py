"""Which tensors a federation shares, how clients train for it, and how much each client weighs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from fedsec.errors import ConfigError
from fedsec.models.base import Normalised
from fedsec.types import Layout, LocalRecipe


@dataclass(frozen=True)
class Sharing:
    """The role of every tensor of a model: shared ones travel, local ones stay at their client."""

    params: Layout
    """Shared trainable tensors."""
    buffers: Layout
    """Shared floating-point buffers, such as BatchNorm statistics. Integer counters never travel."""
    local: Layout
    """Everything that differs between clients and stays: personal parameters and buffers."""


@dataclass(frozen=True)
class Strategy:
    """Base class: share everything, train as the recipe says, weigh by capped sample counts.

    Source: McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data", eq. 1.
    The cap keeps a client that lies about its size at `max_weight` (default 2/n).
    """

    name: ClassVar[str]
    goal: ClassVar[str]
    max_weight: Annotated[
        float | None, Field(gt=0, le=1, description="largest weight of one client; 2/n where not given, 1: no cap")
    ] = None
    uniform: Annotated[bool, Field(description="equal weights, whatever sizes the clients claim")] = False

    def local_selectors(self) -> tuple[str, ...]:
        """Selectors (`key:GLOB` or `type:CLASS`) of the tensors that stay at their client."""
        return ()

    def recipe(self, recipe: LocalRecipe) -> LocalRecipe:
        """The strategy's changes to the clients' training."""
        return recipe

    def weights(self, sizes: Mapping[int, int | None]) -> dict[int, float]:
        """Client -> weight, summing to 1; equal weights where a size is hidden."""
        n = len(sizes)
        known = [s for s in sizes.values() if s is not None]
        if self.uniform or len(known) < n or sum(known) == 0:
            return dict.fromkeys(sizes, 1 / n)
        shares = {client: size / sum(known) for client, size in zip(sizes, known, strict=True)}
        return cap_weights(shares, min(1.0, 2 / n) if self.max_weight is None else max(self.max_weight, 1 / n))

    def sharing(self, model: nn.Module) -> Sharing:
        """Resolve the selectors on a (prepared) model."""
        return resolve(model, self.local_selectors(), label=self.name)


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


def resolve(model: nn.Module, local: tuple[str, ...], label: str) -> Sharing:
    """Give every tensor of a model its role.

    The normalisation record (a fixed mean and standard deviation) is part of the architecture and never travels.

    Raises:
        ConfigError: a selector is malformed or matches nothing.
    """
    fixed = set(Normalised.normalisation_keys)
    types = {f"{path}.{n}".lstrip("."): type(m).__name__ for path, m in model.named_modules() for n in own_tensors(m)}
    chosen: set[str] = set()
    for selector in local:
        kind, _, pattern = selector.partition(":")
        if kind not in ("key", "type") or not pattern:
            raise ConfigError(f"{label}: selector '{selector}' is not key:GLOB or type:CLASS")
        subject = {n: n for n in types} if kind == "key" else types
        found = {name for name, text in subject.items() if fnmatchcase(text, pattern)} - fixed
        if not found:
            known = sorted(set(types.values())) if kind == "type" else sorted(types)[:6]
            raise ConfigError(f"{label}: '{selector}' matches no tensor of the model; it has {', '.join(known)}")
        chosen |= found
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point() and n not in fixed}
    if not params.keys() - chosen:
        raise ConfigError(f"{label}: every trainable tensor is local; nothing is left to share")
    return Sharing(
        params=Layout.of({n: p for n, p in params.items() if n not in chosen}),
        buffers=Layout.of({n: b for n, b in buffers.items() if n not in chosen}),
        local=Layout.of({n: t for n, t in {**params, **buffers}.items() if n in chosen}),
    )


def own_tensors(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers that belong to this module itself."""
    return [n for n, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]


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
    """FedAvg on part of the model: tensors chosen by key or module type stay at their client."""

    name: ClassVar[str] = "partial"
    goal: ClassVar[str] = "FedAvg on part of the model: chosen tensors stay at their client"
    local: Annotated[
        str, Field(min_length=1, description="what stays, such as key:net.fc.* or type:BatchNorm2d; join with |")
    ] = "type:Linear"

    def local_selectors(self) -> tuple[str, ...]:
        """The selectors of the `local` parameter."""
        return tuple(self.local.split("|"))
