"""Deflation of batches: exactness, honest proofs, and the words in which it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fedsec.attacks.gradinversion import auto, deflation
from fedsec.attacks.gradinversion.candidate import Candidate, NotApplicable
from fedsec.attacks.gradinversion.cascade import cascade
from fedsec.attacks.gradinversion.certificate import assess
from fedsec.attacks.gradinversion.chain import find_chain
from fedsec.attacks.gradinversion.clock import Clock
from fedsec.attacks.gradinversion.deflation import Deflation, Proof, prove, settle
from fedsec.attacks.gradinversion.labels import recover_labels
from fedsec.attacks.gradinversion.observation import Observation
from fedsec.attacks.gradinversion.peel import candidate_of, peel, peel_features, remaining, single_rows
from fedsec.attacks.gradinversion.prior import Prior, fit_prior
from fedsec.attacks.gradinversion.remainder import without
from fedsec.attacks.gradinversion.settings import Settings
from fedsec.attacks.gradinversion.trace import trace
from hypothesis import given, settings
from hypothesis import strategies as st
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


def run(observation: Observation) -> Proof:
    return peel(batches.layer_of(observation), Clock(math.inf))


def draw(xrays: Data, count: int, seed: int) -> Data:
    rows = torch.randperm(len(xrays[0]), generator=torch.Generator().manual_seed(1000 + seed))[:count]
    return xrays[0][rows], xrays[1][rows]


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 12, 12), (1, 16, 10)])
@pytest.mark.parametrize("batch", [2, 6])
def test_every_image_and_label_is_exact(shape: tuple[int, int, int], batch: int) -> None:
    public, found = cases.blobs(40, shape), cases.blobs(batch, shape, seed=1)
    model = batches.small_mlp(pixels=found.images[0].numel())
    observation = batches.observed(model, found.images, found.labels, fit_prior(public))
    proof = run(observation)
    assert batches.check(proof, found.images, found.labels) == batch
    assert float(batches.scores(proof, found.images)[0].min()) > 110


@settings(deadline=None, max_examples=12)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 1000))
def test_any_number_of_classes(classes: int, batch: int, seed: int) -> None:
    """No claim is ever false; B > C, and labels that repeat, are nothing special."""
    found = cases.blobs(batch, batches.SHAPE, seed=seed)
    y = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))
    model = batches.small_mlp(classes, seed)
    proof = run(batches.observed(model, found.images, y, fit_prior(cases.blobs(20, batches.SHAPE, seed=seed + 1))))
    batches.check(proof, found.images, y)


def test_sigmoid_outputs_and_many_labels(prior: Prior, data: Data) -> None:
    x = data[0][:4]
    y = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
    proof = run(batches.observed(batches.small_mlp(3), x, y, prior, task="multilabel"))
    assert batches.check(proof, x, y) == 4
    many = batches.small_mlp(9)
    with pytest.raises(NotApplicable, match="9 labels an image have 2\\^9 combinations"):
        batches.layer_of(batches.observed(many, x, torch.zeros(4, 9), prior, task="multilabel"))


@pytest.mark.parametrize("rate", [1.0, 0.02])
def test_a_real_update_is_certified_as_a_whole(rate: float, prior: Prior, data: Data) -> None:
    x, y = data[0][:5], data[1][:5]
    model = batches.small_mlp()
    observation = cases.observation_of(model, x, y, prior, cases.recipe(lr=rate))
    done = auto.reconstruct(observation, Settings(), torch.Generator().manual_seed(0))
    assert (done.method, done.certified, done.label_source) == ("peel", 5, "recovered")
    error = ((done.images[:, None] - x[None]) ** 2).flatten(2).mean(2)
    assert torch.equal(done.labels, y[error.argmin(1)])
    assert done.est_psnr is not None
    assert -10 * math.log10(float(error.min(1).values.max()) + 1e-14) > max(60, done.est_psnr - 20)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [8, 16])
def test_trained_models_give_all_their_images(
    batch: int, xrays: Data, xray_prior: Prior, trained_mlp: nn.Module
) -> None:
    """G2: B = 8 complete in 90 % of the draws, B = 16 three quarters of the images, by proof."""
    counts = []
    for seed in range(10):
        x, y = draw(xrays, batch, seed)
        counts.append(batches.check(run(batches.observed(trained_mlp, x, y, xray_prior)), x, y))
    assert sum(count == batch for count in counts) >= (9 if batch == 8 else 0)
    assert sum(counts) >= 0.75 * 10 * batch


def test_untrained_model_of_the_specification(xrays: Data, xray_prior: Prior) -> None:
    rows = cases.L32[:16]
    x, y = xrays[0][rows], xrays[1][rows]
    proof = run(batches.observed(cases.mlp().eval(), x, y, xray_prior))
    assert batches.check(proof, x, y) == 16
    assert float(batches.scores(proof, x)[0].min()) > 120


@pytest.mark.slow
@pytest.mark.parametrize("batch", [4, 8])
def test_polish_never_worsens(batch: int, xrays: Data, xray_prior: Prior, trained_mlp: nn.Module) -> None:
    """P20, on a trained model, from inputs that are off by as much as their errors say."""
    for seed in range(4):
        x, y = draw(xrays, batch, seed)
        layer = batches.layer_of(batches.observed(trained_mlp, x, y, xray_prior))
        inputs = x.double().flatten(1) * layer.gain + layer.shift
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed)).double()
        for off in (1e-7, 1e-3, 3e-2):
            known = Deflation.start(layer).adding(inputs * (1 + off * noise), y, torch.full((batch,), 2 * off).double())
            settled = settle(known)
            assert settled.misfit <= known.misfit
            assert torch.equal(settled.which, y)


def test_the_client_rounds_the_probability_of_a_sure_label(prior: Prior, data: Data) -> None:
    """p - 1 in float32 is off by 6e-8 however small it is, which changes the whole column of a confident image."""
    x, y = data[0][:4], data[1][:4]
    model = batches.small_mlp()
    head = model.net[5]
    with torch.no_grad():
        head.weight.mul_(60)
        y = model(x).argmax(1)
        y[0] = 1 - y[0]  # one image with a gradient that dwarfs the others'
    assert float(model(x[1:]).softmax(1).max(1).values.max().detach()) > 1 - 1e-4
    layer = batches.layer_of(batches.observed(model, x, y, prior))
    inputs = x.double().flatten(1) * layer.gain + layer.shift
    known = Deflation.start(layer).adding(inputs, y, torch.full((4,), 1e-8).double())
    blind = replace(known, rounding_std=torch.zeros(4).double())
    assert blind.misfit > 100 * known.with_rounding().misfit
    assert batches.check(peel(layer, Clock(math.inf)), x, y) >= 3


def cascade_of(observation: Observation) -> Candidate:
    chain = find_chain(trace(observation.simulation.model, observation.prior.mean[None].clone()), observation.complete)
    labels = recover_labels(observation, torch.Generator().manual_seed(0)).guesses[0]
    return assess(cascade(observation, chain, labels)[0], observation)


def null_trials(count: int, prior: Prior, data: Data) -> None:
    for number in range(count):
        for kind in ("model", "gaussian", "noise"):
            observation, x = batches.null_case(kind, number, prior, data)
            proof = run(observation)
            guess = torch.zeros(len(x), dtype=torch.long)
            found = assess(candidate_of(observation, proof, "peel", guess), observation) if len(proof.known) else None
            assert found is None or found.certified == 0, (kind, number)


def test_nothing_is_certified_where_there_is_nothing(prior: Prior, data: Data) -> None:
    """P19: another model's weights, Gaussian numbers, noise of 1e-3 that nobody declared."""
    null_trials(10, prior, data)


@pytest.mark.slow
def test_nothing_is_certified_in_200_trials(prior: Prior, data: Data) -> None:
    null_trials(200, prior, data)


@pytest.mark.parametrize("trials", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_cascade_certifies_nothing_where_there_is_nothing(trials: int, blob_prior: Prior) -> None:
    """P19 for one image."""
    x = cases.blobs(trials, seed=1).images
    model, other = cases.lenet(shape=(1, 16, 16)), cases.lenet(shape=(1, 16, 16), seed=9)
    for number in range(trials):
        image, label = x[number : number + 1], torch.tensor([number % 2])
        g = batches.gradient(other, image, label)
        random = torch.randn(len(g), generator=torch.Generator().manual_seed(number)) * g.norm() / len(g) ** 0.5
        for gradient in (g, random):
            view = cases.view_of(model, -gradient, 1, cases.recipe())
            assert cascade_of(batches.observe(view, model, blob_prior, (1, 16, 16))).certified == 0
        noisy = batches.observed(model, image, label, blob_prior, noise=1e-3, seed=number)
        assert cascade_of(noisy).certified == 0


def test_declared_noise_widens_every_error(prior: Prior, data: Data) -> None:
    """P19: at most 20 dB too high on every certified image; and the noise shows in the estimates."""
    x, y = data[0][:5], data[1][:5]
    clean, estimates = run(batches.observed(batches.small_mlp(), x, y, prior)), []
    for seed in range(4):
        proof = run(batches.observed(batches.small_mlp(), x, y, prior, noise=1e-5, seed=seed, declared=True))
        assert batches.check(proof, x, y) >= 3
        estimates.append(float(proof.decibel.max()))
    assert max(estimates) < float(clean.decibel.min()) - 10


def test_undeclared_noise_is_noticed(prior: Prior, data: Data) -> None:
    x, y = data[0][:5], data[1][:5]
    assert batches.layer_of(batches.observed(batches.small_mlp(), x, y, prior)).undeclared == 0
    noisy = batches.observed(batches.small_mlp(), x, y, prior, noise=1e-5)
    std = 1e-5 * noisy.norm / len(noisy.gradient) ** 0.5
    assert batches.layer_of(noisy).undeclared == pytest.approx(std, rel=0.1)
    batches.check(run(noisy), x, y)


def test_an_input_that_stands_on_one_row_is_not_proven(prior: Prior, data: Data) -> None:
    """With the one row left out, its error is without bound."""
    x, y = data[0][:3], data[1][:3]
    layer = batches.layer_of(batches.observed(batches.small_mlp(), x, y, prior))
    inputs = x.double().flatten(1) * layer.gain + layer.shift
    truth = Deflation.start(layer).adding(inputs[:1], y[:1], torch.tensor([1e-6]).double())
    alone = (truth.rest_norms < 3 * truth.rounded) & (truth.columns[0].abs() * truth.norms[0] > 100 * truth.rounded)
    assert int(alone.sum()) >= 2
    keep = torch.zeros_like(alone)
    keep[alone.nonzero()[0]] = True
    weights = keep / truth.rounded
    assert float(deflation.fit(truth, weights, torch.ones(1).double()).error) > 0.5
    keep[alone.nonzero()[1]] = True
    assert float(deflation.fit(truth, keep / truth.rounded, torch.ones(1).double()).error) < 1e-4


def test_missing_images_weaken_a_proof(prior: Prior, data: Data) -> None:
    """What is left may be theirs, and the same in all rows: it does not average out."""
    x, y = data[0][:4], data[1][:4]
    layer = batches.layer_of(batches.observed(batches.small_mlp(), x, y, prior))
    inputs = x.double().flatten(1) * layer.gain + layer.shift
    error = torch.full((4,), 1e-7).double()
    whole = prove(Deflation.start(layer).adding(inputs, y, error))
    part = prove(Deflation.start(layer).adding(inputs[:3], y[:3], error[:3]))
    assert bool((part.decibel < whole.decibel[:3] - 10).any())


def test_the_guess_fills_the_labels_of_missing_images() -> None:
    assert remaining(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0])).tolist() == [0, 1]
    assert remaining(torch.tensor([0, 0, 0, 0]), torch.tensor([1, 1])).shape == (2,)


def test_partial_candidates_are_counted_image_by_image(prior: Prior, data: Data) -> None:
    x, y = data[0][:3], data[1][:3]
    observation = batches.observed(batches.small_mlp(), x, y, prior)
    images = torch.cat([x[:2], prior.mean[None]])
    part = Candidate(images, y, "peel", image_psnr=(120.0, 60.0, -math.inf))
    assert assess(part, observation).certified == 2
    whole = Candidate(x, y, "peel", image_psnr=(120.0, 60.0, 51.0), layers_ok=True)
    assert assess(whole, observation).certified == 3
    contradicted = replace(whole, images=images)
    assert assess(contradicted, observation).certified == 0


def test_what_is_left_is_the_gradient_of_the_other_images(prior: Prior, data: Data) -> None:
    x, y, model = data[0][:5], data[1][:5], batches.small_mlp()
    rest = without(batches.observed(model, x, y, prior), x[:2], y[:2])
    expected = batches.gradient(model, x[2:], y[2:])
    assert rest.batch == 3
    assert float((rest.gradient - expected).norm() / expected.norm()) < 1e-5
    clipped = cases.observation_of(model, x, y, prior, knowledge={"g": {"clip_norm": 1e-3, "clip_scope": "update"}})
    with pytest.raises(NotApplicable, match="no sum over the images"):
        without(clipped, x[:2], y[:2])


def cnn() -> cases.Normalised:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(216, 96),
        nn.ReLU(inplace=True),
        nn.Linear(96, 2),
    )
    return cases.Normalised(net).eval()


def test_features_behind_convolutions_are_exact_for_every_image(prior: Prior, data: Data) -> None:
    model, x, y = cnn(), data[0][:3], data[1][:3]
    observation = batches.observed(model, x, y, prior)
    found = peel_features(observation)
    truth = model.net[:4]((x - cases.MEAN) / cases.STD).detach().double()
    assert len(found) == 3
    for feature in found:
        error = (truth - feature.value).norm(dim=1) / truth.norm(dim=1)
        assert float(error.min()) < 1e-4
        assert int(feature.label) == int(y[error.argmin()])
    done = auto.reconstruct(observation, Settings(budget_s=4), torch.Generator().manual_seed(0))
    assert "certified for 3 of 3 images" in done.not_applicable["peel"]
    assert done.certified == 0


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Flatten(), nn.Linear(144, 20), nn.Sigmoid(), nn.Linear(20, 2)], "sigmoid follows"),
        ([nn.Flatten(), nn.Linear(144, 20, bias=False), nn.ReLU(), nn.Linear(20, 2, bias=False)], "no bias"),
        ([nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 2)], "nothing follows"),
    ],
)
def test_refuses_by_name(layers: list[nn.Module], reason: str, prior: Prior, data: Data) -> None:
    model = cases.Normalised(nn.Sequential(*layers)).eval()
    with pytest.raises(NotApplicable, match=reason):
        batches.layer_of(batches.observed(model, data[0][:2], data[1][:2], prior))


def test_refuses_clipping_and_batch_norm_in_training(prior: Prior, data: Data) -> None:
    x, y, model = data[0][:3], data[1][:3], batches.small_mlp()
    for scope, words in (("sample", "each image's gradient was clipped"), ("update", "the update was clipped")):
        known = {"g": {"clip_norm": 1e-3, "clip_scope": scope}}
        with pytest.raises(NotApplicable, match=words):
            batches.layer_of(cases.observation_of(model, x, y, prior, knowledge=known))
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(144, 20), nn.ReLU(), nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
    )
    observation = cases.observation_of(cases.Normalised(net), x, y, prior, cases.recipe(mode="train"))
    with pytest.raises(NotApplicable, match="BatchNorm in train mode"):
        # One image has no batch moments: the recorded pass takes two.
        batches.find_relu_layer(observation, trace(observation.simulation.model, x[:2].clone()))


def test_the_rank_of_the_head_is_named(prior: Prior, data: Data) -> None:
    """P34: with two classes the head's gradient is one mixture, whatever the batch."""
    observation = batches.observed(cases.lenet(shape=batches.SHAPE), data[0][:4], data[1][:4], prior)
    done = auto.reconstruct(observation, Settings(budget_s=0.5, method="cascade"), torch.Generator().manual_seed(0))
    assert "mixture of 4 images" in done.not_applicable["cascade"]
    assert "rank 1 with 2 rows, too low to tell 4 images apart" in done.not_applicable["cascade"]


def test_rows_of_two_images_do_not_pass(prior: Prior, data: Data) -> None:
    """The range of pixels lets a mixture of two images through; their part in the row does not."""
    x, y = data[0][:6], data[1][:6]
    layer = batches.layer_of(batches.observed(batches.small_mlp(), x, y, prior))
    start = Deflation.start(layer)
    passed = single_rows(start)
    inputs = x.double().flatten(1) * layer.gain + layer.shift
    distance = torch.cdist(passed.inputs, inputs) / inputs.norm(dim=1)
    assert len(passed.tier) > 0
    assert float(distance.min(1).values.max()) < 1e-3
