"""What travels comes out as it went in, and what cannot be read is one client's failure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsec.errors import ConfigError, RunError
from fedsec.federation.engines.messages import pack_replies, pack_turns, unpack_replies, unpack_turns
from fedsec.federation.hidden import Envelope
from fedsec.federation.seats import Reply, Turn
from fedsec.types import Payload, RoundContext, Update, Wire

CPU = torch.device("cpu")


def turn(client: int = 0, **changes: Any) -> Turn:
    ctx = RoundContext(7, 3, 9, cohort=(0, 1, 2))
    return replace(Turn(client, PARAMS, torch.zeros(0), ctx.for_client(client)), **changes)


PARAMS = torch.linspace(-1, 1, 5)


def test_turns_come_out_as_they_went_in() -> None:
    asked = [turn(0), turn(2, max_steps=0), turn(1, params=PARAMS + 1, local=torch.ones(2))]
    arrays, values = pack_turns(asked)
    for before, after in zip(asked, unpack_turns(arrays, values, CPU), strict=True):
        assert (after.client, after.ctx, after.max_steps) == (before.client, before.ctx, before.max_steps)
        assert torch.equal(after.params, before.params) and torch.equal(after.buffers, before.buffers)
        assert (after.local is None) == (before.local is None)


def test_the_common_broadcast_travels_once() -> None:
    arrays, _ = pack_turns([turn(k) for k in range(50)])
    assert sum(a.size for a in arrays.values()) == PARAMS.numel()


@given(st.floats(allow_nan=True), st.integers(0, 10**6), st.booleans(), st.integers(0, 3))
def test_replies_come_out_as_they_went_in(loss: float, samples: int, encoded: bool, extras: int) -> None:
    update = Update(
        0,
        torch.randn(5),
        samples,
        torch.ones(2),
        {f"e{i}": torch.full((i + 1,), 2.0) for i in range(extras)},
        Wire(3, 8),
    )
    content = Payload(0, update, 17, samples, stages={"mask": 0.5}) if encoded else update
    reply = Reply(0, content, None, loss, 4, 0.25, tampered=2)
    [after] = unpack_replies(*pack_replies([reply]), [turn(0)])
    inner = after.content.content if isinstance(after.content, Payload) else after.content
    assert isinstance(after.content, Payload) == encoded and isinstance(inner, Update)
    assert torch.equal(inner.delta, update.delta) and inner.num_samples == samples and inner.wire == Wire(3, 8)
    assert inner.buffers is not None and torch.equal(inner.buffers, torch.ones(2))
    assert {k: v.tolist() for k, v in inner.extras.items()} == {k: v.tolist() for k, v in update.extras.items()}
    assert (after.steps, after.seconds, after.tampered) == (4, 0.25, 2)
    assert after.loss == loss or (after.loss != after.loss and loss != loss)


def test_an_envelope_travels_as_bytes() -> None:
    sealed = Envelope(b"agreed", 5, 2, (b"\x00\xff", b""), b"digest", torch.arange(5.0))
    arrays, values = pack_replies([Reply(0, Payload(0, sealed, 40, stages={}))])
    assert values["0/body"] == [b"\x00\xff", b""] and set(arrays) == {"0/clear"}
    [after] = unpack_replies(arrays, values, [turn(0)])
    assert isinstance(after.content, Payload)
    opened = after.content.content
    assert replace(opened, clear=None) == replace(sealed, clear=None)
    assert torch.equal(opened.clear, torch.arange(5.0))


def test_what_a_client_claims_to_be_is_not_believed() -> None:
    update = Update(2, torch.zeros(5), 1)
    arrays, values = pack_replies([Reply(0, Payload(2, update, 20, 1))])
    [after] = unpack_replies(arrays, values, [turn(0)])
    assert isinstance(after.content, Payload)
    assert (after.client, after.content.client, after.content.content.client) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("0/num_bytes", "many"),
        ("0/num_bytes", -1),
        ("0/steps", 1.5),
        ("0/stages", "{not json"),
        ("0/stages", "[1]"),
        ("0/loss", "NaN or so"),
        ("0/wire", ["a"]),
        ("0/body", ["text"]),
        ("0/body", 3),
    ],
)
def test_garbage_is_that_clients_failure(name: str, value: Any) -> None:
    arrays, values = pack_replies([Reply(0, Payload(0, Update(0, torch.zeros(5), 1), 20, 1))])
    if name == "0/body":
        values |= {"0/agreement": b"", "0/digest": b"", "0/sizes": [1, 0]}
    [after] = unpack_replies(arrays, {**values, name: value}, [turn(0)])
    assert after.content is None and after.failure is not None and after.failure.startswith("garbage")


def test_an_empty_answer_and_foreign_arrays_are_failures() -> None:
    assert all(r.failure for r in unpack_replies({}, {}, [turn(0), turn(1)]))
    arrays, values = pack_replies([Reply(0, Payload(0, Update(0, torch.zeros(5), 1), 20, 1))])
    [after] = unpack_replies({**arrays, "0/delta": np.array(["text"])}, values, [turn(0)])
    assert after.failure is not None


def test_personal_tensors_must_fit() -> None:
    arrays, values = pack_replies([Reply(0, Payload(0, Update(0, torch.zeros(5), 1), 20, 1), torch.ones(3))])
    [uninvited] = unpack_replies(arrays, values, [turn(0)])
    [fits] = unpack_replies(arrays, values, [turn(0, local=torch.zeros(3))])
    assert uninvited.failure is not None and fits.failure is None


def test_a_wrong_configuration_stops_the_run_as_on_one_machine() -> None:
    with pytest.raises(ConfigError, match="no such layer"):
        unpack_replies(*pack_replies([ConfigError("no such layer")]), [turn(0)])
    with pytest.raises(RunError, match="hello"):  # a node cannot choose what is raised
        unpack_replies({}, {"error": ["SystemExit", "hello"]}, [turn(0)])


def test_payloads_of_unknown_kind_are_refused() -> None:
    with pytest.raises(RunError, match="engine=flower"):
        pack_replies([Reply(0, Payload(0, object(), 1))])
