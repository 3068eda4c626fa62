"""A server's state as named tensors, so that personal strategies can be observed after their training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fedsec.federation.desk import ServerState


def is_plain(state: ServerState) -> bool:
    """Parameters and buffers say everything."""
    return not (state.local or state.own or state.sent or state.side)


def to_tensors(state: ServerState, prefix: str) -> dict[str, Tensor]:
    """Everything beside parameters and buffers, by name."""

    def named() -> Iterator[tuple[str, Tensor]]:
        for client, tensor in state.local.items():
            yield f"local/{client}", tensor
        for client, tensor in state.sent.items():
            yield f"sent/{client}", tensor
        for client, kept in state.own.items():
            for name, tensor in kept.items():
                yield f"own/{client}/{name}", tensor
        for name, tensor in state.side.items():
            yield f"side/{name}", tensor

    return {f"{prefix}/{name}": tensor.contiguous() for name, tensor in named()}


def from_tensors(params: Tensor, buffers: Tensor, tensors: Mapping[str, Tensor], prefix: str) -> ServerState:
    """The state whose rest `to_tensors` wrote under this prefix."""
    state = ServerState(params, buffers)
    for key, tensor in tensors.items():
        if not key.startswith(f"{prefix}/"):
            continue
        kind, _, rest = key.removeprefix(f"{prefix}/").partition("/")
        client, _, name = rest.partition("/")
        if kind == "local":
            state.local[int(client)] = tensor
        elif kind == "sent":
            state.sent[int(client)] = tensor
        elif kind == "own":
            state.own.setdefault(int(client), {})[name] = tensor
        else:
            state.side[rest] = tensor
    return state
