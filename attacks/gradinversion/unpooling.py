"""One image through ReLU and max pooling, from the head back towards the pixels.

The fully connected layer gives its input away exactly, and the broadcast weights then tell how strongly every pooling
window was pushed. What is missing is which position of a window was the largest. `pooled_layer` finds that together
with the input of the convolution, exact to rounding, starting from the vague image that the features alone suggest.
Layer by layer this goes on for as long as a weight gradient has more rows than its input has pixels. A feature
inversion from the deepest exact map ends it: ten thousand exact numbers about a thousand pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from .analytic import dense_input, refuse_mixtures
from .batch_statistics import Moments, moments_of
from .blocks import Block, find_blocks
from .bn_prior import reference_of
from .candidate import Candidate, NotApplicable
from .certificate import estimate_from_replay
from .clock import Clock
from .feature_inversion import Function, invert, spread_of
from .features import Features, feature_function, recover_features
from .observation import Observation
from .pooled_layer import PooledLayer
from .settings import BatchStatistics

if TYPE_CHECKING:
    from .attempt import Attempt

EXACT = 1e-2
"""Largest relative mismatch of the forward pass, which no solve has used, at which a layer counts as solved."""
MAX_PIXELS = 1_600
"""Pixels a channel of the largest map that is solved for: 20 MB and some 0.3 s a round."""
ENOUGH = 2
"""Live features a pixel from which no further pooled layer is solved: the image follows from them."""
VAGUE, CLOSER, FINE = (0.3,), (0.1, 0.03), (0.01, 1e-3)
"""Widenings of the feature inversion: at first, where that was too vague, and in the end from an exact map."""
PUBLIC_IMAGES = 16
"""From which the spread of the moments is taken."""
COMPONENTS = 160
"""Of the Jacobian that conditions the last descent."""
MARGIN = 2.0
"""An entry of a rectified map below this many times the largest negative one is taken for zero."""


@dataclass(frozen=True)
class Depth:
    """How far down the features of the image are known."""

    weight: str
    """The layer whose input they are."""
    value: Tensor
    """That input, flat, float64."""
    checks: Mapping[str, float]
    """Solved layer -> mismatch of its forward pass."""
    stopped: str
    """Why it went no further."""
    certain: Tensor | None = None
    """Which entries are known, the shape of `value`; None: all."""


Guess = Callable[[str, Tensor, str, bool], Tensor]
"""(layer, its flat input, wanted layer, once more?) -> what an image with that input sends into the wanted layer."""


def descend(
    blocks: list[Block],
    head: tuple[str, str],
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    std: Tensor,
    guess: Guess,
    pixels: int,
) -> Depth:
    """Know the features deeper and deeper, all in float64.

    Args:
        blocks: from `find_blocks`.
        head: names of the fully connected layer's weight and bias.
        parameters: the broadcast parameters by name.
        gradients: the observed gradients by name.
        std: error of each entry of the head's weight gradient.
        guess: where the search in a pooled layer starts.
        pixels: of the image, times its channels.
    """
    weight, bias = head
    value = dense_input(gradients[weight].double(), gradients[bias].double(), std)
    error = parameters[weight].double().T @ gradients[bias].double()
    checks: dict[str, float] = {}
    for number, block in enumerate(blocks):
        below = blocks[number + 1].activation.low if number + 1 < len(blocks) else -float("inf")
        if block.pooled and _enough(value, pixels):
            return Depth(weight, value, checks, f"its {len(value):,} numbers determine {pixels:,} pixels")
        try:
            layer = _layer(block, parameters, gradients, value, error, below)
        except NotApplicable as reason:
            return Depth(weight, value, checks, str(reason))
        g = block.geometry
        for more in (False, True) if block.pooled else (False,):
            start = value.new_zeros(g.input[0], g.pixels)
            if block.pooled:
                start = guess(weight, value, block.weight, more).double().view_as(start)
            found, certain = layer.solve(start)
            mismatch = layer.mismatch(found)
            if mismatch <= EXACT:
                break
        else:
            return Depth(weight, value, checks, f"the input of {block.weight} was not found: mismatch {mismatch:.1e}")
        back = value.new_zeros(g.output[0], g.positions).scatter_add_(1, layer.largest(found), layer.delta)
        kernel = parameters[block.weight].double()
        shape = (1, *g.input)
        error = conv2d_input(shape, kernel, back.view(1, *g.output), g.stride, g.padding, g.dilation).reshape(-1)
        weight, value = block.weight, found.reshape(-1)
        checks[weight] = mismatch
        if not bool(certain.all()):
            missing = f"no gradient touches {int((~certain).sum())} of its {g.pixels} pixels"
            return Depth(weight, value, checks, missing, certain.repeat(g.input[0]))
    return Depth(weight, value, checks, "")


def _enough(value: Tensor, pixels: int) -> bool:
    return int((value > 0).sum()) >= ENOUGH * pixels


def _layer(
    block: Block,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    value: Tensor,
    error: Tensor,
    low: float,
) -> PooledLayer:
    g, activation = block.geometry, block.activation
    kernel = parameters[block.weight].double().flatten(2)
    rows = g.output[0] * kernel.shape[2]
    if block.first or rows <= g.pixels or g.pixels > MAX_PIXELS:
        raise NotApplicable(f"{block.weight}: {rows} rows of gradient for {g.pixels} pixels a channel")
    h = value.view(g.output[0], -1)
    if activation.low == 0:  # rectified: rounding has left something of the zeros
        h = torch.where(h > MARGIN * h.min().clamp(max=0).abs(), h, 0.0)
    h = h.clamp(activation.low, activation.high)
    gain = torch.as_tensor(block.gain, dtype=h.dtype, device=h.device).expand(g.output[0], 1)
    shift = torch.as_tensor(block.shift, dtype=h.dtype, device=h.device).expand(g.output[0], 1)
    if block.bias is not None:
        shift = shift + gain * parameters[block.bias].double()[:, None]
    delta = error.view_as(h) * activation.slope(h) * gain
    if not bool((delta != 0).any()):
        raise NotApplicable(f"{block.weight}: no gradient passes it")
    return PooledLayer(
        geometry=g,
        weight=kernel,
        gain=gain,
        shift=shift,
        windows=block.windows,
        weight_gradient=gradients[block.weight].double().flatten(2),
        delta=delta,
        pooled=activation.preactivation(h),
        low=low,
    )


@dataclass
class Search:
    """The attack on one observation, while it runs: which image do we have at each depth?"""

    observation: Observation
    blocks: list[Block]
    head: tuple[str, str]
    clock: Clock
    images: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> an image whose input to that layer fits."""

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """All broadcast values by name."""
        return dict(self.observation.simulation.model.named_parameters())

    def depth(self, gradients: Mapping[str, Tensor], guess: Guess) -> Depth:
        """How far down these gradients let us see."""
        std, pixels = self.observation.stds[self.head[0]], self.observation.prior.mean.numel()
        return descend(self.blocks, self.head, self.parameters, gradients, std, guess, pixels)

    def input_of(self, weight: str) -> Function:
        """Images -> what they send into a layer."""
        return feature_function(self.observation.simulation.model, weight)

    def fit(self, weight: str, value: Tensor, widenings: tuple[float, ...], certain: Tensor | None = None) -> Tensor:
        """An image with this input to a layer, from the last one; `certain`: which entries are known."""
        prior, function = self.observation.prior, self.input_of(weight)
        start = next(reversed(self.images.values()), prior.mean[None])
        kept = slice(None) if certain is None else certain
        found = invert(
            lambda images: function(images)[:, kept],
            value.to(start)[None, kept],
            prior,
            start,
            self.clock,
            widenings=widenings,
            error=float(self.features.std.pow(2).mean().sqrt()) if weight == self.head[0] else 0.0,
            components=COMPONENTS if widenings is FINE else 0,
        )
        self.images[weight] = found
        return found

    @cached_property
    def features(self) -> Features:
        """The head's input."""
        return recover_features(self.observation, *self.head)

    def guess(self, weight: str, value: Tensor, wanted: str, more: bool) -> Tensor:
        """What an image that fits one layer sends into another."""
        if more or weight not in self.images:
            self.fit(weight, value, CLOSER if more else VAGUE)
        return self.input_of(wanted)(self.images[weight])[0].detach()


def unpooling(
    observation: Observation,
    blocks: list[Block],
    head: tuple[str, str],
    labels: Tensor,
    clock: Clock,
    moments: Mapping[str, Moments] | None = None,
) -> list[Candidate]:
    """Reconstruct one image from the deepest map that is known exactly: the head's input, or one below pooling.

    Args:
        observation: g and φ; B = 1.
        blocks: from `find_blocks`.
        head: names of the fully connected layer's weight and bias.
        labels: (1,) or (1, L).
        clock: CPU budget.
        moments: exact ones of BatchNorm's inputs, where the client computed in train mode.

    Raises:
        NotApplicable: more than one image, or declared noise.
    """
    refuse_mixtures(observation)
    search = Search(observation, blocks, head, clock)
    if moments:
        return [_from_moments(search, moments, labels)]
    search.fit(head[0], search.features.value, VAGUE)
    depth = search.depth(observation.gradients, search.guess)
    if not depth.checks and not _enough(depth.value, observation.prior.mean.numel()):
        images = search.fit(head[0], search.features.value, CLOSER)
        return [Candidate(images.clamp(0, 1), labels, "feature_inversion", notes=(depth.stopped,))]
    search.fit(depth.weight, depth.value, VAGUE, depth.certain)
    starts, began = dict(search.images), clock.used
    notes = (f"exact down to the input of {depth.weight}; {depth.stopped}",)
    images = search.fit(depth.weight, depth.value, FINE, depth.certain).clamp(0, 1)
    method = "unpooling" if depth.checks else "feature_inversion"
    result = Candidate(images, labels, method, layers_ok=clock.left > 0, notes=notes)
    if clock.left < 2 * (clock.used - began):
        return [result]

    def again(gradients: Mapping[str, Tensor]) -> Tensor:
        """Everything but the vague images, from which both runs start."""
        repeated = search.depth(gradients, lambda w, _, wanted, __: search.input_of(wanted)(starts[w])[0])
        search.images = dict(starts)
        return search.fit(repeated.weight, repeated.value, FINE, repeated.certain).clamp(0, 1)

    return [estimate_from_replay(result, observation, again)]


def _moments(observation: Observation, wanted: BatchStatistics) -> dict[str, Moments]:
    """The exact moments of BatchNorm's inputs, where they can be inferred and were wanted."""
    statistics = observation.statistics
    if statistics is None or statistics.strongest(wanted) != "inferred" or statistics.refusal("inferred") is not None:
        return {}
    return reference_of(observation, "inferred")


def _from_moments(search: Search, moments: Mapping[str, Moments], labels: Tensor) -> Candidate:
    """The head's input and each layer's moments are features alike, in units of their public spread.

    A client in train mode gives no map away below its head, because there δ depends on all positions; but its
    moments are some thousand further exact numbers about the one image.
    """
    model, prior, known = search.observation.simulation.model, search.observation.prior, search.features
    function, names = search.input_of(search.head[0]), tuple(moments)

    def flat(found: Mapping[str, Moments]) -> Tensor:
        return torch.cat([torch.cat([found[n].mean, (found[n].variance + 1e-12).sqrt()]) for n in names])

    with torch.no_grad():
        unit = max(spread_of(function, prior), 1e-30)
        public = torch.stack([flat(moments_of(model, names, image[None])) for image in prior.images[:PUBLIC_IMAGES]])
        units = public.std(0, correction=0).clamp(min=1e-3 * float(public.std()) + 1e-12)

    def both(images: Tensor) -> Tensor:
        return torch.cat([function(images) / unit, (flat(moments_of(model, names, images)) / units)[None]], 1)

    target = torch.cat([known.value / unit, flat(moments) / units])[None]
    images, clock = prior.mean[None], search.clock
    images = invert(both, target, prior, images, clock, widenings=VAGUE)
    images = invert(both, target, prior, images, clock, widenings=CLOSER, components=COMPONENTS)
    notes = (f"{known.value.numel():,} features and {2 * sum(len(m.mean) for m in moments.values()):,} moments",)
    return Candidate(images.clamp(0, 1), labels, "feature_inversion", notes=notes)


def stage(run: Attempt) -> None:
    """One image without noise, activations with kinks, a fully connected layer at the end."""
    observation = run.observation
    if run.auto and (run.solved or not run.kinked or run.noisy):
        return
    if run.features is None:
        run.skipped["unpooling"] = "the input of the fully connected layer is not known: that takes one image, no noise"
        return
    chain = run.chain()
    blocks, stopped = find_blocks(run.recorded, chain.weight, observation.complete)
    head = (chain.weight, chain.bias)
    moments = _moments(observation, run.settings.bn)
    run.attempt("unpooling", lambda y, c: unpooling(observation, blocks, head, y, c, moments))
    if not any(c.method == "unpooling" for c in run.candidates):
        run.skipped.setdefault("unpooling", stopped)
