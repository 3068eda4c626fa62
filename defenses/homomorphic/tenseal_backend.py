"""CKKS through TenSEAL's vectors: public-key encryption out of the box, one real number a slot."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import tenseal
from tenseal.enc_context import ENCRYPTION_TYPE

from .parameters import Parameters
from .scheme import Adder, Encryptor, Keys, Opener

Vector = npt.NDArray[np.float64]


def generate(parameters: Parameters) -> Keys:
    """Fresh keys. Relinearisation keys, which TenSEAL always makes and ships unless told not to, stay behind."""
    kind = ENCRYPTION_TYPE.SYMMETRIC if parameters.symmetric else ENCRYPTION_TYPE.ASYMMETRIC
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, parameters.degree, coeff_mod_bit_sizes=list(parameters.primes), encryption_type=kind
    )
    context.global_scale = 2.0**parameters.scale_bits
    public = _serialise(context, secret=False)
    secret = _serialise(context, secret=True)
    return Keys(server=public, client=secret if parameters.symmetric else public, secret=secret)


def _serialise(context: Any, *, secret: bool) -> bytes:
    flags = {"save_galois_keys": False, "save_relin_keys": False}
    return bytes(context.serialize(save_public_key=True, save_secret_key=secret, **flags))


class TensealEncryptor(Encryptor):
    """A client."""

    def __init__(self, parameters: Parameters, key: bytes) -> None:
        self._context = tenseal.context_from(key)

    def encrypt(self, block: Vector) -> Any:
        """One ciphertext of `slots` numbers: TenSEAL's warnings about longer ones are never printed."""
        return tenseal.ckks_vector(self._context, tenseal.plain_tensor(block.tolist(), dtype="float"))

    def serialise(self, ciphertext: Any) -> bytes:
        """As it travels."""
        return bytes(ciphertext.serialize())


class TensealAdder(Adder):
    """The server: it holds no secret key."""

    def __init__(self, parameters: Parameters, key: bytes) -> None:
        self.context = tenseal.context_from(key)

    def load(self, data: bytes) -> Any:
        """One ciphertext; RuntimeError or ValueError where it is none."""
        return tenseal.ckks_vector_from(self.context, data)

    def add(self, total: Any, part: Any) -> Any:
        """Add in place."""
        total += part
        return total

    def serialise(self, total: Any) -> bytes:
        """A summed ciphertext, as it goes to the key holder."""
        return bytes(total.serialize())


class TensealOpener(Opener):
    """The key holder."""

    def __init__(self, parameters: Parameters, key: bytes) -> None:
        self._context = tenseal.context_from(key)

    def decrypt(self, data: bytes) -> Vector:
        """(slots,) of one summed ciphertext."""
        return np.array(tenseal.ckks_vector_from(self._context, data).decrypt())
