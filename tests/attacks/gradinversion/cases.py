"""Victims of gradient inversion, and uploads made by a real optimiser rather than by the attack's own simulation.

Indices, networks, initialisation and check values: the specification of gradient inversion, §6.1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fedsec.attacks.gradinversion.observation import Observation, observe
from fedsec.attacks.gradinversion.prior import Prior, fit_prior
from torch import Tensor, nn

from fedsec.findings import PublicData, Target
from fedsec.types import Layout, LocalRecipe, RoundContext, ServerView, Update

L32 = [872, 3346, 603, 2028, 2202, 2926, 4159, 1990, 519, 452, 3882, 395, 1075, 61, 1793, 1752, 205, 98, 3923, 2973]
L32 += [438, 2040, 1833, 1703, 3388, 3363, 2978, 4097, 1042, 4680, 929, 559]
E20 = [872, 2973, 3244, 3680, 2916, 914, 4291, 3827, 2751, 200, 3835, 3958, 17, 2787, 587, 4178, 2186, 629, 2699, 2270]
N12 = [872, 4208, 3600, 3268, 1778, 128, 568, 2479, 4521, 393, 2983, 1914]
MEAN, STD = 0.5719, 0.1684


class Normalised(nn.Module):
    """Takes images in [0, 1], as every model of fedsec does."""

    def __init__(self, net: nn.Module, mean: float = MEAN, std: float = STD) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, 1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


def lenet(
    activation: type[nn.Module] = nn.Sigmoid,
    *,
    shape: tuple[int, int, int] = (1, 28, 28),
    classes: int = 2,
    seed: int = 0,
) -> Normalised:
    """LeNet with U(-1/2, 1/2) weights."""
    torch.manual_seed(seed)
    features = 12 * -(-shape[1] // 4) * -(-shape[2] // 4)
    net = nn.Sequential(
        nn.Conv2d(shape[0], 12, 5, 2, 2),
        activation(),
        nn.Conv2d(12, 12, 5, 2, 2),
        activation(),
        nn.Conv2d(12, 12, 5, 1, 2),
        activation(),
        nn.Flatten(),
        nn.Linear(features, classes),
    )
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return Normalised(net)


def mlp(pixels: int = 784, classes: int = 2) -> Normalised:
    """784-256-256-C with ReLU."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, classes)]
    return Normalised(nn.Sequential(*layers))


def convnet(side: int = 28) -> Normalised:
    """The ConvNet with BatchNorm, 723,842 parameters at 28 pixels."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    before = 1
    for i, width in enumerate((32, 64, 64, 128, 128, 128, 128, 128)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(3)] if i in (5, 7) else []
        before = width
    return Normalised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (side // 9) ** 2, 2)))


def small_cnn(activation: type[nn.Module] = nn.ReLU, classes: int = 2, channels: int = 1) -> Normalised:
    """Convolution, GroupNorm, activation and max pooling, twice: what the cascade cannot undo. 16x16 images."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        activation(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, classes),
    )
    return Normalised(net)


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """PneumoniaMNIST's training images in [0, 1] and their labels."""
    with np.load(folder / "pneumoniamnist.npz", allow_pickle=False) as data:
        images = torch.tensor(data["train_images"]).float().div(255)[:, None]
        return images, torch.tensor(data["train_labels"]).long()[:, 0]


def public_of(images: Tensor, labels: Tensor) -> PublicData:
    """The first 2,000 images that equal none of the attacked ones."""
    attacked = {images[i].numpy().tobytes() for i in {*L32, *E20, *N12}}
    rows = [i for i in range(2100) if images[i].numpy().tobytes() not in attacked][:2000]
    return PublicData("pneumoniamnist", images[rows], labels[rows])


def train(model: Normalised, images: Tensor, labels: Tensor) -> Normalised:
    """3 epochs of Adam, batch 64, order from a generator seeded 0."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(images) // 64 * 64].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def blobs(count: int, shape: tuple[int, int, int] = (1, 16, 16), seed: int = 0) -> PublicData:
    """Smooth random images with labels by their brighter half; needs no data."""
    rng = np.random.default_rng(seed)
    c, h, w = shape
    rows, columns = np.mgrid[0:h, 0:w]
    images = np.empty((count, c, h, w), np.float32)
    for i in range(count):
        image = np.full((c, h, w), 0.3)
        for _ in range(4):
            cy, cx, s = rng.uniform(0, h), rng.uniform(0, w), rng.uniform(1.5, 5)
            bump = np.exp(-((rows - cy) ** 2 + (columns - cx) ** 2) / (2 * s * s))
            image += rng.uniform(-0.3, 0.5, (c, 1, 1)) * bump
        images[i] = np.clip(image, 0, 1)
    x = torch.tensor(images)
    return PublicData("blobs", x, (x[..., w // 2 :].mean((1, 2, 3)) > x[..., : w // 2].mean((1, 2, 3))).long())


def unlikely(model: nn.Module, x: Tensor) -> Tensor:
    """The class that the model holds for least likely: labels with a large gradient, far above rounding."""
    with torch.no_grad():
        return model(x).argmin(1)


def recipe(**changes: Any) -> LocalRecipe:
    """One local step of plain SGD at rate 1, evaluation mode."""
    base = LocalRecipe("multiclass", 2, 1.0, 0.0, 0.0, 64, None, 1, "eval")
    return replace(base, **changes)


def upload(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    plan: LocalRecipe,
    *,
    names: tuple[str, ...] | None = None,
    loss_factor: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """The flat update of a real client: torch's optimiser, float32, `plan.steps` steps over batches in order."""
    client = copy.deepcopy(model).train(plan.mode == "train")
    torch.manual_seed(seed)
    before = {n: p.detach().clone() for n, p in client.named_parameters()}
    optimizer = torch.optim.SGD(client.parameters(), plan.lr, plan.momentum, weight_decay=plan.weight_decay)
    chunks = list(zip(x.split(plan.batch_size), y.split(plan.batch_size), strict=True))
    for step in range(plan.steps or 1):
        a, b = chunks[step % len(chunks)]
        optimizer.zero_grad()
        if plan.task == "multilabel":
            loss = nn.functional.binary_cross_entropy_with_logits(client(a), b)
        else:
            loss = nn.functional.cross_entropy(client(a), b)
        (loss_factor * loss).backward()
        optimizer.step()
    after = dict(client.named_parameters())
    return torch.cat([(after[n].detach() - before[n]).reshape(-1) for n in names or tuple(before)])


def view_of(
    model: nn.Module,
    delta: Tensor,
    count: int,
    plan: LocalRecipe,
    *,
    names: tuple[str, ...] | None = None,
    knowledge: Mapping[str, Mapping[str, Any]] | None = None,
    clients: int = 1,
    oracle: Tensor | None = None,
) -> ServerView:
    """What the server sees of an update."""
    shared = {n: p.detach() for n, p in model.named_parameters() if names is None or n in names}
    layout = Layout.of(shared)
    buffers = {n: b for n, b in model.named_buffers() if n not in ("mean", "std") and b.is_floating_point()}
    buffer_layout = Layout.of(buffers)
    return ServerView(
        round=1,
        params=layout.flatten(shared),
        buffers=buffer_layout.flatten(buffers) if buffers else None,
        layout=layout,
        buffer_layout=buffer_layout,
        updates=(Update(0 if clients == 1 else -1, delta, count),),
        clients_in_sum=clients,
        recipe=plan,
        local_steps=plan.steps or 1,
        knowledge=knowledge or {},
        oracle_labels=oracle,
    )


def observation_of(
    model: nn.Module, x: Tensor, y: Tensor, prior: Prior, plan: LocalRecipe | None = None, **changes: Any
) -> Observation:
    """An honest upload, observed."""
    plan = plan or recipe()
    view = view_of(model, upload(model, x, y, plan), len(x), plan, **changes)
    return observe(view, model, prior, tuple(x.shape[1:]))


def target_of(model: nn.Module, views: tuple[ServerView, ...], public: PublicData, workers: int = 1) -> Target:
    """What `conclude` is given."""
    return Target(
        model=lambda: copy.deepcopy(model),
        released=lambda: copy.deepcopy(model),
        views=views,
        public=public,
        image_shape=tuple(public.images.shape[1:]),
        ctx=RoundContext(0, 1, 1),
        device=torch.device("cpu"),
        workers=workers,
    )


def prior_of(public: PublicData) -> Prior:
    """The fitted prior."""
    return fit_prior(public)


def psnr(images: Tensor, truth: Tensor) -> float:
    """-10·log10 of the mean squared error, at most 140."""
    return -10 * float(np.log10(max(1e-14, float((images.double() - truth.double()).pow(2).mean()))))
