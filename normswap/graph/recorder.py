"""Record which call made each tensor and which calls used it, while a model runs.

A *value* is a tensor between two changes: in-place operations return the same tensor, so the
recorder numbers values by tensor and version. Norms, torch's own activations and convolutions are
recorded as one call each. Of other classes that derive from those, or are named like them, it
depends on what they run. Nothing is kept alive: tensors are only referred to weakly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from normswap.graph import vocabulary
from normswap.graph.callsites import find_call_site
from normswap.graph.compounds import Frame, one_operation, role_of
from normswap.graph.meta import run_on_meta
from normswap.graph.norms import is_batchnorm
from normswap.graph.strays import Strays
from normswap.graph.trace import Call, Trace, View

_READS = frozenset({"item", "tolist", "numpy", "bool", "float", "int", "array"})


_PLAIN = (int, float, str, type(None), torch.dtype, torch.device)


def _tensors(tree: Any) -> list[Tensor]:
    """Every tensor in a tree; most trees are small, and pytrees take their time."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, _PLAIN):
        return []
    if type(tree) in (tuple, list):
        return [tensor for branch in tree for tensor in _tensors(branch)]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _opened(output: Any, depth: int = 3) -> Any:
    """``output`` with the objects in it that pytrees do not know opened into their attributes."""
    if depth == 0 or isinstance(output, Tensor | nn.Module):
        return output
    leaves = [output] if not isinstance(output, dict | list | tuple) else tree_leaves(output)
    return [
        _opened(held, depth - 1)
        if not isinstance(leaf, Tensor) and (held := _attributes(leaf))
        else leaf
        for leaf in leaves
    ]


def _attributes(thing: Any) -> dict[str, Any]:
    """What an object holds under names, in its dictionary or in slots."""
    slots = (name for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ()))
    held = {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
    return held | dict(getattr(thing, "__dict__", {}))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _changed(before: list[tuple[Tensor, int]], *, in_place: bool) -> list[Tensor]:
    """Which inputs a call changed; inference tensors do not count, so the call's name decides."""
    first = before[0][0] if before and in_place else None
    return [t for t, v in before if _version(t) != v or (t is first and t.is_inference())]


def _is_in_place(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return name.endswith("_") or bool(kwargs.get("inplace"))


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that a ``torch.func`` transform such as ``vmap`` works on."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


class CallRecorder(TorchFunctionMode):
    """The torch-function half of the recorder; :func:`recording` adds the module hooks.

    Args:
        names: first qualified name of every module of the model.
        meta: the model runs on the meta device.
    """

    def __init__(self, names: Mapping[nn.Module, str], *, meta: bool = False) -> None:
        super().__init__()
        self._run = run_on_meta if meta else _run
        self.trace = Trace()
        self._names = names
        self._norms = [module for module in names if is_batchnorm(module)]
        self._roles = {m: role for m in names if (role := role_of(m)) is not None}
        self._stored = _stored(names)
        self._strays = Strays(names, self._stored)
        self.trace.others = self._strays.found
        self._static: set[int] = set()  # values that come from stored tensors alone
        self._hidden: list[nn.Module] = []  # BatchNorms that run and are no submodules
        self._thread = threading.get_ident()
        self._values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._count = 0
        self._opaque: list[Frame] = []
        self._open: list[Frame] = []
        self._stack: list[nn.Module] = []
        self._children_run: list[int] = []

    # values ------------------------------------------------------------------------------------

    def _new_value(self, tensor: Tensor, maker: Call | None) -> int:
        self._count += 1
        self._values[tensor] = (self._count, _version(tensor))
        if maker is not None:
            self.trace.made[self._count] = maker
        return self._count

    def value(self, tensor: Tensor) -> int:
        """Number of the value that ``tensor`` holds now."""
        tensor = _unwrapped(tensor)
        number, version = self._values.get(tensor, (0, None))  # type: ignore[no-untyped-call]
        if version == _version(tensor):
            return int(number)
        # Unseen, or changed behind our back through a view of it: a new value of unknown origin.
        maker = Call("in-place change through a view", ()) if number else None
        number = self._new_value(tensor, maker)
        if id(tensor) in self._stored:
            self._static.add(number)
        return number

    def _use(self, call: Call) -> None:
        self.trace.calls.append(call)
        for number in call.inputs:
            self.trace.used.setdefault(number, []).append(call)

    def _finish(
        self,
        call: Call,
        output: Any,
        before: list[tuple[Tensor, int]],
        *,
        in_place: bool,
    ) -> None:
        """Give new values to what ``call`` made or changed in place."""
        changed = _changed(before, in_place=in_place)
        inputs = {id(tensor) for tensor, _ in before}
        fresh = [tensor for tensor in _tensors(output) if id(tensor) not in inputs]
        if "dropout" in call.op and not fresh and not changed:
            fresh = _tensors(output)  # in eval it returns its input, in training it does not
        numbers = [self._new_value(tensor, call) for tensor in (*fresh, *changed)]
        if self._static.issuperset(call.inputs):
            self._static.update(numbers)
        if numbers:
            call.output = numbers[0]
            call.output_shape = tuple((*fresh, *changed)[0].shape)

    # functions ---------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if threading.get_ident() != self._thread:
            return func(*args, **kwargs)
        if self._opaque:
            self._look_inside(func, args)
            return self._run(func, args, kwargs)
        before = [(t, _version(t)) for t in _tensors((args, *kwargs.values()))]
        numbers = tuple(self.value(t) for t, _ in before)
        output = self._run(func, args, kwargs)
        op = vocabulary.op_of(func)
        in_place = _is_in_place(func, kwargs)
        if not _consumes(op, output, before, in_place=in_place):
            return output
        call = Call(op, numbers, shape=tuple(before[0][0].shape) if before else ())
        call.on_weights = bool(numbers) and self._static.issuperset(numbers)
        self._describe(call, func, args, kwargs, output)
        self._use(call)
        self._finish(call, output, before, in_place=in_place)
        return output

    def _describe(
        self,
        call: Call,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        op = vocabulary.activation_op(func)
        if op in vocabulary.REPLACEABLE:
            call.site = find_call_site(self._names, op)
        elif call.op in vocabulary.VIEWS and isinstance(output, Tensor):
            call.view = _view_of(call.op, args, kwargs, tuple(output.shape))
        elif call.op in vocabulary.PRODUCER_OPS and self._stack:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            module = self._stack[-1]
            if weight is not None and weight is getattr(module, "weight", None):
                call.module = module
                call.own_weight = self._takes_input_of(module, args)
        elif call.op == "batch_norm":
            self._describe_norm(call, args, kwargs)

    def _takes_input_of(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether the first argument is what the running ``module`` was called with."""
        frame = self._open[-1] if self._open else None
        if frame is None or frame.module is not module or not frame.before:
            return False
        return bool(args) and args[0] is frame.before[0][0]

    def _describe_norm(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = _tensors((*args, *kwargs.values()))
        others = [t for t in tensors[1:] if t is not kwargs.get("input")]
        used = {id(t) for t in others}
        strays = {m for m in self._norms if _holds_any(m, used)}
        self.trace.stray_norms.update(strays)
        # what weights are normalised by is never kept in a buffer, as running statistics are
        tracked = any(id(t) in self._stored and not isinstance(t, nn.Parameter) for t in others)
        call.on_weights = call.on_weights and not tracked
        if not strays and not call.on_weights and self._stack:
            hidden = self._hidden[-1] if self._hidden else None
            x = kwargs.get("input", tensors[0])
            self._strays.add(self._stack[-1], hidden, x, others)

    def _look_inside(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        frame = self._opaque[-1]
        module, call, before = frame.module, frame.call, frame.before
        first = args[0] if args else None
        if not before and isinstance(first, Tensor) and not isinstance(first, nn.Parameter):
            # the module was given its input by keyword: the hook could not see it
            before.append((first, _version(first)))
            call.inputs, call.shape = (self.value(first),), tuple(first.shape)
        if vocabulary.op_of(func) in vocabulary.PRODUCER_OPS and len(args) > 1:
            stored = getattr(module, "weight", None)
            call.own_weight = args[1] is stored and bool(before) and args[0] is before[0][0]

    # modules -----------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module of the model starts to run."""
        if threading.get_ident() != self._thread:
            return
        if module not in self._names:
            if is_batchnorm(module):
                self._hidden.append(module)
            return
        slot = self._slot()
        self._stack.append(module)
        self._children_run.append(0)
        role = self._roles.get(module)
        if self._opaque or role is None:
            return
        before = [(t, _version(t)) for t in _tensors(args)]
        call = Call(role.op, tuple(self.value(t) for t, _ in before), module=module, slot=slot)
        call.shape = tuple(before[0][0].shape) if before else ()
        if role.whole and role.op in vocabulary.REPLACEABLE:
            call.site = find_call_site(self._names, role.op)
        frames = self._opaque if role.whole else self._open
        frames.append(Frame(module, call, before, len(self.trace.calls)))

    def leave(self, module: nn.Module, output: Any) -> None:
        """A module of the model has run, or has raised (``output`` None)."""
        if threading.get_ident() != self._thread:
            return
        if module not in self._names:
            if self._hidden and self._hidden[-1] is module:
                self._hidden.pop()
            return
        while self._stack and self._stack[-1] is not module:
            self._stack.pop()
            self._children_run.pop()
        if self._stack:
            self._stack.pop()
            self._children_run.pop()
        if self._opaque and self._opaque[-1].module is module:
            self._close(self._opaque.pop(), output)
        elif self._open and self._open[-1].module is module and not self._opaque:
            frame = self._open.pop()
            self._settle(frame, output)

    def _settle(self, frame: Frame, output: Any) -> None:
        """Record what ran inside a module as the one operation that it is, or leave it as it is."""
        made = self.value(output) if isinstance(output, Tensor) else 0
        op = one_operation(frame, self.trace, made, output)
        if op is None:
            return
        inner = self.trace.forget(frame.start)
        frame.call.op = op
        if not frame.call.inputs:  # given by keyword: the hook could not see it
            made_inside = {call.output for call in inner}
            given = (n for c in inner for n in c.inputs if n not in made_inside | self._static)
            frame.call.inputs = tuple(given)[:1]
        self._close(frame, output)

    def _close(self, frame: Frame, output: Any) -> None:
        """Record as one call what a module did."""
        self._use(frame.call)
        in_place = bool(getattr(frame.module, "inplace", False))
        self._finish(frame.call, output, frame.before, in_place=in_place)

    def _slot(self) -> str | None:
        """The name under which the running ``nn.Sequential`` calls its next child."""
        if not self._stack:
            return None
        index = self._children_run[-1]
        self._children_run[-1] += 1
        parent = self._stack[-1]
        if type(parent).forward is not nn.Sequential.forward:
            return None
        keys = list(parent._modules)
        prefix = self._names[parent]
        return f"{prefix}.{keys[index]}".lstrip(".") if index < len(keys) else None

    def output(self, output: Any) -> None:
        """The model returned ``output``: its tensors are used by whoever called the model."""
        with torch._C.DisableTorchFunction():
            numbers = tuple(self.value(t) for t in _tensors(_opened(output)))
        self._use(Call("output", numbers))


def _holds_any(module: nn.Module, tensors: set[int]) -> bool:
    held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(id(tensor) in tensors for tensor in held)


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _stored(modules: Iterable[nn.Module]) -> dict[int, tuple[nn.Module, str]]:
    """Where the parameters and buffers of some modules are, by their ``id``."""
    return {
        id(tensor): (module, name)
        for module in modules
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    }


def _consumes(op: str, output: Any, before: list[tuple[Tensor, int]], *, in_place: bool) -> bool:
    """Whether a call reads values: shape and device queries do not, nor do identities."""
    made = _tensors(output)
    unchanged = not _changed(before, in_place=in_place)
    if not made:
        return op in _READS or not unchanged
    inputs = {id(t) for t, _ in before}
    identity = unchanged and all(id(t) in inputs for t in made)
    return not identity or "dropout" in op


def _view_of(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any], after: tuple[int, ...]
) -> View | None:
    tensor = args[0] if args else None
    if not isinstance(tensor, Tensor) or kwargs:
        return None
    before = tuple(tensor.shape)
    if op not in {"permute", "transpose", "swapaxes", "movedim", "t"}:
        return View(None, before, after)
    # Let torch itself apply the call to a tensor whose sizes name its axes.
    probe = torch.empty(tuple(range(len(before))), device="meta")
    moved = getattr(probe, op)(*args[1:])
    return View(tuple(moved.shape), before, after)


@contextmanager
def recording(names: Mapping[nn.Module, str], *, meta: bool = False) -> Iterator[CallRecorder]:
    """Record every call made in this thread until the block ends; hooks are removed again."""
    recorder = CallRecorder(names, meta=meta)

    # The hooks look at tensors themselves; that must not come back to the recorder as calls.
    def before(module: nn.Module, args: Any) -> None:
        with torch._C.DisableTorchFunction():
            recorder.enter(module, args)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        del args
        with torch._C.DisableTorchFunction():
            recorder.leave(module, output)

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(before).remove)
        stack.callback(register_module_forward_hook(after, always_call=True).remove)
        stack.enter_context(recorder)
        yield recorder
