"""What is audited: a run folder, which knows its members and recipe, or a model file and what its owner says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsec import checkpoint, data
from fedsec.audit import cohort as cohorts
from fedsec.audit.claims import of_ledger, with_profile
from fedsec.audit.exam import Exam, of_training
from fedsec.audit.model import OpenedModel, check_code, digest_of, open_model
from fedsec.config import Cell, FederationConfig, ModelConfig, expand, read_resolved, read_toml
from fedsec.data.base import Dataset
from fedsec.data.digest import PARTS
from fedsec.data.partition import partition
from fedsec.errors import ConfigError, RefusedError, UnsafeFileError
from fedsec.experiment import Stage, dp_audit, training_key_of
from fedsec.federation import history
from fedsec.federation.assemble import Federation, assemble, federate, resolve
from fedsec.federation.training import Training
from fedsec.privacy.ledger import PARTS as LEDGERS
from fedsec.progress import Progress
from fedsec.types import RoundContext, ServerView


@dataclass(frozen=True)
class Subject:
    """A model that can be questioned, and what is claimed of it."""

    exam: Exam
    model: OpenedModel
    claim: Mapping[str, Any] | None
    dp: Mapping[str, Any]
    """Canary audit of a run that planted some; empty otherwise."""


@dataclass(frozen=True)
class Said:
    """What the owner of a bare model file says of it."""

    data: str | None = None
    members: str = "train"
    nonmembers: str = "val"
    population: str | None = None
    recipe: Path | None = None
    model: str | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    ledger: Path | None = None
    """Of the training: what it proves is the claim."""
    history: Path | None = None
    """Folder with the updates of the training, as a run with an attack from the server's seat leaves it."""
    unit: str | None = None
    """Of the claim; None: the run's own, or one image."""
    seed: int = 0

    def claim(self, unit: str) -> dict[str, Any]:
        """What is claimed, for one image, patient or client."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "unit": self.unit or unit,
            "accountant": "claimed by the user",
        }


def of_run(folder: Path, cell_id: str | None, data_dir: Path | None, said: Said, progress: Progress) -> Subject:
    """A finished cell of a run: the one that is named, else the last with a defense, else the last.

    Raises:
        ConfigError: no such cell, its training is gone, or the data have changed since.
    """
    cells = [Cell.from_json(content) for content in read_resolved(folder / "resolved.json")]
    known = {cell.key(): cell for cell in cells}
    if cell_id is not None and cell_id not in known:
        raise ConfigError(f"{folder}: no cell {cell_id}; cells: {', '.join(known)}")
    cell = known[cell_id] if cell_id else next((c for c in reversed(cells) if c.defense), cells[-1])
    check_code(cell.model.name, said.model, folder)
    federation = assemble(cell, data_dir)
    place = folder / "artifacts" / training_key_of(cell)
    training = Training.open(place, (), federation.dataset.fingerprint)
    if training is None:
        raise ConfigError(f"{place}: this cell's training is missing, or its data have changed; run it again")
    opened = _recorded(place, federation)
    released = partial(federation.build_model, training.snapshots[cell.federation.rounds + 1])
    views = history.views_of(place, federation)
    exam = of_training(federation, released, views, folder / "artifacts", progress)
    claim: Mapping[str, Any] | None = training.privacy or None
    if said.epsilon is not None:
        own = training.privacy.get("unit") or (federation.canaries.unit if federation.canaries else "sample")
        claim = said.claim(own)
        training = replace(training, privacy=dict(claim))
    if said.ledger is not None:
        claim = of_ledger(said.ledger)
        training = replace(training, privacy=dict(claim))
    elif claim is not None:
        claim = with_profile(claim, folder / "artifacts" / LEDGERS / f"{training_key_of(cell)}.jsonl")
    return Subject(exam, opened, claim, dp_audit(Stage(federation, training), cell.seed))


def _recorded(place: Path, federation: Federation) -> OpenedModel:
    """What a run says of its model; the weights are those of the training."""
    path = place / "model.safetensors"
    record = checkpoint.load(path)[1]
    return OpenedModel(federation.build_model(), path, digest_of(path), record)


def of_file(path: Path, said: Said, data_dir: Path | None, cache: Path, progress: Progress) -> Subject:
    """A model file; members, non-members and recipe are what its owner says.

    Raises:
        ConfigError: no data were named. UnsafeFileError, RefusedError: see `fedsec.audit.model.open_model`.
    """
    if said.data is None:
        raise ConfigError(
            f"{path}: a bare model does not say what it was trained on; give --data, --members, --nonmembers"
        )
    dataset = data.load(said.data, data_dir=data_dir)
    opened = open_model(path, dataset, said.model)
    members, others = (chosen(dataset, word) for word in (said.members, said.nonmembers))
    if overlap := len(np.intersect1d(members, others)):
        raise ConfigError(f"{overlap} images are both in --members and --nonmembers; the two must be disjoint")
    draw = RoundContext(said.seed, 0, 0).numpy("cohort")
    if said.population:
        population = np.setdiff1d(chosen(dataset, said.population), np.concatenate([members, others]))
    elif len(others) > 1.5 * len(members):
        population = np.zeros(0, dtype=np.int64)  # the surplus of non-members will do
    else:
        rest = np.setdiff1d(dataset.rows(split="val"), np.concatenate([members, others]))
        population = rest
        if len(rest) < cohorts.HELD_OUT:
            others, population = cohorts.halved(others, draw)
    owner = np.zeros(len(members), dtype=np.int64)
    seed = RoundContext(said.seed, 0, 0).entropy("exam")
    cohort = cohorts.assembled(members, others, population, owner, f"--nonmembers {said.nonmembers}", draw)
    federation = None if said.recipe is None else _recipe(said, dataset, members, opened)
    views = () if said.history is None else _history(said.history, federation)
    exam = Exam(
        dataset=dataset,
        cohort=cohorts.checked(dataset, cohort, seed),
        model=lambda: opened.network,
        released=lambda: opened.network,
        seed=seed,
        device=torch.device("cpu"),
        federation=federation,
        history=views,
        cache=cache,
        progress=progress,
    )
    claim: Mapping[str, Any] | None = None
    if said.epsilon is not None:
        claim = said.claim("sample")
    if said.ledger is not None:
        claim = of_ledger(said.ledger)
        if claim["data_fingerprint"] not in (None, dataset.fingerprint):
            raise RefusedError(f"--ledger {said.ledger}: a training on other data: the claim belongs to another run")
    return Subject(exam, opened, claim, {})


def _history(folder: Path, federation: Federation | None) -> tuple[ServerView, ...]:
    """The views in a folder, read with the recipe of their training.

    Raises:
        ConfigError: no recipe, no history, or one of another model.
    """
    if federation is None:
        raise ConfigError(f"--history {folder}: needs --recipe, which says how the clients trained")
    try:
        views = history.views_of(folder, federation)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--history {folder}: not a history of fedsec ({error})") from None
    if not views:
        raise ConfigError(f"--history {folder}: holds no {history.FILE}; a run with --attack membership:… leaves one")
    expected = federation.seats.sharing.params.size
    for view in views:
        sizes = {view.params.numel(), *(update.delta.numel() for update in view.updates)}
        if sizes != {expected}:
            raise ConfigError(
                f"--history {folder}: round {view.round} holds {max(sizes):,} weights, the model has {expected:,}"
            )
    return views


def _recipe(said: Said, dataset: Dataset, members: NDArray[np.int64], opened: OpenedModel) -> Federation:
    """The federation that the recipe describes, on the members: shadows are trained as it is."""
    assert said.recipe is not None
    cell = expand({**read_toml(said.recipe), "baseline": False})[0]
    name = said.model or str(opened.record.get("model", cell.model.name))
    options = dict(opened.record.get("options", {})) if said.model is None else cell.model.options
    norm: Any = opened.record.get("norm", cell.model.norm)
    settings = {**vars(cell.federation), "clients": cell.federation.clients or 1}
    model = ModelConfig(name=name, norm=norm, options=options, weights=cell.model.weights)
    cell = resolve(replace(cell, model=model, federation=FederationConfig(**settings), attack=None, seed=said.seed))
    dealt = partition(dataset, members, cell.data, cell.federation.clients, cell.seed)
    return federate(cell, dataset, dealt)


def chosen(dataset: Dataset, word: str) -> NDArray[np.int64]:
    """Rows that a word names: a part, `column=value`, a boolean `.npy`, or a text file of ids or row numbers.

    Raises:
        ConfigError: nothing of this, or nothing found.
    """
    path = Path(word)
    if word in PARTS:
        rows = dataset.rows(split=word)
    elif path.suffix == ".npy" and path.is_file():
        rows = np.flatnonzero(_mask(path, len(dataset)))
    elif path.is_file():
        rows = _listed(dataset, path)
    elif "=" in word:
        column, _, value = word.partition("=")
        rows = dataset.rows(**{column: value})
    else:
        raise ConfigError(f"'{word}': neither a part ({', '.join(PARTS)}), column=value, a text file nor a .npy mask")
    if not len(rows):
        raise ConfigError(f"'{word}' names no image of {dataset.name}")
    return np.asarray(rows, dtype=np.int64)


def _mask(path: Path, size: int) -> NDArray[np.bool_]:
    try:
        if is_object_array(path):
            raise UnsafeFileError(f"{path}: this array holds Python objects, which can run code when read; not opened")
        mask = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"{path}: not a plain array ({error}); save it with numpy.save") from None
    if mask.dtype != np.bool_ or mask.shape != (size,):
        raise ConfigError(f"{path}: a mask must be bool of length {size:,}, this is {mask.dtype} {mask.shape}")
    return np.asarray(mask)


def is_object_array(path: Path) -> bool:
    """The header alone says whether a `.npy` file holds pickled objects."""
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            return False
        file.seek(0)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return bool(read(file)[2].hasobject)


def _listed(dataset: Dataset, path: Path) -> NDArray[np.int64]:
    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; write one image id or row number a line") from None
    ids = {str(name): row for row, name in enumerate(dataset.meta["image"])}
    rows = []
    for number, word in enumerate(words, 1):
        row = ids.get(word, int(word) if word.isdecimal() else -1)
        if not 0 <= row < len(dataset):
            raise ConfigError(f"{path}:{number}: '{word[:60]}' is no image of {dataset.name}")
        rows.append(row)
    return np.unique(np.array(rows, dtype=np.int64))
