"""One reading for each kind of thing that travels beside the parameters: (clients, N) scores, larger is likelier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fedsec.findings import Candidates, MembershipScores, SourceGuesses, Target
from fedsec.models.base import Normalised
from fedsec.models.loss import task_loss
from fedsec.strategies.replay import LATENT, Generator, unflat
from fedsec.strategies.selector import described
from fedsec.types import ServerView, Update

Array = NDArray[np.float64]
BATCH = 256
FLOOR = 1e-6


@dataclass
class Seen:
    """All that a curious server holds of one kind: the last of it that each client sent."""

    target: Target
    candidates: Candidates
    clients: tuple[int, ...]
    sent: Mapping[int, Tensor]
    last: Mapping[int, tuple[ServerView, Update]]
    """Client -> the last round in which it sent this."""
    samples: int

    def model(self, client: int) -> nn.Module:
        """The whole model that this client sent in that round."""
        view, update = self.last[client]
        model = self.target.model().to(self.target.device)
        tensors = model.state_dict(keep_vars=True)
        parts = view.layout.views(view.sent.get(client, view.params) + update.delta)
        if update.buffers is not None:
            parts |= view.buffer_layout.views(update.buffers)
        with torch.no_grad():
            for name, value in parts.items():
                tensors[name].copy_(value)
        return model.eval()

    def over_images(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of image batches, over all candidates; without gradients, on the CPU."""
        with torch.no_grad():
            parts = [function(x.to(self.target.device)).cpu() for x in self.candidates.images.split(BATCH)]
        return torch.cat(parts)


Reading = Callable[[Seen], Array]


def read(
    target: Target, samples: int
) -> tuple[tuple[MembershipScores, ...], tuple[SourceGuesses, ...], tuple[str, ...]]:
    """Every reading that what was sent allows.

    Returns:
        membership scores, guesses at each image's client, and what a reader has to know.
    """
    candidates = target.candidates
    assert candidates is not None
    notes: list[str] = []
    memberships: list[MembershipScores] = []
    sources: list[SourceGuesses] = []
    for kind, last in kinds_of(candidates.history).items():
        if kind in COUNTED:
            notes += [COUNTED[kind](client, payload(*pair, kind)) for client, pair in sorted(last.items())]
            continue
        if kind not in READINGS or len(last) < 2:
            notes.append(f"{kind}: no reading of it")
            continue
        clients = tuple(sorted(last))
        sent = {k: payload(*last[k], kind) for k in clients}
        seen = Seen(target, candidates, clients, sent, last, samples)
        scores = READINGS[kind](seen)
        sources.append(SourceGuesses(kind, np.array(clients)[scores.argmax(0)]))
        if kind in TELLS_MEMBERS:
            memberships.append(MembershipScores(kind, scores.max(0), view="updates"))
    if not (memberships or sources or notes):
        notes.append("nothing that can be read leaves the hospitals beside parameters, or only sums of it arrived")
    return tuple(memberships), tuple(sources), tuple(notes)


def kinds_of(history: tuple[ServerView, ...]) -> dict[str, dict[int, tuple[ServerView, Update]]]:
    """Kind -> client -> the last round in which it sent this; of amplitudes the first, since they then stand."""
    found: dict[str, dict[int, tuple[ServerView, Update]]] = {}
    for view in history:
        if view.clients_in_sum > 1:
            continue
        for update in view.updates:
            buffers = view.buffer_layout.names if update.buffers is not None else ()
            kinds = {*update.extras, *(kind for name in buffers if (kind := BUFFERS.get(name.rpartition(".")[2])))}
            for kind in kinds:
                clients = found.setdefault(kind, {})
                if kind != "amplitude" or update.client not in clients:
                    clients[update.client] = (view, update)
    return found


BUFFERS = {"amplitude": "amplitude", "running_mean": "statistics"}


def payload(view: ServerView, update: Update, kind: str) -> Tensor:
    """The tensor of this kind; all buffers for `statistics`."""
    if kind in update.extras:
        return update.extras[kind]
    assert update.buffers is not None
    if kind == "statistics":
        return update.buffers
    views = view.buffer_layout.views(update.buffers)
    return next(t for n, t in views.items() if n.endswith(kind))


# --- readings ------------------------------------------------------------------------------------------------------


def by_amplitude(seen: Seen) -> Array:
    """How near an image's amplitude spectrum is to each client's mean, in logarithms."""
    model = seen.target.model().to(seen.target.device)
    standard = model.normalise if isinstance(model, Normalised) else (lambda x: x)
    own = seen.over_images(lambda x: torch.fft.fft2(standard(x)).abs().add(FLOOR).log())
    means = torch.stack([seen.sent[k].cpu().add(FLOOR).log() for k in seen.clients])
    return scores(-torch.stack([(own - m).square().flatten(1).mean(1) for m in means]))


def by_statistics(seen: Seen) -> Array:
    """Gaussian likelihood of what an image gives at the first BatchNorm, under each client's means and variances."""
    rows = []
    for client in seen.clients:
        model = seen.model(client)
        layer = next(m for m in model.modules() if isinstance(m, _BatchNorm))
        rows.append(seen.over_images(first_layer_likelihood(model, layer)))
    return scores(torch.stack(rows))


def first_layer_likelihood(model: nn.Module, layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """(B,) mean Gaussian log-likelihood (up to constants) of a layer's inputs under its running statistics."""

    def likelihood(x: Tensor) -> Tensor:
        caught: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            model(x)
            if not caught:  # it belongs to a projection that serves training alone
                parts: Any = model
                parts.distil(parts.embed(x))
        finally:
            handle.remove()
        assert layer.running_mean is not None and layer.running_var is not None
        variance = layer.running_var.view(1, -1, 1) + FLOOR
        gap = caught[0].reshape(len(x), layer.num_features, -1) - layer.running_mean.view(1, -1, 1)
        return -(gap.square() / variance + variance.log()).mean((1, 2))

    return likelihood


def by_moments(seen: Seen) -> Array:
    """Gaussian likelihood of an image's features under each client's means and deviations."""
    rows = []
    for client in seen.clients:
        features = seen.over_images(embedding(seen.model(client)))
        mean, deviation = seen.sent[client].cpu()
        variance = deviation.square() + 1e-3
        rows.append(-((features - mean).square() / variance + variance.log()).mean(1))
    return scores(torch.stack(rows))


def by_features(seen: Seen) -> Array:
    """How near an image's unit-length features are to the mean of those that each client sent, which averages noise."""
    rows = []
    for client in seen.clients:
        features = F.normalize(seen.over_images(embedding(seen.model(client))), dim=1)
        rows.append(-(features - seen.sent[client].cpu().mean(0)).square().sum(1))
    return scores(torch.stack(rows))


def by_selector(seen: Seen) -> Array:
    """The clients' gradients of a linear site classifier: the classifier that the server fits with them.

    All gradients of all rounds are taken with Adam from zero, as the server does; it knows its own step.
    """
    from fedsec.strategies.selector import adam

    side: dict[str, Tensor] = {"selector": torch.zeros_like(next(iter(seen.sent.values())).cpu())}
    for view in seen.candidates.history:
        gradients = [u.extras["selector"].cpu() for u in view.updates if "selector" in u.extras]
        if gradients:
            adam(side, "selector", torch.stack(gradients).mean(0), 0.1)
    logits = described(seen.candidates.images.float()) @ side["selector"].T
    return scores(logits.T[list(seen.clients)])


def by_personal(seen: Seen) -> Array:
    """Minus the loss of an image under each client's personal model."""
    loss = task_loss(seen.candidates.task)
    rows = []
    for client in seen.clients:
        view, update = seen.last[client]
        flat, size = seen.sent[client].to(seen.target.device), view.layout.size
        model = seen.model(client)
        tensors = model.state_dict(keep_vars=True)
        parts = view.layout.views(flat[:size])
        if update.buffers is not None:
            parts |= view.buffer_layout.views(flat[size:])
        with torch.no_grad():
            for name, value in parts.items():
                tensors[name].copy_(value)
        logits = seen.over_images(model)
        pairs = zip(logits.split(1), seen.candidates.labels.split(1), strict=True)
        rows.append(torch.stack([-loss(z, y) for z, y in pairs]))
    return scores(torch.stack(rows))


def by_decoder(seen: Seen) -> Array:
    """Minus the squared distance to the nearest image of its class that each client's decoder draws."""
    images, labels = seen.candidates.images, seen.candidates.labels
    classes = int(labels.max()) + 1
    shape = (images.shape[1], images.shape[2], images.shape[3])
    rng = seen.target.ctx.generator("decoder")
    drawn = torch.arange(classes).repeat_interleave(seen.samples)
    rows = []
    for client in seen.clients:
        width = sum(p.numel() for p in Generator(shape, classes).decoder.parameters())
        wanted = classes + (len(seen.sent[client]) - width) // 256  # classes that no candidate has
        generator = Generator(shape, wanted)
        assert LATENT == 16
        unflat(generator.decoder, seen.sent[client].cpu())
        rows.append(-nearest(images, labels, generator.sample(drawn, rng), drawn))
    return scores(torch.stack(rows))


def by_images(seen: Seen) -> Array:
    """Minus the squared distance to the nearest picture that each client sent, after both are made comparable.

    Inverted pictures differ in contrast from real ones, so that each is standardised first.
    """
    own = standardised(seen.candidates.images)
    nobody = torch.zeros(len(own))
    rows = []
    for client in seen.clients:
        pictures = standardised(seen.sent[client].cpu())
        rows.append(-nearest(own, nobody, pictures, torch.zeros(len(pictures))))
    return scores(torch.stack(rows))


def by_labels(seen: Seen) -> Array:
    """How large a share of each class a client has, of all who sent theirs."""
    counts = torch.stack([seen.sent[k].cpu().double() for k in seen.clients])
    return scores((counts / counts.sum(0).clamp(min=1e-12))[:, seen.candidates.labels.long()])


def nearest(images: Tensor, labels: Tensor, pool: Tensor, classes: Tensor) -> Tensor:
    """(N,) mean squared distance of each image to the nearest one of its class in a pool; infinite without one."""
    found = torch.full((len(images),), float("inf"))
    for label in labels.unique():
        rows, other = labels == label, pool[classes == label]
        if len(other):
            flat = images[rows].flatten(1)
            distance = torch.cdist(flat.float(), other.flatten(1).float()).min(1).values
            found[rows] = distance.square() / flat.shape[1]
    return found


def standardised(x: Tensor) -> Tensor:
    """Each image with mean 0 and deviation 1."""
    return (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True).clamp(min=FLOOR)


def embedding(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The features of a model."""
    return lambda x: model.embed(x)  # type: ignore[operator]


def scores(values: Tensor) -> Array:
    """As float64."""
    return np.asarray(values.detach().double().cpu().numpy())


READINGS: Mapping[str, Reading] = {
    "amplitude": by_amplitude,
    "statistics": by_statistics,
    "moments": by_moments,
    "features": by_features,
    "selector": by_selector,
    "personal": by_personal,
    "decoder": by_decoder,
    "images": by_images,
    "label_histogram": by_labels,
    "classes": by_labels,
}
TELLS_MEMBERS = ("personal", "decoder", "images")
COUNTED: Mapping[str, Callable[[int, Tensor], str]] = {
    "rf": lambda k, v: f"client {k}: RF {float(v):.3f}, which {1 / max(float(v), FLOOR):.1f} equally hard classes give",
    "loss": lambda k, v: f"client {k}: training loss {float(v):.4f} in its last round, told outright",
    "capacity": lambda k, v: f"client {k}: capacity {float(v):g}, told outright",
    "votes": lambda k, v: f"client {k}: soft labels of {len(v)} pictures, a query to its model each",
}
"""Single numbers: what they say is read off, and no image can be asked about."""
