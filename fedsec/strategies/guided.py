"""CusFL: a private model that no broadcast overwrites, guided by the federation's features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.errors import ConfigError
from fedsec.federation.desk import Objective, Site, frozen_copy
from fedsec.federation.sharing import Sharing, load
from fedsec.federation.strategy import Label, Strategy
from fedsec.models.base import last_linear
from fedsec.types import Layout


@dataclass(frozen=True)
class CusFL(Strategy):
    """Clients train private models; the average of their extractors only guides them. After Wicaksana et al. 2022.

    Loss: base + λ(1 − cos(e_k(x), ē(x))), ē the received extractor, frozen, from round `warmup` + 1 on: before that the
    average of unsynchronised extractors is no target. The last layer stays at the client.
    """

    name: ClassVar[str] = "cusfl"
    goal: ClassVar[str] = "private models, guided by the average of all feature extractors"
    source: ClassVar[str] = "Wicaksana et al., IEEE JBHI 2022 (abstract)"
    label: ClassVar[Label] = "reconstruction"
    personal: ClassVar[bool] = True
    lam: Annotated[float, Field(ge=0, description="weight of the guidance; 0 is local training")] = 0.1
    warmup: Annotated[int, Field(ge=0, description="rounds without guidance")] = 3

    def sharing(self, model: nn.Module) -> Sharing:
        """The extractor travels, the last linear layer stays."""
        head = last_linear(model)
        whole = super().sharing(model)
        mine = {n: s for n, s in zip(whole.params.names, whole.params.shapes, strict=True) if n.startswith(f"{head}.")}
        rest = {n: s for n, s in zip(whole.params.names, whole.params.shapes, strict=True) if n not in mine}
        if not rest:
            raise ConfigError("cusfl: the model is one linear layer; there is no extractor to share")
        return Sharing(
            Layout(tuple(rest), tuple(rest.values())), whole.buffers, Layout(tuple(mine), tuple(mine.values()))
        )

    def begin(self, site: Site) -> None:
        """Train from the private extractor, not from the broadcast one."""
        if "params" in site.own:
            load(site.model, site.sharing, site.own["params"], site.own["buffers"], None)

    def objective(self, site: Site, base: Objective) -> Objective:
        """Base loss plus the guidance."""
        if self.lam == 0 or site.ctx.round <= self.warmup:
            return base
        guide = frozen_copy(site.model)
        load(guide, site.sharing, site.params, site.buffers(), None)

        def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            target = guide.embed(x)  # type: ignore[operator]
            features = model.embed(x)  # type: ignore[operator]
            return base(model, x, y) + self.lam * (1 - F.cosine_similarity(features, target, dim=1)).mean()

        return total

    def finish(self, site: Site) -> None:
        """The private model is kept."""
        site.keep_personal()
