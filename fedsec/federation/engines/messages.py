"""Turns and replies as named arrays and plain values: what travels between machines. Nothing in it is ever executed.

A parcel goes to one node and may hold the turns of several clients; the common broadcast is in it once. What comes back
is checked here for its form alone; whether an update is any good is the screening's question.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsec import errors
from fedsec.errors import FedsecError, PayloadError, RunError
from fedsec.federation.hidden import Envelope
from fedsec.federation.seats import Reply, Turn
from fedsec.types import Payload, RoundContext, Update, Wire

Arrays = dict[str, np.ndarray]
Values = dict[str, Any]
"""Numbers, texts, bytes, and lists of one of them."""
NO_LIMIT = -1


def pack_turns(turns: Sequence[Turn]) -> tuple[Arrays, Values]:
    """The turns of one node in one round."""
    first = turns[0]
    arrays = {"params": _array(first.params), "buffers": _array(first.buffers)}
    for turn in turns:
        if turn.params is not first.params:  # a malicious server sent this client something else
            arrays[f"params/{turn.client}"] = _array(turn.params)
        if turn.local is not None:
            arrays[f"local/{turn.client}"] = _array(turn.local)
        for kind, tensors in (("own", turn.own), ("received", turn.received)):
            arrays |= {f"{kind}/{turn.client}/{name}": _array(tensor) for name, tensor in tensors.items()}
    ctx = first.ctx
    values: Values = {
        "seed": ctx.seed,
        "round": ctx.round,
        "rounds": ctx.rounds,
        "clients": [t.client for t in turns],
        "keep": [t.keep for t in turns],
        "max_steps": [NO_LIMIT if t.max_steps is None else t.max_steps for t in turns],
    }
    if ctx.cohort is not None:
        values["cohort"] = list(ctx.cohort)
    return arrays, values


def unpack_turns(arrays: Arrays, values: Values, device: torch.device) -> list[Turn]:
    """What `pack_turns` packed, on the node's device."""
    common = _tensor(arrays["params"], device), _tensor(arrays["buffers"], device)
    cohort = tuple(values["cohort"]) if "cohort" in values else None
    ctx = RoundContext(values["seed"], values["round"], values["rounds"], cohort=cohort)
    turns = []
    for client, limit, keep in zip(values["clients"], values["max_steps"], values["keep"], strict=True):
        own, local = arrays.get(f"params/{client}"), arrays.get(f"local/{client}")
        turns.append(
            Turn(
                client,
                common[0] if own is None else _tensor(own, device),
                common[1],
                ctx.for_client(client),
                None if local is None else _tensor(local, device),
                None if limit == NO_LIMIT else limit,
                _named(arrays, f"own/{client}/", device),
                _named(arrays, f"received/{client}/", device),
                keep,
            )
        )
    return turns


def pack_replies(replies: Sequence[Reply | FedsecError]) -> tuple[Arrays, Values]:
    """One node's answers; a `FedsecError` among them stops the whole run, as it does on one machine.

    Raises:
        RunError: an aggregator of somebody else's makes payloads that have no form on the wire.
    """
    arrays: Arrays = {}
    values: Values = {"clients": [r.client for r in replies if isinstance(r, Reply)]}
    for reply in replies:
        if isinstance(reply, FedsecError):
            values["error"] = [type(reply).__name__, str(reply)]
            return {}, {**values, "clients": []}
        mark = f"{reply.client}/"
        values[mark + "steps"], values[mark + "tampered"] = reply.steps, reply.tampered
        values[mark + "loss"], values[mark + "seconds"] = float(reply.loss), float(reply.seconds)
        if reply.failure is not None:
            values[mark + "failure"] = reply.failure
        if reply.local is not None:
            arrays[mark + "local"] = _array(reply.local)
        arrays |= {f"{mark}own/{name}": _array(tensor) for name, tensor in reply.own.items()}
        content = reply.content
        if isinstance(content, Payload):
            values[mark + "num_bytes"] = content.num_bytes
            values[mark + "stages"] = json.dumps(dict(content.stages))
            if content.num_samples is not None:
                values[mark + "num_samples"] = content.num_samples
            content = content.content
        if isinstance(content, Update):
            _pack_update(content, mark, arrays, values)
        elif isinstance(content, Envelope):
            _pack_envelope(content, mark, arrays, values)
        elif content is not None:
            raise RunError(f"engine=flower cannot send a {type(content).__name__}; use engine=processes")
    return arrays, values


def unpack_replies(arrays: Arrays, values: Values, asked: Sequence[Turn]) -> list[Reply]:
    """What a node answered, one reply for each client that was asked; what cannot be read is that client's failure.

    Raises:
        FedsecError: the node says that the configuration is wrong.
    """
    if "error" in values:
        kind, text = (str(part)[:500] for part in values["error"][:2])
        raised = getattr(errors, kind, RunError)
        simple = isinstance(raised, type) and issubclass(raised, FedsecError) and raised is not errors.DataError
        raise (raised if simple else RunError)(text)
    return [_unpack_reply(arrays, values, turn) for turn in asked]


def _unpack_reply(arrays: Arrays, values: Values, turn: Turn) -> Reply:
    client, mark, device = turn.client, f"{turn.client}/", turn.params.device
    try:
        if (failure := values.get(mark + "failure")) is not None:
            return Reply(client, None, failure=str(failure)[:500])
        found = {k.removeprefix(mark): _tensor(a, device) for k, a in arrays.items() if k.startswith(mark)}
        own = {k.removeprefix(mark): v for k, v in values.items() if k.startswith(mark)}
        content: Update | Payload | None = None if turn.keep else _unpack_content(client, found, own)
        if "num_bytes" in own and not turn.keep:
            stages = {str(k): float(v) for k, v in json.loads(own["stages"]).items()}
            content = Payload(client, content, _count(own["num_bytes"]), own.get("num_samples"), stages=stages)
        elif not isinstance(content, Update) and not turn.keep:
            raise ValueError("an envelope without its size")
        local = found.get("local")
        if (local is None) != (turn.local is None) or (
            local is not None and turn.local is not None and local.shape != turn.local.shape
        ):
            raise ValueError("the personal tensors do not fit")
        return Reply(
            client,
            content,
            local,
            float(own["loss"]),
            _count(own["steps"]),
            _seconds(own["seconds"]),
            tampered=_count(own["tampered"]),
            own={k.removeprefix("own/"): t for k, t in found.items() if k.startswith("own/")},
        )
    except (KeyError, TypeError, ValueError, AttributeError, PayloadError, RuntimeError) as error:
        text = str(error).splitlines()[0][:200] if str(error) else ""
        return Reply(client, None, failure=f"garbage: its reply cannot be read ({type(error).__name__}: {text})")


def _pack_update(update: Update, mark: str, arrays: Arrays, values: Values) -> None:
    arrays[mark + "delta"] = _array(update.delta)
    values[mark + "claimed"] = update.num_samples
    if update.buffers is not None:
        arrays[mark + "buffers"] = _array(update.buffers)
    for name, tensor in update.extras.items():
        arrays[f"{mark}extras/{name}"] = _array(tensor)
    if update.wire is not None:
        values[mark + "wire"] = list(dataclasses.astuple(update.wire))


def _pack_envelope(envelope: Envelope, mark: str, arrays: Arrays, values: Values) -> None:
    values[mark + "body"] = list(envelope.body)
    values[mark + "agreement"], values[mark + "digest"] = envelope.agreement, envelope.digest
    values[mark + "sizes"] = [envelope.values, envelope.buffers]
    if envelope.clear is not None:
        arrays[mark + "clear"] = _array(envelope.clear)


def _unpack_content(client: int, found: Mapping[str, Tensor], own: Mapping[str, Any]) -> Any:
    if "body" in own:
        if not all(isinstance(part, bytes) for part in (*own["body"], own["agreement"], own["digest"])):
            raise ValueError("an envelope that is not bytes")
        values, buffers = (_count(size) for size in own["sizes"])
        return Envelope(own["agreement"], values, buffers, tuple(own["body"]), own["digest"], found.get("clear"))
    wire = Wire(*(_count(number) for number in own["wire"])) if "wire" in own else None
    extras = {k.removeprefix("extras/"): t for k, t in found.items() if k.startswith("extras/")}
    return Update(client, found["delta"], own["claimed"], found.get("buffers"), extras, wire)


def _named(arrays: Arrays, start: str, device: torch.device) -> dict[str, Tensor]:
    return {k.removeprefix(start): _tensor(a, device) for k, a in arrays.items() if k.startswith(start)}


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _seconds(value: Any) -> float:
    return float(value) if math.isfinite(float(value)) else 0.0


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array)).to(device)  # a copy: what arrived may be read-only
