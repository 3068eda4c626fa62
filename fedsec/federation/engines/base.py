"""What an engine is: something that carries out clients' turns and says which of them failed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from torch import Tensor

from fedsec.federation.seats import Reply, Turn
from fedsec.types import sorted_by_client

ClientData = tuple[tuple[Tensor, Tensor], ...]
"""One (images, labels) pair a client: images (n, C, H, W) float32 in [0, 1]."""


class Engine(ABC):
    """Runs turns; results do not depend on which engine did it, nor on its order."""

    @abstractmethod
    def train(self, turns: Sequence[Turn]) -> list[Reply]:
        """Carry out all turns. A turn that fails gives a reply with its reason; it never raises for one client."""

    def stream(self, turns: Sequence[Turn]) -> Iterator[Reply]:
        """The same replies one by one in client order; engines that can keep only a few of them in memory."""
        yield from sorted_by_client(self.train(turns))

    def close(self) -> None:
        """Free what the engine holds."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def reason(error: BaseException) -> str:
    """One line for a failure."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
