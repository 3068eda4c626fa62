"""One image through a chain of convolutions, in closed form, from the head back to the pixels.

The gradient of a fully connected layer gives that layer's input exactly; undoing the activation and solving one
linear least-squares problem a convolution (`conv_solve`) walks back to the image. Every layer is checked by its bias
gradient, which stays out of the solve. Runs in float64. Invariant to any scale of the gradient, hence to clipping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.grad import conv2d_input

from .analytic import dense_input, refuse_mixtures
from .candidate import Candidate, NotApplicable
from .certificate import TOLERANCE, estimate_from_replay, tolerance
from .chain import Chain
from .conv_solve import Rows, constraints, solve_input
from .observation import Observation

if TYPE_CHECKING:
    from .attempt import Attempt


@dataclass(frozen=True)
class Walk:
    """What a cascade found."""

    image: Tensor | None
    """(C, H, W) pixels, not clamped; None where the chain is broken before the image."""
    features: Tensor
    """Input of the fully connected layer, flat: exact for one image."""
    checks: Mapping[str, float] = field(default_factory=dict)
    """Layer -> relative error of its bias gradient."""
    undetermined: tuple[str, ...] = ()
    """Layers with fewer constraints than unknowns, in words."""

    def passes(self, limit: float = TOLERANCE) -> bool:
        """Every layer is determined, and its check is within the limit."""
        return not self.undetermined and all(error <= limit for error in self.checks.values())


def walk(
    chain: Chain,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    std: Tensor,
    rows: Rows = "both",
    gamma: float = 0.5,
) -> Walk:
    """Walk from the fully connected layer back to the image.

    Args:
        chain: from `find_chain`.
        parameters: the broadcast parameters by name.
        gradients: the observed gradients by name.
        std: error of each entry of the fully connected layer's weight gradient.
        rows: which rows each solve uses; anything but "both" is for ablation.
        gamma: forward rows are weighted by σ′^γ/(1+|z|).
    """
    t = gradients[chain.bias].double()
    hidden = dense_input(gradients[chain.weight].double(), t, std)
    features = hidden
    if chain.broken_at is not None:
        return Walk(None, features)
    error = parameters[chain.weight].double().T @ t
    checks: dict[str, float] = {}
    short: list[str] = []
    for number, layer in reversed(list(enumerate(chain.layers, start=1))):
        g = layer.geometry
        kernel = parameters[layer.weight].double()
        weight = kernel.flatten(2)
        h = hidden.view(g.output[0], -1).clamp(layer.activation.low, layer.activation.high)
        slope, known = layer.activation.slope(h), layer.activation.invertible(h)
        delta = error.view_as(h) * slope * layer.gain
        counted, unknowns = constraints(g, int(known.sum()), rows)
        if counted < unknowns:
            short.append(f"layer {number}: {counted} of {unknowns} constraints")
        z = (layer.activation.preactivation(h) - layer.shift) / layer.gain
        offset: Tensor | float = 0.0
        if layer.bias is not None:
            da = gradients[layer.bias].double()
            checks[layer.weight] = float((delta.sum(1) - da).norm() / da.norm().clamp(min=1e-300))
            offset = parameters[layer.bias].double()[:, None]
        row_weights = known * slope.abs() ** gamma / (1 + z.abs())
        row_weights = row_weights / row_weights.max().clamp(min=1e-300)
        dw = gradients[layer.weight].double().flatten(2)
        hidden = solve_input(weight, dw, delta, z - offset, row_weights, g, rows)
        if number > 1:
            shape = (1, *g.input)
            back = delta.view(1, *g.output)
            error = conv2d_input(shape, kernel, back, g.stride, g.padding, g.dilation).reshape(-1)
    image = (hidden.reshape(chain.pixel_gain.shape) - chain.pixel_shift) / chain.pixel_gain
    return Walk(image, features, checks, tuple(short))


def cascade(observation: Observation, chain: Chain, labels: Tensor) -> list[Candidate]:
    """Reconstruct one image in front of a chain of convolutions.

    Raises:
        NotApplicable: more than one image, declared noise, or an operation that cannot be undone (named).
    """
    refuse_mixtures(observation, weight=chain.weight)
    if chain.broken_at is not None:
        raise NotApplicable(chain.broken_at)
    if not chain.layers:
        raise NotApplicable("the first layer is fully connected: see analytic")
    limit = tolerance(observation)

    def solve(parts: Mapping[str, Tensor]) -> Walk:
        return walk(chain, observation.simulation.params, parts, observation.stds[chain.weight])

    def image_of(found: Walk) -> Tensor:
        assert found.image is not None
        return found.image.nan_to_num(0.5).clamp(0, 1).to(observation.gradient)[None]

    found = solve(observation.gradients)
    worst = max(found.checks.values(), default=0.0)
    notes = (*found.undetermined, *([f"largest layer error {worst:.1e}"] if worst > limit else []))
    candidate = Candidate(image_of(found), labels, "cascade", layers_ok=found.passes(limit), notes=notes)
    if not candidate.layers_ok:
        return [candidate]
    return [estimate_from_replay(candidate, observation, lambda parts: image_of(solve(parts)))]


def stage(run: Attempt) -> None:
    """One image, convolutions with invertible activations."""
    run.attempt("cascade", lambda y, _: cascade(run.observation, run.chain(), y))
