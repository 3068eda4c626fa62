"""What a curious server could have written down while a federation trained: every round's broadcast and uploads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsec import checkpoint
from fedsec.federation.assemble import Federation
from fedsec.types import ServerView, Update

FILE = "history.safetensors"


@dataclass
class Recorder:
    """Keeps the views of a training; call it as `watch`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, view: ServerView) -> None:
        """Take in one round."""
        start = f"round-{view.round}"
        self.tensors[f"{start}/params"] = view.params.cpu().clone()
        if view.buffers is not None:
            self.tensors[f"{start}/buffers"] = view.buffers.cpu().clone()
        for update in view.updates:
            self.tensors[f"{start}/client-{update.client}/delta"] = update.delta.cpu().clone()
            if update.buffers is not None:
                self.tensors[f"{start}/client-{update.client}/buffers"] = update.buffers.cpu().clone()
            for name, report in update.extras.items():
                self.tensors[f"{start}/client-{update.client}/extras/{name}"] = report.cpu().clone()
            if update.client in view.sent:
                self.tensors[f"{start}/client-{update.client}/sent"] = view.sent[update.client].cpu().clone()
        self.rounds.append(
            {
                "round": view.round,
                "clients": {str(u.client): u.num_samples for u in view.updates},
                "clients_in_sum": view.clients_in_sum,
                "local_steps": view.local_steps,
            }
        )

    def save(self, folder: Path) -> None:
        """Write the history beside the training."""
        checkpoint.save(folder / FILE, self.tensors, {"rounds": self.rounds})


def views_of(folder: Path, federation: Federation) -> tuple[ServerView, ...]:
    """The views that were recorded in a training's folder; none where there are none."""
    path = folder / FILE
    if not path.is_file():
        return ()
    tensors, record = checkpoint.load(path)
    return tuple(_view(federation, tensors, entry) for entry in record["rounds"])


def _view(federation: Federation, tensors: dict[str, Tensor], entry: dict[str, Any]) -> ServerView:
    start, seats = f"round-{entry['round']}", federation.seats
    updates: Sequence[Update] = [
        Update(
            int(client),
            tensors[f"{start}/client-{client}/delta"],
            samples,
            tensors.get(f"{start}/client-{client}/buffers"),
            extras=_below(tensors, f"{start}/client-{client}/extras/"),
        )
        for client, samples in entry["clients"].items()
    ]
    return ServerView(
        round=entry["round"],
        params=tensors[f"{start}/params"],
        buffers=tensors.get(f"{start}/buffers"),
        layout=seats.sharing.params,
        buffer_layout=seats.sharing.buffers,
        updates=tuple(updates),
        clients_in_sum=entry["clients_in_sum"],
        sent={int(c): tensors[key] for c in entry["clients"] if (key := f"{start}/client-{c}/sent") in tensors},
        recipe=seats.recipe,
        local_steps=entry["local_steps"],
        knowledge={d.name: d.public_knowledge(int(next(iter(entry["clients"]), -1))) for d in seats.defenses},
    )


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
