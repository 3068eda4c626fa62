"""HeteroFL: clients with little memory train a leading slice of every layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.errors import ConfigError
from fedsec.federation.desk import Desk, Index, Objective, Report, ServerState, Setting, Site
from fedsec.federation.sharing import Sharing, load
from fedsec.federation.strategy import Strategy
from fedsec.models.base import last_linear, num_groups
from fedsec.types import Layout, Wire


@dataclass(frozen=True)
class HeteroFL(Strategy):
    """Client k trains the leading ⌈r·out⌉ x ⌈r·in⌉ block of every layer; a coordinate is the mean of those who hold it.

    Capacities are dealt in turn from `rates`. First inputs and the last layer's outputs are whole; each layer's output
    is divided by r while training. Logits of classes that a client does not have are set to 0, and rows of the last
    layer are averaged over clients that have the class, which is why the class list travels. No size weights, as in
    the source. A coordinate that one client alone holds is that client's update in clear. Diao et al. 2021.
    """

    name: ClassVar[str] = "heterofl"
    goal: ClassVar[str] = "small clients train leading slices of every layer"
    source: ClassVar[str] = "Diao, Ding and Tarokh, ICLR 2021"
    personal: ClassVar[bool] = True
    reports: ClassVar[tuple[Report, ...]] = (
        Report("capacity", "how large a model it can train"),
        Report("classes", "which classes it has"),
    )
    own_rule: ClassVar[str] = "updates have different shapes, and each coordinate is the mean of those who hold it"
    individuals: ClassVar[str] = "who holds a coordinate must be known for each of them"
    not_private: ClassVar[str] = "which logits count follows the client's own classes"
    rates: Annotated[str, Field(description="capacities, dealt to the clients in turn; join with |")] = "1|0.5|0.25"
    mask_classes: Annotated[bool, Field(description="logits of classes it lacks count as 0")] = True

    def capacities(self) -> tuple[float, ...]:
        """The rates.

        Raises:
            ConfigError: not numbers in (0, 1].
        """
        try:
            found = tuple(float(r) for r in self.rates.split("|"))
        except ValueError:
            found = ()
        if not found or not all(0 < r <= 1 for r in found):
            raise ConfigError(f"heterofl: rates={self.rates}: write numbers in (0, 1], joined with |")
        return found

    def rate(self, client: int) -> float:
        """This client's capacity."""
        rates = self.capacities()
        return rates[client % len(rates)]

    def prepare_model(self, model: nn.Module, setting: Setting) -> nn.Module:
        """The model as it is.

        Raises:
            ConfigError: it is not a chain of layers, so that slices do not fit each other, or multilabel data.
        """
        if setting.recipe.task == "multilabel":
            raise ConfigError("heterofl: averages rows of the last layer by class; multilabel data are not supported")
        for rate in self.capacities():
            slim(model, rate)
        return model

    def begin(self, site: Site) -> None:
        """Cut the client's slice out of what was received."""
        small, index = slim(site.model, self.rate(max(site.client, 0)))
        site.scratch |= {"whole": site.model, "index": index}
        site.model = small

    def objective(self, site: Site, base: Objective) -> Objective:
        """Cross-entropy of masked logits."""
        if not self.mask_classes:
            return base
        has = torch.bincount(site.y, minlength=site.recipe.num_classes) > 0
        return lambda model, x, y: F.cross_entropy(model(x).masked_fill(~has, 0.0), y)

    def part(self, model: nn.Module, client: int) -> tuple[nn.Module, Mapping[str, Index]]:
        """The slice, whose capacity the client tells."""
        return slim(model, self.rate(max(client, 0)), scaled=True)

    def finish(self, site: Site) -> None:
        """Put the slice back into the whole model, whose other coordinates stay as they were received."""
        small = dict(site.model.state_dict(keep_vars=True))
        with torch.no_grad():
            for name, tensor in site.scratch["whole"].state_dict(keep_vars=True).items():
                if name in site.scratch["index"]:
                    tensor[site.scratch["index"][name]] = small[name]
        site.model = site.scratch["whole"]

    def report(self, site: Site) -> dict[str, Tensor]:
        """Capacity and class list."""
        has = torch.bincount(site.y, minlength=site.recipe.num_classes).cpu() > 0
        return {"capacity": torch.tensor([self.rate(max(site.client, 0))]), "classes": has.float()}

    def valid_report(self, extras: Mapping[str, Tensor]) -> str | None:
        """A capacity that was agreed on, and a list of yes and no."""
        if extras["capacity"].shape != (1,) or round(float(extras["capacity"]), 6) not in {
            round(r, 6) for r in self.capacities()
        }:
            return "capacity is not one of the agreed rates"
        flags = extras["classes"]
        good = flags.ndim == 1 and bool(((flags == 0) | (flags == 1)).all())
        return None if good else "classes is not a list of yes and no"

    def wire(self, site: Site) -> Wire | None:
        """The slice alone travels; its place follows from the capacity."""
        return Wire(int(held(site.sharing.params, site.scratch["index"]).sum()))

    def serve(self, desk: Desk) -> None:
        """Coordinate by coordinate, the mean of those who hold it; who is held by nobody keeps its value."""
        if not desk.updates:
            return
        total = torch.zeros_like(desk.before)
        count = torch.zeros_like(desk.before)
        for update in desk.updates:
            mask = self.mask(
                desk.model, desk.sharing.params, float(update.extras["capacity"]), update.extras["classes"]
            )
            total += torch.where(mask, update.delta, torch.zeros_like(update.delta))
            count += mask
        desk.state.params = desk.before + total / count.clamp(min=1)
        desk.state.side["holders"] = count.cpu()

    def mask(self, model: nn.Module, layout: Layout, rate: float, classes: Tensor) -> Tensor:
        """(d,) bool: the coordinates that a client of this capacity and with these classes has a say in."""
        index = slim(model, rate)[1]
        mask = held(layout, index)
        if self.mask_classes:
            head = last_linear(model)
            for name, view in layout.views(mask).items():
                if name.startswith(f"{head}."):
                    view[classes.to(view.device) == 0] = False
        return mask

    def personal_model(
        self, model: nn.Module, sharing: Sharing, client: int, state: ServerState, images: Tensor
    ) -> nn.Module:
        """The slice that this client can run."""
        load(model, sharing, state.params, state.buffers, None)
        return slim(model, self.rate(client))[0]


def slim(model: nn.Module, rate: float, scaled: bool = False) -> tuple[nn.Module, dict[str, Index]]:
    """A copy with leading slices of every layer, and the place of each of its tensors in the whole model.

    Args:
        model: the whole one. rate: r. scaled: divide outputs by r in evaluation mode, too, as training does.

    Raises:
        ConfigError: the model is no chain of convolutions, GroupNorms and linear layers, or it has BatchNorm.
    """
    small = copy.deepcopy(model)
    layers = dict(small.named_modules())
    head = last_linear(model)
    places: dict[str, Index] = {}
    channels, kept = 0, 0  # of the layer before, whole and sliced
    for path, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            out, inside = layer.weight.shape[0], layer.weight.shape[1]
            if channels and inside % channels:
                raise ConfigError(f"heterofl: {path} does not follow the layer before it; the model is no chain")
            rows = torch.arange(out if path == head else math.ceil(rate * out))
            columns = torch.arange(inside if not channels else inside // channels * kept)
            _cut(layers[path], layer, path, rows, columns, places)
            if path != head and rate < 1:
                layers[path].register_forward_hook(_scaler(rate, scaled))
            channels, kept = out, len(rows)
        elif isinstance(layer, nn.GroupNorm):
            if layer.num_channels != channels:
                raise ConfigError(f"heterofl: {path} does not follow the layer before it; the model is no chain")
            twin: Any = layers[path]
            twin.num_channels = kept
            twin.num_groups = layer.num_groups if kept == channels else num_groups(kept)
            _cut(twin, layer, path, torch.arange(kept), None, places)
        elif list(layer.parameters(recurse=False)):
            raise ConfigError(
                f"heterofl: {type(layer).__name__} ({path}) cannot be sliced; use a chain such as cnn or lenet with "
                "model.norm=group"
            )
    return small, places


def _cut(
    twin: Any, layer: nn.Module, path: str, rows: Tensor, columns: Tensor | None, places: dict[str, Index]
) -> None:
    for name, parameter in layer.named_parameters(recurse=False):
        place: Index = (rows,) if parameter.ndim == 1 or columns is None else (rows[:, None], columns[None, :])
        setattr(twin, name, nn.Parameter(parameter.detach()[place].clone()))
        places[f"{path}.{name}"] = place
    if isinstance(twin, nn.Conv2d):
        twin.out_channels, twin.in_channels = twin.weight.shape[0], twin.weight.shape[1]
    elif isinstance(twin, nn.Linear):
        twin.out_features, twin.in_features = twin.weight.shape


def _scaler(rate: float, always: bool) -> Any:
    return lambda module, _, output: output / rate if module.training or always else output


def held(layout: Layout, places: Mapping[str, Index]) -> Tensor:
    """(d,) bool: the coordinates inside a slice."""
    mask = torch.zeros(layout.size, dtype=torch.bool)
    for name, view in layout.views(mask).items():
        view[places[name]] = True
    return mask
