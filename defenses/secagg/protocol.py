"""The phases of secure aggregation, seen from a client and from the server. Nothing here knows of models or rounds.

1. keys: every client advertises two public keys. 2. shares: it shares its mask key and its own seed among all.
3. mask: it sends its integers under masks. 4. unmask: survivors give shares of the seeds of those who sent, and of the
mask keys of those who did not; never both of one client.

Source: Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning", figure 4, for a
semi-honest server (keys are not signed).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsec.errors import PayloadError

from . import shamir
from .fixedpoint import Wide, Words

Kind = Literal["seed", "mask key"]
Revealed = Mapping[int, tuple[Kind, bytes]]
"""Client -> what one survivor gives to unmask it."""
NONCE = bytes(12)
"""Every key encrypts one message in its life."""
SEALED_BYTES = 2 * shamir.SHARE_BYTES + 16


@dataclass(frozen=True)
class PublicKeys:
    """What a client advertises: 32 bytes each."""

    mask: bytes
    share: bytes
    commitment: bytes
    """Digest of its seed: a wrong share is found before anything is opened with it."""


@dataclass(frozen=True)
class Masked:
    """Integers under masks."""

    narrow: Words
    wide: Wide


def threshold(clients: int) -> int:
    """t = max(⌊K/2⌋ + 1, ⌈2K/3⌉): a third may drop out, and t − 1 who collude with the server learn nothing."""
    return max(clients // 2 + 1, -(-2 * clients // 3))


def derive(secret: bytes, session: bytes, label: str) -> bytes:
    """HKDF-SHA256: 32 bytes for one session and one purpose."""
    return HKDF(hashes.SHA256(), 32, salt=session, info=f"fedsec secagg/{label}".encode()).derive(secret)


def keystream(key: bytes, values: int, wides: int) -> Masked:
    """AES-256 in counter mode over zeros; a key is used for one pair in one session only."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * values + 8 * wides))
    return Masked(np.frombuffer(stream, "<u4", values), np.frombuffer(stream, "<u8", wides, 4 * values))


@dataclass
class Client:
    """One client in one session.

    Args:
        index: its number. secret: 32 bytes of its own. session: public, never used twice. needed: t.
    """

    index: int
    secret: bytes = field(repr=False)
    session: bytes
    needed: int
    _given: dict[int, Kind] = field(default_factory=dict, repr=False)
    _shares: dict[int, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)

    @property
    def seed(self) -> bytes:
        """Of the mask that only survivors can take off."""
        return derive(self.secret, self.session, "seed")

    @property
    def mask_key(self) -> bytes:
        """The secret half of the key that masks are agreed with."""
        return derive(self.secret, self.session, "mask key")

    @property
    def share_key(self) -> bytes:
        """The secret half of the key that shares are encrypted with."""
        return derive(self.secret, self.session, "share key")

    def advertise(self) -> PublicKeys:
        """Phase 1."""
        return PublicKeys(public_half(self.mask_key), public_half(self.share_key), commitment(self.seed))

    def deal(self, keys: Mapping[int, PublicKeys]) -> dict[int, bytes]:
        """Phase 2: receiver -> encrypted shares of its seed and mask key.

        Raises:
            PayloadError: fewer than t clients advertised keys.
        """
        self._enough(keys, "advertised keys")
        points = [k + 1 for k in keys]
        seeds = shamir.split(self.seed, points, self.needed)
        masks = shamir.split(self.mask_key, points, self.needed)
        self._shares[self.index] = seeds[self.index + 1], masks[self.index + 1]
        return {
            k: AESGCM(self._sealing_key(self.index, k, keys[k].share)).encrypt(
                NONCE, seeds[k + 1] + masks[k + 1], self.session
            )
            for k in keys
            if k != self.index
        }

    def receive(self, sealed: Mapping[int, bytes], keys: Mapping[int, PublicKeys]) -> None:
        """Phase 2, the other side: keep the shares that others dealt to this client.

        Raises:
            PayloadError: one was tampered with, or made for somebody else.
        """
        for sender, data in sealed.items():
            try:
                opened = AESGCM(self._sealing_key(sender, self.index, keys[sender].share)).decrypt(
                    NONCE, data, self.session
                )
            except InvalidTag:
                raise PayloadError(f"client {self.index}: the share of client {sender} was tampered with") from None
            self._shares[sender] = opened[: shamir.SHARE_BYTES], opened[shamir.SHARE_BYTES :]

    def mask(self, narrow: Words, wide: Wide, keys: Mapping[int, PublicKeys]) -> Masked:
        """Phase 3: y_k = m_k + PRG(b_k) + Σ_{v>k} PRG(r_kv) − Σ_{v<k} PRG(r_kv).

        Args:
            keys: of the clients that dealt shares, its own included.

        Raises:
            PayloadError: fewer than t clients dealt shares.
        """
        self._enough(keys, "dealt shares")
        own = keystream(self.seed, narrow.size, wide.size)
        total = Masked(narrow + own.narrow, wide + own.wide)
        for other, public in keys.items():
            if other != self.index:
                pair = keystream(pair_seed(self.mask_key, public.mask, self.session), narrow.size, wide.size)
                add(total, pair, 1 if other > self.index else -1)
        return total

    def reveal(self, survivors: Collection[int], dropped: Collection[int]) -> dict[int, tuple[Kind, bytes]]:
        """Phase 4: client -> the one share that unmasking needs of it.

        Raises:
            PayloadError: the server asks for both secrets of one client, now or ever, or names too few survivors.
        """
        self._enough(survivors, "are named as survivors")
        asked: dict[int, Kind] = {**dict.fromkeys(survivors, "seed"), **dict.fromkeys(dropped, "mask key")}
        for k, kind in asked.items():
            if (k in survivors and k in dropped) or self._given.get(k, kind) != kind:
                raise PayloadError(f"client {self.index}: refuses to give both secrets of client {k}")
        self._given |= asked
        return {k: (kind, self._shares[k][kind == "mask key"]) for k, kind in asked.items() if k in self._shares}

    def _enough(self, clients: Collection[int], what: str) -> None:
        if len(clients) < self.needed:
            raise PayloadError(f"client {self.index}: {len(clients)} clients {what}, it needs {self.needed} to go on")

    def _sealing_key(self, sender: int, receiver: int, public: bytes) -> bytes:
        return derive(exchange(self.share_key, public), self.session, f"share {sender} to {receiver}")


def unmask(
    total: Masked,
    dropped: Collection[int],
    keys: Mapping[int, PublicKeys],
    revealed: Mapping[int, Revealed],
    session: bytes,
    needed: int,
) -> Masked:
    """Phase 4 at the server: take the masks off the sum of what the survivors of phase 3 sent, in place.

    Args:
        total: Σ y_k modulo 2^32 and 2^64. dropped: who dealt shares and then sent nothing.
        keys: of all who dealt shares. revealed: what each client still there gave in `Client.reveal`.

    Raises:
        PayloadError: fewer than t clients revealed their shares, or the shares fit no secret.
    """
    if len(revealed) < needed:
        raise PayloadError(f"{len(revealed)} clients gave their shares, {needed} are needed: nothing is opened")
    survivors = [k for k in keys if k not in dropped]
    for k in keys:
        secret = recover(k, revealed, needed)
        expected, got = (
            (keys[k].mask, public_half(secret)) if k in dropped else (keys[k].commitment, commitment(secret))
        )
        if got != expected:
            raise PayloadError(f"the secret of client {k} cannot be recovered: a share is wrong; nothing is opened")
        if k not in dropped:
            add(total, keystream(secret, total.narrow.size, total.wide.size), -1)
            continue
        for other in survivors:  # what `other` added for k is still in the sum
            pair = keystream(pair_seed(secret, keys[other].mask, session), total.narrow.size, total.wide.size)
            add(total, pair, -1 if k > other else 1)
    return total


def recover(client: int, revealed: Mapping[int, Revealed], needed: int) -> bytes:
    """The secret of this client that the revealed shares give.

    Raises:
        PayloadError: fewer than t shares, or they fit no secret.
    """
    shares = {giver + 1: given[client][1] for giver, given in revealed.items() if client in given}
    if len(shares) < needed:
        raise PayloadError(f"{len(shares)} shares of client {client}, {needed} are needed: nothing is opened")
    try:
        return shamir.combine(dict(list(shares.items())[:needed]))
    except ValueError as error:
        raise PayloadError(f"the secret of client {client} cannot be recovered: {error}") from None


def add(total: Masked, part: Masked, sign: int) -> None:
    """total ± part modulo 2^32 and 2^64, in place."""
    operation = np.add if sign > 0 else np.subtract
    operation(total.narrow, part.narrow, out=total.narrow)
    operation(total.wide, part.wide, out=total.wide)


def commitment(seed: bytes) -> bytes:
    """Tells nothing about 32 random bytes, and fits no others."""
    return hashlib.sha256(b"fedsec secagg/commitment" + seed).digest()


def public_half(private: bytes) -> bytes:
    """X25519."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def exchange(private: bytes, public: bytes) -> bytes:
    """The X25519 secret of two parties."""
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def pair_seed(private: bytes, public: bytes, session: bytes) -> bytes:
    """r_kv: the same from either side."""
    return derive(exchange(private, public), session, "pair")
