"""HarmoFL and PFA: exact spectra, and what perturbation and transfer may not disturb."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedsec.federation.desk import Site
from fedsec.federation.local import PlainStep
from fedsec.federation.strategy import FedAvg
from fedsec.strategies.harmofl import HarmoFL, PerturbedStep, layer, perturbation
from fedsec.strategies.pfa import PFA, divergence, progressive, spread, stage_of
from fedsec.strategies.spectrum import amplitude, as_matrix, as_weight, band_mask, swapped, with_amplitude
from fedsec.types import RoundContext

from ..federation import toy
from . import small


def images(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.rand(*(shape or (3, 2, 12, 12)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dc_moves_the_mean_alone_to_the_given_intensity() -> None:
    x, target = images(), amplitude(images(1))[0]
    out = with_amplitude(x, target, band_mask(12, 12, "dc"))
    shift = out - x
    assert float((shift - shift.mean((2, 3), keepdim=True)).abs().max()) < 1e-12
    torch.testing.assert_close(out.mean((2, 3)), (target[:, 0, 0] / 144).expand(3, -1))


def test_full_band_has_the_given_amplitude_and_undoes_gain_and_offset() -> None:
    x, target = images(), amplitude(images(1))[0]
    mask = band_mask(12, 12, "full")
    out = with_amplitude(x, target, mask)
    torch.testing.assert_close(amplitude(out), target.expand_as(out), rtol=0, atol=1e-10)
    shifted = with_amplitude(0.5 * x + 0.2, target, mask)
    assert float((shifted - out).abs().max()) < 1e-12
    dc = band_mask(12, 12, "dc")
    ratio = with_amplitude(0.5 * x + 0.2, target, dc).std((2, 3)) / with_amplitude(x, target, dc).std((2, 3))
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5))


@pytest.mark.parametrize(("h", "w"), [(12, 12), (9, 12), (7, 9)])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_symmetric_bands_leave_no_imaginary_part(h: int, w: int, ratio: float) -> None:
    x, target = images(0, 2, 1, h, w), amplitude(images(1, 1, 1, h, w))
    residue = torch.fft.ifft2(swapped(x, target, band_mask(h, w, "ratio", ratio))).imag
    assert float(residue.abs().max()) < 1e-12
    lopsided = band_mask(h, w, "ratio", 0.3)
    lopsided[1, 2] = ~lopsided[1, 2]  # as a half-open range does
    assert float(torch.fft.ifft2(swapped(x, target, lopsided)).imag.abs().max()) > 1e-4


def test_the_mean_amplitude_is_learnt_in_round_one_averaged_and_then_fixed() -> None:
    data = small.clients()
    table, state, _ = small.trained(HarmoFL(), number=1)
    first = table.sharing.buffers.views(state.buffers)["net.amplitude"].clone()
    assert first.abs().sum() > 0
    _, later, _ = small.trained(HarmoFL(), number=3)
    kept = table.sharing.buffers.views(later.buffers)["net.amplitude"]
    torch.testing.assert_close(kept, first, rtol=1e-6, atol=0)  # averaged again with itself
    assert not layer(table.model).learning
    one = small.trained(HarmoFL(), number=1, data=data[:1], recipe=toy.recipe(batch_size=24))[1]
    seen = amplitude((data[0][0] - 0.5) / 0.25).mean(0)  # what the network sees, one batch: the first sets it
    torch.testing.assert_close(one.buffers.view_as(seen), seen, rtol=1e-4, atol=1e-3)


def perturbed(alpha: float) -> tuple[nn.Module, PerturbedStep]:
    model = toy.network()
    return model, PerturbedStep(PlainStep(model, toy.recipe(momentum=0.0)), alpha)


def test_no_perturbation_is_the_base_optimiser() -> None:
    x, y = toy.images(8, 0)
    model, step = perturbed(0.0)
    twin = toy.network()
    step(x, y)
    PlainStep(twin, toy.recipe(momentum=0.0))(x, y)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_perturbed_step_uses_the_gradient_at_the_perturbed_weights() -> None:
    x, y = toy.images(8, 0)
    model, step = perturbed(0.05)
    start = [p.detach().clone() for p in model.parameters()]
    twin = copy.deepcopy(model)
    loss = nn.functional.cross_entropy
    loss(twin(x), y).backward()
    delta = perturbation(list(twin.parameters()), 0.05)
    assert float(torch.stack([d.norm() for d in delta]).norm()) == pytest.approx(0.05, rel=1e-5)
    with torch.no_grad():
        for p, d in zip(twin.parameters(), delta, strict=True):
            p.add_(d)
    twin.zero_grad()
    loss(twin(x), y).backward()
    step(x, y)
    for p, before, q in zip(model.parameters(), start, twin.parameters(), strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p.detach(), before - 0.05 * q.grad, rtol=0, atol=1e-6)


def test_weights_are_restored_when_a_batch_raises() -> None:
    model, step = perturbed(0.05)
    start = [p.detach().clone() for p in model.parameters()]
    inner, calls = step.inner, []

    def failing(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return inner(x, y)

    step.inner = failing  # type: ignore[assignment]
    optimiser_step = step.optimizer.step
    with pytest.raises(RuntimeError, match="out of memory"):
        step(*toy.images(8, 0))
    assert len(calls) == 2 and step.optimizer.step == optimiser_step
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))


# --- PFA -----------------------------------------------------------------------------------------------------------


def weights(clients: int, *shape: int) -> dict[int, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return {k: {"w": torch.randn(*shape, generator=g, dtype=torch.float64)} for k in range(clients)}


@pytest.mark.parametrize("shape", [(8, 6), (6, 4, 3, 3), (5, 3, 3, 3)])
def test_reshaping_kernels_and_back(shape: tuple[int, ...]) -> None:
    w = weights(1, *shape)[0]["w"]
    assert torch.equal(as_weight(as_matrix(w), w.shape), w)
    if len(shape) == 4:
        n, c, d1, d2 = shape
        assert as_matrix(w).shape == (c * d1, d2 * n)
        assert float(as_matrix(w)[1 * d1 + 2, 1 * n + 3]) == float(w[3, 1, 2, 1])


@pytest.mark.parametrize("average", ["amplitude", "complex"])
def test_identical_clients_and_an_empty_band_change_nothing(average: str) -> None:
    w = weights(1, 6, 4, 3, 3)[0]
    same = progressive({0: w, 1: {"w": w["w"].clone()}}, 0.9, average)  # type: ignore[arg-type]
    torch.testing.assert_close(same[0]["w"], w["w"], rtol=0, atol=1e-13)
    others = weights(3, 6, 4, 3, 3)
    for client, tensors in progressive(others, 0.0, average).items():  # type: ignore[arg-type]
        assert torch.equal(tensors["w"], others[client]["w"])


@pytest.mark.parametrize(("rate", "ratio"), [(0.7, 0.959), (0.825, 0.943), (0.95, 0.924)])
def test_amplitude_averaging_aligns_hardly_anything(rate: float, ratio: float) -> None:
    """N(0, 1) kernels 64x32x3x3 of four clients: phase dominates (computed in the specification)."""
    models = weights(4, 64, 32, 3, 3)
    before = spread([m["w"] for m in models.values()])
    after = spread([m["w"] for m in progressive(models, rate).values()])
    assert after / before == pytest.approx(ratio, abs=0.006)


def test_the_whole_complex_band_is_the_mean() -> None:
    models = weights(3, 7, 9)
    mean = torch.stack([m["w"] for m in models.values()]).mean(0)
    for tensors in progressive(models, 1.0, "complex").values():
        torch.testing.assert_close(tensors["w"], mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("first", "previous", "deputy", "personal", "stage"),
    [
        (True, None, 0.9, 0.5, "recover"),
        (False, "exchange", 0.69, 1.0, "recover"),
        (False, "recover", 0.7, 1.0, "exchange"),
        (False, "recover", 0.95, 1.0, "exchange"),
        (False, "exchange", 0.89, 1.0, "exchange"),
        (False, "exchange", 0.9, 1.0, "sublimate"),
        (False, "sublimate", 0.89, 1.0, "exchange"),
        (False, "sublimate", 1.0, 1.0, "sublimate"),
        (False, "sublimate", 0.6, 1.0, "recover"),
    ],
)
def test_stages_of_transfer(first: bool, previous: str, deputy: float, personal: float, stage: str) -> None:
    assert stage_of(first, previous, deputy, personal) == stage  # type: ignore[arg-type]


def test_divergence_is_from_the_teacher_and_teaches_the_student_alone() -> None:
    student = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0, 0.5]], requires_grad=True)
    p, q = torch.softmax(teacher.detach(), 1), torch.softmax(student.detach(), 1)
    loss = divergence(student, teacher)
    assert float(loss.detach()) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    loss.backward()
    assert teacher.grad is None and student.grad is not None
    torch.testing.assert_close(student.grad, q - p)


def test_personal_models_survive_aggregation_and_clients_get_different_deputies() -> None:
    table, state, _ = small.trained(PFA(), norm="batch", number=2, recipe=toy.recipe(batch_size=16, epochs=2))
    assert set(state.sent) == {0, 1, 2}
    assert not torch.equal(state.sent[0], state.sent[1])
    model = PFA().personal_model(small.twin(table), table.sharing, 1, state, small.clients()[1][0])
    tensors = dict(model.state_dict(keep_vars=True))
    assert torch.equal(table.sharing.params.flatten(tensors), state.own[1]["params"])
    assert torch.equal(table.sharing.local.flatten(tensors), state.own[1]["personal_local"])
    assert not torch.equal(state.own[1]["params"], state.sent[1])
    views = [table.sharing.params.views(state.sent[k]) for k in (0, 1)]
    plain = [n for n in table.sharing.params.names if views[0][n].ndim not in (2, 4)]
    assert plain and all(torch.equal(views[0][n], views[1][n]) for n in plain)


def test_transfer_moves_no_statistics_twice() -> None:
    """Each of the two networks sees a batch once: BatchNorm counts it once."""
    strategy = PFA()
    table, state = small.federation(strategy, norm="batch")
    x, y = small.clients()[0]
    ctx = RoundContext(0, 1, 2, 0)
    site = Site(0, table.model, table.sharing, state.params, table.recipe, ctx, {}, {}, x, y)
    step = strategy.local_step(PlainStep(table.model, table.recipe), site)
    table.model.train()
    for rows in step.batches(len(x), ctx):
        step(x[rows], y[rows])
    for model in (table.model, step.personal):  # type: ignore[attr-defined]
        counts = {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
        assert counts == {2}


def test_without_transfer_and_band_pfa_is_no_exchange_of_kernels() -> None:
    _, state, _ = small.trained(PFA(rate=0.0, det=False), norm="batch", number=1)
    _, plain, _ = small.trained(FedAvg(), norm="batch", number=1)
    assert not torch.equal(state.sent[0], plain.params)
