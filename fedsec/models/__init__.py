"""Which architectures there are, and how one is built: `fedsec.models.build(name, num_classes=, in_channels=, ...)`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedsec import plugins
from fedsec.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from fedsec.models.base import Norm, Normalised


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    norm: Norm = "group",
    seed: int = 0,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    **options: Any,
) -> Normalised:
    """Build an architecture with freshly initialised weights, wrapped so that it takes images in [0, 1].

    Args:
        name: a registered model, ours or a third party's (entry-point group `fedsec.models`); one of torchvision's
            classification networks, such as `resnet34`; `timm:NAME` or `torchxrayvision:densenet`, where installed; or
            a user's own as `package.module:factory`.
        num_classes: length of the logits.
        in_channels: 1 for grey images, 3 for colour.
        image_size: side of the square images in pixels.
        norm: normalisation layers; a model without any accepts every value.
        seed: all initial weights are a function of it; the global generators are left as they were.
        mean: what images are normalised with: one number, or one for each channel. Weights that were trained with
            other values than the default need theirs.
        std: as `mean`.
        options: further options of this architecture, such as `stem="small"`.

    Raises:
        ConfigError: unknown name or option, or images that the architecture cannot take.
    """
    made = _made(name, num_classes, in_channels, image_size, norm, seed, options)
    for buffer, values in ((made.mean, mean), (made.std, std)):
        if values is not None:
            _fill(buffer, values, f"{name}: model.options mean and std")
    return made


def _made(
    name: str, num_classes: int, in_channels: int, image_size: int, norm: Norm, seed: int, options: dict[str, Any]
) -> Normalised:
    import torch

    from fedsec.models.base import Normalised

    library, colon, network = name.partition(":")
    if colon and not _is_library(library):
        from fedsec.models.factory import from_factory

        return from_factory(name, num_classes, in_channels, image_size, seed)
    if colon or _is_torchvision(name):
        from fedsec.models.library import from_library

        library, network = (library, network) if colon else ("torchvision", name)
        return from_library(library, network, num_classes, in_channels, image_size, norm, seed, **options)
    factory = plugins.load("models", name)
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            raise ConfigError(f"{name}: unknown option '{option}': {plugins.nearest(option, known)}")
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the CUDA generators, which fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        net = factory(num_classes, in_channels, image_size, norm=norm, **options)
        return Normalised(net, *net.normalisation)


def _is_library(name: str) -> bool:
    from fedsec.models.library import LIBRARIES

    return name in LIBRARIES


def _is_torchvision(name: str) -> bool:
    if name in plugins.names("models"):
        return False
    from fedsec.models.library import torchvision_names

    return name in torchvision_names()


def _fill(buffer: Tensor, values: Sequence[float] | float, label: str) -> None:
    import torch

    given = torch.as_tensor(values, dtype=torch.float32).flatten()
    if given.numel() not in (1, buffer.numel()):
        raise ConfigError(f"{label}: {given.numel()} values for {buffer.numel()} channels")
    buffer.copy_(given.expand(buffer.numel()).view_as(buffer))
