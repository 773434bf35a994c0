"""Where an activation is called: which method, where in it, and whether it can be taken out.

The interpreter knows the exact columns of the call that is running. A call found this way can be
removed from a copy of the method's source with its control flow untouched, which tracing cannot
promise.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _device

from normswap.graph.sites import CallSite
from normswap.graph.vocabulary import REPLACEABLE, replaceable_op

Position = tuple[int, int, int, int]

_FUNCTIONS = {"relu": (torch.relu, torch.relu_, F.relu, F.relu_), "silu": (F.silu,)}
_MODULES = tuple(getattr(nn, name) for name in REPLACEABLE.values())

_SKIPPED = (
    torch.overrides.__file__,
    torch.nn.functional.__file__,
    torch.nn.modules.module.__file__,
    torch._tensor.__file__,
    _device.__file__,
    torch._jit_internal.__file__,
)


@dataclass(frozen=True)
class MethodSource:
    """A method's source as a syntax tree that may be searched, and copied to be edited.

    Attributes:
        function: the method as its class defines it.
        definition: its syntax tree; lines count from 1 at the definition, columns as in the file.
        digest: SHA-256 of the source text, to recognise the same method elsewhere.
    """

    function: FunctionType
    definition: ast.FunctionDef
    digest: str

    @functools.cached_property
    def calls(self) -> dict[Position, ast.Call]:
        """Every call expression by where it stands."""
        return {_place(n): n for n in ast.walk(self.definition) if isinstance(n, ast.Call)}

    @functools.cached_property
    def moody(self) -> bool:
        """Whether the method can take another path in training than in eval mode."""
        attributes = (n.attr for n in ast.walk(self.definition) if isinstance(n, ast.Attribute))
        return "training" in attributes

    @functools.cached_property
    def mangled(self) -> bool:
        """Whether the method uses names that mean something else outside of its class."""
        return any(_is_mangled(node) for node in ast.walk(self.definition))


@functools.lru_cache(maxsize=512)
def method_source(function: FunctionType) -> MethodSource | None:
    """Parse the source of ``function``; None where the source cannot be had."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return None
    # An indented method parses as it stands inside a class; its columns stay those of the file.
    indented = text[:1].isspace()
    try:
        tree = ast.parse("class _:\n" + text if indented else text)
    except SyntaxError:
        return None
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else tree.body
    definition = body[0]
    if len(body) != 1 or not isinstance(definition, ast.FunctionDef):
        return None
    if indented:
        ast.increment_lineno(definition, -1)
    return MethodSource(function, definition, hashlib.sha256(text.encode()).hexdigest())


def argument_of(call: ast.Call) -> ast.expr | None:
    """What ``call`` applies an activation to: its first argument, or ``x`` of ``x.relu()``."""
    if call.args:
        return None if isinstance(call.args[0], ast.Starred) else call.args[0]
    named = next((k.value for k in call.keywords if k.arg == "input"), None)
    if named is None and isinstance(call.func, ast.Attribute) and not call.keywords:
        return call.func.value
    return named


def find_call_site(owners: Mapping[nn.Module, str], op: str) -> CallSite | None:
    """Describe the call that is running now, as seen from torch's function or module machinery.

    Args:
        owners: qualified name of each module of the model.
        op: the activation that is called.
    """
    frame = _calling_frame()
    if frame is None:
        return None
    code = frame.f_code
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if not isinstance(owner, nn.Module) or owner not in owners:
        return None
    position = _running_position(frame, code)
    if position is None:
        return None
    obstacle = _obstacle(owner, code, position, op)
    function = method_of(owner, code.co_name)
    source = method_source(function) if function is not None else None
    moody = source is not None and source.moody
    digest = source.digest if source is not None else ""
    return CallSite(owners[owner], code.co_name, position, digest, obstacle, moody)


def running_place() -> tuple[object, int]:
    """The code outside of torch's machinery that is running now, and the place in it."""
    frame = _calling_frame()
    return (None, 0) if frame is None else (frame.f_code, frame.f_lasti)


def method_of(owner: nn.Module, name: str) -> FunctionType | None:
    """The plain function behind ``owner.name``, or None if it is anything else."""
    found = inspect.getattr_static(type(owner), name, None)
    return found if isinstance(found, FunctionType) and name not in vars(owner) else None


def _calling_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name not in _SKIPPED and frame.f_globals.get("__package__") != __package__:
            return frame
        frame = frame.f_back
    return None


def _running_position(frame: FrameType, code: CodeType) -> Position | None:
    places = list(code.co_positions())
    line, end_line, column, end_column = places[frame.f_lasti // 2]
    if line is None or end_line is None or column is None or end_column is None:
        return None
    first = code.co_firstlineno
    return line - first + 1, column, end_line - first + 1, end_column


def _obstacle(owner: nn.Module, code: CodeType, position: Position, op: str) -> str | None:
    function = method_of(owner, code.co_name)
    if isinstance(owner, _MODULES):
        return f"a {REPLACEABLE[op]} module's forward is called directly"
    if isinstance(owner, torch.fx.GraphModule):
        return "its block is generated from a graph (torch.fx)"
    if function is None or function.__code__ is not code:
        return f"it is called in {code.co_qualname}, which is not a plain method of its block"
    if set(code.co_freevars) - {"__class__"}:
        return f"{code.co_qualname} is a closure"
    source = method_source(function)
    if source is None:
        return f"the source of {code.co_qualname} cannot be read"
    return obstacle_in_source(source, owner, code, position, op)


def obstacle_in_source(
    source: MethodSource, owner: nn.Module, code: CodeType, position: Position, op: str
) -> str | None:
    """Why the call at ``position`` of a method cannot be taken out; None if it always is ``op``."""
    if source.definition.decorator_list:
        return f"{code.co_qualname} is decorated"
    call = source.calls.get(position)
    if call is None or argument_of(call) is None:
        return f"the call cannot be told apart in the source of {code.co_qualname}"
    if not _is_always(op, call, owner, source.function):
        return f"the call in {code.co_qualname} may run something else another time"
    if source.mangled:
        return f"{code.co_qualname} uses private names"
    return None


def _is_always(op: str, call: ast.Call, owner: nn.Module, function: FunctionType) -> bool:
    """Whether the called expression can mean nothing but one activation, whenever it runs."""
    path: list[str] = []
    node = call.func
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    this, *others = function.__code__.co_varnames
    known = {this, *function.__globals__} - set(others)
    if not isinstance(node, ast.Name) or node.id not in known:
        # x.relu(): a method of whatever tensor x is
        return path[-1:] in ([op], [f"{op}_"]) and not call.args
    found: Any = owner if node.id == this else function.__globals__[node.id]
    for attribute in path:
        found = getattr(found, attribute, None)
    return found in _FUNCTIONS[op] or (isinstance(found, nn.Module) and replaceable_op(found) == op)


def _is_mangled(node: ast.AST) -> bool:
    name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "arg", None)
    return isinstance(name, str) and name.startswith("__") and not name.endswith("__")


def _place(node: Any) -> Position:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset
