"""Budgets: CPU seconds, or counted work that reruns repeat to the bit."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from fedsec.attacks.gradinversion.auto import reconstruct
from fedsec.attacks.gradinversion.clock import PER_FLOP, PER_OPERATION, Clock, clocked, now
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.settings import Settings

from . import cases


def work_of(rows: int) -> float:
    a = torch.ones(rows, rows)
    with clocked("work"):
        clock = Clock(1.0)
        a @ a
        return clock.used


class TestWork:
    def test_counts_the_same_whatever_the_machine_does(self) -> None:
        quiet = work_of(64)
        stop = threading.Event()
        noise = threading.Thread(target=lambda: [torch.rand(300, 300).sum() for _ in iter(stop.is_set, True)])
        noise.start()
        try:
            assert work_of(64) == quiet
        finally:
            stop.set()
            noise.join()

    def test_grows_with_the_flops(self) -> None:
        small, large = work_of(64), work_of(640)
        assert small > PER_OPERATION
        assert large - small > 0.5 * PER_FLOP * 2 * (640**3 - 64**3)

    def test_a_factorisation_is_not_free(self) -> None:
        a = torch.eye(200, dtype=torch.float64)
        with clocked("work"):
            began = now()
            torch.linalg.qr(a)
            dear = now() - began
            began = now()
            a + a
            assert dear > 10 * (now() - began)

    def test_a_loop_without_tensors_ends(self) -> None:
        with clocked("work"):
            clock, turns = Clock(1e-3), 0
            while clock.left > 0:
                turns += 1
        assert turns < 2000

    def test_shares_and_fraction(self) -> None:
        seconds = iter([0.0, 4.0, 4.0, 4.0, 100.0])
        clock = Clock(10.0, read=lambda: next(seconds))
        assert clock.fraction == 0.4
        assert clock.left == 6.0
        assert clock.used == 4.0
        assert clock.left == 0.0


@pytest.mark.parametrize("method", ["inverting_gradients", "dlg"])
def test_a_search_that_its_budget_cuts_off_gives_the_same_images_again(blob_prior: Prior, method: Any) -> None:
    """With CPU seconds it would stop at another step."""
    model, data = cases.lenet(shape=(1, 16, 16)), cases.blobs(3, seed=1)
    settings = Settings(method, budget_s=0.5, clock="work")
    found = []
    for _ in range(2):
        observation = cases.observation_of(model, data.images, data.labels, blob_prior)
        found.append(reconstruct(observation, settings, torch.Generator().manual_seed(0)))
    assert found[0].method != "prior"
    assert torch.equal(found[0].images, found[1].images)
    assert found[0].residual == found[1].residual
