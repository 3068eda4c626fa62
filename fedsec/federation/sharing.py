"""Which tensors of a model travel and which stay at their client, found by key or by module type."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedsec.errors import ConfigError
from fedsec.models.base import Normalised
from fedsec.types import Layout

FAMILIES: dict[str, tuple[type[nn.Module], ...]] = {
    "BatchNorm": (_BatchNorm,),
    "Norm": (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm),
}
"""Words of `type:` selectors that stand for several classes; layers are never found by how they are called."""
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Sharing:
    """The role of every tensor of a model: shared ones travel, local ones stay at their client."""

    params: Layout
    """Shared trainable tensors."""
    buffers: Layout
    """Shared floating-point buffers, such as BatchNorm statistics. Integer counters never travel."""
    local: Layout
    """Everything that differs between clients and stays: personal parameters and buffers."""

    @property
    def upload_bytes(self) -> int:
        """Of one unprotected upload without side reports: four bytes a shared number."""
        return 4 * (self.params.size + self.buffers.size)


def resolve(model: nn.Module, local: tuple[str, ...], label: str, empty: bool = False) -> Sharing:
    """Give every tensor of a model its role.

    The normalisation record (a fixed mean and standard deviation) is part of the architecture and never travels.

    Args:
        model: as the defenses and the strategy prepared it.
        local: selectors of what stays: `key:GLOB`, `type:CLASS` (`type:BatchNorm` of any dimension, `type:Norm` all
            normalisation layers), or `stat` (running means and variances).
        label: of the strategy, for messages.
        empty: nothing at all may be shared.

    Raises:
        ConfigError: a selector is malformed or matches nothing.
    """
    fixed = set(Normalised.normalisation_keys)
    owners = {f"{path}.{n}".lstrip("."): m for path, m in model.named_modules() for n in own_tensors(m)}
    chosen: set[str] = set()
    for selector in local:
        found = _matches(selector, owners, label) - fixed
        if not found:
            raise ConfigError(_nothing(selector, owners, label))
        chosen |= found
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point() and n not in fixed}
    if not empty and not params.keys() - chosen:
        raise ConfigError(f"{label}: every trainable tensor is local; nothing is left to share")
    return Sharing(
        params=Layout.of({n: p for n, p in params.items() if n not in chosen}),
        buffers=Layout.of({n: b for n, b in buffers.items() if n not in chosen}),
        local=Layout.of({n: t for n, t in {**params, **buffers}.items() if n in chosen}),
    )


def _matches(selector: str, owners: dict[str, nn.Module], label: str) -> set[str]:
    if selector == "stat":
        return {n for n in owners if n.rpartition(".")[2] in STATISTICS}
    kind, _, pattern = selector.partition(":")
    if kind not in ("key", "type") or not pattern:
        raise ConfigError(f"{label}: selector '{selector}' is not key:GLOB, type:CLASS or stat")
    if kind == "key":
        return {n for n in owners if fnmatchcase(n, pattern)}
    if pattern in FAMILIES:
        return {n for n, m in owners.items() if isinstance(m, FAMILIES[pattern])}
    return {n for n, m in owners.items() if fnmatchcase(type(m).__name__, pattern)}


def _nothing(selector: str, owners: dict[str, nn.Module], label: str) -> str:
    if selector in ("stat", "type:BatchNorm"):
        return (
            f"{label}: the model has no BatchNorm (build it with model.norm=batch; a defense such as dp replaces it by "
            "GroupNorm). To keep GroupNorm local, use partial:local=type:Norm; else choose fedavg"
        )
    types = sorted({type(m).__name__ for m in owners.values()})
    known = types if selector.startswith("type") else sorted(owners)[:6]
    return f"{label}: '{selector}' matches no tensor of the model; it has {', '.join(known)}"


def own_tensors(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers that belong to this module itself."""
    return [n for n, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]


@torch.no_grad()
def load(model: nn.Module, sharing: Sharing, params: Tensor, buffers: Tensor, local: Tensor | None) -> None:
    """Copy flat vectors into the model, in place."""
    tensors = model.state_dict(keep_vars=True)
    parts = [(sharing.params, params), (sharing.buffers, buffers)]
    if local is not None:
        parts.append((sharing.local, local))
    for layout, flat in parts:
        for name, view in layout.views(flat).items():
            tensors[name].copy_(view)
