"""All clients of a round in one batch on one device: their models are stacked, and each step is one vmapped step.

For GPUs, where many small clients leave most of the device idle; on a CPU it is slower than `serial` for convolutions.
Where clients cannot be stacked (a defense that wraps the step, normalisation statistics, dropout, an adversary's
client), the turn is carried out as `serial` does. **Not measured on a GPU yet**: its results are tested, on the CPU.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedsec.defense import Defense
from fedsec.errors import FedsecError
from fedsec.federation.engines.base import ClientData, Engine, reason
from fedsec.federation.engines.serial import Serial
from fedsec.federation.local import shuffled_batches
from fedsec.federation.round import sized
from fedsec.federation.seats import Reply, Seats, Turn
from fedsec.federation.sharing import load
from fedsec.federation.strategy import Strategy
from fedsec.models.loss import task_loss
from fedsec.types import Update, sorted_by_client

TOGETHER = 32
"""Clients in one batch at most: their parameters, gradients and momentum are on the device at once."""


class Batched(Engine):
    """Stacks what can be stacked and carries out the rest one by one.

    Args:
        seats: as `serial` takes them. data: the clients' images, on the device. together: clients in one batch at most.
    """

    def __init__(self, seats: Seats, data: ClientData, together: int = TOGETHER) -> None:
        self.seats = seats
        self.data = data
        self.together = together
        self.serial = Serial(seats, data)
        self.loss = task_loss(seats.recipe.task)
        self.stackable = stackable(seats)

    def train(self, turns: Sequence[Turn]) -> list[Reply]:
        """All turns."""
        return list(self.stream(turns))

    def stream(self, turns: Sequence[Turn]) -> Iterator[Reply]:
        """A batch of clients at a time."""
        turns = sorted_by_client(turns)
        for start in range(0, len(turns), self.together):
            share = turns[start : start + self.together]
            stacked = [t for t in share if self.stackable and self._alike(t, share[0])]
            alone = [t for t in share if t not in stacked]
            yield from sorted_by_client([*self._stacked(stacked), *self.serial.train(alone)])

    def _alike(self, turn: Turn, first: Turn) -> bool:
        common = turn.params is first.params and turn.local is None and not turn.own and not turn.keep
        return common and turn.client not in self.seats.malicious and turn.max_steps is None

    def _stacked(self, turns: Sequence[Turn]) -> list[Reply]:
        if not turns:
            return []
        start = time.perf_counter()
        params, losses, steps = self._descend(turns)
        seconds = (time.perf_counter() - start) / len(turns)
        layout = self.seats.sharing.params
        replies = []
        for row, turn in enumerate(turns):
            delta = layout.flatten({n: p[row] for n, p in params.items()}).sub_(turn.params)
            update = Update(turn.client, delta, len(self.data[turn.client][0]))
            try:
                for defense in self.seats.defenses:
                    update = sized(defense.on_upload(update, turn.ctx), update)
                content = self.seats.aggregator.encode(update, turn.ctx)
            except FedsecError:
                raise
            except Exception as error:
                replies.append(Reply(turn.client, None, failure=reason(error)))
                continue
            loss = losses[row] / steps[row] if steps[row] else float("nan")
            replies.append(Reply(turn.client, content, None, loss, steps[row], seconds))
        return replies

    def _descend(self, turns: Sequence[Turn]) -> tuple[dict[str, Tensor], list[float], list[int]]:
        """Every client's local steps; stacked parameters (k, ...), summed losses and steps of each client."""
        seats, recipe = self.seats, self.seats.recipe
        model = seats.model
        load(model, seats.sharing, turns[0].params, turns[0].buffers, None)
        model.train(recipe.mode == "train")
        fixed = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in seats.sharing.params.names}
        views = seats.sharing.params.views(turns[0].params)
        params = {n: p.unsqueeze(0).repeat(len(turns), *[1] * p.dim()) for n, p in views.items()}
        momentum = {n: torch.zeros_like(p) for n, p in params.items()}

        def loss(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self.loss(functional_call(model, {**fixed, **own}, (x,)), y)

        step = vmap(grad_and_value(loss))
        batches = [
            list(shuffled_batches(len(self.data[t.client][0]), recipe, t.ctx.generator("batches"))) for t in turns
        ]
        total = torch.zeros(len(turns), device=turns[0].params.device)
        for number in range(max(map(len, batches))):
            # The last batch of an epoch is short, and shorter at some clients: batches of one length go together.
            groups: defaultdict[int, list[int]] = defaultdict(list)
            for row, own in enumerate(batches):
                if number < len(own):
                    groups[len(own[number])].append(row)
            for rows in groups.values():
                pairs = [self._batch(turns[row].client, batches[row][number]) for row in rows]
                x, y = (torch.stack(column) for column in zip(*pairs, strict=True))
                where = torch.tensor(rows, device=x.device)
                gradients, values = step({n: p[where] for n, p in params.items()}, x, y)
                total[where] += values.detach()
                for name, gradient in gradients.items():
                    gradient = gradient + recipe.weight_decay * params[name][where]
                    # torch.optim.SGD: the first momentum is the gradient itself, which a zero start gives.
                    speed = recipe.momentum * momentum[name][where] + gradient
                    momentum[name][where] = speed
                    params[name][where] -= recipe.lr * speed
        return params, total.tolist(), [len(own) for own in batches]

    def _batch(self, client: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.data[client]
        rows = rows.to(x.device)
        return x[rows], y[rows]


def stackable(seats: Seats) -> bool:
    """Whether the clients' training is nothing but SGD on a model whose forward pass has neither memory nor chance."""
    plain = all(type(d).local_step is Defense.local_step for d in seats.defenses)
    prepared = all(type(d).prepare_model is Defense.prepare_model for d in seats.defenses)
    random = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in seats.model.modules())
    hooks = ("begin", "objective", "local_step", "finish", "report", "wire")
    usual = all(getattr(type(seats.strategy), hook) is getattr(Strategy, hook) for hook in hooks)
    whole = seats.sharing.buffers.size == 0 and seats.sharing.local.size == 0
    descent = seats.recipe.optimizer == "sgd"
    return plain and prepared and usual and whole and descent and not random and seats.planted is None
