"""Are bound, attack and naive attack compared on the same images, as means of squared errors, with paired intervals?"""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedsec.findings import Limits
from fedsec.metrics.limits import across_seeds, adaptive_gap, beside_limits
from fedsec.types import to_json


def rng():
    return np.random.default_rng(0)


def rows(errors, prior=0.02, per_batch=1):
    return [
        {"victim": i // per_batch, "psnr": -10 * np.log10(e), "prior_psnr": -10 * np.log10(prior)}
        for i, e in enumerate(errors)
    ]


def test_bound_and_gap_are_of_mean_squared_errors():
    errors = np.linspace(1e-3, 9e-3, 24)
    limits = [Limits(e / 4, {"rank_index_noise": i / 24}) for i, e in enumerate(errors)]
    found = beside_limits(rows(errors), limits, generator=rng())
    assert found["bound_psnr"].value == pytest.approx(-10 * np.log10(5e-3 / 4))
    assert found["gap_db"].value == pytest.approx(10 * np.log10(4))
    assert found["bound_psnr"].low < found["bound_psnr"].value < found["bound_psnr"].high
    # Paired: a constant ratio has no spread, however different the images are.
    assert found["gap_db"].high - found["gap_db"].low < 1e-9
    assert found["rank_index_noise"] == pytest.approx(np.median(np.arange(24) / 24))
    assert found["verdict"].startswith("The attack failed; privacy not shown")
    json.dumps(to_json(found), allow_nan=False)


def test_single_images_that_beat_the_bound_are_not_clipped():
    errors = np.array([1e-3] * 12 + [3e-3] * 12)
    found = beside_limits(rows(errors), [Limits(2e-3)] * 24, generator=rng())
    assert found["gap_db"].value == pytest.approx(0, abs=1e-9)
    assert found["gap_db"].low < 0 < found["gap_db"].high


def test_the_images_of_a_batch_share_its_bound():
    found = beside_limits(rows([1e-3] * 20, per_batch=4), [Limits(1e-3), *[Limits(2e-3)] * 4], generator=rng())
    assert found["bound_psnr"].value == pytest.approx(-10 * np.log10(1.8e-3))
    assert found["gap_db"].n == 5


def test_without_noise_there_is_no_bound_key():
    limits = [Limits(values={"jacobian_rank": 784.0}, notes=("no bound: the observation is exact",))] * 20
    for found in (beside_limits(rows([1e-9] * 20), given, generator=rng()) for given in (limits, [])):
        assert not {"bound_psnr", "gap_db"} & found.keys()
        assert found["verdict"].startswith("Leakage measured: the images were recovered")


def test_views_without_bound_are_left_out_of_both_sides():
    errors = [1e-3] * 20 + [1e-1] * 4
    found = beside_limits(rows(errors), [*[Limits(1e-3)] * 20, *[Limits()] * 4], generator=rng())
    assert found["gap_db"].value == pytest.approx(0, abs=1e-9)
    assert found["limit_notes"] == ["the bound is for 20 of 24 images"]


def test_identification_enters_the_verdict():
    found = beside_limits(rows([0.02] * 20), [], generator=rng(), identified=True)
    assert found["verdict"].startswith("Leakage measured")


def test_adaptive_gap_is_paired_and_on_the_scale_of_the_bound():
    naive = np.linspace(1e-2, 9e-2, 24)
    gap = adaptive_gap(rows(naive / 10), rows(naive), generator=rng())
    assert gap.value == pytest.approx(10) and gap.high - gap.low < 1e-9
    bound = beside_limits(rows(naive / 10), [Limits(e / 20) for e in naive], generator=rng())
    other = beside_limits(rows(naive), [Limits(e / 20) for e in naive], generator=rng())
    assert other["gap_db"].value - bound["gap_db"].value == pytest.approx(gap.value)
    with pytest.raises(ValueError, match="same images"):
        adaptive_gap(rows(naive), rows(naive[:-1]), generator=rng())


def test_across_seeds_counts_seeds_and_images_as_random():
    draw = rng()
    seeds = [rows(10 ** (-(level + draw.normal(0, 0.2, 20)) / 10)) for level in (20, 24, 28)]
    pooled = across_seeds(seeds, generator=rng())
    assert pooled.n == 60
    assert pooled.value == pytest.approx(np.median([row["psnr"] for seed in seeds for row in seed]))
    assert pooled.low < 21 and pooled.high > 27  # the spread between seeds, not that of 60 images
    same = across_seeds([seeds[0]] * 3, generator=rng())
    assert same.high - same.low < 0.5
    grouped = across_seeds([rows([1e-2] * 20, per_batch=4)] * 3, generator=rng())
    assert grouped.n == 15
