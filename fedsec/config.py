"""What a run was asked to do: TOML and command-line words become frozen cells with a content hash.

A cell is one point of the grid: one data set, model, federation, attack, stack of defenses and seed. The tables are
`[data] [model] [federation] [[attack]] [[defense]] [sweep]`; a list where one value is expected spans the grid.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedsec.errors import ConfigError
from fedsec.plugins import PluginSpec, construct, nearest, parse_stack

Optimizer = Literal["sgd", "adamw"]
"""What clients descend with, fresh in every round."""
LEARNING_RATES: Mapping[Optimizer, float] = {"sgd": 0.02, "adamw": 0.001}
"""Where none is given: what trains the built-in networks."""


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: the images, and who owns which."""

    name: Annotated[
        str, Field(description="data set name, or path of an npz file or folder, with options: NAME:key=value")
    ] = "synthetic-cxr"
    size: Annotated[int | None, Field(ge=16, description="side in pixels; the set's own where not given")] = None
    partition: Annotated[
        Literal["iid", "dirichlet", "quantity", "site", "patient"],
        Field(description="how the training images are dealt to the clients"),
    ] = "iid"
    alpha: Annotated[float, Field(gt=0, description="concentration of the dirichlet and quantity partitions")] = 0.5
    unit: Annotated[Literal["patient", "image"], Field(description="what is never split between clients")] = "patient"
    min_images: Annotated[int, Field(ge=1, description="smallest client")] = 10
    small: Annotated[
        Literal["error", "merge", "drop"], Field(description="what becomes of sites with fewer than min_images images")
    ] = "error"
    splits: Annotated[
        Literal["official", "derived", "safe"],
        Field(description="published parts; new ones by patient; or those without copies of an image in two parts"),
    ] = "official"
    max_train: Annotated[int | None, Field(ge=1, description="use only so many training images")] = None
    canaries: Annotated[int, Field(ge=0, description="canaries, half of them planted, to audit ε")] = 0
    canary: Annotated[
        Literal["mislabelled", "dirac", "random", "client_dirac", "client_random"],
        Field(description="wrong labels; gradients of images; or whole clients"),
    ] = "mislabelled"


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: the network."""

    name: Annotated[str, Field(description="model name")] = "cnn"
    norm: Annotated[Literal["group", "batch", "none"], Field(description="normalisation layers")] = "group"
    weights: Annotated[str | None, Field(description="start from this checkpoint (safetensors or state dict)")] = None
    options: Annotated[dict[str, Any], Field(description="further options of the architecture")] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class FederationConfig:
    """`[federation]`: how the clients train together."""

    clients: Annotated[
        int | None, Field(ge=1, description="number of clients; the number of sites where the data know them, else 10")
    ] = None
    rounds: Annotated[int, Field(ge=1, description="communication rounds")] = 10
    local_epochs: Annotated[int | None, Field(ge=1, description="passes over a client's images per round")] = None
    local_steps: Annotated[int | None, Field(ge=1, description="optimisation steps per round, instead")] = None
    batch_size: Annotated[int, Field(ge=1, description="images per optimisation step")] = 32
    optimizer: Annotated[Optimizer, Field(description="what clients descend with: sgd or adamw")] = "sgd"
    lr: Annotated[
        float | None, Field(gt=0, description="learning rate of the clients; 0.02 with sgd, 0.001 with adamw")
    ] = None
    momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of the clients' SGD")] = 0.9
    weight_decay: Annotated[float, Field(ge=0, description="weight decay of the clients")] = 0.0
    topology: Annotated[
        Literal["federated", "central", "local"],
        Field(description="by exchange of updates, one owner of all images, or every client for itself"),
    ] = "federated"
    strategy: Annotated[str, Field(description="what is shared and how it is combined, as name:key=value")] = "fedavg"
    participation: Annotated[str, Field(description="full, a fraction, intermittent:p=0.8, or leave, join, flaky")] = (
        "full"
    )
    shadow_rules: Annotated[
        str | None, Field(description="rules to evaluate on the same updates without applying them, as krum+dos")
    ] = None
    client_timeout: Annotated[float | None, Field(gt=0, description="seconds before a client is given up")] = None
    engine: Annotated[
        Literal["auto", "serial", "processes", "batched", "flower"],
        Field(description="where clients train; auto: a process a core"),
    ] = "auto"
    device: Annotated[str, Field(description="auto, cpu, cuda or cuda:N")] = "auto"

    @property
    def rate(self) -> float:
        """The learning rate, given or the optimiser's own."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    def __post_init__(self) -> None:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("give local_epochs or local_steps, not both")


@dataclass(frozen=True)
class Cell:
    """One point of the grid, fully resolved."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    attack: PluginSpec | None = None
    defense: tuple[PluginSpec, ...] = ()
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain nested values, in a fixed order."""
        return {
            "data": dataclasses.asdict(self.data),
            "model": dataclasses.asdict(self.model),
            "federation": dataclasses.asdict(self.federation),
            "attack": self.attack.to_table() if self.attack else None,
            "defense": [d.to_table() for d in self.defense],
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Cell:
        """The cell that `to_json` wrote.

        Raises:
            ConfigError: a table or parameter is missing, unknown or not allowed.
        """
        try:
            return cls(
                data=construct(DataConfig, content["data"], "data"),
                model=construct(ModelConfig, content["model"], "model"),
                federation=construct(FederationConfig, content["federation"], "federation"),
                attack=PluginSpec.from_table(content["attack"]) if content["attack"] else None,
                defense=tuple(PluginSpec.from_table(table) for table in content["defense"]),
                seed=int(content["seed"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a resolved cell: {type(error).__name__}: {error}") from None

    def key(self, *, without_attack: bool = False) -> str:
        """Eight hex digits of the content: equal cells have equal keys on every machine."""
        content = self.to_json()
        if without_attack:
            content["attack"] = None
        return content_hash(content)

    def label(self) -> str:
        """`none`, `dp:epsilon=3` or `dp+dos`: the defense as people write it."""
        return "+".join(map(str, self.defense)) or "none"


def content_hash(content: Any) -> str:
    """Eight hex digits of a JSON-able value."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


TABLES = {"data": DataConfig, "model": ModelConfig, "federation": FederationConfig}
KEYS = (*TABLES, "attack", "defense", "sweep", "seed", "seeds", "baseline")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a configuration file."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def read_resolved(path: Path) -> list[dict[str, Any]]:
    """The cells of a run's resolved.json, which reproduce it."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ConfigError(f"{path}: not a resolved.json of a run") from None
    if not isinstance(cells, list) or not cells:
        raise ConfigError(f"{path}: holds no cells")
    return cells


def set_path(tables: dict[str, Any], assignment: str) -> None:
    """Apply one `--set table.key=value`; the value is read as TOML where it is TOML, else as text."""
    path, equals, text = assignment.partition("=")
    table, dot, key = path.strip().partition(".")
    if not equals or not (dot or table in KEYS):
        raise ConfigError(f"--set {assignment}: write table.key=value, such as federation.lr=0.01")
    if table not in KEYS:
        raise ConfigError(f"--set {assignment}: unknown table '{table}': {nearest(table, KEYS)}")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    if not dot:
        tables[table] = value
        return
    target = tables.setdefault(table, {})
    if not isinstance(target, dict):
        raise ConfigError(f"--set {assignment}: [[{table}]] is a list; give its parameters as name:key=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
    target[leaf] = value


def _spread(table: Mapping[str, Any], keep: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """All combinations of a table's list values; `keep` names keys whose value is a list by nature."""
    axes = {k: v for k, v in table.items() if isinstance(v, list) and k not in keep}
    for key, values in axes.items():
        if not values:
            raise ConfigError(f"{key}: an empty list spans no cells")
    for combination in itertools.product(*axes.values()):
        yield {**table, **dict(zip(axes, combination, strict=True))}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _attacks(entries: Any) -> list[PluginSpec | None]:
    specs: list[PluginSpec | None] = []
    for entry in _as_list(entries):
        if isinstance(entry, str):
            specs.append(None if entry == "none" else PluginSpec.parse(entry))
        else:
            specs.extend(PluginSpec.from_table(table) for table in _spread(entry))
    return specs or [None]


def _defenses(entries: Any) -> list[tuple[PluginSpec, ...]]:
    stacks: list[tuple[PluginSpec, ...]] = []
    for entry in _as_list(entries):
        if isinstance(entry, str):
            stacks.append(parse_stack(entry))
        elif "stack" in entry:
            layers = [[PluginSpec.from_table(t) for t in _spread(layer)] for layer in entry["stack"]]
            stacks.extend(itertools.product(*layers))
        elif "+" in str(entry.get("name")) or entry.get("name") == "none":
            stacks.append(parse_stack(entry["name"]))
        else:
            stacks.extend((PluginSpec.from_table(table),) for table in _spread(entry))
    return stacks or [()]


def expand(tables: Mapping[str, Any]) -> list[Cell]:
    """All cells of a configuration, in a fixed order and without repeats.

    Where `baseline` (default true) is not switched off, every attack is also run on the undefended federation.

    Raises:
        ConfigError: an unknown table or parameter, or a value that is not allowed.
    """
    if "cells" in tables:
        if extra := sorted(tables.keys() - {"cells"}):
            raise ConfigError(f"a resolved.json says everything; leave out {', '.join(extra)}")
        return [Cell.from_json(content) for content in tables["cells"]]
    for key in tables:
        if key not in KEYS:
            raise ConfigError(f"unknown table [{key}]: {nearest(key, KEYS)}")
    merged = {name: {**tables.get(name, {}), **tables.get("sweep", {}).get(name, {})} for name in TABLES}
    for key in tables.get("sweep", {}):
        if key == "breakdown":
            raise ConfigError("[sweep.breakdown]: a search that adds cells as it goes; start it with fedsec sweep")
        if key not in TABLES:
            raise ConfigError(f"[sweep.{key}]: {nearest(key, TABLES)}")
    seeds = range(tables["seeds"]) if "seeds" in tables else _as_list(tables.get("seed", 0))
    stacks = _defenses(tables.get("defense", []))
    if tables.get("baseline", True) and () not in stacks:
        stacks = [(), *stacks]
    cells = [
        Cell(
            data=construct(DataConfig, data, "data"),
            model=construct(ModelConfig, model, "model"),
            federation=construct(FederationConfig, federation, "federation"),
            attack=attack,
            defense=stack,
            seed=int(seed),
        )
        for data in _spread(merged["data"])
        for model in _spread(merged["model"])
        for federation in _spread(merged["federation"])
        for seed in seeds
        for stack in stacks
        for attack in _attacks(tables.get("attack", []))
    ]
    return list({cell.key(): cell for cell in as_baselines(cells)}.values())


def as_baselines(cells: Sequence[Cell]) -> list[Cell]:
    """In a grid of several topologies, central and local training stand plain beside the federation: without attack,
    defense and everything that says how clients exchange. A grid of one topology stays as it is."""
    if len({cell.federation.topology for cell in cells}) == 1:
        return list(cells)
    plain = {key: getattr(FederationConfig, key) for key in ("strategy", "participation", "shadow_rules")}
    return [
        cell
        if cell.federation.topology == "federated"
        else dataclasses.replace(
            cell, attack=None, defense=(), federation=dataclasses.replace(cell.federation, **plain)
        )
        for cell in cells
    ]
