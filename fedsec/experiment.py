"""One cell, start to end: data -> federation -> attack -> measures -> result."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsec import checkpoint
from fedsec.attack import Attack
from fedsec.audit.canaries import audit_claim
from fedsec.audit.exam import Exam, of_training
from fedsec.config import Cell
from fedsec.errors import RunError
from fedsec.federation import history, topology
from fedsec.federation.assemble import Federation, assemble, build_stack
from fedsec.federation.budget import Budget
from fedsec.federation.evaluation import attack_success
from fedsec.federation.interrogation import interrogate
from fedsec.federation.resume import LastRound
from fedsec.federation.training import Training, train
from fedsec.federation.victims import Victim, observe, rounds_of, victims_of
from fedsec.files import replacing
from fedsec.findings import Findings, PublicData, Target
from fedsec.leakage import Judge, model_state, public_prior, stamped
from fedsec.machine import full_precision, prepare_for_small_networks, usable_cores
from fedsec.metrics.image import pixel_hash
from fedsec.metrics.robustness import robustness, without_effect
from fedsec.metrics.signals import logits_of, signals
from fedsec.privacy.ledger import PARTS, Ledger
from fedsec.progress import Progress
from fedsec.robust.aggregator import RuleAggregator
from fedsec.robust.rule import ASSUMED_SHARE, assumed_f
from fedsec.types import RoundContext, ServerView, to_json


@dataclass
class Stage:
    """A trained federation, shared by all cells that differ only in an attack which does not change the training."""

    federation: Federation
    training: Training
    computed: bool = True
    """False: it was read from the disk."""


def training_key(cell: Cell, attack: Attack | None) -> str:
    """The content hash of the training alone."""
    return "train-" + cell.key(without_attack=attack is None or not attack.changes_training)


def run_cell(
    cell: Cell,
    artifacts: Path,
    data_dir: Path | None = None,
    progress: Progress | None = None,
    stages: dict[str, Stage] | None = None,
    keep: tuple[int, ...] = (),
    workers: int | None = None,
) -> dict[str, Any]:
    """Compute one resolved cell, keep its artifacts, and return its result in JSON form.

    Args:
        cell: as `assemble.resolve` gives it.
        artifacts: the folder in which trainings and reconstructions are kept.
        data_dir: where data sets are looked up first.
        progress: told how far it is.
        stages: trainings of this process, by key; read and extended.
        keep: rounds that other cells of the run want to observe in the same training.
        workers: processes that the attack may use; by default one for each core.
    """
    start = time.perf_counter()
    progress = progress or Progress()
    _, attack, _ = build_stack(cell)
    plan = attack.victims() if attack else None
    rounds = rounds_of(plan, cell.federation.rounds) if plan else ()
    stage = open_stage(cell, artifacts, data_dir, progress, stages, keep)
    opened = time.perf_counter()
    federation, training = stage.federation, stage.training

    leakage: dict[str, Any] = {}
    cost = dict(training.cost)
    remarks: tuple[str, ...] = ()
    assumptions: dict[str, Any] = {"server": "honest", "clients": len(federation.clients)}
    if attack is not None and plan is not None:
        queries: list[tuple[ServerView, ...]] = []
        if attack.seat == "malicious-server":
            chosen = victims_of(federation, plan)
            victims = [victim for _, victim in chosen]
            public = public_data(federation, victims)
            queries = interrogate(federation, training, plan, chosen, attack, public)
            views = [answers[-1] for answers in queries]
        else:
            views, victims = observe(federation, training, plan)
            public = public_data(federation, victims)
        target = Target(
            model=federation.build_model,
            released=lambda: federation.build_model(training.snapshots[cell.federation.rounds + 1]),
            views=tuple(views),
            public=public,
            image_shape=federation.dataset.image_shape,
            ctx=RoundContext(cell.seed, cell.federation.rounds, cell.federation.rounds).adversary(),
            device=federation.device,
            workers=(workers or usable_cores()) if federation.device.type == "cpu" else 1,
            progress=lambda done, total: progress.advance(len(views) * done // max(1, total)),
            queries=tuple(queries),
        )
        progress.stage(f"{attack.name} against {cell.label()}", len(views))
        findings = conclude(attack, target)
        concluded = time.perf_counter()
        leakage = judge(attack, target, findings, victims, stage, progress)
        cost["measure_seconds"] = round(time.perf_counter() - concluded, 3)
        assumptions |= dict(findings.assumptions)
        remarks = findings.notes
        assumptions["rounds_observed"] = list(rounds)
        assumptions["model_state"] = model_state(training, rounds)
        assumptions["public_prior"] = public_prior(public, victims)
        keep_reconstructions(artifacts / cell.key(), findings, victims, public)
    elif attack is not None and (asked := attack.candidates()) is not None:
        exam = examination(cell, stage, artifacts, progress)
        progress.stage(f"{attack.name} against {cell.label()}", 1)
        findings = attack.conclude(exam.target(asked)) or Findings()
        leakage = exam.judge(findings)
        keep_scores(artifacts / cell.key(), exam, findings)
        assumptions |= dict(findings.assumptions)
        remarks = findings.notes
    if attack is not None:
        cost["attack_seconds"] = round(time.perf_counter() - opened, 3)
    result = {
        "id": cell.key(),
        "attack": cell.attack.to_table() if cell.attack else None,
        "defense": [spec.to_table() for spec in cell.defense],
        "dataset": federation.dataset.name,
        "data_fingerprint": federation.dataset.fingerprint,
        "model": cell.model.name,
        "topology": topology.shown(cell),
        "strategy": cell.federation.strategy,
        "engine": cell.federation.engine,
        "seed": cell.seed,
        "utility": training.utility,
        "leakage": leakage,
        "dp_audit": dp_audit(stage, cell.seed),
        "robustness": robustness_of(federation, training),
        "privacy": training.privacy,
        "cost": {**cost, "cell_seconds": round(time.perf_counter() - start, 3)},
        "assumptions": {**assumptions, "data": federation.dataset.variant, "train_mode": federation.seats.recipe.mode},
        "failed_clients": failures(training),
        "training": training_key(cell, attack),
        "notes": [*training.notes, *remarks],
    }
    return {k: v for k, v in to_json(result).items() if k == "defense" or v not in ({}, [])}


def robustness_of(federation: Federation, training: Training) -> dict[str, Any]:
    """What malicious clients achieved, and what a robust rule made of the honest ones.

    Raises:
        RunError: the clients of the adversary changed nothing; a result without an attack must not pass for one.
    """
    seats = federation.seats
    if seats.malicious and without_effect(training.history):
        raise RunError(
            f"{seats.attack.name if seats.attack else 'attack'}: attack_had_no_effect: its clients changed no update "
            "and no image in any round; check the method, its strength and when it acts"
        )
    if not seats.malicious and not isinstance(seats.aggregator, RuleAggregator):
        return {}
    clients = len(federation.clients)
    rule = seats.aggregator.rule if isinstance(seats.aggregator, RuleAggregator) else None
    flagged = assumed_f(rule, clients)[0] if rule is not None else round(ASSUMED_SHARE * clients)
    rng = RoundContext(federation.cell.seed, 0, 0).numpy("robustness-bootstrap")
    result = robustness(training.history, flagged, generator=rng)
    if seats.attack is None:
        return result
    released = training.snapshots[federation.cell.federation.rounds + 1]
    params, buffers = (t.to(federation.device) for t in released)
    return result | attack_success(federation, "test", params, buffers, seats.attack.probe)


def open_stage(
    cell: Cell,
    artifacts: Path,
    data_dir: Path | None = None,
    progress: Progress | None = None,
    stages: dict[str, Stage] | None = None,
    keep: Iterable[int] = (),
) -> Stage:
    """The training that a cell stands on: from memory, from the disk, or computed and kept.

    Args:
        cell: as `assemble.resolve` gives it.
        artifacts: the folder in which trainings are kept.
        data_dir: where data sets are looked up first.
        progress: told how far it is.
        stages: trainings of this process, by key; read and extended.
        keep: rounds that other cells want to observe in it, beside those of this cell's own attack.
    """
    if torch.device(cell.federation.device).type == "cpu":
        prepare_for_small_networks()
    else:
        full_precision()
    attack = build_stack(cell)[1]
    plan = attack.victims() if attack else None
    rounds = {*(rounds_of(plan, cell.federation.rounds) if plan else ()), *keep}
    stages = {} if stages is None else stages
    key = training_key(cell, attack)
    watched = wants_history(cell)
    recorded = (artifacts / key / history.FILE).is_file() or not watched
    if key in stages and rounds <= stages[key].training.snapshots.keys() and recorded:
        return stages[key]
    federation = assemble(cell, data_dir)
    training = Training.open(artifacts / key, rounds, federation.dataset.fingerprint) if recorded else None
    ledger = Ledger(artifacts / PARTS / f"{key}.jsonl")
    computed = training is None
    if training is None:
        recorder = history.Recorder() if watched else None
        # A distributed run lasts for days, and its server may be restarted; what an adversary wrote down is not kept.
        distributed = cell.federation.engine == "flower" and recorder is None
        last = (
            LastRound(artifacts / f"{key}.last-round", federation.dataset.fingerprint, rounds) if distributed else None
        )
        after = last.saved.number if last is not None and last.saved is not None else None
        training = train(federation, rounds, progress, Budget(federation, ledger, key, after), recorder, last)
        training.save(artifacts / key, federation)
        if last is not None:
            last.clear()
        if recorder is not None:
            recorder.save(artifacts / key)
    else:
        ledger.check(key, training.releases)
    stages[key] = Stage(federation, training, computed)
    return stages[key]


def examination(cell: Cell, stage: Stage, artifacts: Path, progress: Progress) -> Exam:
    """Which images a trained model is asked about: those of the clients, and others of the same origin."""
    federation, training = stage.federation, stage.training
    attack = build_stack(cell)[1]
    folder = artifacts / training_key(cell, attack)
    released = partial(federation.build_model, training.snapshots[cell.federation.rounds + 1])
    return of_training(federation, released, history.views_of(folder, federation), artifacts, progress)


def dp_audit(stage: Stage, seed: int) -> dict[str, Any]:
    """Claimed against audited ε, where canaries were planted; empty otherwise."""
    federation, training = stage.federation, stage.training
    if federation.canaries is None:
        return {}
    scores = np.array(training.canary_scores)
    if federation.canaries.kind == "mislabelled":
        model = federation.build_model(training.snapshots[federation.cell.federation.rounds + 1])
        x, y = federation.dataset.batch(federation.canaries.rows)
        scores = signals(logits_of(model, x, federation.device), y.numpy(), federation.dataset.task).phi
    return audit_claim(scores, federation.canaries, training.privacy or None, seed)


def keep_scores(folder: Path, exam: Exam, findings: Findings) -> None:
    """Keep the scores of each image beside the truth; they name members, and so stay out of results and reports."""
    if not findings.memberships:
        return
    columns = {f"score_{item.method}": item.scores for item in findings.memberships}
    with replacing(folder / "scores.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, row=exam.cohort.rows, member=exam.cohort.member, allow_pickle=False, **columns)


def conclude(attack: Attack, target: Target) -> Findings:
    """Let the attack draw its conclusion and hold it to its contract: one reconstruction a view, of the right shape."""
    findings = attack.conclude(target) or Findings()
    if findings.reconstructions and len(findings.reconstructions) != len(target.views):
        raise ValueError(
            f"{attack.name}: {len(findings.reconstructions)} reconstructions for {len(target.views)} views"
        )
    if findings.naive and len(findings.naive) != len(findings.reconstructions):
        raise ValueError(f"{attack.name}: {len(findings.naive)} naive reconstructions for {len(target.views)} views")
    for item in (*findings.reconstructions, *findings.naive):
        if item.images.shape[1:] != torch.Size(target.image_shape):
            raise ValueError(f"{attack.name}: images of shape {tuple(item.images.shape[1:])}, not {target.image_shape}")
    return stamped(attack.name, findings)


def judge(
    attack: Attack, target: Target, findings: Findings, victims: list[Victim], stage: Stage, progress: Progress
) -> dict[str, Any]:
    """Compare what was concluded with the truth and, where the attack's author knows, with what was possible."""
    if not findings.reconstructions:
        return {}
    if type(attack).limits is not Attack.limits:
        progress.stage("what was possible", len(target.views))
    limits = attack.limits(target, [(victim.images, victim.labels) for victim in victims])
    if limits and len(limits) != len(target.views):
        raise ValueError(f"{attack.name}: {len(limits)} limits for {len(target.views)} views")
    return Judge.of(stage.federation, stage.training, victims, target.public).leakage(findings, limits)


def public_data(federation: Federation, victims: list[Victim]) -> PublicData:
    """The adversary's prior: the validation part, which no client trains on, without any attacked image."""
    dataset = federation.dataset
    rows = np.flatnonzero(dataset.split == "val")
    origin = "validation part"
    if len(rows) == 0:
        rows, origin = np.flatnonzero(dataset.split == "test"), "test part"
    x, y = dataset.batch(rows)
    seen = set(pixel_hash(torch.cat([v.images for v in victims])))
    fresh = []
    for i, digest in enumerate(pixel_hash(x)):  # each image once, and none that is attacked
        if digest not in seen:
            fresh.append(i)
            seen.add(digest)
    return PublicData(f"{dataset.name}, {origin}", x[fresh], y[fresh])


def keep_reconstructions(folder: Path, findings: Findings, victims: list[Victim], public: PublicData) -> None:
    """Keep originals and reconstructions for the figures."""
    if not findings.reconstructions:
        return
    tensors: dict[str, Tensor] = {"public_mean": public.images.mean(0)}
    for i, (item, victim) in enumerate(zip(findings.reconstructions, victims, strict=True)):
        tensors[f"{i:03d}/round-{victim.round}/original"] = victim.images.clone()
        tensors[f"{i:03d}/round-{victim.round}/recovered"] = item.images.clone()
    checkpoint.save(folder / "reconstructions.safetensors", tensors, {})


def failures(training: Training) -> dict[str, dict[str, str]]:
    """Round -> client -> why nothing of it entered the aggregate."""
    return {str(r["round"]): r["failed"] for r in training.history if r["failed"]}


def training_key_of(cell: Cell) -> str:
    """The content hash of the training that a cell stands on."""
    return training_key(cell, build_stack(cell)[1])


def wants_history(cell: Cell) -> bool:
    """The cell's attack reads every update of the training that it stands on."""
    attack = build_stack(cell)[1]
    asked = attack.candidates() if attack else None
    return asked is not None and asked.history


def shared_rounds(cells: Sequence[Cell]) -> dict[str, tuple[int, ...]]:
    """Training key -> all rounds that the attacks of these cells want to observe in it."""
    wanted: dict[str, set[int]] = {}
    for cell in cells:
        _, attack, _ = build_stack(cell)
        plan = attack.victims() if attack else None
        rounds = rounds_of(plan, cell.federation.rounds) if plan else ()
        wanted.setdefault(training_key(cell, attack), set()).update(rounds)
    return {key: tuple(sorted(rounds)) for key, rounds in wanted.items()}
