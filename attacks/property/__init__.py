"""How many of the training images show a property: women, frontal views, one hospital? The plugin `property`.

Models are trained on public images of which a small or a large share has the property, by the target's own recipe; a
classifier learns to tell their answers apart, and is then shown the target's (Ateniese et al. 2015; with answers to
fixed queries instead of weights as Zhang, Tople & Ohrimenko 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedsec.attack import Attack
from fedsec.errors import ConfigError

if TYPE_CHECKING:
    from fedsec.findings import CandidatePlan, Findings, Target

CLASS = "class"


@dataclass(frozen=True)
class Property(Attack):
    """Property inference on the released model: is the share of a group in the training set small or large?"""

    name: ClassVar[str] = "property"
    seat: ClassVar[Literal["outsider"]] = "outsider"
    goal: ClassVar[str] = "tell the share of a group (sex, view, hospital, class) in the training set from the model"
    on_request: ClassVar[bool] = True

    trait: Annotated[
        str, Field(description="sex, age, view, site or class; the first that the data know if not given")
    ] = ""
    value: Annotated[str, Field(description="the group whose share is asked for; the most frequent if not given")] = ""
    low: Annotated[float, Field(gt=0, lt=1, description="the small share that is compared")] = 0.3
    high: Annotated[float, Field(gt=0, lt=1, description="the large share")] = 0.7
    shadows: Annotated[int, Field(ge=20, description="models that are trained, half for each share")] = 32

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError(f"property: low={self.low:g}, high={self.high:g}: low must be the smaller one")
        if self.shadows % 2:
            raise ConfigError(f"property: shadows={self.shadows}: give an even number, half for each share")

    def candidates(self) -> CandidatePlan:
        """It asks about no image; the frame compares its guess with the members' share."""
        from fedsec.findings import CandidatePlan

        return CandidatePlan()

    def conclude(self, target: Target) -> Findings:
        """One guess, and how often the classifier was right on models that it was not fitted on.

        Raises:
            ConfigError: the data do not know the attribute, or nobody has this value.
        """
        from fedsec.findings import Findings, PropertyGuess

        from .shares import answers, judged, subsets

        candidates = target.candidates
        assert candidates is not None
        if candidates.train_on is None:
            return Findings(notes=("property: needs the recipe of the training; it did not run",))
        trait, value, has, known = self.group(candidates)
        draw = target.ctx.numpy("property")
        plan = subsets(has, known, (self.low, self.high), self.shadows // 2, draw)
        if plan is None:
            return Findings(notes=(f"property: too few public images with {trait} = {value} and without, left out",))
        models = candidates.train_on(plan.sets)
        seen = [answers(build().to(target.device), candidates, plan.queries, has, target.device) for build in models]
        own = answers(target.released().to(target.device), candidates, plan.queries, has, target.device)
        right, large = judged(seen, plan.large, own, draw)
        guess = PropertyGuess(trait, value, (self.low, self.high), len(models), right, large)
        assumptions: dict[str, Any] = {
            "view": "answers of the released model to public images",
            "prior": candidates.population.name,
            "images of each shadow": len(plan.sets[0]),
        }
        return Findings(assumptions=assumptions, properties=(guess,))

    def group(self, candidates: Any) -> tuple[str, str, Any, Any]:
        """Attribute, value, and which public images have it (Z,) and are known to have it or not (Z,)."""
        import numpy as np

        values = dict(candidates.population_traits)
        if candidates.task != "multilabel":
            values[CLASS] = candidates.population.labels.numpy().astype(str)
        if not values:
            raise ConfigError("property: the data set knows no attribute, and has several labels an image")
        trait = self.trait or next(iter(values))
        if trait not in values:
            raise ConfigError(f"property: trait={trait}: the data set knows {', '.join(values)}")
        known = values[trait] != ""
        names, counts = np.unique(values[trait][known], return_counts=True)
        value = self.value or (str(names[counts.argmax()]) if len(names) else "")
        if value not in names:
            raise ConfigError(f"property: value={value}: {trait} is one of {', '.join(map(str, names)) or 'nothing'}")
        return trait, value, values[trait] == value, known
