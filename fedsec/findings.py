"""What an attack is asked once the training is over, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedsec.types import RoundContext, ServerView, Task


@dataclass(frozen=True)
class CandidatePlan:
    """What an attack on the trained model asks about images that may have been trained on."""

    history: bool = False
    """It watched the training from the server: it wants the views of all rounds (see `Candidates.history`)."""


@dataclass(frozen=True)
class Candidates:
    """Images of which an adversary asks: was this one trained on? In an order that tells nothing."""

    images: Tensor
    """(N, C, H, W) float32 in [0, 1]."""
    labels: Tensor
    """(N,) or (N, L)."""
    task: Task
    population: PublicData
    """Images of the same kind that are known not to be members, and are no candidates."""
    population_traits: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Attribute such as sex -> its value (a text, empty where unknown) for each image of the population."""
    train_shadows: Callable[[int], Shadows] | None = None
    """Trains an even number of shadows, or finds them in the cache; None: nobody knows how the target was trained."""
    train_on: Callable[[Sequence[np.ndarray]], tuple[Callable[[], nn.Module], ...]] | None = None
    """Trains one model, as the target was, on each of these sets of the population (positions); None: as above."""
    history: tuple[ServerView, ...] = ()
    """Curious server: what reached it in each round, where the attack asked for it."""


@dataclass(frozen=True)
class Findings:
    """What an attack concludes; the frame compares it with the truth."""

    reconstructions: tuple[Reconstruction, ...] = ()
    """One for each view of the target, in order."""
    assumptions: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    naive: tuple[Reconstruction, ...] = ()
    """The same by an adversary who does not know of the defense, where both were asked for."""
    memberships: tuple[MembershipScores, ...] = ()
    sources: tuple[SourceGuesses, ...] = ()
    prototypes: tuple[Prototype, ...] = ()
    traits: tuple[TraitGuess, ...] = ()
    properties: tuple[PropertyGuess, ...] = ()


@dataclass(frozen=True)
class Limits:
    """What the observation behind one view allowed, computed with the truth in hand once the attack is over."""

    bound_mse: float | None = None
    """Mean squared pixel error, over the B images, that a bound allows; None: no bound, `notes` says why."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Further figures of this view, such as rank indices, by their result key."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MembershipScores:
    """How sure one method is that each candidate was trained on."""

    method: str
    scores: np.ndarray
    """(N,) float64, larger: rather a member; NaN: no answer."""
    shadows: int = 0
    view: Literal["logits", "labels", "updates", "sum"] = "logits"
    """What it looked at: the released model's outputs, its decisions only, single updates, or their sum."""


@dataclass(frozen=True)
class PropertyGuess:
    """Is the share of a group in the training set small or large?"""

    trait: str
    value: str
    shares: tuple[float, float]
    """Small and large."""
    shadows: int
    """Models that were trained to find out."""
    right: int
    """How many of them a classifier that was not fitted on them told right."""
    large: bool
    """What it says of the target."""


@dataclass(frozen=True)
class Prototype:
    """What an attack believes the training images of one class look like."""

    label: int
    images: Tensor
    """(R, C, H, W) in [0, 1]: its attempts, the best by its own objective first."""
    confidence: tuple[float, ...]
    """The attacked model's, of each; proves nothing (see docs/audit.md)."""
    method: str = "miface"


@dataclass(frozen=True)
class PublicData:
    """Images that anybody could have: the adversary's prior, disjoint from every attacked image by pixel hash."""

    name: str
    images: Tensor
    """(N, C, H, W) float32 in [0, 1]."""
    labels: Tensor


@dataclass(frozen=True)
class Reconstruction:
    """Images that an attack believes were behind one view."""

    images: Tensor
    """(B, C, H, W) float32 in [0, 1]."""
    labels: Tensor
    """(B,) or (B, L): the labels used or recovered."""
    method: str
    label_source: Literal["oracle", "recovered", "set", "guessed", "joint"] = "recovered"
    """Told in advance; solved for; the best of a set that covers 95 %; a prior's guess; optimised with the images."""
    label_set: tuple[Tensor, ...] = ()
    """Every multiset of labels that was tried."""
    certified: int = 0
    """How many of the B images carry a certificate that needs no ground truth."""
    residual: float = float("nan")
    """Relative mismatch between the simulated and the observed upload."""
    est_psnr: float | None = None
    """The attack's own estimate of its PSNR in dB."""
    seconds: float = 0.0
    """CPU seconds."""
    not_applicable: Mapping[str, str] = field(default_factory=dict)
    """Method -> why it was skipped."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shadows:
    """Models trained as the target was, on halves of the candidates that are known to the adversary."""

    contains: np.ndarray
    """(M, N) bool: which candidate each of them was trained on; every candidate is in half of them."""
    models: tuple[Callable[[], nn.Module], ...]
    """Builds each with its weights."""


@dataclass(frozen=True)
class SourceGuesses:
    """Which client does each candidate belong to, given that it was trained on?"""

    method: str
    clients: np.ndarray
    """(N,) client numbers."""


@dataclass(frozen=True)
class Target:
    """Everything an adversary holds when it draws its conclusion."""

    model: Callable[[], nn.Module]
    """Builds the (public) architecture, normalisation included, with the defenses' changes to it."""
    released: Callable[[], nn.Module]
    """Builds the same with the weights of the trained model, which everyone gets."""
    views: tuple[ServerView, ...]
    """One a victim: of a malicious server that asked several times, the last."""
    public: PublicData
    image_shape: tuple[int, int, int]
    ctx: RoundContext
    device: torch.device
    workers: int = 1
    """Processes that the attack may use."""
    progress: Callable[[int, int], None] = lambda done, total: None
    queries: tuple[tuple[ServerView, ...], ...] = ()
    """Malicious server: for each victim all its views, in the order of the queries."""
    candidates: Candidates | None = None
    """Images that may have been trained on, where the attack asked for them (`Attack.candidates`)."""


@dataclass(frozen=True)
class TraitGuess:
    """An attribute, such as sex, read off the model's features of each candidate."""

    trait: str
    value: str
    """The value that large scores stand for."""
    scores: np.ndarray
    """(N,) from the model's features."""
    from_pixels: np.ndarray
    """(N,) the same from the pixels alone: what anybody sees in the image."""


@dataclass(frozen=True)
class VictimPlan:
    """Which uploads of which clients an attack from the server's seat asks to be shown.

    In each of `rounds`, `images / batch` times, a client trains `local_steps` steps on one batch of its images, from
    the model broadcast in that round and through its whole defense, and the server sees the result.
    """

    rounds: tuple[int, ...]
    """1-based; -1 is the last round, and 1 sees the untrained model."""
    images: int
    batch: int
    local_steps: int = 1
    epochs: int | None = None
    """Local epochs instead of `local_steps`, each in an order of its own that only the client knows."""
    batch_size: int | None = None
    """Images in one local step; None: the whole batch."""
    split: Literal["train", "test"] = "train"
    """Whose images: the clients' own training images, or images no model has seen."""
    mode: Literal["train", "eval"] | None = None
    """Overrides the recipe's mode."""
    oracle_labels: bool = False
    queries: int = 1
    """How many models at most a malicious server sends to one victim, one after the other, for the same batch."""
