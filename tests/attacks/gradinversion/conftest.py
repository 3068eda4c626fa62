"""Shared victims and data."""

from __future__ import annotations

from pathlib import Path

import pytest
from fedsec.attacks.gradinversion.prior import Prior
from torch import Tensor

from fedsec.findings import PublicData

from . import cases


@pytest.fixture(scope="session")
def blobs() -> PublicData:
    """128 smooth images of 16x16 pixels; the attacked ones come from another seed."""
    return cases.blobs(128)


@pytest.fixture(scope="session")
def blob_prior(blobs: PublicData) -> Prior:
    return cases.prior_of(blobs)


@pytest.fixture(scope="session")
def xrays(shared_data: Path) -> tuple[Tensor, Tensor]:
    return cases.load(shared_data)


@pytest.fixture(scope="session")
def xray_prior(xrays: tuple[Tensor, Tensor]) -> Prior:
    return cases.prior_of(cases.public_of(*xrays))


@pytest.fixture(scope="session")
def trained_lenet(xrays: tuple[Tensor, Tensor]) -> cases.Normalised:
    return cases.train(cases.lenet(), *xrays)
