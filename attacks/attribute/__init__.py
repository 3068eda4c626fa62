"""What do a model's features betray beside the diagnosis? The plugin `attribute`.

A linear probe is fitted on people whose attributes are public, and applied to the images in question. X-rays show sex,
age and view by themselves: the frame sets the probe beside the same probe on pixels, and members beside non-members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedsec.attack import Attack

if TYPE_CHECKING:
    import numpy as np

    from fedsec.findings import CandidatePlan, Findings, Target

FEWEST = 20
"""People of each value in the population below which no probe is fitted."""


@dataclass(frozen=True)
class Attribute(Attack):
    """Attribute inference from the penultimate features: sex, age band, view, hospital, where the data know them."""

    name: ClassVar[str] = "attribute"
    seat: ClassVar[Literal["outsider"]] = "outsider"
    goal: ClassVar[str] = (
        "read sex, age, view or hospital of an image off the model's features, beside the pixels alone"
    )

    strength: Annotated[float, Field(gt=0, description="inverse regularisation of the probe")] = 0.01

    def candidates(self) -> CandidatePlan:
        """Images whose attributes it guesses."""
        from fedsec.findings import CandidatePlan

        return CandidatePlan()

    def conclude(self, target: Target) -> Findings:
        """Scores of the most frequent value of each attribute, from features and from pixels."""
        import numpy as np

        from fedsec.findings import Findings, TraitGuess

        candidates = target.candidates
        assert candidates is not None
        model = target.released().to(target.device)
        inside, outside = (self.features(model, x, target) for x in (candidates.population.images, candidates.images))
        seen, unseen = (_pixels(x) for x in (candidates.population.images, candidates.images))
        found, notes = [], []
        for trait, values in candidates.population_traits.items():
            known = values != ""
            names, counts = np.unique(values[known], return_counts=True)
            value = str(names[counts.argmax()]) if len(names) else ""
            y = (values[known] == value).astype(int)
            if len(names) < 2 or min(y.sum(), len(y) - y.sum()) < FEWEST:
                notes.append(f"{trait}: fewer than {FEWEST} of each value in the population, left out")
                continue
            scores = [self.fitted(a[known], y, b) for a, b in ((inside, outside), (seen, unseen))]
            found.append(TraitGuess(trait, value, *scores))
        if not candidates.population_traits:
            notes.append("the data set has no column sex, age, view or site: no attribute to infer")
        assumptions: dict[str, Any] = {"view": "features of the released model", "prior": candidates.population.name}
        return Findings(assumptions=assumptions, notes=tuple(notes), traits=tuple(found))

    def features(self, model: Any, images: Any, target: Target) -> np.ndarray[Any, Any]:
        """(N, F) what enters the last layer."""
        import torch

        model.eval()
        with torch.no_grad():
            parts = [model.embed(x.to(target.device)).flatten(1).cpu() for x in images.split(512)]
        return torch.cat(parts).numpy()

    def fitted(self, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], new: np.ndarray[Any, Any]) -> Any:
        """Scores (N,) of a regularised logistic regression."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        learner = make_pipeline(StandardScaler(), LogisticRegression(C=self.strength, max_iter=300)).fit(x, y)
        return learner.decision_function(new)


def _pixels(images: Any) -> np.ndarray[Any, Any]:
    """(N, 144·C) average-pooled pixels."""
    import numpy as np
    from torch.nn import functional as F

    return np.asarray(F.adaptive_avg_pool2d(images, 12).flatten(1))
