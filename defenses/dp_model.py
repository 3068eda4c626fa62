"""Which changes an architecture needs before per-sample gradients can be taken of it, and nothing it shows outside.

Per-sample gradients need layers that keep the images of a batch apart (no BatchNorm) and, since they are taken in
backward hooks, tensors that nobody overwrites. Parameter names, shapes and (BatchNorm aside) outputs stay the same.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

from fedsec.errors import ConfigError
from fedsec.models.base import replace_batch_norm

OUT_OF_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def make_private(model: nn.Module) -> nn.Module:
    """Prepare a model for per-sample gradients.

    Returns:
        the model, changed in place: BatchNorm replaced by GroupNorm, InstanceNorm without running statistics, and every
        in-place operation on activations replaced by its out-of-place twin.

    Raises:
        ConfigError: a trainable layer keeps buffers, which would carry private statistics without noise.
    """
    model = replace_batch_norm(model)
    for module in model.modules():
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]
    for module in list(model.modules()):
        if not type(module).__module__.startswith("torch.nn."):
            rewrite_forward(module)
    for path, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)) and next(module.buffers(), None) is not None:
            raise ConfigError(
                f"dp: layer '{path}' ({type(module).__name__}) keeps buffers beside its trainable parameters, which no "
                "noise would protect; use a layer without buffers"
            )
    return model


class _Tracer(fx.Tracer):
    """Records one module's own code: its children stay calls, so their mode, hooks and dropout stay theirs."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Proxy(fx.Proxy):
    """Records `x += y` as the in-place operation that it is; the parent class would turn it into `x + y`."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self._record(operator.iadd, other)

    def __isub__(self, other: object) -> fx.Proxy:
        return self._record(operator.isub, other)

    def __imul__(self, other: object) -> fx.Proxy:
        return self._record(operator.imul, other)

    def __itruediv__(self, other: object) -> fx.Proxy:
        return self._record(operator.itruediv, other)

    def _record(self, target: Callable[..., Any], other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})


def rewrite_forward(module: nn.Module) -> None:
    """Give a module a `forward` without in-place operations, where its own has any and can be traced.

    The module gets a subclass of its class: parameters, children and methods stay. Its code is traced in training and
    in evaluation mode, and the new `forward` chooses by the module's mode, so that functional dropout stays alive.
    """
    graphs = {}
    mode = module.training
    try:
        for training in (True, False):
            module.training = training
            try:
                graphs[training] = _Tracer().trace(module)
            except Exception:  # Code that depends on data raises all sorts of errors: such a module is left as it is.
                return
    finally:
        module.training = mode
    changed = [make_out_of_place(graph) for graph in graphs.values()]
    if not any(changed):
        return
    compiled = {training: _compile(graph) for training, graph in graphs.items()}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return compiled[self.training](self, *args, **kwargs)

    original = type(module)
    content = {"forward": forward, "__reduce_ex__": _reduce, "__module__": original.__module__, "_original": original}
    module.__class__ = type(original.__name__, (original,), content)


def make_out_of_place(graph: fx.Graph) -> bool:
    """Replace in-place operations by their twins; later uses of the overwritten value see the new one.

    Returns:
        whether there was anything to replace.
    """
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    changed = False
    for node in nodes:
        if not (_is_in_place(node) and _swap(node)):
            continue
        changed = True
        overwritten = node.args[0] if node.args else node.kwargs.get("input")
        if isinstance(overwritten, fx.Node):
            for user in [u for u in overwritten.users if order[u] > order[node]]:
                user.replace_input_with(overwritten, node)
    return changed


def _is_in_place(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in OUT_OF_PLACE or _is_marked(_name(node)) or _inplace_argument(node) is True
    return node.op == "call_method" and _is_marked(str(node.target))


def _swap(node: fx.Node) -> bool:
    """Point a node to the out-of-place operation; False where there is none."""
    if node.op == "call_method":
        if not callable(getattr(torch.Tensor, str(node.target)[:-1], None)):
            return False
        node.target = str(node.target)[:-1]
        return True
    assert callable(node.target)
    if node.target in OUT_OF_PLACE:
        node.target = OUT_OF_PLACE[node.target]
    elif _is_marked(_name(node)):
        twin = getattr(F, _name(node)[:-1], None) or getattr(torch, _name(node)[:-1], None)
        if twin is None:
            return False
        node.target = twin
    else:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        bound.arguments["inplace"] = False
        node.args, node.kwargs = bound.args, bound.kwargs
    return True


def _is_marked(name: str) -> bool:
    """PyTorch's convention for in-place operations: `add_`, `relu_`."""
    return name.endswith("_") and not name.endswith("__")


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "")


def _inplace_argument(node: fx.Node) -> Any:
    """The value of a function's `inplace` argument; None where it has none."""
    assert callable(node.target)
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace")
    except (ValueError, TypeError):  # built-in functions have no signature, and no such argument
        return None


def _compile(graph: fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Copy and pickle as the original class: the subclass has no importable name and is made again."""
    return _restore, (getattr(self, "_original"), self.__dict__)  # noqa: B009


def _restore(original: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__dict__.update(state)
    rewrite_forward(module)
    return module
