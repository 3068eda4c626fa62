"""A malicious server's layer in front of the model sorts images into bins (Fowl et al. 2021, Robbing the Fed).

Every row of the first layer asks the same question qᵀx and differs in its threshold b_k alone; a second layer with
equal columns hands the same signal δ_i to every row that image i activates. So row k sums the images above b_k, and two
rows differ by the images between their thresholds: dW_k − dW_{k+1} = Σ δ_i x_i, da_k − da_{k+1} = Σ δ_i. Where a bin
holds one image, the ratio is that image, whatever the batch size, the network, or the sum over clients around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedsec.findings import PublicData, Reconstruction
from fedsec.models.loss import task_loss
from fedsec.types import LocalRecipe

from .candidate import NotApplicable
from .certificate import EXACT_DB
from .observation import Observation
from .simulation import frozen_copy

Question = Literal["mean", "gaussian", "cosine"]
"""What the bins sort by: mean pixel, a random direction, or the first cosine mode from top to bottom."""

GAIN = 1e6
"""Factor between the second layer and the first. It sets the size of δ, against rounding and any unclipped noise."""
SHIFT = 0.05
"""By how many public pixel spreads the block moves the images that it passes on."""
PUBLIC_IMAGES = 256
"""Public images whose loss gradients the passed-on shift is aligned with."""
SIGNAL = 6.0
"""Standard deviations of noise above which a bin is called occupied: one false alarm in 10⁶ views of 512 bins."""
ROUNDING = 30.0
"""The same in units of float32 rounding, which is no Gaussian."""
STRENGTH = 1e-3
"""Largest relative mismatch between a bin's δ and what one image of that content would send."""


class Block(nn.Module):
    """x + W₂·relu(W₁x + b) + c on (B, C, H, W) images, with equal rows in W₁ and equal columns in W₂."""

    def __init__(self, bins: int, pixels: int) -> None:
        super().__init__()
        self.first = nn.Linear(pixels, bins)
        self.second = nn.Linear(bins, pixels)

    def forward(self, x: Tensor) -> Tensor:
        """The images, moved a little."""
        moved: Tensor = self.second(torch.relu(self.first(x.flatten(1))))
        return x + moved.view_as(x)


def _enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (module.imprint(args[0]), *args[1:])  # type: ignore[operator]


def insert(model: nn.Module, bins: int, pixels: int) -> Block:
    """Put an empty block in front of the model, in place. All other tensors keep their names and their order."""
    children = dict(model.named_children())
    for name in children:
        delattr(model, name)
    first = next(model.parameters(), torch.empty(0))
    block = Block(bins, pixels).to(first)
    model.imprint = block  # before the others: what looks for the last layer of the model still finds it
    for name, child in children.items():
        setattr(model, name, child)
    model.register_forward_pre_hook(_enter)
    return block


def question(kind: Question, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """q (C·H·W,), of unit L1 norm."""
    if kind == "mean":
        q = torch.ones(shape)
    elif kind == "gaussian":
        q = torch.randn(shape, generator=generator)
    else:
        rows = torch.arange(shape[1]) + 0.5
        q = torch.cos(math.pi * rows / shape[1])[None, :, None].expand(shape).clone()
    return (q / q.abs().sum()).flatten()


def craft(
    model: nn.Module,
    public: PublicData,
    recipe: LocalRecipe,
    *,
    bins: int,
    kind: Question,
    generator: torch.Generator,
) -> nn.Module:
    """The model with a block in front whose thresholds are the quantiles (k − ½)/K of qᵀx over public images."""
    device = next(model.parameters()).device
    images = public.images.to(device)
    push = passed_direction(model, public, recipe)
    block = insert(model, bins, images[0].numel())
    q = question(kind, (images.shape[1], images.shape[2], images.shape[3]), generator).to(images)
    values = images.flatten(1) @ q
    levels = (torch.arange(bins, device=device) + 0.5) / bins
    edges = smooth_quantiles(values.double(), levels.double()).to(values)
    activity = torch.relu(values[:, None] - edges).sum(1)
    size = SHIFT * images.std() / activity.std().clamp(min=1e-6)
    with torch.no_grad():
        block.first.weight.copy_((q / GAIN).expand_as(block.first.weight))
        block.first.bias.copy_(-edges / GAIN)
        block.second.weight.copy_((GAIN * size * push)[:, None].expand_as(block.second.weight))
        block.second.bias.copy_(-size * activity.mean() * push)
    return model


def smooth_quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of a Gaussian kernel density over `values` (N,), at `levels` (K,) in (0, 1).

    With as many bins as public images, plain quantiles follow the sample instead of the population: 512 bins from 524
    public X-rays leave 0.68 of 128 images alone, smoothed ones 0.78, which is (1 − 1/K)^(B−1). Bandwidth: half of
    Silverman's 1986 rule, as the distribution need not be Gaussian.
    """
    width = (0.45 * values.std(correction=0) * len(values) ** -0.2).clamp(min=1e-6)
    grid = torch.linspace(float(values.min() - 4 * width), float(values.max() + 4 * width), 4096).to(values)
    share = torch.special.ndtr((grid[:, None] - values) / width).mean(1)
    above = torch.searchsorted(share, levels).clamp(1, len(grid) - 1)
    low, high = share[above - 1], share[above]
    position = ((levels - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    found: Tensor = grid[above - 1] + position * (grid[above] - grid[above - 1])
    return found


def passed_direction(model: nn.Module, public: PublicData, recipe: LocalRecipe) -> Tensor:
    """The direction (C·H·W,), root mean square 1, along which the loss of public images changes most.

    First right singular vector of their normalised input gradients: δ_i is the gradient of image i along it, and an
    image that it leaves without a signal cannot be read.
    """
    device = next(model.parameters()).device
    x = public.images[:PUBLIC_IMAGES].to(device).requires_grad_(True)
    twin = frozen_copy(model, recipe.mode)
    loss = task_loss(recipe.task)(twin(x), public.labels[:PUBLIC_IMAGES].to(device))
    (gradient,) = torch.autograd.grad(loss, x)
    rows = torch.nn.functional.normalize(gradient.flatten(1).double(), dim=1)
    _, _, right = torch.linalg.svd(rows, full_matrices=False)
    direction = right[0].to(gradient) * math.sqrt(right.shape[1])
    return direction if bool(torch.isfinite(direction).all()) else torch.ones_like(direction)


@dataclass(frozen=True)
class Bins:
    """What the rows of the first layer say, bin by bin; K bins, d pixels."""

    signal: Tensor
    """Σ δ_i (K,)."""
    mixture: Tensor
    """Σ δ_i x_i (K, d)."""
    signal_std: Tensor
    mixture_std: Tensor
    occupied: Tensor
    """(K,) bool: the signal is neither noise nor rounding."""


def differences(observation: Observation) -> Bins:
    """Bin k lies between the thresholds of rows k and k + 1; the last has no upper end."""

    def step(rows: Tensor) -> Tensor:
        return rows - torch.cat([rows[1:], torch.zeros_like(rows[:1])])

    def root(stds: Tensor) -> Tensor:
        return (stds**2 + torch.cat([stds[1:], torch.zeros_like(stds[:1])]) ** 2).sqrt()

    weight, bias = "imprint.first.weight", "imprint.first.bias"
    if not {weight, bias} <= observation.complete:
        raise NotApplicable("the block's gradient is not sent as a whole")
    signal, std = step(observation.gradients[bias].double()), root(observation.stds[bias].double())
    rounding = root(observation.named(observation.floor)[bias].double())
    return Bins(
        signal,
        step(observation.gradients[weight].double()),
        std,
        root(observation.stds[weight].double()),
        signal.abs() > torch.maximum(SIGNAL * std, ROUNDING * rounding),
    )


def contents(observation: Observation, bins: Bins, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What these bins hold if each holds one image: images (n, C, H, W), not clamped, and their mean squared errors.

    The ratio of the two differences; where the defense's noise is known, the posterior mean under the public prior.
    """
    beta, mixture = bins.signal[rows, None], bins.mixture[rows]
    noise = bins.mixture_std[rows]
    if observation.noise_std > 0:
        prior = observation.prior
        variance, mean = prior.variance.double(), prior.mean.flatten().double()
        own = (noise**2 + (mean * bins.signal_std[rows, None]) ** 2).mean(1, keepdim=True)
        z = (mixture - beta * mean) @ prior.basis.double()
        found = mean + (z * variance * beta / (beta**2 * variance + own)) @ prior.basis.double().T
        left = (variance * own / (beta**2 * variance + own)).sum(1)
        error = left / len(mean) + prior.floor * (1 - prior.rank / len(mean))
    else:
        found = mixture / beta
        error = ((noise**2 + (found * bins.signal_std[rows, None]) ** 2) / beta**2).mean(1)
    return found.to(observation.gradient).view(-1, *observation.image_shape), error


def strengths(observation: Observation, images: Tensor, classes: int) -> Tensor:
    """δ (n, C): by how much each image (n, C, H, W), had it each label, would move the rows that it activates."""
    simulation = observation.simulation
    model = simulation.model
    moved = torch.zeros(len(images), 1, device=images.device, requires_grad=True)
    # Moving all thresholds of an image together sums its δ over the rows that it activates.
    handle = model.imprint.first.register_forward_hook(lambda _, args, out: out + moved)  # type: ignore[union-attr]
    try:
        logits = model(images)
    finally:
        handle.remove()
    with torch.no_grad():
        active = (model.imprint.first(images.flatten(1)) > 0).sum(1).clamp(min=1)  # type: ignore[operator,union-attr]
    found = []
    for c in range(classes):
        y = torch.full((len(images),), c, device=images.device)
        loss = len(images) * task_loss(simulation.task)(logits, y)
        found.append(torch.autograd.grad(loss, moved, retain_graph=True)[0][:, 0].detach() / active)
    scale = 1 / observation.batch if simulation.divisor is None else 1 / simulation.clients
    return scale * torch.stack(found, 1).double()


def agreeing_scale(signal: Tensor, expected: Tensor) -> float:
    """The factor on which most bins agree, where clipping hides it.

    Args:
        signal: (n,) as received. expected: (n, C) for each label.
    """
    ratios = (signal[:, None] / expected).flatten()
    ratios = ratios[torch.isfinite(ratios) & (ratios > 0)]
    if not len(ratios):
        return 1.0
    distance = (signal[:, None, None] - ratios * expected[..., None]).abs()
    close = (distance <= STRENGTH * signal.abs()[:, None, None]).any(1)
    return float(ratios[close.sum(0).argmax()])


def explain(observation: Observation, images: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    """Which label each image must have had for its bin's δ, and how far that δ still is from it, relative (n,).

    The mismatch is infinite where it cannot be computed: labels that are no classes, or clipping of each image.
    """
    simulation = observation.simulation
    if simulation.task == "multilabel":
        with torch.no_grad():
            guess = (simulation.logits(images) > 0).float()
        return guess, torch.full_like(signal, math.inf)
    classes = simulation.logits(observation.prior.mean[None]).shape[1]
    expected = strengths(observation, images, classes)
    scale = agreeing_scale(signal, expected) if simulation.update_clip is not None else 1.0
    mismatch = (scale * expected - signal[:, None]).abs() / signal[:, None].abs()
    smallest, labels = mismatch.nan_to_num(math.inf).min(1)
    return labels, smallest if simulation.sample_clip is None else torch.full_like(smallest, math.inf)


def in_own_bin(observation: Observation, images: Tensor, rows: Tensor, slack: Tensor) -> Tensor:
    """(n,) bool: qᵀx lies between the bin's thresholds, or within `slack` (n,) of them."""
    with torch.no_grad():
        above = observation.simulation.model.imprint.first(images.flatten(1)) * GAIN  # type: ignore[operator,union-attr]
    above = torch.cat([above, torch.full_like(above[:, :1], -math.inf)], 1)
    position = rows[:, None]
    lower, upper = above.gather(1, position)[:, 0], above.gather(1, position + 1)[:, 0]
    return (lower >= -slack) & (upper <= slack)


def read(observation: Observation) -> Reconstruction:
    """All images that the bins give away, the proven ones first, at most as many as the batch holds.

    An image is certified if its pixels lie in the box, if it falls into its own bin, if its estimated error is below
    that of 50 dB, and if the bin's δ is what this one image would send. Two images in one bin fail the last test alone.

    Raises:
        NotApplicable: the block's gradient is hidden, or no bin stands out of the noise.
    """
    bins = differences(observation)
    rows = bins.occupied.nonzero()[:, 0]
    if not len(rows):
        floor = "noise" if observation.noise_std > 0 else "rounding"
        raise NotApplicable(f"none of {len(bins.signal)} bins stands out of the {floor}")
    found, error = contents(observation, bins, rows)
    slack = 1e-3 + 3 * error.sqrt()
    inside = (found.amin((1, 2, 3)) >= -slack) & (found.amax((1, 2, 3)) <= 1 + slack)
    images = found.clamp(0, 1)
    labels, mismatch = explain(observation, images, bins.signal[rows])
    doubt = bins.signal_std[rows] / bins.signal[rows].abs()
    whole = mismatch <= torch.clamp(3 * doubt, min=STRENGTH)
    # A second image of share e in the bin moves the content by e times the distance between two images.
    error = error + 2 * (mismatch.clamp(max=1.0) * observation.prior.spread) ** 2
    own = in_own_bin(observation, images, rows, 1e-6 + 3 * error.sqrt())
    proven = inside & own & whole & (error <= 10 ** (-EXACT_DB / 10))
    usable = (inside & own).nonzero()[:, 0]
    order = usable[torch.argsort(error[usable] - 10.0 * proven[usable])][: observation.batch]
    if not len(order):
        raise NotApplicable(f"none of {len(rows)} occupied bins holds an image")
    several = int((~whole[order]).sum())
    notes = (
        f"{len(rows)} of {len(bins.signal)} bins are occupied",
        *([f"{several} of them hold several images, or images of unknown share"] if several else []),
        *observation.notes,
    )
    return Reconstruction(
        images=images[order].detach().cpu(),
        labels=labels[order].detach().cpu(),
        method="imprint",
        certified=int(proven[order].sum()),
        est_psnr=-10 * math.log10(max(1e-14, float(error[order].median()))),
        notes=notes,
    )
