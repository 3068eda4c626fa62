"""CKKS through TenSEAL's low-level interface: one prime, no key switching, two real numbers a slot.

With the secret key, encryption in its one-argument form gives a ciphertext whose random half travels as a seed; the
two-argument form fills one that travels at full size. The binding reads and writes files only: these live in memory.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt
from tenseal import sealapi

from .parameters import Parameters
from .scheme import Adder, Encryptor, Keys, Opener

Vector = npt.NDArray[np.float64]


class MemoryFile:
    """A file without a name, in memory where the system has such a thing; else deleted with this object."""

    def __init__(self) -> None:
        self._file = None
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("fedsec")
            self._path = f"/proc/self/fd/{self._descriptor}"
        else:
            self._file = tempfile.NamedTemporaryFile(prefix="fedsec")  # noqa: SIM115
            self._descriptor, self._path = self._file.fileno(), self._file.name

    def dump(self, item: Any) -> bytes:
        """What `item.save` writes."""
        os.ftruncate(self._descriptor, 0)
        item.save(self._path)
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def load(self, item: Any, context: Any, data: bytes) -> Any:
        """`item` after its `load`; RuntimeError where the data are none."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
        item.load(context, self._path)
        return item

    def __del__(self) -> None:
        if self._file is None and hasattr(self, "_descriptor"):
            os.close(self._descriptor)
        elif self._file is not None:
            self._file.close()


def context_of(parameters: Parameters) -> Any:
    """The context that parameters alone define: it holds no key at all."""
    made = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    made.set_poly_modulus_degree(parameters.degree)
    made.set_coeff_modulus(sealapi.CoeffModulus.Create(parameters.degree, list(parameters.primes)))
    return sealapi.SEALContext(made, True, sealapi.SEC_LEVEL_TYPE.TC128)


def generate(parameters: Parameters) -> Keys:
    """Fresh keys; the server of a symmetric set needs none at all."""
    context, file = context_of(parameters), MemoryFile()
    made = sealapi.KeyGenerator(context)
    secret = file.dump(made.secret_key())
    if parameters.symmetric:
        return Keys(server=b"", client=secret, secret=secret)
    key = sealapi.PublicKey()  # the form without an argument returns a type that the binding does not know
    made.create_public_key(key)
    public = file.dump(key)
    return Keys(server=public, client=public, secret=secret)


class SealEncryptor(Encryptor):
    """A client."""

    def __init__(self, parameters: Parameters, key: bytes) -> None:
        context, self._file = context_of(parameters), MemoryFile()
        kind = sealapi.SecretKey if parameters.symmetric else sealapi.PublicKey
        self._symmetric = parameters.symmetric
        self._encryptor = sealapi.Encryptor(context, self._file.load(kind(), context, key))
        self._coder = sealapi.CKKSEncoder(context)
        self._scale = 2.0**parameters.scale_bits

    def encrypt(self, block: Vector) -> Any:
        """The first half of the block is the real part of the slots, the second the imaginary one."""
        plain, half = sealapi.Plaintext(), block.size // 2
        self._coder.encode((block[:half] + 1j * block[half:]).tolist(), self._scale, plain)
        if self._symmetric:
            return self._encryptor.encrypt_symmetric(plain)
        ciphertext = sealapi.Ciphertext()
        self._encryptor.encrypt(plain, ciphertext)
        return ciphertext

    def serialise(self, ciphertext: Any) -> bytes:
        """As it travels."""
        return self._file.dump(ciphertext)


class SealAdder(Adder):
    """The server: built from the public parameters alone."""

    def __init__(self, parameters: Parameters, key: bytes) -> None:
        self._context, self._file = context_of(parameters), MemoryFile()
        self._evaluator = sealapi.Evaluator(self._context)

    def load(self, data: bytes) -> Any:
        """One ciphertext, its random half grown from the seed; RuntimeError or ValueError where it is none."""
        return self._file.load(sealapi.Ciphertext(), self._context, data)

    def add(self, total: Any, part: Any) -> Any:
        """Add in place."""
        self._evaluator.add_inplace(total, part)
        return total

    def serialise(self, total: Any) -> bytes:
        """A summed ciphertext, as it goes to the key holder."""
        return self._file.dump(total)


class SealOpener(Opener):
    """The key holder."""

    def __init__(self, parameters: Parameters, key: bytes) -> None:
        self._context, self._file = context_of(parameters), MemoryFile()
        self._decryptor = sealapi.Decryptor(self._context, self._file.load(sealapi.SecretKey(), self._context, key))
        self._coder = sealapi.CKKSEncoder(self._context)

    def decrypt(self, data: bytes) -> Vector:
        """(slots,) of one summed ciphertext."""
        plain = sealapi.Plaintext()
        self._decryptor.decrypt(self._file.load(sealapi.Ciphertext(), self._context, data), plain)
        slots = np.array(self._coder.decode_complex(plain))
        return np.concatenate([slots.real, slots.imag])
