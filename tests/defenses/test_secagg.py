"""Secure aggregation: exact integers, a third of the clients missing in any phase, and refusals."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
from fedsec.defenses.secagg import shamir
from fedsec.defenses.secagg.fixedpoint import WIDE_BOUND, FixedPoint
from fedsec.defenses.secagg.protocol import Client, Masked, PublicKeys, add, keystream, threshold, unmask
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsec.errors import PayloadError
from fedsec.types import RoundContext, Update
from tests.defenses import hidden_cases as cases

SESSION = b"one session only"


def test_the_field_is_prime() -> None:
    """Miller-Rabin to 40 bases, and large enough for any 32-byte secret."""
    p = shamir.PRIME
    assert p > 2**256
    odd, twos = p - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        x = pow(base, odd, p)
        assert x in (1, p - 1) or any((x := pow(x, 2, p)) == p - 1 for _ in range(twos - 1))


@settings(deadline=None, max_examples=25)
@given(secret=st.binary(min_size=32, max_size=32), clients=st.integers(1, 6), data=st.data())
def test_every_threshold_subset_recovers_and_a_smaller_one_does_not(secret: bytes, clients: int, data: Any) -> None:
    needed = data.draw(st.integers(1, clients))
    shares = shamir.split(secret, range(1, clients + 1), needed)
    for subset in itertools.combinations(shares, needed):
        assert shamir.combine({x: shares[x] for x in subset}) == secret
    for subset in itertools.combinations(shares, needed - 1):
        if subset:
            with contextlib.suppress(ValueError):
                assert shamir.combine({x: shares[x] for x in subset}) != secret


def test_one_share_too_few_fits_every_secret() -> None:
    """With t − 1 shares each secret is as likely: a further share can be made for any of them."""
    shares = shamir.split(bytes(32), (1, 2, 3), 3)
    known = {x: shares[x] for x in (1, 2)}
    for wanted in (bytes(32), b"\x07" * 32, b"\xff" * 32):
        # The polynomial through both shares and the wanted secret at zero, at x = 3.
        p = shamir.PRIME
        points = {0: int.from_bytes(wanted, "big"), **{x: int.from_bytes(s, "big") for x, s in known.items()}}
        value = 0
        for x, y in points.items():
            top = math.prod(3 - o for o in points if o != x)
            bottom = math.prod(x - o for o in points if o != x)
            value = (value + y * top * pow(bottom, -1, p)) % p
        assert shamir.combine({**known, 3: value.to_bytes(shamir.SHARE_BYTES, "big")}) == wanted


@pytest.mark.parametrize(("clients", "needed"), [(3, 2), (4, 3), (5, 4), (6, 4), (7, 5), (10, 7), (100, 67)])
def test_threshold_lets_a_third_drop(clients: int, needed: int) -> None:
    assert threshold(clients) == needed
    assert clients - clients // 3 >= needed > clients / 2


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("clients", [3, 10, 100, 1000])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_values_never_overflow(bits: int, clients: int, sign: int) -> None:
    code = FixedPoint(bits, 0.1, clients)
    narrow, wide = code.encode(np.full(5, sign * 0.1), np.full(3, sign * WIDE_BOUND))
    total = Masked(narrow * np.uint32(clients), wide * np.uint64(clients))
    data = code.to_bytes(total.narrow, total.wide)
    assert len(data) == 5 * bits // 8 + 24
    values, wides = code.decode(*code.from_bytes(data, 5, 3))
    np.testing.assert_allclose(values, sign * clients * 0.1, atol=clients * 0.5001 / code.scale)
    np.testing.assert_allclose(wides, sign * clients * WIDE_BOUND, rtol=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([16, 24, 32]), clients=st.integers(3, 40), seed=st.integers(0, 999), size=st.integers(1, 40)
)
def test_rounding_is_at_most_half_a_step_a_client(bits: int, clients: int, seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    code = FixedPoint(bits, 1.0, clients)
    rows = rng.uniform(-1, 1, (clients, size))
    total = Masked(*code.encode(np.zeros(size), np.zeros(1)))
    for row in rows:
        add(total, Masked(*code.encode(row, np.ones(1))), 1)
    values, wides = code.decode(*code.from_bytes(code.to_bytes(total.narrow, total.wide), size, 1))
    assert np.abs(values - rows.sum(0)).max() <= clients * 0.5 / code.scale * (1 + 1e-9)
    assert wides[0] == clients


class Session:
    """All phases, with clients that leave in each of them."""

    def __init__(self, clients: int, size: int = 50, bits: int = 24) -> None:
        self.needed = threshold(clients)
        self.code = FixedPoint(bits, 1.0, clients)
        self.players = {k: Client(k, bytes([k + 1]) * 32, SESSION, self.needed) for k in range(clients)}
        rng = np.random.default_rng(clients)
        self.numbers = {k: self.code.encode(rng.uniform(-1, 1, size), np.array([1.0])) for k in self.players}

    def run(self, gone: dict[str, Collection[int]]) -> Masked:
        """The opened sum, or the error of whoever stops."""
        left = set(self.players) - set(gone.get("keys", ()))
        advertised = {k: self.players[k].advertise() for k in sorted(left)}
        left -= set(gone.get("shares", ()))
        dealt = {k: self.players[k].deal(advertised) for k in sorted(left)}
        keys = {k: advertised[k] for k in dealt}
        for k in left:
            self.players[k].receive({s: sealed[k] for s, sealed in dealt.items() if s != k}, keys)
        left -= set(gone.get("mask", ()))
        sent = {k: self.players[k].mask(*self.numbers[k], keys) for k in sorted(left)}
        self.survivors = set(sent)
        dropped = set(keys) - set(sent)
        total = Masked(*(np.zeros_like(part) for part in self.numbers[0]))
        for masked in sent.values():
            add(total, masked, 1)
        left -= set(gone.get("unmask", ()))
        revealed = {k: self.players[k].reveal(sorted(sent), sorted(dropped)) for k in sorted(left)}
        return unmask(total, dropped, keys, revealed, SESSION, self.needed)

    def exact(self) -> Masked:
        """The sum of the survivors' integers."""
        total = Masked(*(np.zeros_like(part) for part in self.numbers[0]))
        for k in self.survivors:
            add(total, Masked(*self.numbers[k]), 1)
        return total


PHASES = ("keys", "shares", "mask", "unmask")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("clients", [4, 6, 10])
def test_any_third_may_drop_in_each_phase(phase: str, clients: int) -> None:
    thirds = list(itertools.combinations(range(clients), clients // 3))
    for gone in thirds[:: max(1, len(thirds) // 6)]:
        session = Session(clients)
        opened = session.run({phase: gone})
        exact = session.exact()
        assert np.array_equal(opened.narrow, exact.narrow)
        assert np.array_equal(opened.wide, exact.wide)
        assert len(session.survivors) == clients - (0 if phase == "unmask" else len(gone))


def test_dropouts_spread_over_the_phases() -> None:
    session = Session(10)
    opened = session.run({"shares": [0], "mask": [4], "unmask": [9]})
    assert np.array_equal(opened.narrow, session.exact().narrow)


@pytest.mark.parametrize("phase", PHASES)
def test_more_than_a_third_opens_nothing(phase: str) -> None:
    with pytest.raises(PayloadError, match=r"needs 7 |7 are needed"):
        Session(10).run({phase: range(4)})


def both_keys(session: Session) -> dict[int, PublicKeys]:
    keys = {k: p.advertise() for k, p in session.players.items()}
    dealt = {k: p.deal(keys) for k, p in session.players.items()}
    for k, player in session.players.items():
        player.receive({s: sealed[k] for s, sealed in dealt.items() if s != k}, keys)
    return keys


def test_a_client_never_gives_both_secrets() -> None:
    session = Session(4)
    both_keys(session)
    player = session.players[0]
    player.reveal([0, 1, 2], [3])
    with pytest.raises(PayloadError, match="client 0: refuses to give both secrets of client 3"):
        player.reveal([0, 1, 2, 3], [])
    with pytest.raises(PayloadError, match="both secrets of client 1"):
        session.players[1].reveal([0, 1, 2], [1, 3])


def test_a_tampered_share_is_named() -> None:
    session = Session(4)
    keys = {k: p.advertise() for k, p in session.players.items()}
    sealed = bytearray(session.players[1].deal(keys)[0])
    sealed[5] ^= 1
    with pytest.raises(PayloadError, match="client 0: the share of client 1 was tampered with"):
        session.players[0].receive({1: bytes(sealed)}, keys)
    with pytest.raises(PayloadError, match="tampered"):  # a share for somebody else
        session.players[0].receive({1: session.players[1].deal(keys)[2]}, keys)


@pytest.mark.parametrize("kind", ["seed", "mask key"])
def test_a_wrong_share_opens_nothing(kind: str) -> None:
    session = Session(4)
    keys = both_keys(session)
    revealed = {k: session.players[k].reveal([0, 1, 2], [3]) for k in (0, 1, 2)}
    victim = 3 if kind == "mask key" else 1
    revealed[0] = {**revealed[0], victim: (revealed[0][victim][0], bytes(32) + b"\x05")}
    total = Masked(*session.numbers[0])
    with pytest.raises(PayloadError, match=f"secret of client {victim} cannot be recovered"):
        unmask(total, [3], keys, revealed, SESSION, 3)


def test_masks_are_fresh_and_look_uniform() -> None:
    """Equal inputs give unrelated vectors, between clients and between sessions; 256-bit keys."""
    zero = FixedPoint(24, 1.0, 4).encode(np.zeros(4000), np.zeros(1))
    sent = []
    for session in (SESSION, b"another one"):
        players = {k: Client(k, bytes([k + 1]) * 32, session, 3) for k in range(4)}
        keys = {k: p.advertise() for k, p in players.items()}
        sent += [players[k].mask(*zero, keys).narrow.astype(float) for k in range(2)]
        assert len(players[0].seed) == 32
    correlation = np.corrcoef(sent) - np.eye(4)
    assert np.abs(correlation).max() < 5 / math.sqrt(4000)
    for row in sent:
        assert np.mean(row) == pytest.approx(2**31, rel=0.05)
    assert not np.array_equal(keystream(bytes(32), 9, 1).narrow, keystream(b"\1" * 32, 9, 1).narrow)


def test_the_wire_is_three_quarters_of_fp32_and_counts_the_protocol() -> None:
    rule: Any = cases.rule("secagg", norm=False)
    size = 562 - 4 * 2
    import torch

    ctx = RoundContext(0, 1, 2)
    payload = rule.encode(Update(0, torch.zeros(size), 1), ctx.for_client(0))
    player = rule.client(0, ctx)
    sealed = player.deal(rule.directory(ctx))
    messages = 96 + sum(map(len, sealed.values())) + 4 * shamir.SHARE_BYTES
    assert rule.protocol_bytes(ctx) == messages
    assert payload.num_bytes == payload.content.num_bytes + messages
    big = 1_000_000
    assert (payload.num_bytes + 3 * (big - size)) / (4 * big) < 0.7505


def test_a_round_is_exact_with_a_client_missing_and_never_repeats_its_masks() -> None:
    import torch

    rule: Any = cases.rule("secagg", norm=False)
    ctx = RoundContext(0, 1, 2)
    deltas = [torch.randn(300, generator=torch.Generator().manual_seed(k)) * 0.1 for k in range(4)]
    bodies = []
    for _ in range(2):  # the same round asked for again has another session
        rule.begin({}, ctx)
        payloads = [rule.encode(Update(k, d, 1), ctx.for_client(k)) for k, d in enumerate(deltas)]
        bodies.append(payloads[0].content.body)
        for payload in payloads[:3]:
            rule.accumulate(payload, ctx)
        result = rule.finish(ctx)
        weights = [rule.weight(k) for k in range(3)]
        total = sum(np.rint(w * d.double().numpy() * rule.code.scale) for w, d in zip(weights, deltas, strict=False))
        marks = sum(np.rint(w * rule.code.wide_scale) for w in weights) / rule.code.wide_scale
        assert np.array_equal(result.delta.numpy(), (total / rule.code.scale / marks).astype(np.float32))
    assert bodies[0] != bodies[1]
