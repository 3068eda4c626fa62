"""Which architectures there are, and how one is built: `fedsec.models.build(name, num_classes=, in_channels=, ...)`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from fedsec import plugins
from fedsec.errors import ConfigError

if TYPE_CHECKING:
    from fedsec.models.base import Norm, Normalised


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    norm: Norm = "group",
    seed: int = 0,
    **options: Any,
) -> Normalised:
    """Build an architecture with freshly initialised weights, wrapped so that it takes images in [0, 1].

    Args:
        name: a registered model, ours or a third party's (entry-point group `fedsec.models`), or a user's own as
            `package.module:factory`, such as `torchvision.models:resnet18`.
        num_classes: length of the logits.
        in_channels: 1 for grey images, 3 for colour.
        image_size: side of the square images in pixels.
        norm: normalisation layers; a model without any accepts every value.
        seed: all initial weights are a function of it; the global generators are left as they were.
        options: further options of this architecture, such as `stem="small"`.

    Raises:
        ConfigError: unknown name or option, or images that the architecture cannot take.
    """
    import torch

    from fedsec.models.base import Normalised

    if ":" in name:
        from fedsec.models.factory import from_factory

        return from_factory(name, num_classes, in_channels, image_size, seed)
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
