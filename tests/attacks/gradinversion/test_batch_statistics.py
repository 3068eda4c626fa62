"""Which moments may an attack know, and are they right? Pitfalls P12 and P13 of the specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from fedsec.attacks.gradinversion import GradInversion, batch_statistics
from fedsec.attacks.gradinversion.batch_statistics import (
    Moments,
    Statistics,
    biased,
    counts_of,
    distance,
    infer,
    moments_of,
    read_statistics,
    used_by,
)
from fedsec.attacks.gradinversion.candidate import NotApplicable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, vmap

from fedsec.types import ServerView

from . import cases
from .clients import view_of_round

SHAPE = (1, 16, 16)


def network(momentum: float | None = 0.1) -> cases.Normalised:
    """Two convolutions with BatchNorm, one with a pooled map."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6, momentum=momentum),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 2),
    )
    return cases.Normalised(net)


def warmed(momentum: float | None = 0.1) -> cases.Normalised:
    """The same after some batches in train mode: running statistics that say something."""
    model = network(momentum).train()
    with torch.no_grad():
        for batch in cases.blobs(24, seed=5).images.split(8):
            model(batch)
    return model


def view(
    mode: Literal["train", "eval"] = "train", *, batch: int = 8, steps: int = 1, shared: bool = True
) -> ServerView:
    """One upload of the trained network."""
    data = cases.blobs(batch, seed=1)
    plan = cases.recipe(lr=0.1, mode=mode, steps=steps)
    return view_of_round(warmed(), data.images, data.labels, plan, shared=shared)


def hooked(model: nn.Module, images: Tensor) -> dict[str, Moments]:
    """What torch itself sees in front of each BatchNorm in train mode, by hooks of this test."""
    seen: dict[str, Moments] = {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            flat = args[0].transpose(0, 1).flatten(1).double()
            seen[name] = Moments(flat.mean(1), flat.var(1, correction=0))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model.train()(images)
    return seen


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_inferred_moments_are_those_of_the_batch(momentum: float | None) -> None:
    """8 images through a real client: both ends of the running statistics against hooks, to 1e-5."""
    model, data = warmed(momentum), cases.blobs(8, seed=1)
    seen = view_of_round(model, data.images, data.labels, cases.recipe(lr=0.1, mode="train"))
    statistics = read_statistics(seen, model, "train")
    names = statistics.layers
    found = statistics.reference("inferred", counts_of(model, names, data.images[0], 8))
    truth = hooked(warmed(momentum), data.images)
    assert set(found) == set(truth) == {"net.1", "net.5"}
    for name in names:
        assert torch.allclose(found[name].mean.double(), truth[name].mean, rtol=1e-5, atol=1e-5)
        assert torch.allclose(found[name].variance.double(), truth[name].variance, rtol=1e-5, atol=1e-5)


def test_unbiased_variance_is_converted() -> None:
    """Taken as biased, a map of 2·3 numbers is wrong by a fifth."""
    x = torch.tensor([1.0, 4.0, 2.0, 8.0, 5.0, 7.0])
    after = 0.9 * 1.0 + 0.1 * x.var()
    recovered = biased(infer(torch.ones(1), after[None], 0.1), 6)
    assert float(recovered) == pytest.approx(float(x.var(correction=0)), rel=1e-5)
    assert abs(float(infer(torch.ones(1), after[None], 0.1)) / float(x.var(correction=0)) - 1) > 0.15


@settings(deadline=None, max_examples=30)
@given(st.floats(0.05, 1), st.floats(-3, 3), st.floats(-3, 3))
def test_infer_undoes_the_running_average(momentum: float, old: float, moment: float) -> None:
    before = torch.tensor([old])
    after = (1 - momentum) * before + momentum * moment
    assert float(infer(before, after, momentum)) == pytest.approx(moment, abs=2e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": 3}, "3 local steps leave a mixture"),
        ({"mode": "eval"}, "computed in eval mode"),
        ({"shared": False}, "no BatchNorm statistics are sent"),
    ],
)
def test_inferred_is_refused(changes: dict[str, object], reason: str) -> None:
    mode = changes.get("mode", "train")
    statistics = read_statistics(view(**changes), warmed(), mode)  # type: ignore[arg-type]
    with pytest.raises(NotApplicable, match=reason):
        statistics.reference("inferred", {"net.1": 8, "net.5": 8})


def test_what_is_hidden_or_mixed_is_refused() -> None:
    seen = view()
    hidden = replace(seen, updates=(replace(seen.updates[0], buffers=None),))
    mixed = replace(seen, clients_in_sum=3)
    model = warmed()
    assert "hidden" in str(read_statistics(hidden, model, "train").refusal("inferred"))
    assert "3 clients" in str(read_statistics(mixed, model, "train").refusal("inferred"))
    assert "3 clients" in str(read_statistics(mixed, model, "train").refusal("running"))
    assert read_statistics(hidden, model, "train").strongest("auto") == "running"
    assert read_statistics(mixed, model, "train").strongest("auto") == "none"


def test_statistics_of_initialisation_are_no_prior() -> None:
    data, model = cases.blobs(4, seed=1), network()
    seen = view_of_round(model, data.images, data.labels, cases.recipe(mode="eval"))
    statistics = read_statistics(seen, model, "eval")
    assert "initialisation" in str(statistics.refusal("running"))
    assert statistics.strongest("auto") == "none"
    assert used_by(seen, model, "eval", "auto") == "running"  # the simulation normalises with them all the same


def test_auto_takes_the_strongest_honest_mode() -> None:
    model = warmed()
    assert used_by(view(), model, "train", "auto") == "inferred"
    assert used_by(view(steps=2), model, "train", "auto") == "running"
    assert used_by(view("eval"), model, "eval", "auto") == "running"
    assert used_by(view(shared=False), model, "train", "auto") == "none"
    assert used_by(view(shared=False), model, "eval", "auto") == "none"
    assert used_by(view(), model, "train", "none") == "none"
    assert Statistics((), "train", 1, 1).strongest("auto") == "none"


@pytest.mark.parametrize(
    ("mode", "shared", "stamped", "statistics"),
    [
        ("eval", True, "eval", "running"),
        ("train", False, "train", "none"),
        ("train", True, "train+shared", "inferred"),
    ],
)
def test_stamp_says_how_the_client_loop_computed(
    mode: Literal["train", "eval"], shared: bool, stamped: str, statistics: str
) -> None:
    seen = view(mode, batch=2, shared=shared)
    target = cases.target_of(warmed(), (seen,), cases.blobs(32))
    found = GradInversion(method="analytic", budget_s=1).conclude(target).assumptions
    assert (found["victim_mode"], found["bn_statistics"]) == (stamped, statistics)


def test_moments_under_vmap_and_their_gradient() -> None:
    model, images = warmed().requires_grad_(False).eval(), cases.blobs(6, seed=2).images.view(3, 2, *SHAPE)
    together = vmap(lambda x: moments_of(model, ("net.5",), x)["net.5"].variance)(images)
    for i in range(3):
        assert torch.allclose(together[i], moments_of(model, ("net.5",), images[i])["net.5"].variance, atol=1e-6)
    reference = moments_of(model, ("net.1", "net.5"), images[0])

    def value(x: Tensor) -> Tensor:
        return distance(moments_of(model, tuple(reference), x), reference)

    assert float(value(images[0])) < 1e-9
    assert bool(torch.isfinite(grad(value)(images[0])).all())
    assert float(value(images[1])) > 1e-3


def test_distance_has_no_units() -> None:
    reference = {"a": Moments(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 9.0]))}
    found = {"a": Moments(torch.tensor([1.5, 2.0]), torch.tensor([4.0, 10.0]))}
    expected = 0.5 / 13**0.5 + 1 / 97**0.5
    assert float(distance(found, reference)) == pytest.approx(expected, rel=1e-5)
    scaled = [{"a": Moments(7 * m["a"].mean, 49 * m["a"].variance)} for m in (found, reference)]
    assert float(distance(*scaled)) == pytest.approx(expected, rel=1e-5)
    assert batch_statistics.momentum_of(nn.BatchNorm2d(2, momentum=None)) == 1.0
