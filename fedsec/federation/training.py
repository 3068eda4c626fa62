"""Stage one: train a federation, evaluate it, and keep what later attacks may look at.

A curious server and an outsider do not change the training, so that any number of such attacks share one training;
a malicious client or server is part of it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsec import checkpoint
from fedsec.federation.assemble import Federation
from fedsec.federation.budget import Budget
from fedsec.federation.desk import ServerState
from fedsec.federation.engines.base import Engine
from fedsec.federation.evaluation import curve_point, evaluate
from fedsec.federation.resume import LastRound, Saved
from fedsec.federation.round import run_round, turn_of
from fedsec.federation.seats import RoundRecord
from fedsec.federation.sharing import load
from fedsec.federation.states import from_tensors, is_plain, to_tensors
from fedsec.federation.streaming import run_streamed, streams
from fedsec.files import write_json
from fedsec.privacy.ledger import Ledger
from fedsec.progress import Progress
from fedsec.types import RoundContext, ServerView, to_json

STATES = "states.safetensors"


@dataclass(frozen=True)
class Training:
    """A finished training: everything that stage two needs of it."""

    snapshots: Mapping[int, tuple[Tensor, Tensor]]
    """Round -> the parameters and buffers that were broadcast in it; rounds + 1 is the released model."""
    history: tuple[dict[str, Any], ...]
    utility: dict[str, Any]
    privacy: dict[str, Any]
    cost: dict[str, Any]
    notes: tuple[str, ...]
    fingerprint: str
    """Of the data set."""
    releases: int = 0
    """Events of this training in the run's ledger."""
    states: Mapping[int, ServerState] = field(default_factory=dict)
    """Simulation only: round -> everything behind the snapshot, where parameters and buffers do not say everything."""
    canary_scores: tuple[float, ...] = ()
    """What gradient and client canaries left behind, in their order; larger: rather included."""

    def state(self, number: int, federation: Federation) -> ServerState:
        """The server and the clients as they were when this round began, on the federation's device."""
        if number in self.states:
            return self.states[number].copy(federation.device)
        params, buffers = (t.to(federation.device) for t in self.snapshots[number])
        return ServerState(params, buffers, federation.initial_state().local)

    def save(self, folder: Path, federation: Federation) -> None:
        """Write the training to a folder that appears whole or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            tensors = {
                f"round-{r}/{name}": t
                for r, pair in self.snapshots.items()
                for name, t in zip(("params", "buffers"), pair, strict=True)
            }
            checkpoint.save(temporary / "snapshots.safetensors", tensors, {})
            behind = {k: t for r, s in self.states.items() for k, t in to_tensors(s, f"round-{r}").items()}
            if behind:
                checkpoint.save(temporary / STATES, behind, {})
            load(federation.seats.model, federation.seats.sharing, *self.snapshots[max(self.snapshots)], None)
            released = {
                k: t
                for k, t in federation.seats.model.state_dict().items()
                if not k.startswith(federation.seats.strategy.auxiliary() or ("\0",))
            }
            if federation.seats.sharing.params.size:  # where nothing is shared, nothing is released
                checkpoint.save(temporary / "model.safetensors", released, model_record(federation))
            text = {k: v for k, v in vars(self).items() if k not in ("snapshots", "states")}
            write_json(temporary / "training.json", {**text, "rounds_kept": sorted(self.snapshots)})
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def open(cls, folder: Path, rounds: Iterable[int], fingerprint: str) -> Training | None:
        """Read a saved training; None where it is absent, saw other data, or did not keep all of `rounds`."""
        try:
            content = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        kept = content.pop("rounds_kept")
        if not set(rounds) <= set(kept) or content["fingerprint"] != fingerprint:
            return None
        tensors, _ = checkpoint.load(folder / "snapshots.safetensors")
        snapshots = {r: (tensors[f"round-{r}/params"], tensors[f"round-{r}/buffers"]) for r in kept}
        if (folder / STATES).is_file():
            behind, _ = checkpoint.load(folder / STATES)
            content["states"] = {r: from_tensors(*snapshots[r], behind, f"round-{r}") for r in kept}
        for name in ("history", "notes", "canary_scores"):
            content[name] = tuple(content.get(name, ()))
        return cls(snapshots=snapshots, **content)


def model_record(federation: Federation) -> dict[str, Any]:
    """How to build the model again: travels in the checkpoint's header."""
    dataset, model = federation.dataset, federation.cell.model
    fixed = {n.rpartition(".")[2]: b for n, b in federation.seats.model.named_buffers()}
    return {
        "model": model.name,
        "norm": model.norm,
        "options": dict(model.options),
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "task": dataset.task,
        "image_shape": list(dataset.image_shape),
        "normalisation": {k: fixed[k].flatten().tolist() for k in ("mean", "std") if k in fixed},
        "defense": [spec.to_table() for spec in federation.cell.defense],
    }


def train(
    federation: Federation,
    keep: Iterable[int],
    progress: Progress | None = None,
    budget: Budget | None = None,
    watch: Callable[[ServerView], None] | None = None,
    last_round: LastRound | None = None,
) -> Training:
    """Run all rounds.

    Args:
        federation: as `assemble` gives it.
        keep: rounds whose broadcast model is kept for attacks; the released model is always kept.
        progress: told after every round.
        budget: the ledger; by default one that is thrown away.
        watch: given what reached the server in every round.
        last_round: where each round is kept once it is over; a training that was cut off goes on from there.
    """
    progress = progress or Progress()
    if budget is None:
        with tempfile.TemporaryDirectory() as folder:
            budget = Budget(federation, Ledger(Path(folder) / "ledger.jsonl"), "train")
            return train(federation, keep, progress, budget, watch, last_round)
    settings = federation.cell.federation
    state = federation.initial_state()
    initial = state.params.clone()
    keep = set(keep)
    states: dict[int, ServerState] = {}
    history: list[dict[str, Any]] = []
    resumed: list[int] = []
    if last_round is not None and (saved := last_round.saved) is not None:
        state, states, history, resumed = saved.state, saved.states, saved.history, saved.resumed
        federation.seats.aggregator.recall(saved.memory)
        budget.exhausted.update(saved.exhausted)
        progress.message(f"going on after round {saved.number}, where this training was cut off")
    start = time.perf_counter()
    training_seconds = 0.0
    progress.stage(f"training, defense {federation.cell.label()}", settings.rounds)
    with federation.engine() as engine:
        for number in range(len(history) + 1, settings.rounds + 1):
            ctx = RoundContext(federation.cell.seed, number, settings.rounds)
            if number in keep:
                states[number] = state.copy()
            present = federation.participation.select(len(federation.clients), ctx)
            present, limits = budget.admit(present, ctx)
            if watch is None and streams(federation.seats, len(present), ctx):
                sizes = {k: federation.plan.client_sizes[k] for k in present}
                record = run_streamed(federation.seats, state, sizes, ctx, engine.stream, limits)
            else:
                record = run_round(federation.seats, state, present, ctx, engine.train, limits, watch)
            training_seconds += record.seconds
            auc = curve_point(federation, state)
            history.append(_plain(record, auc))
            if last_round is not None:
                memory = federation.seats.aggregator.memory()
                last_round.keep(Saved(number, state, states, history, memory, budget.exhausted, resumed))
            progress.advance(number, f"validation AUC {auc:.3f}" + _trouble(record))
        if federation.seats.strategy.final_epochs:
            polish_all(federation, state, engine)
    states[settings.rounds + 1] = state.copy()
    utility = evaluate(federation, state)
    budget.close()
    uploads = [r["upload_bytes"] for r in history if r["upload_bytes"]]
    sent = uploads[-1] if uploads else 0
    return Training(
        snapshots={r: (s.params, s.buffers) for r, s in states.items()},
        states={r: s for r, s in states.items() if not is_plain(s)},
        history=tuple(history),
        utility=utility,
        privacy=privacy_spent(federation, budget),
        cost={
            "seconds": round(time.perf_counter() - start, 3),
            "rounds_per_second": round(
                (settings.rounds - (resumed[-1] if resumed else 0)) / max(training_seconds, 1e-9), 3
            ),
            "upload_bytes_per_client": sent,
            "expansion": round(sent / max(1, plain_bytes(federation)), 4),
            **({"aggregation": to_json(report)} if (report := federation.seats.aggregator.report()) else {}),
        },
        notes=(
            *federation.notes,
            *(n for d in federation.seats.defenses for n in d.notes()),
            *federation.seats.aggregator.notes(),
            *budget.notes(),
            *(f"the server was stopped after round {n} and went on from there" for n in resumed),
        ),
        fingerprint=federation.dataset.fingerprint,
        releases=len(budget.events),
        canary_scores=canary_scores(federation, state.params - initial),
    )


def polish_all(federation: Federation, state: ServerState, engine: Engine) -> None:
    """After the last round, every client trains on for itself; nothing of it is sent."""
    rounds = federation.cell.federation.rounds
    ctx = RoundContext(federation.cell.seed, rounds + 1, rounds)
    turns = [turn_of(federation.seats, state, k, ctx) for k in range(len(federation.clients))]
    for reply in engine.train([replace(turn, keep=True) for turn in turns]):
        if reply.failure is None:
            state.own[reply.client] = dict(reply.own)


def canary_scores(federation: Federation, moved: Tensor) -> tuple[float, ...]:
    """What an auditor read of every canary that is a gradient or a client; nothing of others.

    Args:
        moved: (d,) released minus initial parameters.
    """
    planted = federation.seats.planted
    if planted is None:
        return ()
    if planted.of_clients:
        return tuple(planted.directions.project(moved.cpu()).tolist())
    return tuple(planted.scores.tolist())


def plain_bytes(federation: Federation) -> int:
    """Bytes of one unprotected upload: four for each shared number."""
    return federation.seats.sharing.upload_bytes


def privacy_spent(federation: Federation, budget: Budget) -> dict[str, Any]:
    """What the stack's one claim amounts to by the ledger; empty where it makes none."""
    claim = budget.claim()
    if claim is None:
        return {}
    result = asdict(claim)
    result["per_client"] = {federation.owners[k]: e for k, e in claim.per_client.items()}
    return result


def _plain(record: RoundRecord, auc: float) -> dict[str, Any]:
    return to_json({**asdict(record), "validation_auc": auc})  # type: ignore[no-any-return]


def _trouble(record: RoundRecord) -> str:
    return "".join(f"; client {k} failed: {why}" for k, why in record.failed.items())
