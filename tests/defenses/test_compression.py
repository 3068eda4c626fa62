"""Top-k and quantisation: what arrives, how large it is, and how far off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fedsec.defenses.compression import Int8, TopK, quantise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsec import plugins
from fedsec.defense import Defense
from fedsec.errors import ConfigError, RunError
from fedsec.federation.aggregate import WeightedMean
from fedsec.federation.round import client_turn
from fedsec.federation.seats import Turn
from fedsec.types import FederationPlan, Layout, RoundContext, Update
from tests.federation import toy

CTX = RoundContext(0, 1, 2, 0)
LAYOUT = Layout(("a", "b"), ((30, 10), (100,)))
D = LAYOUT.size


def vector(seed: int = 0, size: int = D) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def planned(defense: Int8, layout: Layout = LAYOUT) -> Int8:
    return defense.calibrate(FederationPlan(toy.recipe(), 1, (8,), layout=layout))


def sent_bytes(*defenses: Defense) -> int:
    update = Update(0, vector(), 8)
    for defense in defenses:
        update = defense.on_upload(update, CTX)
    return WeightedMean().encode(update, CTX).num_bytes


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 300), fraction=st.floats(0.001, 1.0))
def test_the_largest_entries_are_sent_as_they_are(seed: int, size: int, fraction: float) -> None:
    delta = vector(seed, size)
    sent = TopK(fraction).on_upload(Update(0, delta, 8), CTX).delta.numpy()
    count = max(1, round(fraction * size))
    rows = np.argsort(-np.abs(delta.numpy()))[:count]
    expected = np.zeros(size, np.float32)
    expected[rows] = delta.numpy()[rows]
    np.testing.assert_array_equal(sent, expected)


def test_everything_is_the_update_itself() -> None:
    given_update = Update(0, vector(), 8)
    assert TopK(1.0).on_upload(given_update, CTX) is given_update
    assert TopK(1.0).public_knowledge(0) == {}
    assert TopK().public_knowledge(0) == {"sparse": True}


@pytest.mark.parametrize(
    ("defenses", "expected"),
    [
        ((), 4 * 400),
        ((TopK(0.01),), 4 * 4 + 4 * 4),  # four values, four indices
        ((TopK(0.1),), 40 * 4 + 400 // 8),  # one bit an entry is shorter than 40 indices
        ((planned(Int8()),), 400 + 2 * 4),  # a byte an entry, a scale for each tensor
        ((planned(Int8(bits=4)),), 200 + 2 * 4),
        ((Int8(granularity="vector"),), 400 + 4),
        ((TopK(0.1), planned(Int8())), 40 + 50 + 2 * 4),
        ((planned(Int8()), TopK(0.1)), 40 + 50 + 2 * 4),
    ],
)
def test_bytes_on_the_wire(defenses: tuple[Defense, ...], expected: int) -> None:
    assert sent_bytes(*defenses) == expected


@pytest.mark.parametrize(("word", "share"), [("topk", 0.1 + 1 / 32), ("topk+gaussian", 1.0), ("gaussian+topk", 0.132)])
def test_a_round_counts_what_travels(word: str, share: float) -> None:
    """Noise on top of a sparse update fills it, and the small size that was claimed for it is void."""
    defenses = tuple(plugins.build("defenses", spec) for spec in plugins.parse_stack(word))
    table = toy.seats(defenses=defenses)
    state, (x, y) = toy.state(table), toy.images(8, seed=5)
    reply = client_turn(table, Turn(0, state.params, state.buffers, CTX), x, y)
    assert reply.content is not None
    assert reply.content.num_bytes == pytest.approx(share * 4 * table.sharing.params.size, rel=0.01)  # type: ignore[union-attr]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 127), scale=st.floats(1e-6, 1e6), stochastic=st.booleans())
def test_rounding_to_whole_steps(seed: int, levels: int, scale: float, stochastic: bool) -> None:
    generator = torch.Generator().manual_seed(seed) if stochastic else None
    exact = scale * vector(seed)
    step = float(exact.abs().max()) / levels
    whole = quantise(exact, levels, generator).double() / step
    assert float((whole - whole.round()).abs().max()) < 1e-4
    assert float(whole.abs().max()) == pytest.approx(levels, rel=1e-5)
    off = float((whole - exact.double() / step).abs().max())
    assert off <= (1 if stochastic else 0.5) * (1 + 1e-4)


def test_the_error_has_the_variance_that_attacks_assume() -> None:
    """s²/12 to the nearest (uniform in the cell); s²/6 at random, the mean of u(1 − u) over the cell; and no bias."""
    exact = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    step = float(exact.abs().max()) / 127
    near = (quantise(exact, 127) - exact).double()
    drawn = (quantise(exact, 127, torch.Generator().manual_seed(1)) - exact).double()
    assert float(near.var()) == pytest.approx(step**2 / 12, rel=0.01)
    assert float(drawn.var()) == pytest.approx(step**2 / 6, rel=0.01)
    assert abs(float(drawn.mean())) < 4 * step / (6 * len(exact)) ** 0.5


def test_steps_reach_over_a_tensor_or_the_vector() -> None:
    delta = vector()
    delta[300:] *= 1e-3
    by_tensor = planned(Int8()).on_upload(Update(0, delta, 8), CTX).delta
    by_vector = Int8(granularity="vector").on_upload(Update(0, delta, 8), CTX).delta
    torch.testing.assert_close(by_tensor[300:], delta[300:], rtol=0, atol=float(delta[300:].abs().max()) / 253)
    assert not by_vector[300:].any()  # far below half a step of the other tensor
    assert torch.equal(by_tensor[:300], by_vector[:300])


def test_nothing_to_send_stays_nothing() -> None:
    for generator in (None, torch.Generator().manual_seed(0)):
        assert not quantise(torch.zeros(5), 127, generator).any()
        assert quantise(torch.zeros(0), 127, generator).shape == (0,)


def test_a_step_for_each_tensor_needs_their_layout() -> None:
    with pytest.raises(RunError, match="calibrate"):
        Int8().on_upload(Update(0, vector(), 8), CTX)


@pytest.mark.parametrize("words", ["topk:fraction=0", "topk:fraction=1.1", "int8:bits=1", "int8:bits=17"])
def test_requests_that_mean_nothing_are_refused(words: str) -> None:
    with pytest.raises(ConfigError):
        plugins.build("defenses", plugins.PluginSpec.parse(words))
