"""Encryption in processes: TenSEAL never lets go of the interpreter lock, so that threads gain nothing.

In a federation whose clients already have a process each, a client encrypts in its own.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import numpy.typing as npt

from fedsec.machine import usable_cores

from .parameters import Parameters
from .scheme import Encryptor, Scheme

Vector = npt.NDArray[np.float64]
WORTH_IT = 512
"""Ciphertexts of one upload from which starting processes pays."""
CHUNK = 64
_encryptor: Encryptor | None = None


class Workers:
    """Encrypts an upload's blocks, in further processes where that pays and is possible.

    Args:
        count: processes; None: one for each core. They start with the first large upload.
    """

    def __init__(self, scheme: Scheme, key: bytes, count: int | None = None) -> None:
        self._scheme, self._key = scheme, key
        alone = multiprocessing.current_process().daemon  # such a process may have no children
        self._count = 1 if alone else count or usable_cores()
        self._pool: ProcessPoolExecutor | None = None
        self._own: Encryptor | None = None

    def encrypt(self, blocks: Vector) -> tuple[list[bytes], dict[str, float]]:
        """Serialised ciphertexts in order, and the CPU seconds of the two stages, whichever process spent them."""
        if self._count == 1 or len(blocks) < WORTH_IT:
            self._own = self._own or self._scheme.encryptor(self._key)
            return timed(self._own, blocks)
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._count, multiprocessing.get_context("forkserver"), _start, (self._scheme.parameters, self._key)
            )
        bodies: list[bytes] = []
        seconds = {"encrypt": 0.0, "serialise": 0.0}
        for part, spent in self._pool.map(_encrypt, np.array_split(blocks, -(-len(blocks) // CHUNK))):
            bodies += part
            seconds = {stage: seconds[stage] + spent[stage] for stage in seconds}
        return bodies, seconds

    def close(self) -> None:
        """Stop the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def timed(encryptor: Encryptor, blocks: Sequence[Vector] | Vector) -> tuple[list[bytes], dict[str, float]]:
    """Encrypt blocks here, one after the other: never more than one ciphertext is held unserialised."""
    bodies: list[bytes] = []
    seconds = {"encrypt": 0.0, "serialise": 0.0}
    for block in blocks:
        start = time.process_time()
        ciphertext = encryptor.encrypt(block)
        middle = time.process_time()
        bodies.append(encryptor.serialise(ciphertext))
        seconds["encrypt"] += middle - start
        seconds["serialise"] += time.process_time() - middle
    return bodies, seconds


def _start(parameters: Parameters, key: bytes) -> None:
    global _encryptor
    _encryptor = Scheme(parameters).encryptor(key)


def _encrypt(blocks: Vector) -> tuple[list[bytes], dict[str, float]]:
    assert _encryptor is not None
    return timed(_encryptor, blocks)
