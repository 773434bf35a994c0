"""Take single activation calls out of a block's methods: the norm in front takes them over.

The block's class is replaced by a subclass whose method was compiled from the original source
without those calls. Nothing is traced: control flow, training flag, checkpointing switches and
state-dict keys stay what they are; line numbers in tracebacks still point at the original file.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch import nn

from normswap.errors import SwapError
from normswap.graph.callsites import (
    MethodSource,
    argument_of,
    method_of,
    method_source,
    obstacle_in_source,
)
from normswap.graph.sites import CallSite

_FUTURES = 0x1FF0000  # the bits of co_flags that `from __future__` imports set

Edit = tuple[str, tuple[int, int, int, int], str]
"""Method, position of the call in it, digest of the method's source."""


class _WithoutCalls:
    """Mixin of the generated classes: how to copy and pickle an instance of one."""

    _normswap_base: type[nn.Module]
    _normswap_edits: frozenset[Edit]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        base, edits = self._normswap_base, self._normswap_edits
        return (_blank_instance, (base, edits), self.__getstate__())


def _blank_instance(base: type[nn.Module], edits: frozenset[Edit]) -> nn.Module:
    cls = class_without_calls(base, edits)
    return cls.__new__(cls)


def edited_class(module: nn.Module, calls: Mapping[CallSite, str]) -> type[nn.Module]:
    """The class that ``module`` gets when ``calls``, each to an activation, leave its methods.

    Raises:
        SwapError: if the source is not the one that the plan was made for.
    """
    cls = type(module)
    base = getattr(cls, "_normswap_base", cls)
    edits: frozenset[Edit] = getattr(cls, "_normswap_edits", frozenset())
    for call, op in calls.items():
        function = method_of(module, call.method)
        source = method_source(function) if function is not None else None
        if source is None or source.digest != call.digest:
            raise SwapError(
                call.owner or "the model",
                got=f"another source of {cls.__name__}.{call.method} than the plan was made for",
                need="the same version of the code that defines the block",
                hint="a new plan, or the library versions recorded in normswap.json",
            )
        if call.position not in source.calls:
            raise KeyError(call.position)
        # a plan may come from elsewhere: it takes out what always is that activation
        obstacle = obstacle_in_source(source, module, source.function.__code__, call.position, op)
        if obstacle is not None:
            raise SwapError(
                call.owner or "the model",
                got=f"a call that is to go although {obstacle}",
                need="an activation that can be told in the source",
                hint="a new plan for this model",
            )
    return class_without_calls(base, edits | {(c.method, c.position, c.digest) for c in calls})


_generated: dict[tuple[type[nn.Module], frozenset[Edit]], type[nn.Module]] = {}


def class_without_calls(base: type[nn.Module], edits: frozenset[Edit]) -> type[nn.Module]:
    """A subclass of ``base`` whose methods lack the calls at the given positions.

    The same arguments give the same class, so that equal blocks stay of one type.

    Raises:
        SwapError: if the source of a method is not what it was when the edit was decided.
    """
    if (base, edits) not in _generated:
        _generated[base, edits] = _generate(base, edits)
    return _generated[base, edits]


def _generate(base: type[nn.Module], edits: frozenset[Edit]) -> type[nn.Module]:
    by_method: dict[str, list[tuple[int, int, int, int]]] = {}
    for method, position, digest in sorted(edits):
        by_method.setdefault(method, []).append(position)
        found = _source(base, method)
        if found is None or found.digest != digest:
            raise SwapError(
                f"{base.__module__}.{base.__qualname__}.{method}",
                got="another source than the model was converted with",
                need="the same version of the code that defines the block",
                hint="the library versions recorded at conversion, or converting again",
            )
    methods: dict[str, Any] = {}
    for method, positions in by_method.items():
        source = _source(base, method)
        assert source is not None
        methods[method] = _compile_without(source, positions, base)
    namespace = {
        **methods,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_normswap_base": base,
        "_normswap_edits": edits,
    }
    try:
        return type(base.__name__, (_WithoutCalls, base), namespace)
    except Exception as error:
        raise SwapError(
            f"{base.__module__}.{base.__qualname__}",
            got=f"a class that refuses to be derived from ({error})",
            need="a block whose activation can be taken out",
            hint="normswap.FilterResponseNorm(tlu=False)",
        ) from error


def edited_methods(cls: type[nn.Module]) -> dict[str, str]:
    """The source of every method of a generated class that lost calls; empty for others."""
    base, edits = vars(cls).get("_normswap_base"), vars(cls).get("_normswap_edits", ())
    found: dict[str, str] = {}
    for method in sorted({method for method, _, _ in edits}):
        source = _source(base, method) if base is not None else None
        if source is not None:
            positions = [position for name, position, _ in edits if name == method]
            definition = _without(source, positions)
            definition.returns = None
            for argument in ast.walk(definition.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            found[method] = ast.unparse(definition)
    return found


def _source(base: type[nn.Module], method: str) -> MethodSource | None:
    function = next((vars(c)[method] for c in base.__mro__ if method in vars(c)), None)
    return method_source(function) if isinstance(function, FunctionType) else None


class _Remover(ast.NodeTransformer):
    def __init__(self, calls: list[ast.Call]) -> None:
        self._places = {_place(call) for call in calls}

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Put the argument of a condemned call in the place of the call."""
        self.generic_visit(node)
        argument = argument_of(node) if _place(node) in self._places else None
        return node if argument is None else argument


def _place(node: ast.Call) -> tuple[int, int, int | None, int | None]:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _without(source: MethodSource, positions: list[tuple[int, int, int, int]]) -> ast.FunctionDef:
    definition: ast.FunctionDef = _Remover([source.calls[p] for p in positions]).visit(
        copy.deepcopy(source.definition)
    )
    return definition


def _compile_without(
    source: MethodSource, positions: list[tuple[int, int, int, int]], base: type[nn.Module]
) -> FunctionType:
    function = source.function
    definition = _without(source, positions)
    # Defaults and annotations were evaluated when the class was made; they are carried over below.
    definition.args.defaults = []
    definition.args.kw_defaults = [None] * len(definition.args.kwonlyargs)
    definition.returns = None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    ast.increment_lineno(definition, function.__code__.co_firstlineno - 1)
    # Zero-argument super() finds its class in a variable of the enclosing function.
    factory = ast.parse("def factory(__class__): pass").body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([factory], []))
    flags = function.__code__.co_flags & _FUTURES
    code = compile(module, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    namespace: dict[str, Any] = {}
    exec(code, function.__globals__, namespace)
    edited: FunctionType = namespace["factory"](_defining_class(base, function))
    edited.__code__ = edited.__code__.replace(co_qualname=function.__code__.co_qualname)
    edited.__defaults__ = function.__defaults__
    edited.__kwdefaults__ = function.__kwdefaults__
    edited.__annotations__ = function.__annotations__
    edited.__qualname__ = function.__qualname__
    edited.__module__ = function.__module__
    edited.__doc__ = function.__doc__
    return edited


def _defining_class(base: type[nn.Module], function: FunctionType) -> type:
    return next(c for c in base.__mro__ if vars(c).get(function.__name__) is function)
