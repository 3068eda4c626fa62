"""A round under secure aggregation: keys and shares before it, masked integers from each client, one opened sum."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsec.federation.hidden import Envelope, HiddenSum, Opened, agreed
from fedsec.types import Payload, RoundContext, Update

from . import shamir
from .fixedpoint import WIDE_BOUND, FixedPoint, Wide, Words
from .protocol import SEALED_BYTES, Client, Masked, PublicKeys, add, threshold, unmask

if TYPE_CHECKING:
    from .plugin import SecAgg

SECURITY_BITS = 128
"""Of X25519; seeds and AES keys have 256."""


class SecureSum(HiddenSum):
    """Σ w_k Δ_k of masked integers.

    This process plays all clients, and so holds a secret of each. Whatever a client does uses its own alone, and the
    server's part (`collect`, `protocol.unmask`) is given messages.
    """

    def __init__(self, settings: SecAgg) -> None:
        super().__init__("secagg", settings.plan, settings.min_clients)
        self.settings = settings
        self._sessions: Counter[bytes] = Counter()
        self._directory: tuple[bytes, dict[int, PublicKeys]] = (b"", {})

    @cached_property
    def _secrets(self) -> dict[int, bytes]:
        return {k: os.urandom(32) for k in self.clients}

    def __getstate__(self) -> dict[str, Any]:
        _ = self._secrets  # all processes have to play the same clients
        return self.__dict__

    # --- the client ------------------------------------------------------------------------------------------------

    @cached_property
    def code(self) -> FixedPoint:
        """How numbers become integers."""
        return FixedPoint(self.settings.bits, self.settings.max_abs, len(self.clients))

    def session(self, ctx: RoundContext) -> bytes:
        """Of a round and its participants; another one each time that the same round is asked for again."""
        base = agreed(ctx.seed, ctx.round, self._cohort(ctx), self.code)
        return agreed(base, self._sessions[base])

    agreement = session

    def _cohort(self, ctx: RoundContext) -> tuple[int, ...]:
        return self.clients if ctx.cohort is None else ctx.cohort

    def client(self, index: int, ctx: RoundContext) -> Client:
        """One client in the session of this round."""
        return Client(index, self._secrets[index], self.session(ctx), threshold(len(self._cohort(ctx))))

    def directory(self, ctx: RoundContext) -> dict[int, PublicKeys]:
        """Phase 1: client -> the keys that the server passes on to all."""
        session = self.session(ctx)
        if self._directory[0] != session:
            self._directory = session, {k: self.client(k, ctx).advertise() for k in self._cohort(ctx)}
        return self._directory[1]

    def encode(self, update: Update, ctx: RoundContext) -> Payload:
        """Phase 3: weigh, check the range, round to integers, mask."""
        start = time.process_time()
        values, buffers = self.vector(update)
        weight = self.weight(update.client)
        self.bounded(values, self.settings.max_abs, "values", "raise secagg:max_abs for all")
        self.bounded(buffers, WIDE_BOUND, "the buffers", "normalise the model's inputs")
        narrow, wide = self.code.encode(weight * values, np.append(weight * buffers, weight))
        masked = self.client(update.client, ctx).mask(narrow, wide, self.directory(ctx))
        body = [self.code.to_bytes(masked.narrow, masked.wide)]
        envelope = self.envelope(values.size, buffers.size, body, None, ctx)
        stages = {"mask": time.process_time() - start}
        return Payload(update.client, envelope, envelope.num_bytes + self.protocol_bytes(ctx), stages=stages)

    def protocol_bytes(self, ctx: RoundContext) -> int:
        """What a client sends beside its masked vector.

        Two keys and a commitment, a sealed pair of shares for each other client, and the shares that unmasking takes.
        """
        clients = len(self._cohort(ctx))
        return 96 + (clients - 1) * SEALED_BYTES + clients * shamir.SHARE_BYTES

    # --- the server ------------------------------------------------------------------------------------------------

    def needed(self, ctx: RoundContext) -> int:
        """The threshold, and never fewer than `min_clients`."""
        return max(self.min_clients, threshold(len(self._cohort(ctx))))

    def open(self, payloads: Sequence[Payload], ctx: RoundContext) -> tuple[Opened | None, dict[int, str]]:
        """Add up, let the survivors reveal their shares, and take the masks off."""
        total, rejected = self.collect(payloads)
        survivors = [p.client for p in payloads if p.client not in rejected]
        if total is None or len(survivors) < self.needed(ctx):
            return None, rejected
        start = time.process_time()
        keys, session = self.directory(ctx), self.session(ctx)
        dropped = [k for k in keys if k not in survivors]
        players = {k: self.client(k, ctx) for k in keys}
        dealt = {k: player.deal(keys) for k, player in players.items()}
        revealed = {}
        for k in survivors:
            players[k].receive({sender: sealed[k] for sender, sealed in dealt.items() if sender != k}, keys)
            revealed[k] = players[k].reveal(survivors, dropped)
        opened = unmask(total, dropped, keys, revealed, session, self.needed(ctx))
        self.spent("unmask", time.process_time() - start)
        self.openings += 1
        self._sessions[agreed(ctx.seed, ctx.round, self._cohort(ctx), self.code)] += 1
        values, wide = self.code.decode(opened.narrow, opened.wide)
        return Opened(np.concatenate([values, wide[:-1]]), float(wide[-1]), len(survivors)), rejected

    def collect(self, payloads: Sequence[Payload]) -> tuple[Masked | None, dict[int, str]]:
        """The sum of the masked vectors, which is all that the server has before it is unmasked."""
        total: Masked | None = None
        rejected: dict[int, str] = {}
        for payload in payloads:
            content: Envelope = payload.content
            start = time.process_time()
            try:
                narrow, wide = self._read(content)
            except ValueError as error:
                rejected[payload.client] = f"length: {error}"
                continue
            if total is None:
                total = Masked(narrow, wide)
            else:
                add(total, Masked(narrow, wide), 1)
            self.spent("server_add", time.process_time() - start)
        return total, rejected

    def _read(self, content: Envelope) -> tuple[Words, Wide]:
        return self.code.from_bytes(b"".join(content.body), content.values, content.buffers + 1)

    # --- the result ------------------------------------------------------------------------------------------------

    def twin(self) -> SecureSum:
        """With secrets of its own."""
        return SecureSum(self.settings)

    def report(self) -> Mapping[str, Any]:
        """Sizes, CPU seconds of each stage, errors, security, threshold."""
        if self.plan is None:
            return {}
        clients = len(self.clients)
        return {
            "scheme": f"masks/{self.settings.bits}",
            "security_bits": SECURITY_BITS,
            "key_topology": "pairwise",
            "threshold": max(self.min_clients, threshold(clients)),
            "fraction_encrypted": 1.0,
            **self.stage_seconds(),
            **self.measured_error(),
        }

    def notes(self) -> tuple[str, ...]:
        """Who has to collude, and what is not covered."""
        needed = threshold(len(self.clients))
        return (
            f"secagg: nobody holds a common key; the server and up to {needed - 1} of {len(self.clients)} hospitals "
            "together learn no more than the sum; any third may drop out",
            "secagg: keys are unsigned, a malicious server can impersonate clients; what the sum and the released "
            "model give away is not protected",
        )
