"""In what order are the methods tried? The strongest that applies first; stop at a proof.

| stage | method | applies to |
|---|---|---|
| 0 | the public mean image | always: what anybody could draw |
| 1 | label recovery | unless labels are told |
| 2 | `analytic`, `cascade` | one image, fully connected first layer; convolutions with invertible activations |
| 3 | `map_gauss_newton` | one image; with known noise, or smooth activations |
| 4 | feature inversion, a start for stage 6 | one image, piecewise-linear nets with a fully connected layer |
| 5 | `dlg`, and `map_descent` for batches | smooth activations; any activations where noise is known |
| 6 | `inverting_gradients` | always |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fedsec.types import Reconstruction

from .analytic import analytic
from .candidate import Candidate, Clock, NotApplicable
from .cascade import cascade
from .certificate import assess
from .chain import Chain, find_chain
from .dlg import dlg
from .features import Features, recover_features, usable
from .inverting_gradients import Terms, inverting_gradients
from .labels import Labels, guess_labels, recover_labels
from .map_descent import map_descent
from .map_gauss_newton import invert_features, map_gauss_newton
from .observation import Observation
from .selection import disagreement, select
from .starts import prior_start
from .trace import Trace, trace

Method = Literal["auto", "analytic", "cascade", "map_gauss_newton", "dlg", "inverting_gradients"]
KINKED = frozenset({"relu", "relu_", "leaky_relu", "hardtanh", "relu6", "prelu", "rrelu", "max_pool2d", "threshold"})
"""Operations without a useful second derivative."""
MAX_BATCH = 128
SOLVED = 1e-3
"""Relative residual after which weaker methods are not worth their time."""
COARSE_RANK = 160
"""Components of the maximum a posteriori estimate where more would cost time and bring nothing."""
NOISY = 0.3
"""Relative noise above which cosine matching adds nothing to the maximum a posteriori estimate."""
IMPROVING_STEPS = 500
"""Steps of `inverting_gradients` from a good start."""
PRIOR_WEIGHT = 1e-2
"""Weight of the public prior at the start of `inverting_gradients` in auto."""


@dataclass(frozen=True)
class Settings:
    """How hard to try."""

    method: Method = "auto"
    restarts: int = 8
    iterations: int = 2400
    tv: float = 1e-3
    budget_s: float = 20.0


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
        """The exact features of the one image, where the model gives them away."""
        if self.observation.batch > 1:
            return None
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

    def attempt(self, name: str, method: Callable[[Tensor, Clock], list[Candidate]], share: float = 1.0) -> None:
        """Run a method for each label guess, or note why it does not apply."""
        guesses = self.guesses
        clock = self.clock.share(share)
        try:
            for i, labels in enumerate(guesses):
                self.add(method(labels, clock.share(1 / (len(guesses) - i))))
        except NotApplicable as reason:
            self.skipped[name] = str(reason)
        except RuntimeError as error:  # torch: an operation of this model lacks a derivative that the method needs
            self.skipped[name] = f"failed: {str(error).strip().splitlines()[0]}"

    @property
    def done(self) -> bool:
        """Every image is proven exact, or the budget is spent."""
        return self.clock.left <= 0 or any(c.certified == self.observation.batch for c in self.candidates)


def reconstruct(observation: Observation, settings: Settings, generator: torch.Generator) -> Reconstruction:
    """Attack one observation within the budget and choose what to hand in."""
    began = time.process_time()
    empty = _nothing_to_see(observation)
    labels = guess_labels(observation) if empty else recover_labels(observation)
    run = Attempt(observation, settings, generator, labels, Clock(settings.budget_s))
    mean = observation.prior.mean.expand(observation.batch, *observation.image_shape).clone()
    run.add([Candidate(mean, guess, "prior") for guess in labels.guesses])
    if empty:
        run.skipped["all"] = empty
    else:
        for stage in _stages(run):
            stage()
            if run.done:
                break
    pool = [c for c in run.candidates if c.method != "prior"] if settings.method != "auto" else run.candidates
    chosen = select(pool or run.candidates, observation)
    rivals = [c for c in run.candidates if c is not chosen and c.method == chosen.method]
    notes = [f"labels: {labels.detail}", *observation.notes, *chosen.notes]
    if rivals:
        second = select(rivals, observation)
        notes.append(f"the two best restarts differ by {disagreement(chosen, second):.3f} (root mean square pixel)")
    return Reconstruction(
        images=chosen.images.detach().cpu(),
        labels=chosen.labels.detach().cpu(),
        method=chosen.method,
        certified=chosen.certified,
        residual=chosen.residual,
        est_psnr=chosen.est_psnr,
        seconds=time.process_time() - began,
        not_applicable=dict(run.skipped),
        notes=tuple(notes),
    )


def _nothing_to_see(observation: Observation) -> str | None:
    if not bool(torch.isfinite(observation.gradient).all()):
        return "the update holds values that are not finite"
    if observation.norm == 0:
        return "the update is zero"
    if observation.batch > MAX_BATCH:
        return f"{observation.batch} images are behind the update; {MAX_BATCH} are attacked at most"
    return None


def _stages(run: Attempt) -> Iterator[Callable[[], None]]:
    """The stages of the chosen method; lazily, so that each can look at what came before."""
    method, observation = run.settings.method, run.observation
    if method in ("auto", "analytic"):
        yield lambda: run.attempt("analytic", lambda y, _: analytic(observation, run.chain(), y))
    if method in ("auto", "cascade"):
        yield lambda: run.attempt("cascade", lambda y, _: cascade(observation, run.chain(), y))
    if method in ("auto", "map_gauss_newton"):
        yield lambda: _gauss_newton(run)
    if method == "auto":
        yield lambda: _batch_descent(run)
    if method in ("auto", "dlg"):
        yield lambda: _dlg(run)
    if method in ("auto", "inverting_gradients"):
        yield lambda: _inverting_gradients(run)


def _gauss_newton(run: Attempt) -> None:
    observation, auto = run.observation, run.settings.method == "auto"
    noisy = observation.noise_std > 0
    if auto and run.kinked and not noisy:
        run.skipped["map_gauss_newton"] = f"without noise it stalls at the kinks of {run.kinked}"
        if run.features is not None:
            known = run.features
            run.attempt("feature_inversion", lambda y, c: [invert_features(observation, known, y, c)], 0.25)
        return
    limit = COARSE_RANK if run.kinked or observation.relative_noise > 1 else None
    run.attempt("map_gauss_newton", lambda y, c: map_gauss_newton(observation, y, c, limit=limit), 0.6 if auto else 1.0)


def _batch_descent(run: Attempt) -> None:
    observation = run.observation
    wanted = observation.noise_std > 0 or not run.kinked
    if wanted and (observation.batch > 1 or "map_gauss_newton" in run.skipped):
        run.attempt("map_descent", lambda y, c: map_descent(observation, y, c, run.generator), 0.7)


def _dlg(run: Attempt) -> None:
    observation, auto = run.observation, run.settings.method == "auto"
    if auto and run.kinked:
        run.skipped["dlg"] = f"second derivatives vanish at {run.kinked}"
        return
    if auto and observation.noise_std > 0:
        run.skipped["dlg"] = "the noise is known: the maximum a posteriori estimate replaces it"
        return
    if auto and _solved(run):
        return
    joint = run.labels.source == "guessed" and observation.simulation.task != "multilabel"
    start = run.best_start() if auto and observation.batch > 1 else None
    seeds = 1 if start is not None else 2

    def method(labels: Tensor, clock: Clock) -> list[Candidate]:
        known = None if joint else labels
        return dlg(observation, known, clock, run.generator, start=start, seeds=seeds)

    run.attempt("dlg", method, 0.6 if auto else 1.0)


def _inverting_gradients(run: Attempt) -> None:
    observation, settings, auto = run.observation, run.settings, run.settings.method == "auto"
    noisy = observation.noise_std > 0 and (observation.relative_noise > NOISY or not run.kinked)
    if auto and (_solved(run) or noisy):
        return
    terms = Terms(tv=settings.tv)
    start, restarts, iterations = None, settings.restarts, settings.iterations
    if auto:
        terms = replace(terms, prior=PRIOR_WEIGHT, features=run.features)
        start = run.best_start()
        if start is None:
            start = prior_start(observation, run.generator)
        else:  # a good start: more of the same adds little
            restarts, iterations = 1, min(iterations, IMPROVING_STEPS)
    run.attempt(
        "inverting_gradients",
        lambda y, c: inverting_gradients(
            observation,
            y,
            c,
            run.generator,
            restarts=restarts,
            iterations=iterations,
            terms=terms,
            start=start,
        ),
    )


def _solved(run: Attempt) -> bool:
    return any(c.residual < SOLVED for c in run.candidates)
