"""Which clients take part in a round: a pure function of the seed and the round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fedsec.errors import ConfigError
from fedsec.plugins import PluginSpec
from fedsec.types import RoundContext

FORMS = (
    "full, a fraction in (0, 1], intermittent:p=0.8, leave:CLIENT=ROUND,…, join:CLIENT=ROUND,… or "
    "flaky:drop=0.1,back=0.5"
)


@dataclass(frozen=True)
class Participation:
    """Full (`fraction` 1), a fixed fraction drawn each round, each client with probability `p`, or a schedule.

    Clients that leave or join, and lines that fail: after Sáinz-Pardo Díaz and López García 2023. An absent client is
    skipped: the weights are shared by those present, and what it keeps for itself waits for it.
    """

    fraction: float = 1.0
    p: float | None = None
    leaves: Mapping[int, int] = field(default_factory=dict)
    """Client -> the first round without it."""
    joins: Mapping[int, int] = field(default_factory=dict)
    """Client -> its first round."""
    drop: float | None = None
    """Flaky lines: probability that a client present in one round is absent in the next."""
    back: float = 1.0
    """Flaky lines: probability that an absent client is back in the next round."""

    @classmethod
    def parse(cls, text: str) -> Participation:
        """Read one of `FORMS`.

        Raises:
            ConfigError: none of them.
        """
        spec = PluginSpec.parse(text)
        readers: dict[str, Callable[[Mapping[str, str]], Participation | None]] = {
            "full": lambda params: None if params else cls(),
            "intermittent": _intermittent,
            "leave": lambda params: cls(leaves=_rounds(params)) if params else None,
            "join": lambda params: cls(joins=_rounds(params)) if params else None,
            "flaky": _flaky,
        }
        try:
            if spec.name in readers:
                found = readers[spec.name](spec.params)
            else:
                found = cls(fraction=float(spec.name)) if not spec.params and 0 < float(spec.name) <= 1 else None
        except (ValueError, KeyError):
            found = None
        if found is None:
            raise ConfigError(f"participation={text}: write {FORMS}")
        return found

    def check(self, num_clients: int) -> None:
        """Hold a schedule against the federation.

        Raises:
            ConfigError: it names a client that does not exist, or nobody is there in round 1.
        """
        for client in (*self.leaves, *self.joins):
            if client >= num_clients:
                raise ConfigError(f"participation: client {client} does not exist; they are 0 to {num_clients - 1}")
        if not [k for k in range(num_clients) if self.leaves.get(k, 2) > 1 and self.joins.get(k, 1) <= 1]:
            raise ConfigError("participation: nobody is left in round 1; let one client join earlier")

    def expected(self, num_clients: int) -> float:
        """How many clients take part in a round on average; of those who leave or join, all are counted."""
        if self.p is not None:
            return num_clients * self.p
        if self.drop is not None:
            return num_clients * self.back / (self.back + self.drop)
        return max(1, round(self.fraction * num_clients))

    def select(self, num_clients: int, ctx: RoundContext) -> list[int]:
        """The clients of this round, sorted; never empty unless everybody has left."""
        rng = ctx.numpy("participation")
        if self.leaves or self.joins:
            everybody = range(num_clients)
            return [k for k in everybody if self.joins.get(k, 1) <= ctx.round < self.leaves.get(k, ctx.round + 1)]
        if self.drop is not None:
            return self._flaky(num_clients, ctx)
        if self.p is not None:
            present = [k for k in range(num_clients) if rng.random() < self.p]
            return present or [int(rng.integers(num_clients))]
        count = max(1, round(self.fraction * num_clients))
        return sorted(int(k) for k in rng.choice(num_clients, size=count, replace=False))

    def _flaky(self, num_clients: int, ctx: RoundContext) -> list[int]:
        """A two-state chain for each client, present in round 1 and walked from there, so that any round repeats."""
        assert self.drop is not None
        present = dict.fromkeys(range(num_clients), True)
        for number in range(2, ctx.round + 1):
            rng = replace(ctx, round=number).numpy("participation")
            draws = rng.random(num_clients)
            present = {k: draws[k] >= self.drop if here else draws[k] < self.back for k, here in present.items()}
        chosen = [k for k, here in present.items() if here]
        return chosen or [int(ctx.numpy("participation-rescue").integers(num_clients))]


def _intermittent(params: Mapping[str, str]) -> Participation | None:
    value = float(params["p"])
    return Participation(p=value) if params.keys() == {"p"} and 0 < value <= 1 else None


def _flaky(params: Mapping[str, str]) -> Participation | None:
    drop, back = float(params.get("drop", "0.1")), float(params.get("back", "0.5"))
    known = params.keys() <= {"drop", "back"} and 0 <= drop <= 1 and 0 < back <= 1
    return Participation(drop=drop, back=back) if known else None


def _rounds(params: Mapping[str, str]) -> dict[int, int]:
    found = {int(client): int(number) for client, number in params.items()}
    if any(client < 0 or number < 1 for client, number in found.items()):
        raise ValueError("clients count from 0, rounds from 1")
    return found
