"""A fully connected layer with bias and ReLU whose gradient is a sum of outer products, one an image.

dW = Σ_i δ_i·x_iᵀ and da = Σ_i δ_i, where x_i is what image i puts into the layer and δ_i (m,) its share of the loss's
derivative by the layer's output. The layers above are known and treat every image alone, so x_i and a label give δ_i:
that is the test with which `peel` and `spear` prove an image without the truth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .candidate import NotApplicable
from .chain import find_chain
from .observation import Observation
from .trace import Call, Trace

EPS = 1.2e-7
"""Spacing of float32 at 1: the absolute error of a client's probabilities."""
MAX_LABELS = 6
"""Labels of a multi-label task up to which all 2^L combinations are tried."""
UNDECLARED = 2.0
"""Energy beyond rank B, as a multiple of what is declared, above which there is noise that nobody declared."""


@dataclass(frozen=True)
class ReluLayer:
    """One such layer behind one observation, in float64."""

    dw: Tensor
    """D (m, d)."""
    da: Tensor
    """β (m,)."""
    dw_error: Tensor
    """u (m,) expected norm of the error of each row of D."""
    da_error: Tensor
    """v (m,) standard deviation of the error of β."""
    weight: Tensor
    """W (m, d)."""
    bias: Tensor
    """a (m,)."""
    upper: Callable[[Tensor], Tensor]
    """Outputs (K, m) of the layer before its ReLU -> logits (K, C)."""
    targets: Tensor
    """(T, C) what the loss can compare the probabilities with: one-hot classes, or combinations of labels."""
    multilabel: bool
    share: float
    """Weight of one image in the gradient: 1/B for a mean."""
    batch: int
    box: tuple[Tensor, Tensor] | None
    """(d,) least and greatest inputs; None where they are features without known bounds."""
    gain: Tensor
    """(d,) d input / d pixel; 1 where the inputs are features."""
    shift: Tensor
    """(d,) input of a black image."""
    name: str
    """Of the weight."""
    undeclared: float = 0.0
    """Standard deviation per entry of noise that nobody declared."""

    @cached_property
    def both(self) -> Tensor:
        """(m, d + 1) D with β as its last column."""
        return torch.cat([self.dw, self.da[:, None]], 1)

    @property
    def pixels(self) -> bool:
        """The inputs are the image's own pixels."""
        return self.box is not None

    def preactivation(self, x: Tensor) -> Tensor:
        """z (K, m) of inputs x (K, d)."""
        return torch.addmm(self.bias, x, self.weight.T)

    def slopes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities p (K, C) at inputs x (K, d), and J (K, C, m): the derivative of each logit by z, over B."""
        with torch.enable_grad():
            z = self.preactivation(x.detach()).requires_grad_(True)
            logits = self.upper(z)
            rows = [torch.autograd.grad(u.sum(), z, retain_graph=True)[0] for u in logits.unbind(1)]
        p = logits.detach().sigmoid() if self.multilabel else logits.detach().softmax(1)
        return p, torch.stack(rows, 1) * self.share

    def columns(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """δ (K, m) of inputs x (K, d) with the targets `which` (K,), and how far a client's float32 may be off it.

        A probability close to 1 loses all but its absolute precision when 1 is taken from it, which changes the whole
        column of an image of which the model is sure.
        """
        if not len(x):
            return (self.dw.new_zeros(0, len(self.da)),) * 2
        p, slopes = self.slopes(x)
        target = self.targets[which]
        column = torch.einsum("kc,kcm->km", p - target, slopes)
        return column, EPS * torch.einsum("kc,kcm->km", target, slopes)

    def labels(self, which: Tensor) -> Tensor:
        """Targets `which` (K,) as classes (K,), or as labels (K, L)."""
        rows = self.targets[which]
        return rows.float() if self.multilabel else rows.argmax(1)

    def to_pixels(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Inputs (K, d) as images (K, C, H, W), not clamped."""
        return ((x - self.shift) / self.gain).view(-1, *shape)

    def decibel(self, relative_error: Tensor, x: Tensor) -> Tensor:
        """PSNR (K,) of inputs (K, d) with these relative errors; of features, with their greatest value as the peak."""
        error = relative_error * (x / self.gain).norm(dim=1) / math.sqrt(x.shape[1])
        peak = 1.0 if self.pixels else float(x.abs().amax()) if len(x) else 1.0
        return -20 * torch.log10((error / peak).clamp(min=1e-7))


def find_relu_layer(observation: Observation, recorded: Trace) -> ReluLayer:
    """The fully connected layer with ReLU nearest to the image.

    Raises:
        NotApplicable: there is none with bias whose gradient is observed, or its gradient is not such a sum.
    """
    simulation = observation.simulation
    _refuse(observation, recorded)
    call = _nearest(recorded, observation.complete)
    names = recorded.name_of(call.args[1]), recorded.name_of(call.argument(2, "bias"))
    assert names[0] is not None and names[1] is not None
    weight, bias = simulation.params[names[0]].double(), simulation.params[names[1]].double()
    box, gain, shift = _pixels(observation, recorded, names[0], weight)
    divisor = observation.batch if simulation.divisor is None else simulation.clients
    layer = ReluLayer(
        dw=observation.gradients[names[0]].double(),
        da=observation.gradients[names[1]].double(),
        dw_error=observation.stds[names[0]].double().norm(dim=1),
        da_error=_bias_error(observation, names[1]),
        weight=weight,
        bias=bias,
        upper=_upper(simulation.double.model, names[0], observation.prior.mean[None].double()),
        targets=_targets(observation, recorded),
        multilabel=simulation.task == "multilabel",
        share=(1 / divisor) / (_classes(recorded) if simulation.task == "multilabel" else 1),
        batch=observation.batch,
        box=box,
        gain=gain,
        shift=shift,
        name=names[0],
    )
    return _with_undeclared_noise(layer)


def _refuse(observation: Observation, recorded: Trace) -> None:
    simulation = observation.simulation
    if any(c.name == "batch_norm" and c.argument(5, "training", False) for c in recorded.calls):
        raise NotApplicable("BatchNorm in train mode mixes the images above the layer")
    if simulation.sample_clip is not None:
        raise NotApplicable("each image's gradient was clipped by an unknown factor")
    clip = simulation.update_clip
    if clip is not None and float(observation.gradient.norm(clip.order)) > 0.999 * clip.norm:
        raise NotApplicable("the update was clipped by an unknown factor")
    if simulation.norm is not None or simulation.stop is not None:
        raise NotApplicable("what comes back to the layer cannot be simulated: a draw or an unknown scale is behind it")


def _nearest(recorded: Trace, observed: frozenset[str]) -> Call:
    """The first linear call with observed weight and bias whose output goes into a ReLU and nowhere else."""
    reasons = []
    for i in recorded.find("linear"):
        reason = _why_not(recorded, i, observed)
        if reason is None:
            return recorded.calls[i]
        reasons.append(reason)
    raise NotApplicable(reasons[0] if reasons else "no fully connected layer")


def _why_not(recorded: Trace, position: int, observed: frozenset[str]) -> str | None:
    call = recorded.calls[position]
    users = [c for c in recorded.calls[position + 1 :] if _takes(c, call.output)]
    names = {recorded.name_of(call.args[1]) or "", recorded.name_of(call.argument(2, "bias")) or ""}
    if "" in names:
        return "the fully connected layer has no bias"
    if not names <= observed:
        return "the gradient of the fully connected layer is not observed"
    if call.args[0].ndim != 2:
        return "the fully connected layer is applied at several positions of one image"
    if not users or users[0].name not in ("relu", "relu_"):
        return f"{users[0].name if users else 'nothing'} follows the fully connected layer, not relu"
    # A ReLU in place leaves nothing behind that could be used without it.
    if len(users) > 1 and users[0].output is not call.output:
        return "the output of the fully connected layer takes a second way past its relu"
    return None


def _takes(call: Call, tensor: Any) -> bool:
    return any(a is tensor for a in (*call.args, *call.kwargs.values()))


def _pixels(
    observation: Observation, recorded: Trace, name: str, weight: Tensor
) -> tuple[tuple[Tensor, Tensor] | None, Tensor, Tensor]:
    """Box, gain and shift of the layer's inputs: those of the pixels where it stands on them."""
    features = None, torch.ones_like(weight[0]), torch.zeros_like(weight[0])
    try:
        chain = find_chain(recorded, observation.complete)
    except NotApplicable:
        return features
    if chain.weight != name or chain.layers or chain.broken_at is not None:
        return features
    gain, shift = chain.pixel_gain.reshape(-1), chain.pixel_shift.reshape(-1)
    edges = torch.stack([shift, shift + gain])
    return (edges.amin(0), edges.amax(0)), gain, shift


def _bias_error(observation: Observation, name: str) -> Tensor:
    """The observation spreads the rounding of a bias gradient over all its entries; here each entry has its own."""
    da = observation.gradients[name].double()
    spread = (2e-7 * da.pow(2).mean().sqrt()) ** 2
    stored = (observation.stds[name].double() ** 2 - spread).clamp(min=0)
    error: Tensor = (stored + (2e-7 * da) ** 2 + (1e-12 * da.norm()) ** 2).sqrt()
    return error


def _classes(recorded: Trace) -> int:
    return int(recorded.calls[-1].output.shape[1])


def _targets(observation: Observation, recorded: Trace) -> Tensor:
    classes = _classes(recorded)
    like = observation.prior.mean.double()
    told = observation.labels
    if observation.simulation.task != "multilabel":
        rows = torch.eye(classes).to(like)
        return rows if told is None else rows[told.unique()]
    if told is not None:
        combinations: Tensor = told.to(like).unique(dim=0)
        return combinations
    if classes > MAX_LABELS:
        raise NotApplicable(f"{classes} labels an image have 2^{classes} combinations; {MAX_LABELS} labels are tried")
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=classes))).to(like)


class _Replace(TorchFunctionMode):
    """Puts given values in the place of one linear layer's output."""

    def __init__(self, weight: Tensor, value: Tensor) -> None:
        super().__init__()
        self.weight, self.value = weight, value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "linear" and args[1] is self.weight:
            return self.value
        return func(*args, **(kwargs or {}))


def _upper(model: nn.Module, name: str, image: Tensor) -> Callable[[Tensor], Tensor]:
    weight = dict(model.named_parameters())[name]

    def function(z: Tensor) -> Tensor:
        # The image only feeds the layers below, whose result is thrown away; the clone survives an in-place ReLU.
        with _Replace(weight, z.clone()):
            logits: Tensor = model(image)
        return logits

    return function


def _with_undeclared_noise(layer: ReluLayer) -> ReluLayer:
    """Widen the errors by noise that nobody declared: D has rank B without it, so the rest of its energy is noise."""
    rows, columns = layer.dw.shape
    free = (rows - layer.batch) * (columns - layer.batch) / (rows * columns)
    if rows <= layer.batch or columns <= layer.batch:
        return layer
    energy = torch.linalg.eigvalsh(layer.dw @ layer.dw.T if rows <= columns else layer.dw.T @ layer.dw)
    beyond = float(energy[: -layer.batch].clamp(min=0).sum()) / free
    declared = float((layer.dw_error**2).sum()) + 1e-14 * float(energy.sum())
    if beyond <= UNDECLARED**2 * declared:
        return layer
    variance = (beyond - declared) / (rows * columns)
    return replace(
        layer,
        dw_error=(layer.dw_error**2 + columns * variance).sqrt(),
        da_error=(layer.da_error**2 + variance).sqrt(),
        undeclared=math.sqrt(variance),
    )
