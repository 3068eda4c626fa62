"""What homomorphic and secure aggregation promise alike: the plain mean, nothing but the sum, and named faults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from fedsec.attack import Attack
from fedsec.config import expand
from fedsec.defense import Defense
from fedsec.errors import ConfigError, PayloadError
from fedsec.federation.assemble import build_stack
from fedsec.federation.hidden import Envelope
from fedsec.federation.seats import Seats
from fedsec.types import Peers, RoundContext, Seat, ServerView, Update
from tests.defenses import hidden_cases as cases

RULES: dict[str, dict[str, Any]] = {
    "he": {},
    "he-shared": {"topology": "shared"},
    "he-seal": {"backend": "seal"},
    "he-seal-keyholder": {"backend": "seal", "topology": "keyholder"},
    "secagg": {},
}
both = pytest.mark.parametrize("name", ["he", "secagg"])


def seats(label: str, **changes: Any) -> Seats:
    return cases.seats(label.partition("-")[0], **{**RULES[label], **changes})


@pytest.mark.parametrize("label", RULES)
def test_a_round_equals_the_plain_one(label: str) -> None:
    """Weights, the strategy's cap on them, and BatchNorm statistics included."""
    plain, _ = cases.train(cases.seats(None))
    hidden, records = cases.train(seats(label))
    assert not any(r.failed or r.flags for r in records)
    torch.testing.assert_close(hidden.params, plain.params, rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden.buffers, plain.buffers, rtol=0, atol=1e-5)
    assert not torch.allclose(plain.params, cases.toy.state(cases.seats(None)).params, atol=1e-3)


@pytest.mark.parametrize("label", ["he", "he-seal", "secagg"])
def test_processes_equal_serial(label: str) -> None:
    serial, _ = cases.train(seats(label))
    parallel, records = cases.train(seats(label), workers=2)
    assert not any(r.failed for r in records)
    torch.testing.assert_close(parallel.params, serial.params, rtol=0, atol=1e-6)


@both
def test_absent_clients_are_no_part_of_the_mean(name: str) -> None:
    plain, _ = cases.train(cases.seats(None), present=(0, 1, 2))
    hidden, records = cases.train(cases.seats(name), present=(0, 1, 2))
    assert not records[0].failed
    torch.testing.assert_close(hidden.params, plain.params, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class Watch(Attack):
    name: ClassVar[str] = "watch"
    seat: ClassVar[Seat] = "server"
    seen: Any = None

    def on_view(self, view: ServerView, ctx: RoundContext) -> None:
        self.seen.append(view)


@both
def test_the_view_holds_the_sum_alone(name: str) -> None:
    seen: list[ServerView] = []
    table = replace(cases.seats(name), attack=Watch(seen))
    start = cases.toy.state(table).params
    state, _ = cases.train(table, rounds=1)
    (update,) = seen[0].updates
    assert (update.client, update.num_samples, seen[0].clients_in_sum) == (-1, 0, 4)
    torch.testing.assert_close(start + update.delta, state.params, rtol=0, atol=1e-6)


@both
def test_a_payload_shows_neither_values_nor_weight(name: str) -> None:
    """Two uploads of the same update look unrelated, and beside ciphertexts only public sizes travel."""
    table = cases.seats(name)
    delta = torch.full((table.sharing.params.size,), 0.01)
    payloads = [table.aggregator.encode(Update(0, delta, 24), RoundContext(0, r, 2, 0)) for r in (1, 2)]
    for payload in payloads:
        assert payload.num_samples is None
        content = payload.content
        assert isinstance(content, Envelope)
        assert {k: v for k, v in vars(content).items() if isinstance(v, (int, float))} == {
            "values": delta.numel(),
            "buffers": 0,
        }
        assert content.clear is None
        assert table.aggregator.readable(payload) is None
    first, second = (np.frombuffer(p.content.body[0], np.uint8).astype(float) for p in payloads)
    size = min(len(first), len(second))
    tail = slice(size // 4, size // 2)  # no headers
    assert abs(np.corrcoef(first[tail], second[tail])[0, 1]) < 0.2
    assert first[tail].std() > 70  # uniform bytes have 73.9; the plaintext has one value


@both
def test_fewer_than_three_clients_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: 2 clients; it needs 3 or more .*: use --clients 3$"):
        cases.defense(name, (10, 20))


@both
def test_a_round_of_two_is_discarded_unopened(name: str) -> None:
    table = cases.seats(name)
    before = cases.toy.state(table).params
    state, records = cases.train(table, rounds=1, present=(0, 3))
    assert torch.equal(state.params, before)
    assert f"{name}: 2 usable payloads, fewer than 3: discarded unopened" in records[0].flags
    assert table.aggregator.openings == 0  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Send(Defense):
    """Client 1 sends something else."""

    name: ClassVar[str] = "send"
    protects: ClassVar[str] = "nothing"
    change: Any = None

    def on_upload(self, update: Update, ctx: RoundContext) -> Update:
        return self.change(update) if update.client == 1 else update


@dataclass(frozen=True)
class Forge(Attack):
    """So does a malicious one."""

    name: ClassVar[str] = "forge"
    seat: ClassVar[Seat] = "client"
    change: Any = None

    def controls(self, num_clients: int) -> frozenset[int]:
        return frozenset({1})

    def on_upload(self, update: Update, peers: Peers, ctx: RoundContext) -> Update:
        assert not peers.honest
        return self.change(update)


FAULTS = {
    "non_finite: 1 values are NaN or infinite, first in 0.weight": lambda u: replace(
        u, delta=u.delta.index_fill(0, torch.tensor([3]), float("nan"))
    ),
    "overflow: |1e+04| in 3.bias is above": lambda u: replace(
        u, delta=u.delta.index_fill(0, torch.tensor([u.delta.numel() - 1]), 1e4)
    ),
}


@both
@pytest.mark.parametrize("reason", FAULTS)
@pytest.mark.parametrize("malicious", [False, True])
def test_what_cannot_be_sent_is_named_and_the_round_goes_on(name: str, reason: str, malicious: bool) -> None:
    table = cases.seats(name, norm=False)
    change = FAULTS[reason]
    if malicious:
        table = replace(table, attack=Forge(change), malicious=frozenset({1}))
    else:
        table = replace(table, defenses=(Send(change), *table.defenses))
    reason = reason.replace("3.bias", "3.bias")
    state, records = cases.train(table, rounds=1)
    assert list(records[0].failed) == [1]
    assert reason in records[0].failed[1]
    plain, _ = cases.train(cases.seats(None, norm=False), rounds=1, present=(0, 2, 3))
    torch.testing.assert_close(state.params, plain.params, rtol=0, atol=2e-2)
    assert torch.isfinite(state.params).all()


@both
def test_a_forged_update_that_can_be_sent_counts_and_is_on_record(name: str) -> None:
    flip = Forge(lambda u: replace(u, delta=-u.delta, num_samples=10**6))
    table = replace(cases.seats(name), attack=flip, malicious=frozenset({1}))
    hidden, records = cases.train(table, rounds=1)
    assert records[0].tampering[1] == pytest.approx(2)
    lie = Forge(lambda u: replace(u, delta=-u.delta))
    plain, _ = cases.train(replace(cases.seats(None), attack=lie_seen(lie), malicious=frozenset({1})), rounds=1)
    torch.testing.assert_close(hidden.params, plain.params, rtol=0, atol=1e-5)  # the claimed size has no effect


def lie_seen(attack: Forge) -> Attack:
    """The same attack where honest updates can be seen."""

    @dataclass(frozen=True)
    class Seen(Forge):
        def on_upload(self, update: Update, peers: Peers, ctx: RoundContext) -> Update:
            return attack.change(update)

    return Seen(attack.change)


def payloads_of(table: Seats, count: int = 4) -> list[Any]:
    size = table.sharing.params.size
    deltas = [torch.full((size,), 0.01 * (k + 1)) for k in range(count)]
    return [table.aggregator.encode(Update(k, d, 1), RoundContext(0, 1, 2, k)) for k, d in enumerate(deltas)]


@pytest.mark.parametrize("label", RULES)
def test_damaged_payloads_and_strangers_are_named(label: str) -> None:
    table, other = seats(label), seats(label)
    payloads = payloads_of(table)
    body = bytearray(payloads[1].content.body[0])
    body[len(body) // 2] ^= 1
    spoilt = replace(payloads[1].content, body=(bytes(body), *payloads[1].content.body[1:]))
    faults = {
        "damaged: the payload does not match its checksum": replace(payloads[1], content=spoilt),
        "agreement: made with other keys, parameters or participants": payloads_of(other)[1],
        "type: the payload is Update, not an envelope": replace(payloads[1], content=Update(1, torch.zeros(3), 1)),
        "shape: (3, 0) entries": table.aggregator.encode(Update(1, torch.zeros(3), 1), RoundContext(0, 1, 2, 1)),
    }
    if label == "secagg":  # keys are of a session: other participants, not other objects, are strangers
        stranger = RoundContext(0, 1, 2, 1, cohort=(0, 1, 2))
        alien = table.aggregator.encode(Update(1, torch.zeros(3), 1), stranger)
        faults["agreement: made with other keys, parameters or participants"] = alien
    for reason, payload in faults.items():
        ctx = RoundContext(0, 1, 2)
        table.aggregator.begin({}, ctx)
        for item in (payloads[0], payload, *payloads[2:]):
            table.aggregator.accumulate(item, ctx)
        result = table.aggregator.finish(ctx)
        assert list(result.rejected) == [1]
        assert result.rejected[1].startswith(reason)
        assert result.delta is not None
        w = table.aggregator.weight  # type: ignore[attr-defined]
        expected = sum(w(k) * 0.01 * (k + 1) for k in (0, 2, 3)) / sum(w(k) for k in (0, 2, 3))
        torch.testing.assert_close(result.delta, torch.full_like(result.delta, expected), rtol=0, atol=1e-6)
        if label == "secagg":  # a session is used once
            table = seats(label)
            payloads = payloads_of(table)
            break


REFUSED = {
    "krum+{}": "krum and {0} both aggregate, and {0} hides individual updates from the server: choose one",
    "{}+dos": "dos and {0} both aggregate, and {0} hides individual updates from the server: choose one",
    "{}+norm_clip": "norm_clip and {0} both aggregate, and {0} hides individual updates from the server: choose one",
    "he+secagg": "secagg and he both aggregate",
}
ALLOWED = ("dp:noise_multiplier=1+{}", "norm_clip:bound=fixed,at=client+{}", "{}+int8", "gaussian:sigma=0.1+{}")


def stack(text: str) -> Any:
    (cell,) = [c for c in expand({"defense": [text]}) if c.defense]
    return build_stack(cell)


@both
@pytest.mark.parametrize("text", REFUSED)
def test_rules_that_compare_individuals_are_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stack(text.format(name))
    assert str(caught.value).startswith(REFUSED[text].format(name))
    assert "\n" not in str(caught.value)


@both
@pytest.mark.parametrize("text", ALLOWED)
def test_what_happens_at_the_client_composes(name: str, text: str) -> None:
    defenses, _, _ = stack(text.format(name))
    assert name in {d.name for d in defenses}


def test_norm_clip_at_the_client() -> None:
    clip = stack("norm_clip:bound=fixed,c=0.5,at=client+secagg")[0][0]
    long, short = torch.full((100,), 1.0), torch.full((100,), 0.01)
    ctx = RoundContext(0, 1, 1, 0)
    assert float(clip.on_upload(Update(0, long, 1), ctx).delta.norm()) == pytest.approx(0.5)
    assert clip.on_upload(Update(0, short, 1), ctx).delta is short
    assert clip.public_knowledge(0)["clip_norm"] == 0.5
    with pytest.raises(ConfigError, match="at=client needs bound=fixed"):
        stack("norm_clip:at=client")


@both
def test_every_run_says_what_it_cost_and_who_holds_which_key(name: str) -> None:
    table = cases.seats(name)
    cases.train(table, rounds=1)
    report = table.aggregator.report()
    assert {"scheme", "security_bits", "key_topology", "fraction_encrypted", "rms_error", "max_error"} <= report.keys()
    assert {k for k in report if k.endswith("_seconds")} >= {"server_add_seconds"}
    assert 0 < report["rms_error"] < report["max_error"] < 1e-5
    assert report["security_bits"] >= 128
    assert any("hospital" in note for note in table.aggregator.notes())


@both
def test_side_reports_would_travel_in_clear(name: str) -> None:
    table = cases.seats(name)
    update = Update(0, torch.zeros(3), 1, extras={"loss": torch.zeros(1)})
    with pytest.raises(ConfigError, match="side reports would travel unencrypted"):
        table.aggregator.encode(update, RoundContext(0, 1, 2, 0))
    assert not isinstance(PayloadError("x"), ConfigError)
