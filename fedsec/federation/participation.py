"""Which clients take part in a round."""

from __future__ import annotations

from dataclasses import dataclass

from fedsec.errors import ConfigError
from fedsec.plugins import PluginSpec
from fedsec.types import RoundContext


@dataclass(frozen=True)
class Participation:
    """Full (`fraction` 1), a fixed fraction drawn each round, or each client present with probability `p`."""

    fraction: float = 1.0
    p: float | None = None

    @classmethod
    def parse(cls, text: str) -> Participation:
        """Read `full`, a fraction such as `0.5`, or `intermittent:p=0.8`."""
        spec = PluginSpec.parse(text)
        try:
            if spec.name == "full" and not spec.params:
                return cls()
            if spec.name == "intermittent" and spec.params.keys() == {"p"}:
                value = float(spec.params["p"])
                if 0 < value <= 1:
                    return cls(p=value)
            elif not spec.params and 0 < float(spec.name) <= 1:
                return cls(fraction=float(spec.name))
        except ValueError:
            pass
        raise ConfigError(f"participation={text}: write full, a fraction in (0, 1], or intermittent:p=0.8")

    def expected(self, num_clients: int) -> float:
        """How many clients take part in a round on average."""
        return num_clients * self.p if self.p is not None else max(1, round(self.fraction * num_clients))

    def select(self, num_clients: int, ctx: RoundContext) -> list[int]:
        """The clients of this round, sorted; never empty."""
        rng = ctx.numpy("participation")
        if self.p is not None:
            present = [k for k in range(num_clients) if rng.random() < self.p]
            return present or [int(rng.integers(num_clients))]
        count = max(1, round(self.fraction * num_clients))
        return sorted(int(k) for k in rng.choice(num_clients, size=count, replace=False))
