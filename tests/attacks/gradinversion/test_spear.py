"""Low-rank disaggregation: exactness where no neuron has an image alone, and what proves nothing."""

from __future__ import annotations

import pytest
import torch
from fedsec.attacks.gradinversion import spear as module
from fedsec.attacks.gradinversion.candidate import NotApplicable
from fedsec.attacks.gradinversion.certificate import assess
from fedsec.attacks.gradinversion.clock import Clock
from fedsec.attacks.gradinversion.deflation import Proof
from fedsec.attacks.gradinversion.observation import Observation
from fedsec.attacks.gradinversion.peel import candidate_of, peel
from fedsec.attacks.gradinversion.prior import Prior, fit_prior
from fedsec.attacks.gradinversion.spear import column_test, disaggregate, nothing_known, null_vectors, row_space, spear
from torch import Tensor, nn

from . import batches, cases

Data = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def prior() -> Prior:
    return fit_prior(cases.blobs(64, batches.SHAPE))


@pytest.fixture(scope="module")
def data() -> Data:
    found = cases.blobs(48, batches.SHAPE, seed=1)
    return found.images, found.labels


@pytest.fixture(scope="session")
def trained_mlp(xrays: Data) -> cases.Normalised:
    return cases.train(cases.mlp(), *xrays)


def run(observation: Observation, proof: Proof | None = None, seconds: float = 10.0, public: bool = True) -> Proof:
    layer = batches.layer_of(observation) if proof is None else proof.known.layer
    images = observation.prior.images.double().flatten(1) * layer.gain + layer.shift
    generator = torch.Generator().manual_seed(0)
    return spear(proof or nothing_known(layer), Clock(seconds), generator, images if public else images[:0])


@pytest.mark.parametrize("batch", [2, 4, 8])
@pytest.mark.parametrize("public", [True, False])
def test_every_image_is_exact_without_peeling(batch: int, public: bool, prior: Prior, data: Data) -> None:
    x, y = data[0][:batch], data[1][:batch]
    proof = run(batches.observed(batches.small_mlp(), x, y, prior), public=public)
    assert batches.check(proof, x, y) == batch
    assert float(batches.scores(proof, x)[0].min()) > 100


@pytest.mark.parametrize("batch", [2, 4])
def test_whitening_solves_trained_models(
    batch: int, xrays: Data, xray_prior: Prior, trained_mlp: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P18: a fixed tolerance for zeros fails once singular values differ by more than 100."""
    rows = torch.randperm(len(xrays[0]), generator=torch.Generator().manual_seed(3))[:batch]
    x, y = xrays[0][rows], xrays[1][rows]
    observation = batches.observed(trained_mlp, x, y, xray_prior)
    space = row_space(nothing_known(batches.layer_of(observation)).known)
    assert space.condition > module.WHITEN
    assert space.whitened
    assert batches.check(run(observation), x, y) == batch
    monkeypatch.setattr(module, "WHITEN", 1e30)
    assert not row_space(nothing_known(batches.layer_of(observation)).known).whitened


def test_the_bias_proves_nothing_and_the_column_does(prior: Prior, data: Data) -> None:
    """P17: any invertible Q explains the gradient of the bias."""
    x, y = data[0][:4], data[1][:4]
    observation = batches.observed(batches.small_mlp(), x, y, prior)
    layer = batches.layer_of(observation)
    space = row_space(nothing_known(layer).known)
    wrong = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()
    columns, residual = disaggregate(space.factor, layer.da, wrong)
    assert residual < 1e-5
    inputs = torch.linalg.lstsq(columns, layer.dw).solution
    assert float(column_test(layer, inputs, columns.T)[0].min()) > 0.1
    truth = x.double().flatten(1) * layer.gain + layer.shift
    right = layer.columns(truth, y)[0]
    miss, which = column_test(layer, truth, right)
    assert float(miss.max()) < 1e-12
    assert torch.equal(which, y)


def test_null_vectors_are_those_of_the_decomposition() -> None:
    matrices = torch.randn(20, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.linalg.svd(matrices)[2][:, -1]
    assert torch.allclose((null_vectors(matrices) * expected).sum(1).abs(), torch.ones(20).double(), atol=1e-9)


def test_it_finishes_what_peeling_leaves(xrays: Data, xray_prior: Prior) -> None:
    """A batch of 32 in which two images alone have a neuron of their own."""
    rows = torch.randperm(len(xrays[0]), generator=torch.Generator().manual_seed(1015))[:32]
    x, y = xrays[0][rows], xrays[1][rows]
    observation = batches.observed(cases.mlp().eval(), x, y, xray_prior)
    peeled = peel(batches.layer_of(observation), Clock(60))
    assert len(peeled.known) < 8
    assert batches.check(run(observation, peeled), x, y) == 32


def null_trials(count: int, prior: Prior, data: Data) -> None:
    for number in range(count):
        for kind in ("model", "gaussian", "noise"):
            observation, x = batches.null_case(kind, number, prior, data)
            try:
                proof = run(observation, seconds=0.03)
            except NotApplicable:
                continue
            guess = torch.zeros(len(x), dtype=torch.long)
            if len(proof.known):
                assert assess(candidate_of(observation, proof, "spear", guess), observation).certified == 0


def test_nothing_is_certified_where_there_is_nothing(prior: Prior, data: Data) -> None:
    """P19."""
    null_trials(10, prior, data)


@pytest.mark.slow
def test_nothing_is_certified_in_200_trials(prior: Prior, data: Data) -> None:
    null_trials(200, prior, data)


def test_refuses_with_numbers(prior: Prior, data: Data) -> None:
    x, y = data[0][:12], data[1][:12]
    with pytest.raises(NotApplicable, match="8 neurons cannot tell 12 images apart"):
        run(batches.observed(batches.small_mlp(width=8), x, y, prior))
    with pytest.raises(NotApplicable, match=r"too few|nothing but rounding or noise"):
        run(batches.observed(batches.small_mlp(), x, y, prior, noise=30.0, declared=True))
    many = cases.blobs(70, batches.SHAPE, seed=2)
    with pytest.raises(NotApplicable, match="images are mixed in every row; 64 are told apart at most"):
        run(batches.observed(batches.small_mlp(), many.images, many.labels, prior))
