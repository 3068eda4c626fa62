"""Reading what is sent beside the parameters: found where hospitals differ, and at chance where they do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fedsec.attacks.extras import Extras
from fedsec.attacks.extras.readings import COUNTED, READINGS, kinds_of, nearest

from fedsec.federation.composition import compose
from fedsec.federation.engines.serial import Serial
from fedsec.findings import Candidates, Findings, PublicData, Target
from fedsec.types import RoundContext

from ...federation import toy
from ...strategies import small

SHIFTS = ((1.0, 0.0), (0.45, 0.45), (0.6, 0.0))
Data = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def hospitals(shifted: bool, count: int = 40) -> Data:
    parts = small.clients((count,) * 3)
    if not shifted:
        return parts
    return tuple((x * gain + offset, y) for (x, y), (gain, offset) in zip(parts, SHIFTS, strict=True))


def concluded(word: str, data: Data, norm: str = "group", rounds: int = 2, fresh: bool = False) -> tuple[Findings, Any]:
    strategy = compose(word)
    table, state = small.federation(strategy, norm=norm)
    views: list[Any] = []
    small.rounds(table, state, data, Serial(table, data).train, rounds, watch=views.append)
    asked = tuple(toy.images(len(x), 100 + k, small.SIDE) for k, (x, _) in enumerate(data)) if fresh else data
    images, y = (torch.cat([pair[i] for pair in asked]) for i in (0, 1))
    candidates = Candidates(images, y, "binary", PublicData("none", images[:1], y[:1]), history=tuple(views))
    target = Target(
        model=lambda: small.twin(table), released=lambda: small.twin(table), views=(), public=candidates.population,
        image_shape=(1, small.SIDE, small.SIDE), ctx=RoundContext(0, 0, 0), device=torch.device("cpu"),
        candidates=candidates,
    )  # fmt: skip
    return Extras(samples=50).conclude(target), np.repeat(np.arange(3), [len(x) for x, _ in data])


def accuracy(findings: Findings, owner: Any, kind: str) -> float:
    return float((next(s for s in findings.sources if s.method == kind).clients == owner).mean())


PLANTED = [
    ("harmofl", "amplitude", "group", 1),
    ("fedavg", "statistics", "batch", 6),
    ("feature_stats", "moments", "group", 2),
    ("dann", "features", "group", 2),
    ("fedsm", "selector", "group", 25),
    ("replay:generator_rounds=2,generator_epochs=20", "decoder", "group", 2),
    ("medisecfed:images=20,steps=60", "images", "batch", 4),
]


@pytest.mark.parametrize(("word", "kind", "norm", "rounds"), PLANTED[:-1], ids=[p[1] for p in PLANTED[:-1]])
def test_a_planted_difference_between_hospitals_is_read(word: str, kind: str, norm: str, rounds: int) -> None:
    found, owner = concluded(word, hospitals(True), norm, rounds)
    assert accuracy(found, owner, kind) > 0.5  # one in three is chance


@pytest.mark.parametrize(("word", "kind", "norm", "rounds"), PLANTED[:4], ids=[p[1] for p in PLANTED[:4]])
def test_hospitals_without_a_difference_are_not_told_apart(word: str, kind: str, norm: str, rounds: int) -> None:
    """Other images of the law that all hospitals share: at chance. (Their own images are told: a mean holds them.)"""
    found, owner = concluded(word, hospitals(False, 120), norm, rounds, fresh=True)
    assert accuracy(found, owner, kind) < 0.42  # 1/3 and 3.5 standard errors of 360 guesses


def test_histograms_are_read_by_class() -> None:
    x, _ = hospitals(False)[0]
    data = tuple((x, torch.full((len(x),), label)) for label in (0, 1, 1))
    found, owner = concluded("fedslid", data)
    guesses = next(s for s in found.sources if s.method == "label_histogram").clients
    assert (guesses[owner == 0] == 0).all() and set(guesses[owner > 0].tolist()) <= {1, 2}


def test_single_numbers_are_told_outright_and_nothing_where_nothing_is_sent() -> None:
    found, _ = concluded("fedmas", hospitals(False))
    assert len(found.notes) == 3 and all("RF" in n for n in found.notes)
    found, _ = concluded("loss_weighted", hospitals(False))
    assert [n.partition(":")[0] for n in found.notes] == ["client 0", "client 1", "client 2"]
    found, _ = concluded("fedavg", hospitals(False))
    assert not found.sources and not found.memberships and "nothing" in found.notes[0]


@pytest.mark.parametrize(
    "word", ["fedsm", "replay:generator_rounds=2,generator_epochs=1", "medisecfed:images=2,steps=2"]
)
def test_what_is_made_of_training_images_gives_membership_scores(word: str) -> None:
    found, owner = concluded(word, hospitals(False))
    assert len(found.memberships) == 1
    assert found.memberships[0].scores.shape == owner.shape and np.isfinite(found.memberships[0].scores).all()


def test_a_sum_is_nobody_s() -> None:
    class View:
        clients_in_sum = 3
        updates = ()

    assert kinds_of((View(),)) == {}  # type: ignore[arg-type]


def test_nearest_is_by_class() -> None:
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    pool = torch.tensor([0.1, 0.9]).view(2, 1, 1, 1)
    found = nearest(images, torch.tensor([0, 1]), pool, torch.tensor([1, 0]))
    torch.testing.assert_close(found, torch.tensor([0.81, 0.81]))
    alone = nearest(images, torch.tensor([0, 2]), pool, torch.tensor([0, 0]))
    assert alone[1] == float("inf")


def test_every_declared_report_has_a_reading_or_is_a_single_number() -> None:
    from fedsec import plugins

    declared = {r.name for name in plugins.names("strategies") for r in plugins.load("strategies", name).reports}
    assert declared == (set(READINGS) | set(COUNTED)) - {"amplitude", "statistics"}
