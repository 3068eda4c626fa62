"""A round under homomorphic encryption: clients encrypt, the server adds what it cannot read, the key holder opens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsec.federation.hidden import Envelope, HiddenSum, Opened, agreed
from fedsec.types import Payload, RoundContext, Update

from .keyholder import TOPOLOGIES, KeyHolder, flood_std
from .packing import count_blocks, pack
from .parameters import SECURITY_BITS, Parameters, choose
from .scheme import Keys, Scheme
from .selection import clear_entries
from .workers import Workers

if TYPE_CHECKING:
    from .plugin import HE

BUFFER_UNIT = 64.0
"""Normalisation statistics are far larger than updates: they are encrypted as multiples of this."""


class HomomorphicSum(HiddenSum):
    """Σ w_k Δ_k over CKKS ciphertexts.

    Args:
        settings: the defense. keys: where they exist already; else made when they are first needed.
    """

    def __init__(self, settings: HE, keys: Keys | None = None) -> None:
        super().__init__("he", settings.plan, settings.min_clients)
        self.settings = settings
        self._keys = keys
        self._keygen_seconds = 0.0
        self._public: dict[str, Any] = {}

    @cached_property
    def parameters(self) -> Parameters:
        """The agreed set."""
        s = self.settings
        primes = tuple(int(bits) for bits in s.primes.split("-")) if s.primes else None
        return choose(s.backend, s.held == "shared", len(self.clients), s.max_abs, s.degree, primes)

    @cached_property
    def scheme(self) -> Scheme:
        """The backend with its parameters."""
        return Scheme(self.parameters)

    @property
    def keys(self) -> Keys:
        """Made once a run."""
        if self._keys is None:
            start = time.process_time()
            self._keys = self.scheme.generate()
            self._keygen_seconds = time.process_time() - start
        return self._keys

    def __getstate__(self) -> dict[str, Any]:
        """What a client's process is sent: never the secret key, unless all hospitals share it."""
        keys = self.keys
        kept = ("name", "plan", "min_clients", "settings", "_device")
        state = {name: getattr(self, name) for name in kept}
        secret = keys.secret if self.settings.held == "shared" else b""
        return state | {"_keys": replace(keys, secret=secret)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        HomomorphicSum.__init__(self, state["settings"], state["_keys"])
        self.__dict__.update(state)

    # --- the client ------------------------------------------------------------------------------------------------

    @cached_property
    def workers(self) -> Workers:
        """Where clients encrypt."""
        return Workers(self.scheme, self.keys.client, self.settings.workers)

    @cached_property
    def _clear_of_layout(self) -> Tensor | None:
        return None if self._plan.layout is None else clear_entries(self.settings.select, self._plan.layout)

    def clear_mask(self, size: int) -> Tensor | None:
        """(size,) true where an entry travels in clear; None: all are encrypted, as in a model of another size."""
        mask = self._clear_of_layout
        return mask if mask is not None and mask.numel() == size else None

    def agreement(self, ctx: RoundContext) -> bytes:
        """Parameters, public keys, and how the entries are laid out."""
        plan = self._plan
        names = None if plan.layout is None else plan.layout.names
        return agreed(self.parameters, self.keys.identity, names, len(self.clients), self.settings.select)

    def encode(self, update: Update, ctx: RoundContext) -> Payload:
        """Client: weigh, check the range, pack, encrypt."""
        values, buffers = self.vector(update)
        weight = self.weight(update.client)
        mask = self.clear_mask(values.size)
        clear = None
        if mask is not None:
            clear = torch.where(mask, update.delta.detach().cpu() * weight, 0.0)
        self.bounded(values, self.settings.max_abs, "values", "raise he:max_abs for all")
        self.bounded(buffers / BUFFER_UNIT, self.settings.max_abs, "the buffers", "raise he:max_abs for all")
        hidden = values if mask is None else values[~mask.numpy()]
        whole = weight * np.concatenate([hidden, buffers / BUFFER_UNIT])
        body, stages = self.workers.encrypt(pack(whole, weight, self.parameters.slots))
        envelope = self.envelope(values.size, buffers.size, body, clear, ctx)
        in_clear = 0 if mask is None else 4 * int(mask.sum())
        return Payload(update.client, envelope, envelope.num_bytes + in_clear, stages=stages)

    # --- the server ------------------------------------------------------------------------------------------------

    def readable(self, payload: Payload) -> Update | None:
        """The part in clear, where there is one; the server is taken to know the client's weight."""
        content = payload.content
        if not isinstance(content, Envelope) or content.clear is None:
            return None
        return Update(payload.client, content.clear / max(self.weight(payload.client), 1e-30), 0)

    def open(self, payloads: Sequence[Payload], ctx: RoundContext) -> tuple[Opened | None, dict[int, str]]:
        """Add up ciphertexts, and have the sums opened."""
        adder = self.scheme.adder(self.keys.server)
        first: Envelope = payloads[0].content
        mask = self.clear_mask(first.values)
        hidden = first.values + first.buffers - (0 if mask is None else int(mask.sum()))
        sums: list[Any] = []
        rejected: dict[int, str] = {}
        clear = torch.zeros(first.values)
        for payload in payloads:
            try:
                with self._timed("server_load"):
                    parts = [adder.load(data) for data in payload.content.body]
                if len(parts) != count_blocks(hidden, self.parameters.slots):
                    raise ValueError(f"{len(parts)} ciphertexts")
            except (RuntimeError, ValueError) as error:
                rejected[payload.client] = f"ciphertext: not usable ({error})"
                continue
            with self._timed("server_add"):
                sums = [adder.add(s, p) for s, p in zip(sums, parts, strict=True)] if sums else parts
            if payload.content.clear is not None:
                clear += payload.content.clear
        clients = len(payloads) - len(rejected)
        if clients < self.min_clients:
            return None, rejected
        with self._timed("decrypt"):
            total, weight = self.keyholder.open([adder.serialise(s) for s in sums], hidden, clients)
        self.openings += 1
        whole = np.empty(first.values + first.buffers)
        where = np.ones(first.values, dtype=bool) if mask is None else ~mask.numpy()
        whole[: first.values][where] = total[: int(where.sum())]
        whole[: first.values][~where] = clear.double().numpy()[~where]
        whole[first.values :] = total[int(where.sum()) :] * BUFFER_UNIT
        return Opened(whole, weight, clients), rejected

    @cached_property
    def keyholder(self) -> KeyHolder:
        """The one object that has the secret key; it is not part of what the server is built from."""
        return KeyHolder(self.scheme, self.keys.secret, self.min_clients, self.flood_std)

    @property
    def flood_std(self) -> float:
        """Of the noise on an opened sum; 0 where none was asked for."""
        security = self.settings.flood_lambda
        error = self.parameters.rms_error * len(self.clients) ** 0.5
        return 0.0 if security is None else flood_std(security, self._plan.rounds, error)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.spent(stage, time.process_time() - start)

    # --- the result ------------------------------------------------------------------------------------------------

    def twin(self) -> HomomorphicSum:
        """Same keys, nothing counted."""
        return HomomorphicSum(self.settings, self.keys)

    def report(self) -> Mapping[str, Any]:
        """Sizes, CPU seconds of each stage, errors, security, keys."""
        if self.plan is None:
            return {}
        size = None if self.plan.layout is None else self.plan.layout.size
        mask = None if size is None else self.clear_mask(size)
        return {
            "scheme": f"ckks/{self.settings.backend}",
            "degree": self.parameters.degree,
            "modulus_bits": self.parameters.modulus_bits,
            "scale_bits": self.parameters.scale_bits,
            "security_bits": SECURITY_BITS,
            "key_topology": self.settings.held,
            "public_context_bytes": len(self.keys.server),
            "fraction_encrypted": 1.0 if mask is None else 1.0 - float(mask.float().mean()),
            "flood_lambda": self.settings.flood_lambda or 0,
            "keygen_seconds": round(self._keygen_seconds, 6),
            **self.stage_seconds(),
            **self.measured_error(),
        }

    def notes(self) -> tuple[str, ...]:
        """Who holds which key, and what the sum itself tells."""
        p = self.parameters
        notes = [
            f"he: {TOPOLOGIES[self.settings.held]}",
            f"he: at least {SECURITY_BITS} bits of security (classical estimate: {p.modulus_bits} bits of primes at "
            f"degree {p.degree}); what the sum and the released model give away is not protected",
        ]
        if (self.settings.flood_lambda or 0) < 30:
            notes.append(
                "he: whoever sees a ciphertext and the exact decryption of its sum learns about the key (Li, "
                f"Micciancio 2021): sums are opened with {self.settings.flood_lambda or 'no'} bits of flooding; for a "
                "server that is not trusted with that, set flood_lambda=30 or more"
            )
        if self.clear_mask(self._plan.layout.size if self._plan.layout else 0) is not None:
            notes.append("he: a part travels in clear: run --attack gradinversion, which is given exactly that part")
        return tuple(notes)
