"""The networks of torchvision, timm and torchxrayvision by name, without pretrained weights and without a download."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedsec.errors import ConfigError
from fedsec.models.base import Norm, Normalised, replace_batch_norm
from fedsec.models.factory import Foreign
from fedsec.plugins import nearest

EXTRAS = {"timm": "timm", "torchxrayvision": "xray"}
"""Library -> the extra that installs it."""
LIBRARIES = ("torchvision", *EXTRAS)


def torchvision_names() -> list[str]:
    """torchvision's networks for classification, by name."""
    import torchvision

    return sorted(torchvision.models.list_models(module=torchvision.models))


def from_library(
    library: str, name: str, num_classes: int, in_channels: int, image_size: int, norm: Norm, seed: int, **options: Any
) -> Normalised:
    """A network of a library, freshly initialised, with logits of our classes.

    Args:
        library: `torchvision`, `timm` or `torchxrayvision`.
        name: as the library spells it.
        norm: `group` puts a GroupNorm in the place of every BatchNorm; `batch` leaves the network as it is.
        options: of the library's own function.

    Raises:
        ConfigError: the library is not installed or has no such network, or the network cannot take these images.
    """
    if norm not in ("group", "batch"):
        raise ConfigError(f"{library}:{name}: norm={norm}: write group or batch")
    make = {"torchvision": _torchvision, "timm": _timm, "torchxrayvision": _xray}[library]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            net = make(name, num_classes, in_channels, image_size, options)
            if norm == "group":
                net = replace_batch_norm(net)
            wrapped = Foreign(net, in_channels, image_size)
            _probe(wrapped, in_channels, image_size, num_classes)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{library}:{name}: cannot take {in_channels}x{image_size}x{image_size} images with these options: {first}"
        ) from None
    return Normalised(wrapped)


@torch.no_grad()
def _probe(net: nn.Module, in_channels: int, image_size: int, num_classes: int) -> None:
    """Show it one image, so that what does not fit is said before a training starts."""
    shape = net.eval()(torch.zeros(1, in_channels, image_size, image_size)).shape
    net.train()
    if shape != (1, num_classes):
        raise ValueError(f"it gives {tuple(shape)}, not logits of {num_classes} classes")


def _torchvision(name: str, num_classes: int, in_channels: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    import torchvision

    known = torchvision_names()
    if name not in known:
        raise ConfigError(f"torchvision has no network '{name}': {nearest(name, known)}")
    told: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Auxiliary classifiers would make it return several outputs.
        told = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        told = {"image_size": image_size}
    elif name.startswith("maxvit_"):
        told = {"input_size": (image_size, image_size)}
    net: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **{**told, **options})
    return net


def _timm(name: str, num_classes: int, in_channels: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    timm = _import("timm")
    if not timm.is_model(name):
        raise ConfigError(f"timm has no network '{name}': {nearest(name, timm.list_models())}")
    sized = {"img_size": image_size} if name.startswith(("vit_", "deit", "swin")) else {}
    net: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **{**sized, **options}
    )
    return net


def _xray(name: str, num_classes: int, in_channels: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    library = _import("torchxrayvision")
    if name != "densenet":
        raise ConfigError(f"torchxrayvision: '{name}' cannot be trained here; write torchxrayvision:densenet")
    net: nn.Module = library.models.DenseNet(
        weights=None, num_classes=num_classes, in_channels=in_channels, apply_sigmoid=False, **options
    )
    return net


def _import(library: str) -> Any:
    import importlib

    try:
        return importlib.import_module(library)
    except ImportError:
        raise ConfigError(
            f"--model {library}:…: {library} is not installed: pip install 'fedsec[{EXTRAS[library]}]'"
        ) from None
