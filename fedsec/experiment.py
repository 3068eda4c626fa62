"""One cell, start to end: data -> federation -> attack -> measures -> result."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsec import checkpoint
from fedsec.attack import Attack
from fedsec.config import Cell
from fedsec.federation.assemble import Federation, assemble, build_stack
from fedsec.federation.training import Training, train
from fedsec.federation.victims import Victim, observe, rounds_of
from fedsec.machine import prepare_for_small_networks, usable_cores
from fedsec.metrics.image import pixel_hash
from fedsec.metrics.reconstruction import summarise_reconstructions
from fedsec.progress import Progress
from fedsec.types import Findings, PublicData, Reconstruction, RoundContext, Target, to_json

GALLERY = 500
"""Largest number of same-class candidates that re-identification has to tell apart."""


@dataclass
class Stage:
    """A trained federation, shared by all cells that differ only in an attack which does not change the training."""

    federation: Federation
    training: Training


def training_key(cell: Cell, attack: Attack | None) -> str:
    """The content hash of the training alone."""
    changes_training = attack is not None and attack.seat in ("client", "malicious-server")
    return "train-" + cell.key(without_attack=not changes_training)


def run_cell(
    cell: Cell,
    artifacts: Path,
    data_dir: Path | None = None,
    progress: Progress | None = None,
    stages: dict[str, Stage] | None = None,
    keep: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Compute one resolved cell, keep its artifacts, and return its result in JSON form.

    Args:
        cell: as `assemble.resolve` gives it.
        artifacts: the folder in which trainings and reconstructions are kept.
        data_dir: where data sets are looked up first.
        progress: told how far it is.
        stages: trainings of this process, by key; read and extended.
        keep: rounds that other cells of the run want to observe in the same training.
    """
    start = time.perf_counter()
    progress = progress or Progress()
    if torch.device(cell.federation.device).type == "cpu":
        prepare_for_small_networks()
    _, attack, _ = build_stack(cell)
    plan = attack.victims() if attack else None
    rounds = rounds_of(plan, cell.federation.rounds) if plan else ()
    stage = _stage(cell, attack, artifacts, data_dir, progress, {} if stages is None else stages, {*rounds, *keep})
    federation, training = stage.federation, stage.training

    leakage: dict[str, Any] = {}
    assumptions: dict[str, Any] = {"server": "honest", "clients": len(federation.clients)}
    if attack is not None and plan is not None:
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
            workers=usable_cores() if federation.device.type == "cpu" else 1,
            progress=lambda done, total: progress.advance(done),
        )
        progress.stage(f"{attack.name} against {cell.label()}", len(views))
        findings = conclude(attack, target)
        leakage = leakage_of(findings, victims, federation, public)
        assumptions |= dict(findings.assumptions)
        assumptions["rounds_observed"] = list(rounds)
        assumptions["public_prior"] = {"name": public.name, "size": len(public.images), "hash_disjoint": True}
        keep_reconstructions(artifacts / cell.key(), findings, victims, public)
    result = {
        "id": cell.key(),
        "attack": cell.attack.to_table() if cell.attack else None,
        "defense": [spec.to_table() for spec in cell.defense],
        "dataset": federation.dataset.name,
        "data_fingerprint": federation.dataset.fingerprint,
        "model": cell.model.name,
        "strategy": cell.federation.strategy,
        "engine": cell.federation.engine,
        "seed": cell.seed,
        "utility": training.utility,
        "leakage": leakage,
        "privacy": training.privacy,
        "cost": {**training.cost, "cell_seconds": round(time.perf_counter() - start, 3)},
        "assumptions": {**assumptions, "data": federation.dataset.variant, "train_mode": federation.seats.recipe.mode},
        "failed_clients": failures(training),
        "training": training_key(cell, attack),
        "notes": [*training.notes],
    }
    return {k: v for k, v in to_json(result).items() if k == "defense" or v not in ({}, [])}


def _stage(
    cell: Cell,
    attack: Attack | None,
    artifacts: Path,
    data_dir: Path | None,
    progress: Progress,
    stages: dict[str, Stage],
    rounds: set[int],
) -> Stage:
    key = training_key(cell, attack)
    if key in stages and rounds <= stages[key].training.snapshots.keys():
        return stages[key]
    federation = assemble(cell, data_dir)
    training = Training.open(artifacts / key, rounds, federation.dataset.fingerprint)
    if training is None:
        training = train(federation, rounds, progress)
        training.save(artifacts / key, federation)
    stages[key] = Stage(federation, training)
    return stages[key]


def conclude(attack: Attack, target: Target) -> Findings:
    """Let the attack draw its conclusion and hold it to its contract: one reconstruction a view, of the right shape."""
    findings = attack.conclude(target) or Findings()
    if findings.reconstructions and len(findings.reconstructions) != len(target.views):
        raise ValueError(
            f"{attack.name}: {len(findings.reconstructions)} reconstructions for {len(target.views)} views"
        )
    for item in findings.reconstructions:
        if item.images.shape[1:] != torch.Size(target.image_shape):
            raise ValueError(f"{attack.name}: images of shape {tuple(item.images.shape[1:])}, not {target.image_shape}")
    return findings


def public_data(federation: Federation, victims: list[Victim]) -> PublicData:
    """The adversary's prior: the validation part, which no client trains on, without any attacked image."""
    dataset = federation.dataset
    rows = np.flatnonzero(dataset.split == "val")
    origin = "validation part"
    if len(rows) == 0:
        rows, origin = np.flatnonzero(dataset.split == "test"), "test part"
    x, y = dataset.batch(rows)
    attacked = set(pixel_hash(torch.cat([v.images for v in victims])))
    fresh = [i for i, digest in enumerate(pixel_hash(x)) if digest not in attacked]
    return PublicData(f"{dataset.name}, {origin}", x[fresh], y[fresh])


def leakage_of(findings: Findings, victims: list[Victim], federation: Federation, public: PublicData) -> dict[str, Any]:
    """Compare reconstructions with the truth: each observed round on its own; the headline is the worst of them."""
    if not findings.reconstructions:
        return {}
    gallery = gallery_of(federation, victims, public)
    by_round: dict[int, dict[str, Any]] = {}
    for number in sorted({v.round for v in victims}):
        chosen = [i for i, v in enumerate(victims) if v.round == number]
        by_round[number] = summarise_reconstructions(
            tuple(findings.reconstructions[i] for i in chosen),
            [victims[i].images for i in chosen],
            [victims[i].labels for i in chosen],
            public_images=public.images,
            gallery_images=gallery[0],
            gallery_labels=gallery[1],
            generator=RoundContext(federation.cell.seed, number, 0).numpy("leakage-bootstrap"),
        )
        by_round[number] |= how_recovered([findings.reconstructions[i] for i in chosen])
    worst = max(by_round, key=lambda r: by_round[r]["psnr"].value)
    return {**by_round[worst], "round": worst, "by_round": by_round}


def how_recovered(items: Sequence[Reconstruction]) -> dict[str, Any]:
    """What the attack itself says of its reconstructions, without any truth."""
    own = [item.est_psnr for item in items if item.est_psnr is not None]
    return {
        "certified": sum(item.certified for item in items),
        "methods": dict(Counter(item.method for item in items)),
        "not_applicable": {method: why for item in items for method, why in item.not_applicable.items()},
        "attack_notes": sorted({note for item in items for note in item.notes}),
        "attack_cpu_seconds": round(sum(item.seconds for item in items), 3),
        **({"est_psnr": statistics.median(own)} if own else {}),
    }


def gallery_of(federation: Federation, victims: list[Victim], public: PublicData) -> tuple[Tensor, Tensor]:
    """Images that re-identification must tell the victims from: none public, none of a victim's patient."""
    dataset = federation.dataset
    taken = np.concatenate([v.rows for v in victims])
    usable = np.isin(dataset.split, ["train", "test"])
    for column in ("patient", "lesion"):
        if column in dataset.meta:
            usable &= ~np.isin(dataset.meta[column], dataset.meta[column][taken])
    usable[taken] = False
    rows = np.flatnonzero(usable)
    rng = RoundContext(federation.cell.seed, 0, 0).numpy("gallery")
    labels = np.asarray(dataset.labels)
    if labels.ndim == 1:  # a sample of each class, so that every victim has enough candidates of its own
        parts = [rows[labels[rows] == c] for c in np.unique(labels[rows])]
        rows = np.concatenate([rng.choice(p, min(len(p), GALLERY), replace=False) for p in parts])
    else:
        rows = rng.choice(rows, min(len(rows), 4 * GALLERY), replace=False)
    return dataset.batch(np.sort(rows))


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


def shared_rounds(cells: Sequence[Cell]) -> dict[str, tuple[int, ...]]:
    """Training key -> all rounds that the attacks of these cells want to observe in it."""
    wanted: dict[str, set[int]] = {}
    for cell in cells:
        _, attack, _ = build_stack(cell)
        plan = attack.victims() if attack else None
        rounds = rounds_of(plan, cell.federation.rounds) if plan else ()
        wanted.setdefault(training_key(cell, attack), set()).update(rounds)
    return {key: tuple(sorted(rounds)) for key, rounds in wanted.items()}
