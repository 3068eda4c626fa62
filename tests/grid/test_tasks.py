"""Is every training handed out once, before its cells, and every cell once, whoever asks?"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedsec.config import Cell, FederationConfig
from fedsec.grid.estimate import Clock, in_words
from fedsec.grid.tasks import Schedule, Task
from fedsec.plugins import PluginSpec


def cell(seed: int, attack: str = "gradinversion", rounds: int = 2) -> Cell:
    return Cell(federation=FederationConfig(rounds=rounds), attack=PluginSpec.parse(attack), seed=seed)


def schedule(counts: list[int]) -> Schedule:
    cells = [cell(k, f"a:n={i}") for k, count in enumerate(counts) for i in range(count)]
    return Schedule(cells, {c.key(): f"train-{c.seed}" for c in cells}, {})


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 4), st.randoms(use_true_random=False))
def test_each_task_once_and_cells_after_their_training(counts, workers, order) -> None:
    plan = schedule(counts)
    busy: list[Task] = []
    held: dict[int, str] = {}
    done: list[Task] = []
    for _ in range(200):
        while len(busy) < workers and (task := plan.next(held.get(len(busy)))) is not None:
            held[len(busy)] = task.training
            busy.append(task)
        if not busy:
            break
        task = busy.pop(order.randrange(len(busy)))
        done.append(task)
        if task.kind == "train":
            plan.trained(task.training)
    assert not list(plan.remaining())
    assert sum(t.kind == "train" for t in done) == len(counts)
    assert sum(t.kind == "cell" for t in done) == sum(counts)
    assert len({(t.kind, t.cell.key()) for t in done}) == len(done)
    for place, task in enumerate(done):
        if task.kind == "cell":
            assert any(t.kind == "train" and t.training == task.training for t in done[:place])


def test_a_worker_stays_with_its_training_and_else_opens_a_new_one() -> None:
    plan = schedule([2, 1])
    first = plan.next()
    assert first is not None and (first.kind, first.training) == ("train", "train-0")
    plan.trained("train-0")
    second, third, fourth = plan.next("train-0"), plan.next(None), plan.next(None)
    assert second is not None and (second.kind, second.training) == ("cell", "train-0")
    assert third is not None and (third.kind, third.training) == ("train", "train-1")
    assert fourth is not None and (fourth.kind, fourth.training) == ("cell", "train-0")
    assert plan.next() is None
    assert [t.training for t in plan.abandoned("train-1")] == ["train-1"]
    assert not list(plan.remaining())


def result(training: str, seconds: float, attack_seconds: float) -> dict:
    return {"training": training, "cost": {"seconds": seconds, "attack_seconds": attack_seconds}}


def test_time_is_learned_from_the_most_alike_cells() -> None:
    slow, fast = cell(0, "gradinversion"), cell(0, "membership")
    clock = Clock([(slow, result("t0", 10, 40)), (fast, result("t0", 10, 2)), (cell(1), result("t1", 20, 60))])
    assert clock.guess(Task("cell", "t2", cell(2))) == 50
    assert clock.guess(Task("cell", "t2", cell(2, "membership"))) == 2
    assert clock.guess(Task("cell", "t2", cell(2, "membership:x=1"))) == 2  # the same family
    assert clock.guess(Task("train", "t2", cell(2))) == 15  # a shared training counts once
    rest = clock.remaining([Task("train", "t2", cell(2)), Task("cell", "t2", cell(2))], jobs=2)
    assert rest.seconds == 50  # no shorter than its longest task
    assert clock.remaining([Task("cell", "t", cell(2))] * 4, jobs=2).seconds == 100
    assert str(rest) == "about 50 s, learned from 3 finished cells"


def test_without_a_finished_cell_nothing_is_claimed() -> None:
    assert Clock().remaining([Task("train", "t", cell(0))], 2).seconds is None
    assert "no estimate yet" in str(Clock().remaining([Task("train", "t", cell(0))], 2))
    assert [in_words(s) for s in (40, 600, 7200)] == ["40 s", "10 min", "2.0 h"]


def test_a_training_is_told_of_the_cell_that_wants_all_its_updates() -> None:
    """Else it is done a second time, with them recorded."""
    cells = [cell(0, "gradinversion"), cell(0, "membership:federated=true")]
    plan = Schedule(cells, {c.key(): "train-0" for c in cells}, {}, frozenset({cells[1].key()}))
    first = plan.next()
    assert first is not None and first.cell == cells[1]
