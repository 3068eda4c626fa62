"""`--engine flower` on Flower's own simulation, with ray: starts, equals serial, ends, and leaves nothing behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsec[flower]'")
pytest.importorskip("ray", reason="ray is not installed: pip install 'fedsec[flower]'")

from fedsec.federation.engines.flower import simulate
from fedsec.federation.engines.serial import Serial
from fedsec.federation.round import run_round
from fedsec.types import RoundContext

from ..federation import toy

SIZES = (24, 17, 32)


def test_the_simulation_equals_serial_and_cleans_up() -> None:
    before = set(Path(tempfile.gettempdir()).glob("fedsec-flower-*"))
    seats = toy.seats(toy.network(norm=True))
    start = toy.state(seats)
    own = toy.seats(toy.network(norm=True))
    expected = toy.state(own)
    with simulate(seats, toy.clients(SIZES), None) as engine:
        assert sorted(engine.nodes) == [0, 1, 2]
        for number in (1, 2):
            ctx = RoundContext(0, number, 2)
            record = run_round(seats, start, range(3), ctx, engine.train)
            assert not record.failed
    plain = Serial(own, toy.clients(SIZES))
    for number in (1, 2):
        run_round(own, expected, range(3), RoundContext(0, number, 2), plain.train)
    assert float((start.params - expected.params).abs().max()) <= 1e-5
    assert torch.allclose(start.buffers, expected.buffers, atol=1e-5)
    assert set(Path(tempfile.gettempdir()).glob("fedsec-flower-*")) == before
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
