"""From a cell's configuration to a federation that is ready for its first round."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedsec import checkpoint, data, models, plugins
from fedsec.attack import Attack
from fedsec.config import Cell, FederationConfig
from fedsec.data.base import Dataset
from fedsec.data.canaries import Canaries, plant
from fedsec.data.partition import Partition, partition
from fedsec.data.stream import client_images
from fedsec.defense import Defense
from fedsec.errors import ConfigError
from fedsec.federation import topology
from fedsec.federation.composition import check_optimizer, check_privacy, check_rule, check_seat, compose
from fedsec.federation.desk import ServerState, Setting
from fedsec.federation.engines.base import ClientData, Engine
from fedsec.federation.engines.processes import Processes
from fedsec.federation.engines.serial import Serial
from fedsec.federation.facts import Facts, planned
from fedsec.federation.participation import Participation
from fedsec.federation.planted import with_planted
from fedsec.federation.rules import choose_aggregator, with_shadows
from fedsec.federation.seats import Seats
from fedsec.federation.sharing import load
from fedsec.federation.strategy import Strategy
from fedsec.machine import usable_cores
from fedsec.types import FederationPlan, LocalRecipe, RoundContext

DEFAULT_EPOCHS = 3
ROOT_IMAGES = 100
"""Images of the server's own, for the rules that ask for them."""
Splits = Literal["official", "derived", "safe"]


@dataclass
class Federation:
    """Everything that one cell trains and evaluates with."""

    cell: Cell
    dataset: Dataset
    partition: Partition
    seats: Seats
    plan: FederationPlan
    participation: Participation
    clients: ClientData
    rows: tuple[np.ndarray, ...]
    """Data set rows of each client's training images."""
    evaluation: dict[str, tuple[tuple[Tensor, Tensor], ...]]
    """`val` and `test`: each client's own part, in client order; together they are the whole part."""
    test_groups: tuple[np.ndarray, ...]
    """Patient, lesion or image of each of a client's test images: intervals resample these."""
    device: torch.device
    notes: tuple[str, ...]
    canaries: Canaries | None = None
    owners: tuple[str, ...] = ()
    """Names of those who train: the hospitals of the partition, or the one owner of all their images."""
    initial: Mapping[str, Tensor] | None = None
    """All tensors of the model before the first round, which is public; the seats' one holds what was trained last."""

    def __post_init__(self) -> None:
        if self.initial is None:
            self.initial = {name: t.detach().clone() for name, t in self.seats.model.state_dict().items()}

    @property
    def setting(self) -> Setting:
        """What the strategy knows of this federation."""
        ctx = RoundContext(self.cell.seed, 0, self.cell.federation.rounds)
        return Setting(self.dataset.image_shape, self.seats.recipe, len(self.clients), ctx)

    def initial_state(self) -> ServerState:
        """The server before the first round."""
        assert self.initial is not None
        tensors = dict(self.initial)
        sharing = self.seats.sharing
        local = {}
        if sharing.local.size:
            personal = sharing.local.flatten(tensors)
            local = {k: personal.clone() for k in range(len(self.clients))}
        state = ServerState(sharing.params.flatten(tensors), sharing.buffers.flatten(tensors), local)
        state.side = self.seats.strategy.initial_side(self.seats.model, self.setting)
        return state

    def engine(self) -> Engine:
        """The engine that the configuration names."""
        settings = self.cell.federation
        if settings.engine == "processes":
            return Processes(self.seats, self.clients, timeout=settings.client_timeout)
        if settings.engine == "batched":
            from fedsec.federation.engines.batched import Batched

            return Batched(self.seats, self.clients)
        if settings.engine == "flower":
            from fedsec.federation.engines.flower import open_engine

            return open_engine(self.seats, self.clients, settings.client_timeout, self.cell.key())
        return Serial(self.seats, self.clients)

    def build_model(self, weights: tuple[Tensor, Tensor] | None = None) -> nn.Module:
        """A copy of the architecture, as every adversary knows it, and with these shared tensors where given.

        What stays at the clients is as it was before the first round, never a client's own.
        """
        assert self.initial is not None
        model = copy.deepcopy(self.seats.model)
        model.load_state_dict(self.initial)
        if weights is not None:
            load(model, self.seats.sharing, *weights, None)
        return model


def resolve(cell: Cell) -> Cell:
    """Replace `auto` by what this machine offers, and texts by the values they mean: this is written and hashed.

    Raises:
        ConfigError: CUDA was asked for where there is none.
    """
    device = resolve_device(cell.federation.device)
    engine = cell.federation.engine
    if engine == "auto":
        engine = "processes" if device.type == "cpu" and usable_cores() > 1 else "serial"
    if engine in ("processes", "flower") and device.type != "cpu":
        raise ConfigError(f"engine={engine} works on the CPU, not on {device}; use engine=serial there")
    if engine == "flower" and importlib.util.find_spec("flwr") is None:
        raise ConfigError("engine=flower: Flower is not installed; pip install 'fedsec[flower]', or use processes")
    cell = topology.settled(cell)
    settings: dict[str, Any] = {
        **vars(cell.federation),
        "lr": cell.federation.rate,
        "device": str(device),
        "engine": engine,
    }
    if cell.federation.local_epochs is None and cell.federation.local_steps is None:
        settings["local_epochs"] = DEFAULT_EPOCHS
    return replace(
        cell,
        federation=FederationConfig(**settings),
        attack=plugins.checked("attacks", cell.attack) if cell.attack else None,
        defense=tuple(plugins.checked("defenses", spec) for spec in cell.defense),
    )


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        ConfigError: not a device, or not present.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: write auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name}: write auto, cpu, cuda or cuda:N")
    return device


def build_stack(cell: Cell) -> tuple[tuple[Defense, ...], Attack | None, Strategy]:
    """The cell's plugins, parameters checked, impossible combinations refused. Needs no data.

    Raises:
        ConfigError: an unknown plugin or parameter, or a stack that cannot work.
    """
    defenses: tuple[Defense, ...] = tuple(plugins.build("defenses", spec) for spec in cell.defense)
    names = [d.name for d in defenses]
    if len(set(names)) < len(names):
        raise ConfigError(f"--defense {cell.label()}: a stack holds each defense once")
    attack = plugins.build("attacks", cell.attack) if cell.attack else None
    strategy = compose(cell.federation.strategy)
    check_rule(strategy, choose_aggregator(defenses), [d.name for d in defenses])
    if attack is not None:
        check_seat(strategy, attack)
        check_optimizer(cell.federation.optimizer, attack)
    Participation.parse(cell.federation.participation)
    topology.check(cell, defenses, attack)
    return defenses, attack, strategy


def root_data(dataset: Dataset, seed: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Images of the server's own, from the validation part, which no client trains on: as many of each class."""
    rows = np.flatnonzero(dataset.split == "val")
    labels = np.asarray(dataset.labels)[rows]
    if not len(rows):
        return None
    rng = RoundContext(seed, 0, 0).numpy("root")
    if labels.ndim > 1:
        chosen = rng.permutation(rows)[:ROOT_IMAGES]
    else:
        classes = np.unique(labels)
        each = max(1, ROOT_IMAGES // len(classes))
        chosen = np.concatenate([rng.permutation(rows[labels == c])[:each] for c in classes])
    return tensors(dataset, np.sort(chosen), device)


def assemble(cell: Cell, data_dir: Path | None = None) -> Federation:
    """Load the data, deal it to the clients, build and prepare the model, and calibrate the defenses.

    Args:
        cell: a resolved cell. data_dir: where data sets are looked up first.
    """
    build_stack(cell)
    dataset = dataset_of(cell, data_dir)
    train_rows = np.flatnonzero(dataset.split == "train")
    rng = np.random.default_rng(RoundContext(cell.seed, 0, 0).entropy("max-train"))
    if cell.data.max_train is not None and cell.data.max_train < len(train_rows):
        train_rows = np.sort(rng.choice(train_rows, cell.data.max_train, replace=False))
    dealt = partition(dataset, train_rows, cell.data, default_clients(cell, dataset), cell.seed)
    if not cell.data.canaries:
        return federate(cell, dataset, dealt)
    dataset, given, canaries = plant(dataset, dealt, cell.data.canaries, cell.seed, cell.data.canary)
    federation = replace(federate(cell, dataset, given), canaries=canaries)
    for claim in (d.privacy() for d in federation.seats.defenses):
        if claim is not None:
            canaries.check_unit(claim.unit)
    return federation if canaries.kind == "mislabelled" else with_planted(federation, canaries, dealt)


def federate(cell: Cell, dataset: Dataset, dealt: Partition) -> Federation:
    """The federation of a cell on images that are already dealt: `assemble` without its first half.

    Args:
        cell: a resolved cell. dataset: its data set. dealt: who owns which training images.
    """
    device = resolve_device(cell.federation.device)
    if dataset.image_shape[1] != dataset.image_shape[2]:
        height, width = dataset.image_shape[1:]
        raise ConfigError(f"{dataset.name}: images are {height}x{width}; give --set data.size=N for square ones")
    owned, owners = topology.owners(cell, dealt)
    facts = (planned.get() or {}).get(cell.key()) or Facts.of(dataset, owned)
    seats, plan, notes = take_seats(cell, facts, root_data(dataset, cell.seed, device))
    parts = {part: dealt.deal(dataset, part) for part in ("val", "test")}
    return Federation(
        cell=cell,
        dataset=dataset,
        partition=dealt,
        seats=seats,
        plan=plan,
        participation=Participation.parse(cell.federation.participation),
        clients=tuple(tensors(dataset, rows, device) for rows in owned),
        rows=owned,
        evaluation={part: tuple(tensors(dataset, r, device) for r in rows) for part, rows in parts.items()},
        test_groups=tuple(dataset.groups()[rows] for rows in parts["test"]),
        device=device,
        notes=notes,
        owners=owners,
    )


def take_seats(
    cell: Cell, facts: Facts, root: tuple[Tensor, Tensor] | None = None
) -> tuple[Seats, FederationPlan, tuple[str, ...]]:
    """Build and prepare the model and calibrate the defenses: the same on every machine that takes part.

    Args:
        cell: a resolved cell. facts: of the clients' data. root: the server's own images and labels.

    Returns:
        the seats, the plan that they were calibrated on, and notes for the result.
    """
    defenses, attack, strategy = build_stack(cell)
    device, count = resolve_device(cell.federation.device), len(facts.client_sizes)
    model: nn.Module = models.build(
        cell.model.name,
        num_classes=facts.num_classes,
        in_channels=facts.image_shape[0],
        image_size=facts.image_shape[1],
        norm=cell.model.norm,
        seed=RoundContext(cell.seed, 0, 0).entropy("model"),
        **cell.model.options,
    )
    notes: tuple[str, ...] = ()
    if cell.model.weights is not None:
        notes = checkpoint.load_into(model, Path(cell.model.weights), keep=cell.model.options.keys())
    for defense in defenses:
        model = defense.prepare_model(model)

    settings = cell.federation
    Participation.parse(settings.participation).check(count)
    recipe = strategy.recipe(
        LocalRecipe(
            task=facts.task,
            num_classes=facts.num_classes,
            lr=settings.rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            batch_size=settings.batch_size,
            epochs=settings.local_epochs,
            steps=settings.local_steps,
            optimizer=settings.optimizer,
        )
    )
    setting = Setting(facts.image_shape, recipe, count, RoundContext(cell.seed, 0, settings.rounds))
    model = strategy.prepare_model(model, setting).to(device).to(memory_format=torch.channels_last)
    sharing = strategy.sharing(model)
    plan = FederationPlan(
        recipe=recipe,
        rounds=settings.rounds,
        client_sizes=facts.client_sizes,
        client_patients=facts.client_patients,
        layout=sharing.params,
        patient_ids=facts.patient_ids,
        clients_per_round=Participation.parse(settings.participation).expected(count),
        weights=tuple(strategy.weights(dict(enumerate(facts.client_sizes))).values()),
    )
    defenses = tuple(d.calibrate(plan).measure(model, facts.image_shape) for d in defenses)
    claiming = [d.name for d in defenses if d.privacy() is not None]
    if len(claiming) > 1:
        raise ConfigError(
            f"{' and '.join(claiming)} each add noise for an epsilon of their own, and the two do not combine: "
            "choose one, or leave clip out of the other, which is then a heuristic"
        )
    check_privacy(strategy, [d for d in defenses if d.name in claiming])
    if attack is not None:
        attack = attack.calibrate(plan, RoundContext(cell.seed, 0, settings.rounds).adversary())
    seats = Seats(
        model=model,
        recipe=recipe,
        strategy=strategy,
        sharing=sharing,
        defenses=defenses,
        attack=attack,
        aggregator=with_shadows(choose_aggregator(defenses), settings.shadow_rules),
        malicious=attack.controls(count) if attack and attack.seat == "client" else frozenset(),
        root=root,
    )
    return seats, plan, notes


def dataset_of(cell: Cell, data_dir: Path | None = None) -> Dataset:
    """The cell's data set."""
    return _load(cell.data.name, data_dir, cell.data.size, cell.data.splits)


@lru_cache(maxsize=2)
def _load(name: str, data_dir: Path | None, size: int | None, splits: Splits) -> Dataset:
    """Cells of one run read their data set once; data sets are never changed."""
    return data.load(name, data_dir=data_dir, size=size, splits=splits)


def default_clients(cell: Cell, dataset: Dataset) -> int | None:
    """The number that was asked for; else as many as the data know sites; None where the partition decides."""
    asked = cell.federation.clients
    if asked is not None or cell.data.partition in ("site", "patient") or "site" not in dataset.meta:
        return asked
    sites = np.unique(dataset.meta["site"][dataset.split == "train"])
    return len(sites) if len(sites) > 1 and "" not in sites else None


def tensors(dataset: Dataset, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images, in memory or streamed, and labels of these rows."""
    return client_images(dataset, rows, device), torch.from_numpy(dataset.labels[rows]).to(device)
