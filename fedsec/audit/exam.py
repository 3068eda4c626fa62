"""Asks an attack which of some images a model was trained on, and compares its answer with the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedsec.audit import cohort as cohorts
from fedsec.audit.attributes import compare_traits
from fedsec.audit.cohort import Cohort
from fedsec.audit.inversion import compare_prototypes
from fedsec.audit.membership import by_stratum, leaks, measured, most_exposed, sentence
from fedsec.audit.properties import compare_properties
from fedsec.audit.source import compare_sources
from fedsec.data.base import Dataset
from fedsec.federation.assemble import Federation
from fedsec.federation.shadows import parity, train_models, train_shadows
from fedsec.findings import CandidatePlan, Candidates, Findings, MembershipScores, PublicData, Target
from fedsec.machine import usable_cores
from fedsec.progress import Progress
from fedsec.types import RoundContext, ServerView

TRAITS = ("sex", "age", "view", "site")
"""Metadata columns that an attack may try to infer, where a data set has them."""


@dataclass(frozen=True)
class Exam:
    """A trained model, the images in question, and how its training can be repeated."""

    dataset: Dataset
    cohort: Cohort
    model: Callable[[], nn.Module]
    released: Callable[[], nn.Module]
    seed: int
    device: Any
    federation: Federation | None = None
    """None: nobody knows the recipe, so that no shadows can be trained."""
    history: tuple[ServerView, ...] = ()
    cache: Path = Path()
    """Where shadows are kept."""
    deadline: float | None = None
    """`time.monotonic()` after which no further shadows are started."""
    progress: Progress = field(default_factory=Progress)

    def target(self, plan: CandidatePlan) -> Target:
        """Everything that the attack may see: the truth stays here."""
        rows, population = self.cohort.rows, self.cohort.population
        x, y = self.dataset.batch(rows)
        px, py = self.dataset.batch(population)
        shadows = None
        if self.federation is not None:
            shadows = partial(
                train_shadows, self.federation, rows, folder=self.cache, progress=self.progress, deadline=self.deadline
            )
        train_on = None
        if self.federation is not None:
            train_on = partial(train_models, self.federation, population, folder=self.cache, progress=self.progress)
        public = PublicData(f"{self.dataset.name}, population", px, py)
        candidates = Candidates(
            images=x,
            labels=y,
            task=self.dataset.task,
            population=public,
            population_traits={k: v[population] for k, v in traits_of(self.dataset).items()},
            train_shadows=shadows,
            train_on=train_on,
            history=self.history if plan.history else (),
        )
        return Target(
            model=self.model,
            released=self.released,
            views=(),
            public=public,
            image_shape=self.dataset.image_shape,
            ctx=RoundContext(self.seed, 0, 0).adversary(),
            device=self.device,
            workers=usable_cores() if self.device.type == "cpu" else 1,
            progress=lambda done, total: self.progress.advance(done),
            candidates=candidates,
        )

    def traits(self) -> dict[str, np.ndarray[Any, Any]]:
        """See `traits_of`."""
        return traits_of(self.dataset)

    def classes(self) -> np.ndarray[Any, Any]:
        """(N,) name of each candidate's class; empty where it may have several."""
        labels = np.asarray(self.dataset.labels)[self.cohort.rows]
        if labels.ndim > 1:
            return np.full(len(labels), "")
        return np.asarray(np.array(self.dataset.class_names)[labels.astype(int)])

    def classes_by_number(self) -> np.ndarray[Any, Any]:
        """Class number of each image of the data set, as a text."""
        return np.asarray(self.dataset.labels).astype(int).astype(str)

    def strata(self) -> dict[str, np.ndarray[Any, Any]]:
        """Groups of patients in which membership is also measured."""
        return {"class": self.classes(), **{k: v[self.cohort.rows] for k, v in self.traits().items()}}

    def exposed(self, item: MembershipScores) -> np.ndarray[Any, Any]:
        """Positions among the candidates of the members that a method recognises best."""
        return most_exposed(item, self.cohort)

    def judge(self, findings: Findings) -> dict[str, Any]:
        """Every measure that the findings allow, beside what is known without the model."""
        rng = RoundContext(self.seed, 0, 0).numpy("audit-judge")
        groups = self.dataset.groups()[self.cohort.rows]
        result: dict[str, Any] = {}
        if findings.memberships:
            table = measured(findings.memberships, self.cohort, groups, rng)
            table |= {
                "valid": self.cohort.valid,
                "verdict": sentence(table, self.cohort.valid),
                "checks": [check.to_json() for check in self.cohort.checks],
                "nonmembers": self.cohort.origin,
            }
            if "headline" in table and self.cohort.valid:
                chosen = next(m for m in findings.memberships if m.method == table["headline"]["method"])
                table["strata"] = by_stratum(chosen, self.cohort, self.strata(), rng)
                if leaks(table["headline"]):
                    names, counts = np.unique(self.classes()[self.exposed(chosen)], return_counts=True)
                    table["exposed"] = dict(zip(names.tolist(), counts.tolist(), strict=True))
            if self.federation is not None and any(item.shadows for item in findings.memberships):
                table["parity"] = parity(self.federation, len(self.cohort.rows))
            result["membership"] = table
        if findings.sources:
            result["source"] = compare_sources(findings.sources, self)
        if findings.prototypes:
            result["inversion"] = compare_prototypes(findings.prototypes, self, rng)
        if findings.traits:
            result["attributes"] = compare_traits(findings.traits, self, rng)
        if findings.properties:
            result["property"] = compare_properties(findings.properties, self)
        return result


def traits_of(dataset: Dataset) -> dict[str, np.ndarray[Any, Any]]:
    """Attribute -> (N,) text of each image, empty where unknown; ages are bands of twenty years."""
    found = {}
    for name in TRAITS:
        if name not in dataset.meta:
            continue
        column = dataset.meta[name]
        if name == "age":
            ages = column.astype(float)
            bands = np.array([f"{int(a // 20) * 20}-{int(a // 20) * 20 + 19}" if a == a else "" for a in ages])
            column = bands
        found[name] = column.astype(str)
    return found


def of_training(
    federation: Federation,
    released: Callable[[], nn.Module],
    history: tuple[ServerView, ...],
    cache: Path,
    progress: Progress,
) -> Exam:
    """The exam of a training of this run."""
    seed = RoundContext(federation.cell.seed, 0, 0).entropy("exam")
    cohort = cohorts.checked(federation.dataset, cohorts.of_federation(federation), seed)
    return Exam(
        dataset=federation.dataset,
        cohort=cohort,
        model=partial(federation.build_model),
        released=released,
        seed=seed,
        device=federation.device,
        federation=federation,
        history=history,
        cache=cache,
        progress=progress,
    )
