"""What a CKKS backend is: key generation, and one class for each of the three roles.

The roles never share an object: what a server is built from cannot decrypt, whatever it calls.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .parameters import Parameters

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Keys:
    """Serialised contexts, one a role."""

    server: bytes
    """Parameters and, where there is one, the public key; no secret, Galois or relinearisation key."""
    client: bytes = field(repr=False)
    """What a client encrypts with: the public key, or the secret one where all hospitals share it."""
    secret: bytes = field(repr=False)
    """What the key holder decrypts with."""
    identity: bytes = field(default_factory=lambda: os.urandom(16))
    """Public and random: tells payloads under other keys apart, also where the server holds no key at all."""


class Encryptor(ABC):
    """A client."""

    @abstractmethod
    def encrypt(self, block: Vector) -> Any:
        """One ciphertext of a block (slots,)."""

    @abstractmethod
    def serialise(self, ciphertext: Any) -> bytes:
        """As it travels."""


class Adder(ABC):
    """The server."""

    @abstractmethod
    def load(self, data: bytes) -> Any:
        """One ciphertext; RuntimeError or ValueError where it is none."""

    @abstractmethod
    def add(self, total: Any, part: Any) -> Any:
        """Their sum, in the place of `total`."""

    @abstractmethod
    def serialise(self, total: Any) -> bytes:
        """A summed ciphertext, as it goes to the key holder."""


class Opener(ABC):
    """The key holder."""

    @abstractmethod
    def decrypt(self, data: bytes) -> Vector:
        """(slots,) of one summed ciphertext."""


@dataclass(frozen=True)
class Scheme:
    """One backend with one set of parameters."""

    parameters: Parameters

    @property
    def _roles(self) -> tuple[Any, type[Encryptor], type[Adder], type[Opener]]:
        if self.parameters.backend == "seal":
            from . import seal_backend as seal

            return seal.generate, seal.SealEncryptor, seal.SealAdder, seal.SealOpener
        from . import tenseal_backend as high

        return high.generate, high.TensealEncryptor, high.TensealAdder, high.TensealOpener

    def generate(self) -> Keys:
        """Fresh keys from the operating system's randomness."""
        keys: Keys = self._roles[0](self.parameters)
        return keys

    def encryptor(self, key: bytes) -> Encryptor:
        """A client with `Keys.client`."""
        return self._roles[1](self.parameters, key)  # type: ignore[call-arg]

    def adder(self, key: bytes) -> Adder:
        """A server with `Keys.server`."""
        return self._roles[2](self.parameters, key)  # type: ignore[call-arg]

    def opener(self, key: bytes) -> Opener:
        """A key holder with `Keys.secret`."""
        return self._roles[3](self.parameters, key)  # type: ignore[call-arg]
