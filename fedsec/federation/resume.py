"""The last finished round of a training on the disk: what a server needs that was stopped in the middle of a run."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsec.federation.desk import ServerState
from fedsec.files import replacing

FILE = "last-round.pt"


@dataclass
class Saved:
    """Everything that the server knew when a round was over."""

    number: int
    """The round."""
    state: ServerState
    states: dict[int, ServerState]
    """Those that attacks want to observe, by round."""
    history: list[dict[str, Any]]
    memory: Mapping[str, Any] = field(default_factory=dict)
    """Of the aggregation rule (`Aggregator.memory`)."""
    exhausted: dict[int, int] = field(default_factory=dict)
    """Client -> the first round that its privacy budget kept it out of."""
    resumed: list[int] = field(default_factory=list)
    """Rounds after which the training was stopped and taken up again, so far."""


class LastRound:
    """One file in a folder of its own, replaced whole after every round and removed when the training is complete.

    Args:
        folder: of one training. fingerprint: of its data; a file that saw other data is not used.
        rounds: that attacks want to observe; a file that did not keep those before it is not used either.
    """

    def __init__(self, folder: Path, fingerprint: str, rounds: Collection[int] = ()) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.rounds = frozenset(rounds)
        self.saved = self._read()

    def keep(self, saved: Saved) -> None:
        """Write a round down."""
        states = {number: vars(state) for number, state in saved.states.items()}
        content = {**vars(saved), "state": vars(saved.state), "states": states, "fingerprint": self.fingerprint}
        with replacing(self.folder / FILE) as temporary:
            torch.save(_plain(content), temporary)

    def clear(self) -> None:
        """The training is kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> Saved | None:
        try:
            content = torch.load(self.folder / FILE, map_location="cpu", weights_only=True)
        except Exception:  # absent, damaged in any way, or more than tensors: then the training starts again
            return None
        try:
            seen = content.pop("fingerprint")
            states = {number: _state(kept) for number, kept in content["states"].items()}
            saved = Saved(**{**content, "state": _state(content["state"]), "states": states})
        except (KeyError, TypeError, AttributeError):
            return None  # another version wrote it
        if seen != self.fingerprint or not {r for r in self.rounds if r <= saved.number} <= saved.states.keys():
            return None
        saved.resumed.append(saved.number)
        return saved


def _state(content: Mapping[str, Any]) -> ServerState:
    return ServerState(**{**content, "trained": set(content["trained"])})


def _plain(value: Any) -> Any:
    """The same with nothing that weights-only loading refuses."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    return value.item() if isinstance(value, np.generic) else value
