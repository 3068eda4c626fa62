"""A strategy by its word, several pieces as one, and what may stand beside a strategy and what may not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fedsec import plugins
from fedsec.attack import Attack
from fedsec.defense import Aggregator, Defense, LocalStep
from fedsec.errors import ConfigError
from fedsec.federation.aggregate import WeightedMean
from fedsec.federation.desk import Desk, Index, Objective, ServerState, Setting, Site
from fedsec.federation.sharing import Sharing
from fedsec.federation.strategy import Label, Strategy
from fedsec.types import Descent, LocalRecipe, RoundContext, Wire

DECISIONS: Mapping[str, tuple[str, ...]] = {
    "which tensors stay": ("local_selectors", "sharing"),
    "the recipe": ("recipe",),
    "the weights": ("weights", "reweigh"),
    "the personal model": ("personal_model", "unseen_model", "final_epochs"),
    "what the server makes": ("serve", "received", "initial_side", "visible"),
    "what is trained from": ("begin", "prepare_model"),
    "the upload": ("report", "wire"),
}
"""Decisions that one piece alone may take, and the hooks that take them; objectives and steps are stacked."""


def compose(word: str) -> Strategy:
    """The strategy that a word such as `fedprox:mu=0.1` or `fedbn+fedprox` names.

    Raises:
        ConfigError: an unknown name or parameter, or two pieces that take the same decision.
    """
    pieces: list[Strategy] = [plugins.build("strategies", spec) for spec in plugins.parse_stack(word)]
    if not pieces:
        raise ConfigError("strategy=none: write local for clients that exchange nothing")
    return pieces[0] if len(pieces) == 1 else Composite.of(pieces)


@dataclass(frozen=True)
class Composite(Strategy):
    """Several pieces as one: each decision is taken by the only piece that takes it, objectives are stacked in order.

    Raises:
        ConfigError: two pieces take the same decision, a piece that stands alone, or the same piece twice.
    """

    name: ClassVar[str] = "composite"
    goal: ClassVar[str] = "several strategies as one"
    label: ClassVar[Label] = "ours"
    pieces: tuple[Strategy, ...] = ()

    @classmethod
    def of(cls, pieces: Sequence[Strategy]) -> Composite:
        """Check that the pieces do not contradict each other."""
        names = [p.name for p in pieces]
        if len(set(names)) < len(names):
            raise ConfigError(f"strategy {'+'.join(names)}: each piece stands once")
        for piece in pieces:
            if piece.shares_nothing or piece.own_rule:
                why = piece.own_rule or "no parameter leaves a client"
                raise ConfigError(f"strategy {'+'.join(names)}: {piece.name} stands alone ({why})")
        for decision, hooks in DECISIONS.items():
            takers = [p.name for p in pieces if overrides(p, hooks)]
            if len(takers) > 1:
                raise ConfigError(f"strategy {'+'.join(names)}: {' and '.join(takers)} both decide {decision}")
        weighing = next((p for p in pieces if overrides(p, ("weights",))), pieces[0])
        return cls(max_weight=weighing.max_weight, uniform=any(p.uniform for p in pieces), pieces=tuple(pieces))

    def __post_init__(self) -> None:
        """Take the pieces' declarations together: they are read from the instance like a class's own."""
        joined: dict[str, Any] = {
            "name": "+".join(p.name for p in self.pieces),
            "goal": "; ".join(p.goal for p in self.pieces),
            "source": "; ".join(dict.fromkeys(p.source for p in self.pieces)),
            "reports": tuple(r for p in self.pieces for r in p.reports),
            "personal": any(p.personal for p in self.pieces),
            "remembered": tuple(key for p in self.pieces for key in p.remembered),
            **{
                key: next((w for p in self.pieces if (w := getattr(p, key))), "")
                for key in ("individuals", "not_private", "server_seat")
            },
        }
        for key, value in joined.items():
            object.__setattr__(self, key, value)

    def _taker(self, hook: str) -> Strategy:
        return next((p for p in self.pieces if overrides(p, (hook,))), self.pieces[0])

    def prepare_model(self, model: nn.Module, setting: Setting) -> nn.Module:
        """Of the piece that changes the model."""
        return self._taker("prepare_model").prepare_model(model, setting)

    def auxiliary(self) -> tuple[str, ...]:
        """Of all pieces."""
        return tuple(prefix for p in self.pieces for prefix in p.auxiliary())

    def local_selectors(self) -> tuple[str, ...]:
        """Of the piece that keeps tensors."""
        return self._taker("local_selectors").local_selectors()

    def recipe(self, recipe: LocalRecipe) -> LocalRecipe:
        """Of the piece that changes it."""
        return self._taker("recipe").recipe(recipe)

    def initial_side(self, model: nn.Module, setting: Setting) -> dict[str, Tensor]:
        """Of the piece that serves."""
        return self._taker("initial_side").initial_side(model, setting)

    def begin(self, site: Site) -> None:
        """Of the piece that begins."""
        self._taker("begin").begin(site)

    def objective(self, site: Site, base: Objective) -> Objective:
        """Stacked, the first piece innermost."""
        for piece in self.pieces:
            base = piece.objective(site, base)
        return base

    def local_step(self, step: LocalStep, site: Site) -> LocalStep:
        """Stacked, the first piece innermost."""
        for piece in self.pieces:
            step = piece.local_step(step, site)
        return step

    def part(self, model: nn.Module, client: int) -> tuple[nn.Module, Mapping[str, Index]] | None:
        """Of the piece that cuts."""
        return self._taker("part").part(model, client)

    def descent(self) -> Descent:
        """Of the piece that has one."""
        return self._taker("descent").descent()

    def finish(self, site: Site) -> None:
        """All of them, in order."""
        for piece in self.pieces:
            piece.finish(site)

    def report(self, site: Site) -> dict[str, Tensor]:
        """Of the piece that reports."""
        return self._taker("report").report(site)

    def wire(self, site: Site) -> Wire | None:
        """Of the piece that shortens the upload."""
        return self._taker("wire").wire(site)

    @property
    def final_epochs(self) -> int:
        """Of the piece that trains on."""
        return max(p.final_epochs for p in self.pieces)

    def received(self, state: ServerState, client: int) -> Mapping[str, Tensor]:
        """Of the piece that serves."""
        return self._taker("received").received(state, client)

    def weights(self, sizes: Mapping[int, int | None]) -> dict[int, float]:
        """Of the piece that weighs, else by size or equal."""
        taker = self._taker("weights")
        return taker.weights(sizes) if overrides(taker, ("weights",)) else Strategy.weights(self, sizes)

    def valid_report(self, extras: Mapping[str, Tensor]) -> str | None:
        """Of the piece that reports."""
        return self._taker("valid_report").valid_report(extras)

    def reweigh(
        self, weights: Mapping[int, float], reports: Mapping[int, Mapping[str, Tensor]], ctx: RoundContext
    ) -> dict[int, float]:
        """Of the piece that weighs."""
        return self._taker("reweigh").reweigh(weights, reports, ctx)

    def serve(self, desk: Desk) -> None:
        """Of the piece that serves."""
        self._taker("serve").serve(desk)

    def personal_model(
        self, model: nn.Module, sharing: Sharing, client: int, state: ServerState, images: Tensor
    ) -> nn.Module:
        """Of the piece that is personal."""
        return self._taker("personal_model").personal_model(model, sharing, client, state, images)

    def unseen_model(self, model: nn.Module, sharing: Sharing, state: ServerState, images: Tensor) -> nn.Module:
        """Of the piece that knows."""
        return self._taker("unseen_model").unseen_model(model, sharing, state, images)


def overrides(piece: Strategy, hooks: Sequence[str]) -> bool:
    """A piece brings its own form of one of these hooks."""
    return any(getattr(type(piece), hook) is not getattr(Strategy, hook) for hook in hooks)


def check_rule(strategy: Strategy, rule: Aggregator, names: Sequence[str]) -> None:
    """Hold a strategy against the stack's rule before anything runs.

    Raises:
        ConfigError: the rule hides what the strategy needs, or it would not be the strategy's rule that combines.
    """
    stack = "+".join(names)
    if strategy.individuals and not rule.sees_individuals:
        raise ConfigError(f"{strategy.name}: {strategy.individuals}; {stack} hides single updates. Drop one of the two")
    if strategy.reports and not rule.sees_individuals:
        told = ", ".join(r.name for r in strategy.reports)
        raise ConfigError(
            f"{strategy.name}: its side reports ({told}) would travel in clear beside what {stack} hides; choose a "
            "strategy without reports (fedsec list strategies -v says which), or drop the defense"
        )
    if strategy.own_rule and not isinstance(rule, WeightedMean):
        raise ConfigError(f"{strategy.name}: {strategy.own_rule}; {stack} brings another rule. Drop one of the two")


def check_seat(strategy: Strategy, attack: Attack) -> None:
    """Refuse a curious server where there is none.

    Raises:
        ConfigError: the strategy has no server to sit at, or no parameter reaches it.
    """
    if strategy.shares_nothing and attack.reads_parameters and attack.seat != "client":
        raise ConfigError(
            f"{attack.name}: under {strategy.name} no parameter leaves a client and no model is released; what else "
            "leaves is read by --attack extras"
        )
    if strategy.server_seat and attack.seat in ("server", "malicious-server"):
        raise ConfigError(f"{attack.name}: {strategy.server_seat}")


def check_optimizer(optimizer: str, attack: Attack) -> None:
    """Refuse an attack that would look harmless for want of a gradient.

    Raises:
        ConfigError: the clients' optimiser is adaptive, and the attack needs plain SGD.
    """
    if attack.needs_sgd and optimizer != "sgd":
        raise ConfigError(
            f"{attack.name}: rebuilds images from SGD's updates, and is not built for those of {optimizer}, "
            "which give away the signs of the gradient at least: a low score would prove nothing. Use optimizer=sgd"
        )


def check_privacy(strategy: Strategy, claiming: Sequence[Defense]) -> None:
    """Refuse an epsilon that would not hold.

    Raises:
        ConfigError: something leaves without noise, or moves the update past the clipping of single images.
    """
    for defense in claiming:
        if strategy.reports:
            told = "; ".join(f"{r.name} ({r.tells})" for r in strategy.reports)
            raise ConfigError(
                f"{defense.name}: {strategy.name} also sends {told}, without noise, which leaves no epsilon"
            )
        if strategy.not_private and type(defense).local_step is not Defense.local_step:
            raise ConfigError(
                f"{defense.name}: {strategy.name}: {strategy.not_private}, so that clipping each image's gradient "
                "bounds nothing; use dp_client, or gaussian with clip, which bound the whole update"
            )


def leaves(strategy: Any) -> tuple[str, ...]:
    """What leaves the hospital beyond parameters, one line each."""
    reports = tuple(f"{r.name}: {r.tells}" for r in strategy.reports)
    return (*reports, f"buffers: {strategy.statistics}") if strategy.statistics else reports


def composes(strategy: Any) -> tuple[str, ...]:
    """Which kinds of defenses stand beside a strategy, and why the others do not."""
    kinds: list[tuple[str, Callable[[], str]]] = [
        ("noise or compression of updates", lambda: "" if not strategy.shares_nothing else "no update leaves"),
        ("dp (per image)", lambda: strategy.not_private or _reported(strategy)),
        ("he, secagg", lambda: strategy.individuals or strategy.own_rule or _reported(strategy)),
        ("robust rules", lambda: strategy.own_rule or ("no update leaves" if strategy.shares_nothing else "")),
    ]
    return tuple(f"{kind}: {'no, ' + why if (why := reason()) else 'yes'}" for kind, reason in kinds)


def _reported(strategy: Any) -> str:
    return f"its reports ({', '.join(r.name for r in strategy.reports)}) travel in clear" if strategy.reports else ""
