"""Is the benchmark fair? The specified victims, one thread, recording that costs nothing, and one scorer for all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fedsec.attacks.gradinversion.auto import METHODS, reconstruct
from fedsec.attacks.gradinversion.observation import Observation
from fedsec.attacks.gradinversion.prior import Prior
from fedsec.attacks.gradinversion.settings import Settings
from torch import Tensor
from torch.func import grad, jvp, vmap

from experiments.benchmarks import contest, gradinversion, peer_breaching, scoreboard, tracing, victims
from tests.attacks.gradinversion import cases

SHAPE = (1, 1, 16, 16)


@pytest.fixture
def data(shared_data: Path) -> victims.XRays:
    return victims.load("pneumoniamnist")


@pytest.fixture(scope="module")
def prior() -> Prior:
    return cases.prior_of(cases.blobs(64))


@pytest.fixture
def observation(prior: Prior) -> Observation:
    public = cases.blobs(1, seed=5)
    return cases.observation_of(cases.lenet(shape=(1, 16, 16)), public.images, public.labels, prior)


class TestVictims:
    @pytest.mark.parametrize(
        ("name", "loss", "norm"),
        [
            ("lenet-b1", 4.274429, 28.4391),
            ("lenet-b4", 4.118583, None),
            ("mlp-b1", 0.644686, 3.762896),
            ("convnet-b1", 0.691580, 0.948306),
        ],
    )
    def test_the_specified_values_are_reproduced(
        self, data: victims.XRays, name: str, loss: float, norm: float | None
    ) -> None:
        case = victims.Case.parse(name)
        rows = cases.L32[: case.batch]
        found = victims.loss_and_norm(victims.build(case, data, trained=False), data.images[rows], data.labels[rows])
        assert found[0] == pytest.approx(loss, abs=2e-6)
        assert norm is None or found[1] == pytest.approx(norm, rel=2e-6)

    def test_other_victims_are_refused(self, data: victims.XRays, monkeypatch: pytest.MonkeyPatch) -> None:
        original = cases.lenet
        monkeypatch.setattr(cases, "lenet", lambda **_: original(seed=1))
        with pytest.raises(victims.WrongVictimError, match="lenet-b1: loss"):
            victims.check("lenet", data)

    def test_no_attacked_image_or_patient_is_public(self, shared_data: Path) -> None:
        for name in ("pneumoniamnist", "kermany_64"):
            data = victims.load(name)
            public = {image.numpy().tobytes() for image in data.public.images}
            assert not public & {data.images[i].numpy().tobytes() for i in data.attacked}

    def test_the_upload_is_one_real_step_and_noise_has_its_declared_size(self, data: victims.XRays) -> None:
        case = victims.Case.parse("lenet-b1@0.1")
        model = victims.build(case, data, trained=False)
        clean, first, second = (
            victims.victim(c, model, data, (872,), k, told=False)
            for c, k in ((replace(case, noise=0.0), 0), (case, 0), (case, 1))
        )
        gradient, noisy = -clean.view.updates[0].delta, -first.view.updates[0].delta
        assert float(gradient.norm()) == pytest.approx(28.4391, rel=1e-5)
        assert float((noisy - gradient).norm()) == pytest.approx(0.1 * float(gradient.norm()), rel=0.05)
        assert not torch.equal(first.view.updates[0].delta, second.view.updates[0].delta)
        assert first.view.knowledge["gaussian"]["noise_std"] == pytest.approx(0.1 * 28.4391 / 8714**0.5, rel=1e-5)
        assert first.view.oracle_labels is None

    def test_names_of_cases(self) -> None:
        assert [c.name for c in victims.parse("lenet-b4,noise")] == ["lenet-b4", "lenet-b1@0.1", "lenet-b1@1"]
        with pytest.raises(ValueError, match="lenet-b33: no such case; write NETWORK-bB"):
            victims.parse("lenet-b33")


class TestClock:
    def test_more_than_one_thread_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        torch.set_num_threads(2)
        try:
            words = ["--cases", "mlp-b1", "--states", "untrained", "--methods", "analytic", "--images", "1"]
            assert gradinversion.main([*words, "--no-peers"]) == 2
        finally:
            torch.set_num_threads(1)
        shown = capsys.readouterr()
        assert "2 threads: run again with OMP_NUM_THREADS=1" in shown.err
        assert not shown.out

    def test_recording_is_taken_off_the_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 100.0
        monkeypatch.setattr(tracing.time, "process_time", lambda: now)
        recorder = tracing.Recorder(SHAPE)

        def slow() -> Tensor:
            nonlocal now
            now += 5.0
            return torch.zeros(SHAPE)

        for work in (1.0, 2.0):
            now += work
            recorder.record(slow)
        assert [point.seconds for point in recorder.points] == [1.0, 3.0]
        assert recorder.seconds == 3.0
        assert recorder.cost == 10.0

    def test_brief_attacks_count_with_their_median(self) -> None:
        times = iter([0.3, 0.1, 0.2])
        bout = contest.Bout(torch.zeros(SHAPE), torch.zeros(1), "recovered", "toy", 0.0, ())
        ring: Any = type("Ring", (), {"budget_s": 1.0})
        found = contest.timed(lambda *_: replace(bout, seconds=next(times)), ring, None, 0)  # type: ignore[arg-type]
        assert found.seconds == 0.2
        assert contest.timed(lambda *_: replace(bout, seconds=7.0), ring, None, 0).seconds == 7.0  # type: ignore[arg-type]


class TestRecording:
    def test_iterates_are_seen_through_transforms(self) -> None:
        recorder = tracing.Recorder(SHAPE)

        def objective(x: Tensor) -> Tensor:
            recorder.record(x)
            return (x**2).sum()

        x = torch.rand(3, *SHAPE)
        vmap(grad(objective))(x)
        objective(x[0])
        jvp(objective, (x[0],), (x[1],))
        assert torch.equal(recorder.points[0].images, x)
        assert all(torch.equal(point.images, x[0]) for point in recorder.points[1:])

    def test_images_of_other_batches_are_no_iterates(self) -> None:
        recorder = tracing.Recorder((4, 1, 16, 16))
        recorder.record(torch.zeros(SHAPE))
        recorder.record(torch.zeros(256, 1, 16, 16))
        assert not recorder.points

    @pytest.mark.parametrize("settings", [Settings("cascade"), Settings("inverting_gradients", 3, 20)])
    def test_a_recorded_attack_ends_where_it_would_have(self, observation: Observation, settings: Settings) -> None:
        recorder = tracing.Recorder(SHAPE)
        plain, watched = (
            reconstruct(o, settings, torch.Generator().manual_seed(1))
            for o in (observation, tracing.recorded(observation, recorder))
        )
        assert torch.equal(plain.images, watched.images)
        assert plain.method == watched.method == settings.method
        assert any(torch.equal(p.images, plain.images) or p.images.ndim == 5 for p in recorder.points)

    def test_the_curve_leaves_out_public_images_and_follows_the_restart_handed_in(self, prior: Prior) -> None:
        truth = torch.full(SHAPE, 0.5)
        handed_in, better = truth + 0.1, truth + 0.01
        points = [
            tracing.Point(0.5, prior.mean[None]),
            tracing.Point(1.0, prior.images[:1]),
            tracing.Point(2.0, torch.stack([better, handed_in])),
            tracing.Point(3.0, truth + 0.2),
            tracing.Point(4.0, better),
        ]
        assert tracing.curve(points, handed_in, truth, prior) == [
            (2.0, pytest.approx(20.0, abs=1e-4)),
            (4.0, pytest.approx(40.0, abs=1e-4)),
        ]

    def test_the_attack_is_not_given_the_truth(self, data: victims.XRays) -> None:
        case = victims.Case.parse("mlp-b1")
        model = victims.build(case, data, trained=False)
        ring = contest.Ring(case, "untrained", data, victims.prior_of(data), model, False, 5.0)
        victim = victims.victim(case, model, data, (872,), 0, told=False)
        blind = replace(victim, images=torch.zeros_like(victim.images), labels=torch.zeros_like(victim.labels))
        first, second = (contest.ours("analytic", ring, v, 0, 5.0) for v in (victim, blind))
        assert torch.equal(first.images, second.images)
        assert contest.score(first, victim, ring)["psnr"] > 100 > 15 > contest.score(second, blind, ring)["psnr"]


class TestScores:
    def test_one_bad_image_of_a_batch_counts_as_the_mean(self, prior: Prior) -> None:
        truth = cases.blobs(2, seed=9).images
        broken = truth.clone()
        broken[0] = torch.nan
        expected = -10 * torch.log10(((prior.mean - truth[0]).double() ** 2).mean() / 2)
        assert tracing.batch_psnr(broken, truth, prior.mean) == pytest.approx(float(expected), abs=1e-4)
        assert tracing.batch_psnr(truth.flip(0), truth, prior.mean) == 140

    def test_never_is_longest(self) -> None:
        assert contest.median_time([1.0, None, 2.0]) == 2.0
        assert contest.median_time([1.0, None]) is None
        assert tracing.first_at([(1.0, 19.0), (2.0, 20.0), (3.0, 25.0)], 20) == 2.0
        assert tracing.first_at([(1.0, 19.0)], 20) is None

    def test_thinning_keeps_both_ends(self) -> None:
        traced = [(float(i), float(i)) for i in range(1000)]
        thin = tracing.thinned(traced, 50)
        assert thin[0] == traced[0]
        assert thin[-1] == traced[-1]
        assert len(thin) <= 51

    def test_the_median_curve(self) -> None:
        curves = [[(1.0, 10.0), (3.0, 30.0)], [(2.0, 20.0)], [(1.5, 0.0), (4.0, 40.0)]]
        assert scoreboard.median_curve(curves) == ([2.0, 3.0, 4.0], [10.0, 20.0, 30.0])

    @pytest.mark.parametrize(
        ("certified", "slowest", "verdict"), [(4, 0.1, "met"), (3, 0.1, "missed"), (4, 1, "missed")]
    )
    def test_a_goal_is_held_against_what_was_measured(self, certified: int, slowest: float, verdict: str) -> None:
        row = {"case": "lenet-b1", "state": "trained", "contender": "fedsec auto", "images": 4, "certified": certified}
        row |= {"psnr_lowest": 90.0, "cpu_seconds_slowest": slowest}
        assert f": {verdict} ({certified} of 4 proven" in scoreboard.goals([row])[0]

    def test_the_noise_goal_needs_a_peer(self) -> None:
        ours = {"case": "lenet-b1@1", "state": "trained", "contender": "fedsec auto", "psnr_of_mean_mse": 25.0}
        peers = [ours | {"contender": f"breaching {k}", "psnr_of_mean_mse": v} for k, v in enumerate((18.0, 21.5))]
        assert scoreboard.goals([ours]) == []
        assert ": missed (25.0 against 21.5 dB" in scoreboard.goals([ours, *peers])[0]


class TestContenders:
    @pytest.fixture
    def ring(self) -> Any:
        return type("Ring", (), {"case": victims.Case.parse("mlp-b8")})

    def test_methods_that_land_later_take_part_by_themselves(self, ring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("peel", "spear"):
            monkeypatch.delitem(METHODS, name, raising=False)
        assert list(contest.contenders(ring, None, False)) == ["fedsec auto"]
        monkeypatch.setitem(METHODS, "peel", ())  # type: ignore[misc]
        assert list(contest.contenders(ring, None, False)) == ["fedsec auto", "fedsec peel"]
        assert list(contest.contenders(ring, ["dlg"], True)) == ["fedsec dlg", *peer_breaching.CONFIGURATIONS]

    def test_without_the_peer_our_side_runs_alone(
        self, shared_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(peer_breaching, "version", lambda: None)
        words = ["--cases", "mlp-b1", "--states", "untrained", "--images", "2", "--methods", "analytic"]
        files = [word for kind in ("json", "plot", "markdown") for word in (f"--{kind}", str(tmp_path / f"r.{kind}"))]
        files[3] = str(tmp_path / "r.png")
        assert gradinversion.main([*words, *files]) == 0
        shown = capsys.readouterr()
        assert shown.err.count("breaching is not installed (pip install -e .[bench]): our side alone") == 1
        assert "mlp-b1 untrained" in shown.out
        record = json.loads((tmp_path / "r.json").read_text())
        heading, _, line = (tmp_path / "r.markdown").read_text().splitlines()[:3]
        assert dict(zip(heading.split("|"), line.split("|"), strict=True))[" contender "] == " fedsec analytic "
        (row,) = record["rows"]
        assert row["contender"] == "fedsec analytic"
        assert row["psnr_lowest"] > 100 > row["nearest_public_psnr"] > row["prior_psnr"] > 10
        assert row["labels_right"] == 1
        assert {"date", "machine", "torch", "breaching", "settings"} <= record.keys()
        assert (tmp_path / "r.png").stat().st_size > 1000


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    assert torch.get_num_threads() == 1
