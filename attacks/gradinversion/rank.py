"""How many of an image's numbers does an upload determine? Two indices, both our own definitions.

`rank_index_structural` counts equations, for one image and without noise: for every layer those that its gradient
(R-GAP's rank analysis: Zhu and Blaschko 2021, 2010.07733, "plain", without virtual constraints) and its known outputs
give for its input. It reacts to the architecture alone. `rank_index_noise` counts the directions that a noisy upload
tells more about than public images do. It reacts to noise, masks and coarse numbers.

Neither is the "RA-I" that some papers mention, for which no formula could be found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedsec.models.loss import task_loss

from .candidate import NotApplicable
from .chain import geometry_of
from .conv_solve import Geometry, gradient_matrix
from .simulation import Simulation
from .trace import Call

MAX_PIXELS = 2048
"""Pixels of a channel up to which ranks are computed and rows not merely counted: 10 CPU seconds."""
MAX_ENTRIES = 20_000_000
"""Unknowns that the gradient rows leave, times known outputs, up to which the same is done."""
DETERMINED = 1e-12
"""Eigenvalues of a Gram matrix above this share of its size count as its rank."""


@dataclass(frozen=True)
class LayerRank:
    """The equations for one layer's input."""

    layer: str
    rank: int
    unknowns: int
    counted: bool = False
    """Too large: an upper limit from counting rows."""

    @property
    def index(self) -> float:
        """Rank as a share of the unknowns: 1 where they are determined."""
        return self.rank / self.unknowns

    def __str__(self) -> str:
        how = "at most " if self.counted else ""
        return f"{self.layer} has {how}{self.rank:,} independent equations for {self.unknowns:,} unknowns"


def rank_index_structural(ranks: list[LayerRank]) -> float:
    """The smallest share of any layer: 1 for a network whose every layer's input is determined. Our definition."""
    return min(r.index for r in ranks)


def rank_index_noise(information: Tensor, unknowns: int) -> float:
    """Share of an image's directions that the upload tells more about than the prior. Our definition.

    Args:
        information: eigenvalues of C^½JᵀWJC^½ at the true images, as `bound.Bound` has them.
        unknowns: B·d, the number of pixels.
    """
    return int((information > 1).sum()) / unknowns


def layer_ranks(simulation: Simulation, image: Tensor, label: Tensor) -> list[LayerRank]:
    """The equations that one image's upload gives for the input of each convolution and fully connected layer.

    Outputs without any influence on the loss (behind a closed ReLU, not the largest in a pool) are not known.

    Args:
        simulation: the client; its weights count, its defense does not.
        image: (1, C, H, W). label: (1,) or (1, L).

    Raises:
        NotApplicable: a layer that this analysis does not cover, by name.
    """
    recorder = _Recorder()
    model = simulation.double.model
    with torch.enable_grad(), recorder:
        out = model(image.double())
        loss = task_loss(simulation.task)(out, label if label.ndim == 1 else label.double())
    slopes = torch.autograd.grad(loss, [p for _, p in recorder.layers], allow_unused=True, materialize_grads=True)
    names = {id(p): name for name, p in model.named_parameters()}
    best: dict[int, LayerRank] = {}
    for (call, _), slope in zip(recorder.layers, slopes, strict=True):
        name = names.get(id(call.argument(1, "weight")), call.name).removesuffix(".weight")
        found = (_conv if call.name == "conv2d" else _linear)(name, call, slope[0])
        # Layers that read the same input, such as both branches of a residual block: the better informed one counts.
        rival = best.get(id(call.args[0]), found)
        best[id(call.args[0])] = max(found, rival, key=lambda r: r.index)
    return list(best.values())


class _Recorder(TorchFunctionMode):
    """Notes every convolution and fully connected layer, and adds a zero to its output that a gradient can flow to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[Call, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in ("conv2d", "linear") or not isinstance(out, Tensor):
            return out
        zero = torch.zeros_like(out).requires_grad_(True)
        self.layers.append((Call(name, args, kwargs or {}, args[0], out), zero))
        return out + zero


def _linear(name: str, call: Call, slope: Tensor) -> LayerRank:
    """One neuron with influence suffices: its gradient is the input times a number that the bias gives."""
    weight: Tensor = call.argument(1, "weight")
    unknowns = weight.shape[1]
    return LayerRank(name, unknowns if bool((slope != 0).any()) else 0, unknowns)


def _conv(name: str, call: Call, slope: Tensor) -> LayerRank:
    weight: Tensor = call.argument(1, "weight")
    if call.argument(6, "groups", 1) != 1:
        raise NotApplicable(f"{name}: grouped convolutions are not analysed")
    return conv_rank(name, weight.detach().flatten(2), slope.flatten(1), geometry_of(call, name))


def conv_rank(name: str, weight: Tensor, slope: Tensor, geometry: Geometry) -> LayerRank:
    """Rank of a convolution's gradient rows and forward rows together; what lies in the padding is known.

    The gradient rows are the same for every input channel, so that forward rows matter in their null space alone.

    Args:
        name: of the layer. weight: (O, I, k²). slope: δ, (O, n′); 0 marks an output that is not known.
        geometry: the shapes.
    """
    channels, n = geometry.input[0], geometry.pixels
    known = slope.reshape(-1) != 0
    total = channels * n
    if n > MAX_PIXELS:
        gradient_rows = min(slope.shape[0] * weight.shape[2], n)
        return LayerRank(name, min(total, channels * gradient_rows + int(known.sum())), total, counted=True)
    matrix = gradient_matrix(slope, geometry)
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    found = _rank(values, float(values[-1]))
    left = channels * (n - found)
    if left == 0:
        return LayerRank(name, total, total)
    if left * int(known.sum()) > MAX_ENTRIES:
        return LayerRank(name, min(total, channels * found + int(known.sum())), total, counted=True)
    null = vectors[:, : n - found].T.reshape(-1, 1, *geometry.input[1:])
    kernels = weight.view(*weight.shape[:2], *geometry.kernel)
    shape = geometry.stride, geometry.padding, geometry.dilation
    outputs = [F.conv2d(null, kernels[:, i : i + 1], None, *shape).flatten(1)[:, known] for i in range(channels)]
    inside = torch.cat(outputs)
    # Against the size of a whole forward row: what is left of it may be rounding alone.
    size = float(weight.square().sum((1, 2)).max())
    return LayerRank(name, channels * found + _rank(torch.linalg.eigvalsh(inside @ inside.T), size), total)


def _rank(values: Tensor, size: float) -> int:
    """From the eigenvalues of a Gram matrix whose entries are of this size."""
    return int((values > max(size, 1e-300) * DETERMINED).sum())
