"""What does a restart of `inverting_gradients` cost, alone and side by side? Goal G6 of gradient inversion.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.restarts --repeats 5

LeNet with sigmoid, one image of 28x28 random pixels (speed does not depend on what they show). `floor` is 3.5 times
forward and backward, what a step with its double backward must cost; `single loop` is a step of the method with one
start, `vmap R` a step with R starts, divided by R. Milliseconds of CPU time, the median of interleaved repeats; the
machine is shared, so only the ratios of one run mean something.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from fedsec.attacks.gradinversion import inverting_gradients as method
from fedsec.attacks.gradinversion.clock import Clock
from fedsec.attacks.gradinversion.starts import noise_start
from torch import nn

from fedsec.machine import prepare_for_small_networks
from tests.attacks.gradinversion import cases

FLOOR = 3.5
SIZES = (1, 8, 32)


def milliseconds(run: Callable[[], object], steps: int) -> float:
    """CPU time of one call."""
    began = time.process_time()
    for _ in range(steps):
        run()
    return (time.process_time() - began) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    prepare_for_small_networks()
    model, shape = cases.lenet(), (1, 28, 28)
    x, y = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)), torch.ones(1, dtype=torch.long)
    prior = cases.prior_of(cases.blobs(64, shape))
    observation = cases.observation_of(model, x, y, prior)
    parameters = [p.clone().requires_grad_(True) for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def forward_backward() -> None:
        out = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        torch.autograd.grad(nn.functional.cross_entropy(out, y), parameters)

    def whole_loop(restarts: int) -> Callable[[], object]:
        """So many steps of the method itself, its bookkeeping included."""
        return lambda: method.inverting_gradients(
            observation, y, Clock(1e9), torch.Generator().manual_seed(0), restarts=restarts, iterations=arguments.steps
        )

    contenders: dict[str, Callable[[], float]] = {
        "forward + backward": lambda: milliseconds(forward_backward, 5 * arguments.steps),
        "single, gradient alone": lambda: milliseconds(
            lambda: method._evaluator(observation, y, method.Terms(), 1)(
                noise_start(observation, torch.Generator().manual_seed(0), 1), 1.0
            ),
            arguments.steps,
        ),
    }
    for size in SIZES:
        name = "single loop" if size == 1 else f"vmap {size}"
        contenders[name] = lambda size=size: milliseconds(whole_loop(size), 1) / (arguments.steps * size)  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(arguments.repeats + 1):  # the first is a warm-up
        for name, run in contenders.items():
            spent = run()
            if repeat:
                taken[name].append(spent)
    median = {name: statistics.median(values) for name, values in taken.items()}
    floor = FLOOR * median["forward + backward"]
    result = {
        "milliseconds": {name: round(value, 3) for name, value in median.items()},
        "single loop over floor": round(median["single loop"] / floor, 3),
        "speed over the single loop": {
            f"vmap {size}": round(median["single loop"] / median[f"vmap {size}"], 2) for size in SIZES[1:]
        },
        "torch": torch.__version__,
        **vars(arguments),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
