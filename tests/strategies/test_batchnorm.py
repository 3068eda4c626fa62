"""FedBN, SiloBN, AdaBN: exact facts about what travels and what comes out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsec import models
from fedsec.errors import ConfigError
from fedsec.federation.composition import compose
from fedsec.federation.engines.serial import Serial
from fedsec.federation.round import run_round
from fedsec.federation.strategy import FedAvg
from fedsec.strategies.batchnorm import AdaBN, FedBN, SiloBN, adapt
from fedsec.types import RoundContext

from . import small


def test_silobn_trains_fedavg_s_parameters_bit_for_bit() -> None:
    """Running statistics never enter a forward pass in train mode."""
    plain = small.trained(FedAvg(), norm="batch", number=3)[1]
    silo = small.trained(SiloBN(), norm="batch", number=3)[1]
    assert torch.equal(plain.params, silo.params)
    assert not torch.equal(silo.local[0], silo.local[1])


def test_one_client_makes_them_all_equal() -> None:
    data = small.clients((24,))
    found = []
    for strategy in (FedAvg(), SiloBN(), FedBN()):
        table, state, _ = small.trained(strategy, norm="batch", data=data)
        model = strategy.personal_model(small.twin(table), table.sharing, 0, state, data[0][0])
        found.append(torch.cat([t.float().flatten() for n, t in model.state_dict().items() if "num_batches" not in n]))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-6)  # θ + (θ' − θ) against θ' itself


@pytest.mark.parametrize("name", ["densenet121", "resnet18"])
def test_layers_are_found_by_type_whatever_they_are_called(name: str) -> None:
    model = models.build(name, num_classes=2, in_channels=1, image_size=32, norm="batch", seed=0)
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    channels = sum(m.num_features for m in layers)
    fedbn, silo, whole = (s.sharing(model) for s in (FedBN(), SiloBN(), FedAvg()))
    assert fedbn.local.size == 4 * channels and fedbn.buffers.size == 0
    assert silo.local.size == 2 * channels and silo.buffers.size == 0
    assert silo.params.size == whole.params.size
    assert whole.upload_bytes - silo.upload_bytes == 8 * channels
    assert silo.upload_bytes - fedbn.upload_bytes == 8 * channels
    if name == "densenet121":
        paths = tuple(f"{path}." for path, m in model.named_modules() if m in layers)
        state = [n for n in model.state_dict() if n.startswith(paths)]
        assert not [n for n in state if "bn" in n]  # a filter by name would find nothing
        assert len(state) == 605
        assert channels == 41824


def test_densenet_upload_bytes() -> None:
    """DenseNet-121, 5 labels, ImageNet stem, three channels: bytes of one upload, from the specification."""
    model = models.build("densenet121", num_classes=5, in_channels=3, image_size=224, norm="batch", seed=0)
    assert FedAvg().sharing(model).upload_bytes == 28_170_516
    assert SiloBN().sharing(model).upload_bytes == 27_835_924
    assert FedBN().sharing(model).upload_bytes == 27_501_332


@pytest.mark.parametrize("word", ["fedbn", "silobn", "adabn"])
def test_without_batchnorm_there_is_one_line_with_the_remedy(word: str) -> None:
    with pytest.raises(ConfigError, match=r"no BatchNorm.*dp replaces it.*type:Norm.*fedavg"):
        compose(word).sharing(small.network("group"))
    assert compose("partial:local=type:Norm").sharing(small.network("group")).local.size > 0


def test_adabn_takes_plain_means_over_batches() -> None:
    layer = nn.BatchNorm2d(2)
    model = nn.Sequential(layer)
    x = torch.randn(128, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5
    layer.running_mean.fill_(77.0)  # type: ignore[union-attr]
    adapt(model, x, batch=64)
    halves = x.split(64)
    means = torch.stack([h.mean((0, 2, 3)) for h in halves]).mean(0)
    variances = torch.stack([h.transpose(0, 1).flatten(1).var(1) for h in halves]).mean(0)
    torch.testing.assert_close(layer.running_mean, means)
    torch.testing.assert_close(layer.running_var, variances)
    assert layer.momentum == 0.1 and not model.training
    with pytest.raises(ConfigError, match="give no statistics"):
        adapt(model, x[:1])


def test_a_client_that_never_came_adapts_and_the_others_do_not_change() -> None:
    data = small.clients()
    strategy = SiloBN()
    table, state = small.federation(strategy, norm="batch")
    for t in (1, 2):
        run_round(table, state, [0, 1], RoundContext(0, t, 2), Serial(table, data).train)
    assert state.trained == {0, 1}
    shifted = data[2][0] * 0.3 + 0.6
    unseen = strategy.unseen_model(small.twin(table), table.sharing, state, shifted)
    expected = adapt(strategy.personal_model(small.twin(table), table.sharing, 0, state, shifted), shifted)
    for (name, a), (_, b) in zip(unseen.state_dict().items(), expected.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_adabn_judges_old_clients_with_fresh_statistics() -> None:
    table, state, _ = small.trained(AdaBN(), norm="batch")
    x = small.clients()[0][0]
    judged = AdaBN().personal_model(small.twin(table), table.sharing, 0, state, x)
    plain = SiloBN().personal_model(small.twin(table), table.sharing, 0, state, x)
    first = next(m for m in judged.modules() if isinstance(m, nn.BatchNorm2d))
    kept = next(m for m in plain.modules() if isinstance(m, nn.BatchNorm2d))
    assert first.running_mean is not None and kept.running_mean is not None
    assert not torch.equal(first.running_mean, kept.running_mean)
