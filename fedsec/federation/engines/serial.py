"""One client after the other, in this process: the engine to debug with, and the one that is bit-reproducible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedsec.errors import FedsecError
from fedsec.federation.engines.base import ClientData, Engine, reason
from fedsec.federation.round import client_turn
from fedsec.federation.seats import Reply, Seats, Turn


class Serial(Engine):
    """Carries out turns in order. A timeout cannot interrupt a client here; `processes` can."""

    def __init__(self, seats: Seats, data: ClientData) -> None:
        self.seats = seats
        self.data = data

    def train(self, turns: Sequence[Turn]) -> list[Reply]:
        """All turns, one by one."""
        return list(self.stream(turns))

    def stream(self, turns: Sequence[Turn]) -> Iterator[Reply]:
        """One update at a time."""
        for turn in turns:
            try:
                reply = client_turn(self.seats, turn, *self.data[turn.client])
            except FedsecError:
                raise  # a wrong configuration is not one client's failure
            except Exception as error:
                reply = Reply(turn.client, None, failure=reason(error))
            yield reply
