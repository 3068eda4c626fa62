"""How one client trains: batches, loss and optimiser. A defense may wrap the step (see `fedsec.defense.LocalStep`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fedsec.defense import LocalStep
from fedsec.federation.desk import Objective
from fedsec.models.loss import penalties, task_loss
from fedsec.types import LocalRecipe, RoundContext, Task


def optimizer(params: Sequence[nn.Parameter], recipe: LocalRecipe) -> torch.optim.Optimizer:
    """What the recipe's clients descend with, fused where the device can."""
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(params, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    return torch.optim.SGD(
        params, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=fused
    )


class PlainStep:
    """The recipe's optimiser on shuffled batches, one epoch after the other."""

    def __init__(self, model: nn.Module, recipe: LocalRecipe, objective: Objective | None = None) -> None:
        self.model = model
        self.recipe = recipe
        self.objective = objective or plain_objective(recipe.task)
        params = [p for p in model.parameters() if p.requires_grad]
        # A fresh optimiser each round: momentum does not survive a broadcast.
        self.optimizer = optimizer(params, recipe)

    def batches(self, size: int, ctx: RoundContext) -> Iterator[Tensor]:
        """Shuffled index batches for the recipe's epochs or steps; the last batch of an epoch may be short."""
        return shuffled_batches(size, self.recipe, ctx.generator("batches"))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        with penalties(self.model) as extra:
            loss = self.objective(self.model, x, y)
        loss = loss + sum(extra) if extra else loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def plain_objective(task: Task) -> Objective:
    """The task's mean loss, with nothing added."""
    loss = task_loss(task)
    return lambda model, x, y: loss(model(x), y)


def shuffled_batches(size: int, recipe: LocalRecipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches for the recipe's epochs or steps, each epoch in a new order; its last batch may be short."""
    left = recipe.steps
    epochs = recipe.epochs
    while (epochs is None or epochs > 0) and left != 0:
        for batch in torch.randperm(size, generator=generator).split(recipe.batch_size):
            yield batch
            if left is not None:
                left -= 1
                if left == 0:
                    return
        if epochs is not None:
            epochs -= 1


def train_locally(
    step: LocalStep,
    x: Tensor,
    y: Tensor,
    recipe: LocalRecipe,
    ctx: RoundContext,
    batches: Iterable[Tensor] | None = None,
    max_steps: int | None = None,
) -> tuple[float, int]:
    """Run one round of local training.

    Args:
        step: the client's optimisation, as its defenses made it.
        x: (n, C, H, W) images. y: their labels.
        recipe: how clients train.
        ctx: the client's own.
        batches: index tensors to train on instead of those that the step draws.
        max_steps: stop after so many.

    Returns:
        mean loss over the steps (NaN where there was none), and the number of steps.
    """
    step.model.train(recipe.mode == "train")
    total: Tensor | float = 0.0
    steps = 0
    drawn = step.batches(len(x), ctx) if batches is None else batches
    for batch in itertools.islice(drawn, max_steps):
        rows = batch.to(x.device)
        total = total + step(x[rows], y[rows])
        steps += 1
    return (float(total) / steps if steps else float("nan")), steps
