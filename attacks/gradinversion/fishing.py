"""A malicious server silences all images of a batch but one (after Wen et al. 2022, Fishing for user data).

Row c of the head becomes ω·a, with a the direction of largest public spread of the features h, all other rows become 0,
and the bias of row c −ω·t. So p_c is 1 for images with aᵀh > t and 0 for the others, and an image contributes to the
batch gradient only where p_c is not what its label asks for: class c below t, other classes above t. Between two
thresholds every image moves the gradient by the gradient of one image of class c, whatever its class, and moves
Σ_{r≠c} da_r by 1/B. So the server counts the images between any two thresholds, bisects until it is one, and hands the
difference of two gradients to the methods for single images. t = +∞ alone singles out a class (all of it above).

Wen et al. take one feature in the place of a; a dense direction spreads images further and lets the whole feature
vector speak below the head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedsec.findings import PublicData
from fedsec.types import ServerView, Task

from .candidate import NotApplicable
from .features import feature_function
from .knowledge import read as read_knowledge
from .observation import Observation
from .trace import trace

SHARPNESS = 1e5
"""ω in units of one over the public spread of aᵀh: images closer to a threshold than 1e-4 of it blur the count."""
PUBLIC_IMAGES = 256
"""Public images that show how far features spread."""
BLUR = 0.2
"""How far a count may be from a whole number; three standard deviations of the defense's noise must be less."""
FAR = 100.0
"""Thresholds that no image reaches, in public spreads beyond the extremes."""
CLOSEST = 1e-4
"""Public spreads between two thresholds below which no further one is tried."""


@dataclass(frozen=True)
class Lever:
    """How a model's images can be told apart by its head, from public images."""

    weight: str
    bias: str
    caught: int
    """c, the class whose row carries the threshold: the most frequent public one."""
    direction: Tensor
    """a (F,), of unit norm."""
    values: Tensor
    """aᵀh of public images, sorted (N,)."""

    @property
    def spread(self) -> float:
        """Their standard deviation."""
        return max(float(self.values.std(correction=0)), 1e-6)

    @property
    def ends(self) -> tuple[float, float]:
        """Thresholds below and above all images."""
        return float(self.values[0]) - FAR * self.spread, float(self.values[-1]) + FAR * self.spread

    def between(self, low: float, high: float, share: float) -> float:
        """The threshold with this share of the public images between `low` and `high` below it.

        Outside the public range the distribution continues evenly, one image to five spreads.
        """
        margin = 5 * self.spread
        ends = self.values[:1] - margin, self.values, self.values[-1:] + margin
        points = torch.cat(ends).double()
        ranks = torch.arange(len(points), dtype=torch.float64)
        first, last = (_interpolate(t, points, ranks) for t in (low, high))
        return _interpolate(first + share * (last - first), ranks, points)


def _interpolate(x: float, xs: Tensor, ys: Tensor) -> float:
    return float(np.interp(x, xs.numpy(), ys.numpy()))


@torch.no_grad()
def find_lever(model: nn.Module, public: PublicData, task: Task, sent: ServerView | None = None) -> Lever:
    """The head of a model and the direction to tell images apart by.

    Args:
        model: with the broadcast weights below its head.
        sent: an earlier query, whose direction is kept.

    Raises:
        NotApplicable: no softmax over classes, or no fully connected layer with a shared bias at the end.
    """
    if task == "multilabel":
        raise NotApplicable("labels that do not exclude each other have no softmax to saturate")
    images = public.images[:PUBLIC_IMAGES].to(next(model.parameters()).device)
    training = model.training
    call = (recorded := trace(model.eval(), images[:1])).calls[-1]
    weight, bias = None, None
    if call.name == "linear":
        weight, bias = recorded.name_of(call.args[1]), recorded.name_of(call.argument(2, "bias"))
    if weight is None or bias is None:
        raise NotApplicable(f"the model must end in a fully connected layer with a bias, not in {call.name}")
    features = feature_function(model, weight)(images).double()
    model.train(training)
    caught = int(torch.bincount(public.labels.long().flatten()).argmax())
    if sent is None:
        direction = torch.linalg.svd(features - features.mean(0), full_matrices=False)[2][0]
    else:
        if not {weight, bias} <= set(sent.layout.names):
            raise NotApplicable("the head stays at the client")
        direction = sent.layout.views(sent.params)[weight][caught].double().to(features)
        direction = direction / direction.norm().clamp(min=1e-300)
    values = (features @ direction).sort().values.cpu()
    return Lever(weight, bias, caught, direction.to(images), values)


@torch.no_grad()
def craft(model: nn.Module, lever: Lever, threshold: float) -> nn.Module:
    """Set the head so that `threshold` decides which images speak; in place."""
    named = dict(model.named_parameters())
    weight, bias = named[lever.weight], named[lever.bias]
    omega = SHARPNESS / lever.spread
    weight.zero_()
    bias.zero_()
    weight[lever.caught] = omega * lever.direction
    bias[lever.caught] = -omega * threshold
    return model


@dataclass(frozen=True)
class Answer:
    """What one query brought."""

    threshold: float
    excess: float
    """Images of class c below the threshold minus images of other classes above it; a whole number but for blur."""
    view: ServerView

    @property
    def sharp(self) -> bool:
        """No image was so near to the threshold that it spoke with half a voice."""
        return abs(self.excess - round(self.excess)) < BLUR


def answer(view: ServerView, lever: Lever, adaptive: bool = True) -> Answer:
    """Count from the head's bias. The row with the threshold is too coarse in float32 and left out; the other rows were
    sent as zero, so that rounding and weight decay leave them alone.

    Raises:
        NotApplicable: clipping or noise hides the count.
    """
    known = read_knowledge(view.knowledge if adaptive else {})
    if known.sample_clip is not None or known.update_clip is not None:
        raise NotApplicable("clipping hides how many images are behind the gradient")
    steps = max(1, view.local_steps)
    moved = view.recipe.lr * steps / (known.divisor or 1.0)
    scale = view.clients_in_sum if known.divisor else batch_of(view)
    params, delta = view.layout.views(view.params), view.layout.views(view.updates[0].delta.cpu())[lever.bias].double()
    others = torch.arange(len(delta)) != lever.caught
    noise = scale * math.hypot(known.step_std / steps**0.5, known.update_std / moved)
    noise *= math.sqrt(int(others.sum()) / view.clients_in_sum)
    if 3 * noise > BLUR or known.unknown_noise:
        size = f"{noise:.2g}" if not known.unknown_noise else "an unknown number of"
        raise NotApplicable(f"the defense's noise hides how many images are behind the gradient: ± {size} images")
    excess = -scale * float(delta[others].sum()) / moved
    if not math.isfinite(excess):
        raise NotApplicable("the update holds values that are not finite")
    threshold = -float(params[lever.bias][lever.caught]) / float(params[lever.weight][lever.caught].norm())
    return Answer(threshold, excess, view)


def batch_of(view: ServerView) -> int:
    """Images behind a view, as claimed or by protocol."""
    return view.updates[0].num_samples or view.clients_in_sum * view.recipe.batch_size


@dataclass(frozen=True)
class Interval:
    """The images between two thresholds."""

    low: Answer | None
    """None: below it nothing speaks, as the batch holds class c alone."""
    high: Answer
    count: int
    ends: tuple[float, float]


def intervals(answers: Sequence[Answer], lever: Lever, batch: int) -> list[Interval]:
    """The batch, divided at all thresholds so far; empty while its two ends are not known. The first answer is t = +∞.

    Raises:
        NotApplicable: the counts contradict each other.
    """
    if not answers:
        return []
    blurred = sum(not a.sharp for a in answers)
    if not answers[0].sharp or blurred > len(answers) - blurred + 2:
        raise NotApplicable(f"the counts of {batch} images are no whole numbers: its size is not as claimed")
    others = batch - round(answers[0].excess)
    low = lever.ends[0]
    marks: list[tuple[float, Answer | None, int]] = [(low, None, 0)] if others == 0 else []
    marks += [(a.threshold, a, round(a.excess) + others) for a in answers if a.sharp]
    marks.sort(key=lambda mark: mark[0])
    counts = [count for _, _, count in marks]
    if counts != sorted(counts) or counts[-1] != batch or (len(answers) > 1 and counts[0] != 0):
        raise NotApplicable(f"the counts {counts} of {batch} images contradict each other: its size is not as claimed")
    pairs = itertools.pairwise(marks)
    return [Interval(a, b, n - m, (s, t)) for (s, a, m), (t, b, n) in pairs if b is not None and n > m]


def next_threshold(answers: Sequence[Answer], lever: Lever, batch: int) -> float | None:
    """Where to divide next; None: every image is alone, or too near to its neighbour.

    First both ends (the lower only where other classes are in the batch), then the interval nearest to one image, at
    the threshold below which one image is expected.

    Raises:
        NotApplicable: see `intervals`.
    """
    if not answers:
        return lever.ends[1]
    parts = intervals(answers, lever, batch)
    if len(answers) == 1 and round(answers[0].excess) < batch:
        return lever.ends[0]
    crowded = [i for i in parts if i.count > 1 and i.ends[1] - i.ends[0] > CLOSEST * lever.spread]
    if not crowded:
        return None
    chosen = min(crowded, key=lambda i: i.count)
    # A threshold that hit an image is not tried again.
    missed = sum(not a.sharp and chosen.ends[0] < a.threshold < chosen.ends[1] for a in answers)
    return lever.between(*chosen.ends, 1 / (chosen.count + 0.37 * missed))


class Difference(Observation):
    """The difference of two uploads, put right where the rounding of large parameters had eaten it."""

    def reobserve(self, x: Tensor, y: Tensor) -> Tensor:
        """φ with errors of the size of `floor`: no single upload of these parameters would round like that."""
        exact = self.simulation.flat(x, y)
        draw = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)).to(exact)
        return exact + self.floor * draw


def single_image(interval: Interval, lever: Lever, observations: Sequence[Observation]) -> Difference:
    """The gradient that the one image of an interval would cause alone with label c, as an observation of its own.

    Args:
        observations: of `interval.high` and, unless it is None, of `interval.low`.
    """
    top = observations[0]
    scale = top.batch if top.simulation.divisor is None else top.simulation.clients
    gradient = top.gradient - sum((o.gradient for o in observations[1:]), torch.zeros_like(top.gradient))
    floor = torch.stack([o.floor for o in observations]).pow(2).sum(0).sqrt()
    parts, floors = top.named(scale * gradient), top.named(scale * floor)
    for name in (lever.weight, lever.bias):
        # Rows of the head's gradient sum to zero, and the row with the large weights is the one that was rounded.
        rows = [r for r in range(len(parts[name])) if r != lever.caught]
        parts[name][lever.caught] = -parts[name][rows].sum(0)
        floors[name][lever.caught] = floors[name][rows].pow(2).sum(0).sqrt()
    found = {field.name: getattr(top, field.name) for field in fields(top)}
    found |= {
        "simulation": replace(top.simulation, batch=1, batch_size=None, clients=1),
        "gradient": torch.cat([p.reshape(-1) for p in parts.values()]),
        "floor": torch.cat([p.reshape(-1) for p in floors.values()]),
        "step": top.step / scale,
        "noise_std": scale * top.noise_std * math.sqrt(len(observations)),
        "labels": None,
    }
    return Difference(**found)


def sort_labels(
    cut: Sequence[Interval], lever: Lever, observations: Mapping[int, Observation], top: Observation
) -> Tensor:
    """The label of each interval's images (n,), from the query that silences no image of class c.

    There, row r ≠ c of B·dW is H/(C−1) − V_r with H the sum of all features and V_r the sum over class r. An interval's
    own sum of features is known, and the V_r are combinations of them: the coefficient is near 1 for the label.

    Args:
        cut: all intervals. observations: by the id of each view. top: of t = +∞.
    """

    def features(interval: Interval) -> Tensor:
        answers = [interval.high, *([interval.low] if interval.low else [])]
        parts = [observations[id(a.view)].gradients[lever.weight].double() for a in answers]
        rows = parts[0] - (parts[1] if len(parts) > 1 else 0.0)
        return rows[others].sum(0)

    rows = top.gradients[lever.weight].double()
    others = torch.arange(len(rows), device=rows.device) != lever.caught
    sums = torch.stack([features(i) for i in cut])
    classes = sums.sum(0) / (len(rows) - 1) - rows
    classes[lever.caught] = rows[others].sum(0)
    shares = torch.linalg.lstsq(sums.T, classes.T, driver="gelsd" if sums.device.type == "cpu" else None).solution
    labels: Tensor = shares.argmax(1)
    return labels
