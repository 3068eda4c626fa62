"""HEMF: local and global pyramids whose stages are fused, for lesions and organs of very different sizes."""

from __future__ import annotations

from torch import Tensor, nn

from fedsec.errors import ConfigError
from fedsec.models.base import Backbone, InputSize, Norm, check_size
from fedsec.models.hemf_fusion import Fusion
from fedsec.models.hemf_pyramid import EGF, ELF, EPS, Pyramid, start

SMALLEST = 64
STRIDE = 32
WIDTHS = (96, 192, 384, 768)
TINY_WIDTHS = (16, 32, 64, 128)


class HEMF(Backbone):
    """Hierarchical fusion of a convolutional and an attention pyramid.

    Source: He et al. 2025, "HEMF: an adaptive hierarchical enhanced multi-attention feature fusion framework for
    cross-scale medical image classification", PeerJ Computer Science 11:e3181.

    Args:
        local, layers: ELF blocks and attention layers of each stage.
        prune_unused: leave out the 1.6M parameters that no image reaches. They are otherwise kept without gradient,
            as in the released model, and neither trained nor sent.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        in_channels: int,
        image_size: int,
        norm: Norm,
        widths: tuple[int, ...],
        local: int,
        layers: int,
        prune_unused: bool,
    ) -> None:
        super().__init__()
        check_size(name, image_size, SMALLEST)
        if image_size % STRIDE:
            near = round(image_size / STRIDE) * STRIDE
            raise ConfigError(
                f"{name}: the side must be a multiple of {STRIDE}, not {image_size}; use data.size={near}"
            )
        self.input = InputSize(in_channels, SMALLEST)
        self.embed_dim = widths[-1]
        self.local = Pyramid(in_channels, widths, [nn.Sequential(*(ELF(d) for _ in range(local))) for d in widths])
        self.other = Pyramid(in_channels, widths, [EGF(d, layers) for d in widths])
        self.fusion = nn.ModuleList(Fusion(d, i == 0, norm, prune_unused) for i, d in enumerate(widths))
        self.norm = nn.LayerNorm(widths[-1], eps=EPS)
        self.fc = nn.Linear(widths[-1], num_classes)
        start(self.fc)

    def embed(self, x: Tensor) -> Tensor:
        """Globally averaged output of the last fusion block, normalised."""
        fused: Tensor | None = None
        for block, local, other in zip(self.fusion, self.local(x), self.other(x), strict=True):
            fused = block(local, other, fused)
        assert fused is not None
        return self.norm(fused.mean((2, 3)))  # type: ignore[no-any-return]

    def head(self, features: Tensor) -> Tensor:
        """The linear layer."""
        return self.fc(features)  # type: ignore[no-any-return]


def hemf(num_classes: int, in_channels: int, image_size: int, norm: Norm = "group", prune_unused: bool = False) -> HEMF:
    """HEMF (68M parameters): fused local and global features; sides of 64 and more, in steps of 32.

    Source: He et al. 2025, PeerJ Computer Science 11:e3181.
    """
    return HEMF("hemf", num_classes, in_channels, image_size, norm, WIDTHS, 4, 3, prune_unused)


def hemf_tiny(
    num_classes: int, in_channels: int, image_size: int, norm: Norm = "group", prune_unused: bool = False
) -> HEMF:
    """HEMF with a sixth of its widths and one block a stage (1.0M parameters), for small studies.

    Source: as `hemf`; this size is ours.
    """
    return HEMF("hemf_tiny", num_classes, in_channels, image_size, norm, TINY_WIDTHS, 1, 1, prune_unused)
