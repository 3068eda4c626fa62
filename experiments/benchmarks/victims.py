"""Who is attacked in the benchmark of gradient inversion, and are these the victims that the numbers are about?

A case is written `NETWORK-bB`, such as `lenet-b4`: batches of B images behind one real step of SGD. `@R` adds Gaussian
noise of R times the gradient's norm. Networks, image lists, seeds and check values are those of tests/attacks; every
case exists untrained and trained.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fedsec.attacks.gradinversion.prior import Prior, fit_prior
from torch import Tensor, nn

from fedsec import checkpoint
from fedsec.findings import PublicData
from fedsec.types import LocalRecipe, ServerView
from tests.attacks.gradinversion import cases

ALIASES = {"noise": ("lenet-b1@0.1", "lenet-b1@1")}
PATTERN = re.compile(r"(lenet|mlp|convnet64|convnet|kermany64)-b([1-9]\d?)(?:@([\d.]+))?")
RECIPE: LocalRecipe = cases.recipe()
CHECKS = {
    "lenet-b1": (4.274429, 28.4391),
    "lenet-b4": (4.118583, None),
    "mlp-b1": (0.644686, 3.762896),
    "convnet-b1": (0.691580, 0.948306),
}
"""Loss and gradient norm of the untrained network on the first B images of L32: specification, section 6.1."""
DIGITS = 1e-5
"""Relative difference up to which a check value counts as reproduced."""


class WrongVictimError(Exception):
    """The victims are not those that the stored numbers are about."""


@dataclass(frozen=True)
class XRays:
    """One data set: what may be attacked, and what anybody could have."""

    name: str
    images: Tensor
    """(N, C, H, W) in [0, 1]."""
    labels: Tensor
    attacked: tuple[int, ...]
    """Rows to attack, in order."""
    public: PublicData
    mean: float
    std: float
    """What the network normalises with."""


@dataclass(frozen=True)
class Case:
    """One network, batch size and noise level."""

    name: str
    network: str
    batch: int
    noise: float = 0.0
    """Norm of the noise as a share of the gradient's."""

    @classmethod
    def parse(cls, text: str) -> Case:
        """`lenet-b4`, `lenet-b1@0.1`.

        Raises:
            ValueError: no such network or batch size.
        """
        found = PATTERN.fullmatch(text)
        if not found or int(found[2]) > len(cases.L32):
            networks = "lenet, mlp, convnet, kermany64 or convnet64"
            known = f"NETWORK-bB[@NOISE] with {networks} and B up to {len(cases.L32)}, or noise"
            raise ValueError(f"{text}: no such case; write {known}")
        return cls(text, found[1], int(found[2]), float(found[3] or 0))

    @property
    def data(self) -> str:
        """The data set behind the case."""
        return "kermany_64" if self.network.endswith("64") else "pneumoniamnist"


@dataclass(frozen=True)
class Victim:
    """One upload, and the truth behind it, which no attack is given."""

    view: ServerView
    images: Tensor
    labels: Tensor
    rows: tuple[int, ...]


def parse(words: str) -> list[Case]:
    """Cases from comma-separated names, aliases included."""
    names = [name for word in words.split(",") if word for name in ALIASES.get(word, (word,))]
    return [Case.parse(name) for name in names]


def data_folder() -> Path:
    """The folder that FEDSEC_DATA names.

    Raises:
        FileNotFoundError: it names none.
    """
    folder = Path(os.environ.get("FEDSEC_DATA", ""))
    if not os.environ.get("FEDSEC_DATA") or not folder.is_dir():
        raise FileNotFoundError("set FEDSEC_DATA to the folder that holds pneumoniamnist.npz and kermany_64.npz")
    return folder


def load(name: str) -> XRays:
    """`pneumoniamnist` as in the specification, or `kermany_64`, whose public images are of other patients."""
    if name == "pneumoniamnist":
        images, labels = cases.load(data_folder())
        attacked = (*cases.L32, *cases.E20, *cases.N12)
        return XRays(name, images, labels, attacked, cases.public_of(images, labels), cases.MEAN, cases.STD)
    with np.load(data_folder() / f"{name}.npz", allow_pickle=False) as file:
        images = torch.tensor(file["train_images"]).float().div(255)
        labels, patients = torch.tensor(file["train_labels"]).long()[:, 0], file["train_patient"]
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    sick = [int(np.flatnonzero(patients == p)[0]) for p in np.unique(patients[labels.numpy() == 1])]
    attacked = tuple(sick[:: max(1, len(sick) // 32)][:32])
    ours = set(patients[list(attacked)].tolist())
    pixels = {images[i].numpy().tobytes() for i in attacked}
    rows = [i for i, p in enumerate(patients.tolist()) if p not in ours and images[i].numpy().tobytes() not in pixels]
    public = PublicData(name, images[rows], labels[rows])
    return XRays(name, images, labels, attacked, public, float(public.images.mean()), float(public.images.std()))


def rows_of(case: Case, data: XRays, victims: int) -> list[tuple[int, ...]]:
    """The image rows of each victim batch: E20 alone, N12 under noise (E20 for more than 12), L32 in batches."""
    if case.data == "pneumoniamnist":
        few = bool(case.noise) and victims <= len(cases.N12)
        lists = cases.L32 if case.batch > 1 else cases.N12 if few else cases.E20
    else:
        lists = list(data.attacked)
    whole = len(lists) // case.batch
    return [tuple(lists[k * case.batch : (k + 1) * case.batch]) for k in range(min(victims, whole))]


def build(case: Case, data: XRays, *, trained: bool, keep: Path | None = None) -> nn.Module:
    """The network as it was broadcast, in evaluation mode; a trained one is kept in the folder `keep`."""
    makers: dict[str, Callable[[], cases.Normalised]] = {
        "lenet": cases.lenet,
        "mlp": cases.mlp,
        "convnet": cases.convnet,
        "kermany64": partial(cases.lenet, shape=tuple(data.images.shape[1:])),  # type: ignore[arg-type]
        "convnet64": partial(cases.convnet, side=data.images.shape[-1]),
    }
    model = makers[case.network]()
    for name, value in (("mean", data.mean), ("std", data.std)):
        model.get_buffer(name).fill_(value)
    if not trained:
        return model.eval()
    path = None if keep is None else keep / f"{case.network}-torch{torch.__version__}.safetensors"
    if path is not None and path.is_file():
        model.load_state_dict(checkpoint.load(path)[0])
        return model.eval()
    cases.train(model, data.images, data.labels)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, model.state_dict(), {"trained": "3 epochs of Adam, as in tests"})
    return model


def victim(case: Case, model: nn.Module, data: XRays, rows: Sequence[int], number: int, *, told: bool) -> Victim:
    """What reaches the server of one batch: one step of torch's SGD, and noise where the case has some.

    The noise generator is seeded 7 + 37·`number`; `told` gives the labels to every attack.
    """
    x, y = data.images[list(rows)], data.labels[list(rows)]
    delta = cases.upload(model, x, y, RECIPE)
    knowledge = {}
    if case.noise:
        std = case.noise * float(delta.norm()) / delta.numel() ** 0.5
        delta = delta + std * torch.randn(delta.shape, generator=torch.Generator().manual_seed(7 + 37 * number))
        knowledge = {"gaussian": {"noise": "gaussian", "noise_std": std}}
    oracle = y if told else None
    view = cases.view_of(model, delta, len(rows), RECIPE, knowledge=knowledge, oracle=oracle)
    return Victim(view, x, y, tuple(rows))


def prior_of(data: XRays) -> Prior:
    """The Gaussian that the attacker fits to the public images."""
    return fit_prior(data.public)


def loss_and_norm(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and the norm of its gradient in the parameters."""
    loss = nn.functional.cross_entropy(model(x), y)
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), float(torch.cat([p.reshape(-1) for p in parts]).norm())


def check(network: str, data: XRays) -> dict[str, tuple[float, float]]:
    """Loss and gradient norm of an untrained network beside the specification's.

    Returns:
        Case -> (loss, gradient norm), for the cases that have a check value.

    Raises:
        WrongVictimError: one differs by more than `DIGITS`.
    """
    measured = {}
    for name, wanted in CHECKS.items():
        case = Case.parse(name)
        if case.network != network:
            continue
        rows = cases.L32[: case.batch]
        measured[name] = loss_and_norm(build(case, data, trained=False), data.images[rows], data.labels[rows])
        for what, value, target in zip(("loss", "gradient norm"), measured[name], wanted, strict=True):
            if target is not None and abs(value - target) > DIGITS * target:
                raise WrongVictimError(f"{name}: {what} {value:.6f}, not {target}: not the specification's victim")
    return measured
