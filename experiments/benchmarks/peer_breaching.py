"""The opponent of the benchmark: `breaching` 0.1.2 (PyPI, MIT), given the same upload, with its faults mended.

What it needs to run on grey images and to be read fairly is mended here, on its objects and never in its files. Each
mend says what goes wrong without it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fedsec.attacks.gradinversion.observation import Observation
from torch import Tensor, nn

from .tracing import Recorder

MAX_ITERATIONS = 2400
"""Of its 24,000 for cosine matching, so that an attack takes seconds; the rate decays at the same shares of the run."""
CONFIGURATIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "breaching invertinggradients, TV 0.2": ("invertinggradients", (f"optim.max_iterations={MAX_ITERATIONS}",)),
    "breaching invertinggradients, TV 0.001": (
        "invertinggradients",
        (f"optim.max_iterations={MAX_ITERATIONS}", "regularization.total_variation.scale=0.001"),
    ),
    "breaching deepleakage": ("deepleakage", ()),
}
"""Contender -> the peer's configuration and what is changed in it. TV 0.2 is its own weight, made for CIFAR-10."""


def version() -> str | None:
    """The installed version; None where the peer cannot be imported."""
    return importlib.metadata.version("breaching") if importlib.util.find_spec("breaching") else None


class OutOfTime(KeyboardInterrupt):
    """The CPU budget is spent. At an interrupt, and at nothing else, the peer hands in its best so far."""


@dataclass(frozen=True)
class Outcome:
    """What the peer hands in."""

    images: Tensor
    """(B, C, H, W), [0, 1] before clamping."""
    labels: Tensor
    label_source: str
    """`told`, `recovered` by its own rule, or `joint`: optimised with the images."""
    iterations: int
    """Evaluations of its objective."""


class TimedObjective:
    """The peer's objective, behind a recorder of its iterates and a CPU limit."""

    def __init__(self, objective: Any, recorder: Recorder, level: Tensor, spread: Tensor, budget_s: float) -> None:
        self.objective, self.recorder, self.budget_s = objective, recorder, budget_s
        self.level, self.spread = level.view(1, -1, 1, 1), spread.view(1, -1, 1, 1)
        self.calls = 0

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        """As the peer's."""
        self.objective.initialize(*args, **kwargs)

    def pixels(self, candidate: Tensor) -> Tensor:
        """Images in [0, 1] from normalised ones."""
        return candidate.detach() * self.spread + self.level

    def __call__(self, model: nn.Module, gradient: Any, candidate: Tensor, labels: Tensor) -> Any:
        self.recorder.record(lambda: self.pixels(candidate))
        if self.recorder.seconds > self.budget_s:
            raise OutOfTime
        self.calls += 1
        return self.objective(model, gradient, candidate, labels)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It prints its configuration and warns of its dependencies' futures."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def prepare(configuration: str, net: nn.Module, iterations: int | None = None) -> Any:
    """The peer's attacker on a network for normalised images."""
    with _quiet():
        import breaching

        name, changes = CONFIGURATIONS[configuration]
        limit = () if iterations is None else (f"optim.max_iterations={iterations}",)
        config = breaching.get_attack_config(name, [*changes, *limit])
        setup = {"dtype": torch.float, "device": torch.device("cpu")}
        return breaching.attacks.prepare_attack(net, nn.CrossEntropyLoss(), config, setup)


def mend_total_variation(attacker: Any, channels: int) -> None:
    """Its total variation has kernels for three channels: any other number raises."""
    for regularizer in attacker.regularizers:
        if type(regularizer).__name__ == "TotalVariation":
            regularizer.groups = channels
            regularizer.weight = regularizer.weight[:2].repeat(channels, 1, 1, 1)


def mend_joint_labels(attacker: Any) -> list[Tensor]:
    """Its joint attack reports the arg max of the random template; the list collects the optimised logits instead."""
    found: list[Tensor] = []
    run = attacker._run_trial

    def trial(*args: Any, **kwargs: Any) -> Any:
        images, logits = run(*args, **kwargs)
        found.append(logits)
        return images, logits

    attacker._run_trial = trial
    return found


def reconstruct(
    configuration: str,
    observation: Observation,
    net: nn.Module,
    level: Tensor,
    spread: Tensor,
    recorder: Recorder,
    *,
    seed: int,
    budget_s: float,
    iterations: int | None = None,
) -> Outcome:
    """Attack one upload.

    Args:
        configuration: a key of `CONFIGURATIONS`.
        observation: the upload as our attacks see it. The peer is given the same gradient, and the labels where they
            were told; it has no place for the prior and the noise level.
        net: the broadcast network, on normalised images.
        level: (C,) mean that images are normalised with.
        spread: (C,) standard deviation.
        recorder: started right before.
        seed: of torch's global generator, from which the peer draws.
        budget_s: net CPU seconds.
        iterations: steps at most, for a warm-up.
    """
    attacker = prepare(configuration, net, iterations)
    mend_total_variation(attacker, observation.image_shape[0])
    joint = attacker.cfg.attack_type == "joint-optimization"  # refuses labels that are told
    logits = mend_joint_labels(attacker) if joint else []
    timed = attacker.objective = TimedObjective(attacker.objective, recorder, level, spread, budget_s)
    told = None if joint else observation.labels
    shared = {
        "gradients": [part.clone() for part in observation.gradient_parts],
        "buffers": None,
        "metadata": {"num_data_points": observation.batch, "labels": told, "local_hyperparams": None},
    }
    torch.manual_seed(seed)
    with _quiet():
        # Its default `server_secrets=None` raises: it looks for a key in it.
        found, _ = attacker.reconstruct([_payload(observation, net, level, spread)], [shared], server_secrets={})
    labels = logits[0].argmax(1) if joint else found["labels"]
    source = "joint" if joint else "recovered" if told is None else "told"
    return Outcome(timed.pixels(found["data"]), labels, source, timed.calls)


def _payload(observation: Observation, net: nn.Module, level: Tensor, spread: Tensor) -> dict[str, Any]:
    from omegaconf import OmegaConf  # the peer's own: it reads its metadata by attribute and by key

    with torch.no_grad():
        classes = net(torch.zeros(1, *observation.image_shape)).shape[1]
    metadata = {
        "shape": list(observation.image_shape),
        "mean": level.tolist(),
        "std": spread.tolist(),
        "classes": classes,
        "task": "classification",
        "modality": "vision",
    }
    return {
        "parameters": list(net.parameters()),
        "buffers": list(net.buffers()),
        "metadata": OmegaConf.create(metadata),
    }
