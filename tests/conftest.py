"""Shared by all tests: one thread (small convolutions are 10-50x slower with more on a busy machine), data lookup."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images; tests that need it skip where it is absent."""
    folder = os.environ.get("FEDSEC_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FEDSEC_DATA does not name a folder with the shared data sets")
    return Path(folder)
