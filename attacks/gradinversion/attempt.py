"""The attack on one observation, while it runs: what the methods share, and what they have found so far.

A method is a function (observation, labels, clock, ...) -> candidates. Its module ends with `stage(run)`, which says
when the method applies, with which settings, and what it takes over from the methods before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .candidate import Candidate, NotApplicable
from .certificate import EXACT_DB, assess
from .chain import Chain, find_chain
from .clock import Clock
from .deflation import Proof
from .features import Features, recover_features, usable
from .labels import Labels
from .observation import Observation
from .peel import features_of
from .selection import select
from .settings import Settings
from .trace import Trace, trace

KINKED = frozenset({"relu", "relu_", "leaky_relu", "hardtanh", "relu6", "prelu", "rrelu", "max_pool2d", "threshold"})
"""Operations without a useful second derivative."""
SOLVED = 1e-3
"""Relative residual after which weaker methods are not worth their time."""


@dataclass
class Attempt:
    """The attack on one observation, while it runs."""

    observation: Observation
    settings: Settings
    generator: torch.Generator
    labels: Labels
    clock: Clock
    candidates: list[Candidate] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    proof: Proof | None = None
    """Inputs of a fully connected layer that were found image by image."""
    settled: bool = False
    """What was not proven has been attacked on its own: no further method adds anything."""

    @cached_property
    def recorded(self) -> Trace:
        """One forward pass of the model."""
        mean = self.observation.prior.mean
        return trace(self.observation.simulation.model, mean[None].clone())

    @cached_property
    def kinked(self) -> str | None:
        """An operation without second derivatives, if the model has one."""
        return next((c.name for c in self.recorded.calls if c.name in KINKED), None)

    def chain(self) -> Chain:
        """The convolutions up to the first fully connected layer.

        Raises:
            NotApplicable: there is no such layer, or its gradient is hidden.
        """
        return find_chain(self.recorded, self.observation.complete)

    @cached_property
    def features(self) -> Features | None:
        """The exact features of every image, where the model gives them away."""
        if self.observation.batch > 1:
            return None if self.proof is None else features_of(self.observation, self.proof)
        try:
            chain = self.chain()
            found = recover_features(self.observation, chain.weight, chain.bias)
        except NotApplicable:
            return None
        return found if usable(found) else None

    @property
    def guesses(self) -> tuple[Tensor, ...]:
        """Labels to try: all of the set, or those of the best candidate once one has been found."""
        found = [c for c in self.candidates if c.method != "prior"]
        if found and len(self.labels.guesses) > 1:
            return (select(found, self.observation).labels,)
        return self.labels.guesses

    def best_start(self) -> Tensor | None:
        """The images to improve on: the best candidate so far."""
        found = [c for c in self.candidates if c.method != "prior"]
        return select(found, self.observation).images if found else None

    def add(self, found: list[Candidate]) -> None:
        """Assess and keep candidates."""
        self.candidates += [assess(c, self.observation) for c in found]

    def attempt(
        self, name: str, method: Callable[[Tensor, Clock], list[Candidate]], share: float = 1.0, *, once: bool = False
    ) -> None:
        """Run a method for each label guess (`once`: for the first), or note why it does not apply."""
        guesses = self.guesses[:1] if once else self.guesses
        clock = self.clock.share(share)
        try:
            for i, labels in enumerate(guesses):
                self.add(method(labels, clock.share(1 / (len(guesses) - i))))
        except NotApplicable as reason:
            self.skipped[name] = str(reason)
        except RuntimeError as error:  # torch: an operation of this model lacks a derivative that the method needs
            self.skipped[name] = f"failed: {str(error).strip().splitlines()[0]}"

    @property
    def auto(self) -> bool:
        """The methods run in their order, rather than one alone."""
        return self.settings.method == "auto"

    @property
    def noisy(self) -> bool:
        """The defense's noise is known."""
        return self.observation.noise_std > 0

    @property
    def solved(self) -> bool:
        """A candidate explains the update so well that weaker methods are not worth their time."""
        return any(c.residual < SOLVED or (c.layers_ok and (c.est_psnr or 0) >= EXACT_DB) for c in self.candidates)

    @property
    def done(self) -> bool:
        """Every image is proven exact, or the budget is spent."""
        return (
            self.settled or self.clock.left <= 0 or any(c.certified == self.observation.batch for c in self.candidates)
        )
