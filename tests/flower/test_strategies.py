"""Every strategy over Flower's messages gives what it gives in one process: parameters, own states and side reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

flwr = pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsec[flower]'")

from fedsec.federation.composition import compose  # noqa: E402
from fedsec.federation.engines.flower import Flower, simulated_client  # noqa: E402
from fedsec.federation.engines.serial import Serial  # noqa: E402

from ..contract.test_strategies import ROWS, word  # noqa: E402
from ..strategies import small  # noqa: E402
from .grid import LocalGrid, Node  # noqa: E402


@pytest.mark.parametrize("name", ROWS)
def test_a_strategy_over_messages_equals_serial(name: str, tmp_path: Path) -> None:
    table, state = small.federation(compose(word(name)), norm=ROWS[name].norm)
    data, seen = small.clients(), list[Any]()
    path = str(tmp_path / "seats.pt")
    torch.save((table, data), path)
    grid = LocalGrid(
        {900 - k: Node(simulated_client(path), {"partition-id": k}, {}, bytes([k])) for k in range(len(data))}
    )
    with Flower(grid, len(data), timeout=60, poll=0.001) as engine:
        assert engine.gather(5.0) == []
        records = small.rounds(table, state, data, engine.train, 2, watch=seen.append)
    assert all(not r.failed for r in records), records[0].failed

    own, expected = small.federation(compose(word(name)), norm=ROWS[name].norm)
    views: list[Any] = []
    plain = small.rounds(own, expected, data, Serial(own, data).train, 2, watch=views.append)
    small.assert_same(state, expected)
    assert [r.upload_bytes for r in records] == [r.upload_bytes for r in plain]
    for here, there in zip(seen, views, strict=True):
        for a, b in zip(here.updates, there.updates, strict=True):
            assert a.client == b.client and a.extras.keys() == b.extras.keys()
            for key in a.extras:
                torch.testing.assert_close(a.extras[key], b.extras[key])
