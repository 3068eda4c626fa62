"""What is kept of a personal federation, so that it can be observed after its training."""

from __future__ import annotations

from pathlib import Path

import torch

from fedsec.config import Cell, DataConfig, FederationConfig, ModelConfig
from fedsec.federation.assemble import assemble, resolve
from fedsec.federation.states import from_tensors, is_plain, to_tensors
from fedsec.federation.strategy import FedAvg
from fedsec.federation.training import Training, train
from fedsec.federation.victims import observe
from fedsec.findings import VictimPlan
from fedsec.strategies.pfa import PFA

from . import small


def test_a_state_survives_being_written() -> None:
    _, state, _ = small.trained(PFA(), norm="batch")
    back = from_tensors(state.params, state.buffers, to_tensors(state, "round-3"), "round-3")
    small.assert_same(state, back, atol=0)
    assert is_plain(small.trained(FedAvg())[1]) and not is_plain(back)
    copied = state.copy()
    copied.own[0]["params"].zero_()
    assert bool(state.own[0]["params"].any())


def test_a_victim_trains_from_what_it_was_sent_and_kept_in_that_round(tmp_path: Path) -> None:
    cell = resolve(
        Cell(
            data=DataConfig(name="synthetic-cxr:images=260"),
            model=ModelConfig(name="cnn", norm="batch"),
            federation=FederationConfig(clients=2, rounds=2, local_epochs=1, strategy="pfa", engine="serial"),
        )
    )
    federation = assemble(cell)
    done = train(federation, (2,))
    done.save(tmp_path / "t", federation)
    opened = Training.open(tmp_path / "t", (2,), done.fingerprint)
    assert opened is not None
    for training in (done, opened):
        state = training.state(2, federation)
        assert set(state.sent) == {0, 1} and not torch.equal(state.sent[0], state.sent[1])
        views, victims = observe(federation, training, VictimPlan(rounds=(2,), images=2, batch=1))
        for view, victim in zip(views, victims, strict=True):
            assert torch.equal(view.params, state.sent[victim.client])


def test_the_released_model_leaves_out_what_served_training_alone(tmp_path: Path) -> None:
    from fedsec import checkpoint

    cell = resolve(
        Cell(
            data=DataConfig(name="synthetic-cxr:images=260"),
            federation=FederationConfig(clients=2, rounds=1, local_epochs=1, strategy="moon", engine="serial"),
        )
    )
    federation = assemble(cell)
    train(federation, ()).save(tmp_path / "t", federation)
    kept, _ = checkpoint.load(tmp_path / "t" / "model.safetensors")
    assert kept and not [name for name in kept if name.startswith("projection.")]
