"""BatchNorms of other authors: declared by their users, or recognised by what they compute.

A class that holds γ, β, a running mean and a running variance may compute anything. So it is run,
by itself, on a small input and on random tensors of its own names, and what comes out is compared
with BatchNorm's formula in eval mode. Nothing of the module is changed.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from normswap.errors import PlanError, WalkError, in_short
from normswap.graph.preserved import preserved
from normswap.graph.vocabulary import activation_op

_WEIGHTS = ("weight", "gamma", "gain", "scale")
_BIASES = ("bias", "beta", "shift")
_MEANS = ("running_mean", "moving_mean", "stored_mean", "mean")
_MEAN_SET = frozenset(_MEANS)
_VARIANCES = ("running_var", "moving_var", "moving_variance", "stored_var", "var")
_EPSILONS = ("eps", "epsilon")
_USUAL_EPS = (1e-5, 1e-3, 0.0, 1e-6, 1e-4, 1e-8, 1e-12, 1e-2)
_SHAPES = ((4, 3, 3), (4, 5), (4, 2, 3, 3), (4,))  # N and the map, C comes between
_TOLERANCE = 1e-4

_FUNCTIONAL: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "hardtanh": nn.Hardtanh,
    "sigmoid": nn.Sigmoid,
    "logsigmoid": nn.LogSigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
}
"""What a functional activation is as a module; both take their numbers in the same order."""


@dataclass(frozen=True)
class Roles:
    """Under which names a class holds what a BatchNorm holds.

    Attributes:
        weight: attribute of γ.
        bias: attribute of β.
        mean: attribute of the running mean.
        var: attribute of the running variance.
        eps: attribute of ε, or ε itself; None: found out by running the module.
        momentum: attribute of the momentum, or the momentum itself.
        activation: attribute of the activation that the module applies, or the name of one such as
            ``relu``; None: found out by running the module.
    """

    weight: str = "weight"
    bias: str = "bias"
    mean: str = "running_mean"
    var: str = "running_var"
    eps: str | float | None = None
    momentum: str | float | None = "momentum"
    activation: str | None = None


@dataclass(frozen=True)
class Foreign:
    """What a foreign BatchNorm turned out to be.

    Attributes:
        roles: where it holds its tensors.
        eps: ε.
        drop: the dropout behind it, an identity if it has none.
        act: the activation behind that, an identity if it has none.
    """

    roles: Roles
    eps: float
    drop: nn.Module
    act: nn.Module


STANDARD = Roles()

_declared: dict[type[nn.Module], Roles] = {}
_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Foreign | None]] = (
    weakref.WeakKeyDictionary()
)


def register_batchnorm(
    cls: type[nn.Module],
    *,
    weight: str = "weight",
    bias: str = "bias",
    mean: str = "running_mean",
    var: str = "running_var",
    eps: str | float | None = None,
    momentum: str | float | None = "momentum",
    activation: str | None = None,
) -> type[nn.Module]:
    """Declare that a class computes BatchNorm: ``act(γ·(x − μ)/√(σ² + ε) + β)`` in eval mode.

    Needed only where it cannot be seen: classes that hold γ, β, running mean and variance under
    usual names and compute this formula are recognised. Also usable as a decorator.

    Args:
        cls: the class; its subclasses count as declared too.
        weight: name of the attribute that holds γ, of shape (C,).
        bias: the same for β.
        mean: the same for the running mean.
        var: the same for the running variance.
        eps: name of the attribute that holds ε, or its value; None: found out by running it.
        momentum: name of the attribute that holds BN's momentum, or its value.
        activation: name of the attribute that holds the activation which the module applies, or
            of an activation (``relu``, ``leaky_relu``, ``silu`` …); None: found out by running it.

    Returns:
        ``cls`` itself.

    Raises:
        PlanError: ``cls`` is no module class.

    Example:
        >>> class MyNorm(nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.g, self.b = (nn.Parameter(torch.ones(channels)) for _ in range(2))
        ...         self.register_buffer("m", torch.zeros(channels))
        ...         self.register_buffer("v", torch.ones(channels))
        ...
        ...     def forward(self, x):
        ...         return nn.functional.batch_norm(x, self.m, self.v, self.g, self.b, eps=1e-3)
        >>> register_batchnorm(MyNorm, weight="g", bias="b", mean="m", var="v").__name__
        'MyNorm'
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise PlanError(
            "register_batchnorm",
            got=repr(cls),
            need="a class that derives from torch.nn.Module",
            hint="the class itself, not an instance of it",
        )
    _declared[cls] = Roles(weight, bias, mean, var, eps, momentum, activation)
    _known.clear()
    return cls


def declared_roles(module: nn.Module) -> Roles | None:
    """What was declared of the module's class, or of the nearest class that it derives from."""
    if not _declared:
        return None
    return next((_declared[c] for c in type(module).__mro__ if c in _declared), None)


def foreign(module: nn.Module) -> Foreign | None:
    """What is known of a BatchNorm of another author; None if ``module`` is none.

    Raises:
        WalkError: its class was declared, and does not hold or compute what was declared.
    """
    declared = declared_roles(module)
    roles = _roles_of(module) if declared is None else declared
    if roles is None:
        return None
    mark = _mark(module)
    known = _known.get(module)
    if known is None or known[0] != mark:
        known = mark, _examined(module, roles, declared=declared is not None)
        _known[module] = known
    return known[1]


def _roles_of(module: nn.Module) -> Roles | None:
    """The usual names under which a module owns BatchNorm's tensors, all of one length."""
    if _MEAN_SET.isdisjoint((*module._buffers.keys(), *module._parameters.keys())):
        return None
    held = {
        n: t for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None
    }
    mean, var = _named(held, _MEANS), _named(held, _VARIANCES)
    if mean is None or var is None or isinstance(module, _InstanceNorm):
        return None
    weight, bias = _named(held, _WEIGHTS), _named(held, _BIASES)
    tensors = [held[name] for name in (mean, var, weight, bias) if name is not None]
    if any(not _is_row(t) or t.numel() != tensors[0].numel() for t in tensors):
        return None
    return Roles(weight or "weight", bias or "bias", mean, var)


def _is_row(tensor: Tensor) -> bool:
    """Whether a tensor is (C,), or that in the form of (1, C, 1, 1)."""
    return tensor.ndim > 0 and tensor.numel() == max(tensor.shape)


def _named(held: dict[str, Tensor], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in held), None)


def _mark(module: nn.Module) -> tuple[Any, ...]:
    """What decides how a module computes, its tensors apart."""
    plain = tuple(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None) and name != "training"
    )
    children = tuple((name, id(child)) for name, child in module._modules.items())
    forward: Any = vars(module).get("forward", type(module).forward)
    return forward, plain, children, len(_declared)


def _examined(module: nn.Module, roles: Roles, *, declared: bool) -> Foreign | None:
    if declared:
        _check_declared(module, roles)
    seen, problem = _looked_at(module, roles)
    if not declared or seen is not None:
        return seen
    if problem is not None:
        return _as_declared(module, roles, problem)
    raise _contradiction(module, "computes something else")


def _looked_at(module: nn.Module, roles: Roles) -> tuple[Foreign | None, Exception | None]:
    try:
        return _Probe(module, roles).look(), None
    except Exception as error:  # noqa: BLE001 - whatever the module raises when it runs alone
        return None, error


def _check_declared(module: nn.Module, roles: Roles) -> None:
    lengths = set()
    for name in (roles.mean, roles.var):
        tensor = getattr(module, name, None)
        if not isinstance(tensor, Tensor) or not _is_row(tensor):
            raise _contradiction(module, f"holds no tensor of shape (C,) as {name!r}")
        lengths.add(tensor.numel())
    if len(lengths) > 1:
        raise _contradiction(module, f"holds a {roles.mean} and a {roles.var} of two lengths")


def _contradiction(module: nn.Module, what: str) -> WalkError:
    return WalkError(
        type(module).__name__,
        got=f"a class that was declared to be a BatchNorm and {what}",
        need="a module that computes BatchNorm's formula in eval mode from the declared tensors",
        hint="other names of its tensors, its activation's name, or leaving it undeclared",
    )


def _as_declared(module: nn.Module, roles: Roles, error: Exception) -> Foreign:
    """A declared module that does not run by itself, on GPUs only for example."""
    eps = getattr(module, roles.eps, None) if isinstance(roles.eps, str) else roles.eps
    if eps is None:
        eps = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
    if eps is None:
        raise _contradiction(
            module, f"does not run by itself ({in_short(error)}), so its ε is unknown"
        ) from error
    wanted = roles.activation
    act = next(_declared_activation(module, wanted)) if wanted else nn.Identity()
    return Foreign(roles, float(eps), nn.Identity(), act)


def _declared_activation(module: nn.Module, name: str) -> Iterator[nn.Module]:
    held = getattr(module, name, None)
    if isinstance(held, nn.Module):
        yield held
    elif name in _FUNCTIONAL:
        yield _FUNCTIONAL[name]()
    else:
        raise _contradiction(module, f"has no activation {name!r}")


class _Calls(TorchFunctionMode):
    """Notes the activations that run, with the numbers they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.activations: list[nn.Module] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        build = _FUNCTIONAL.get(activation_op(func) or "")
        if build is not None:
            known = inspect.signature(build).parameters
            numbers = [a for a in args[1:] if not isinstance(a, Tensor)]
            named = {k: v for k, v in kwargs.items() if k in known and k != "inplace"}
            self.activations.append(build(*numbers, **named))
        return func(*args, **kwargs)


class _Probe:
    """One module, run by itself on tensors that make every formula look different."""

    def __init__(self, module: nn.Module, roles: Roles) -> None:
        self.module, self.roles = module, roles
        self.generator = torch.Generator().manual_seed(0)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def look(self) -> Foreign | None:
        """What the module is; raises whatever it raises where it cannot be run."""
        parts = list(self.module.modules())
        with preserved(parts, values=False), torch.device("cpu"):
            for part in parts:
                part.training = False
                self._put_values(part)
            # a variance this small shows ε, and one of 1 shows everything else
            for scale in (1.0, 1e-5):
                x, y, calls = self._run(scale)
                fits = [
                    (eps, drop, act)
                    for eps in self._epsilons()
                    for drop, act in self._endings(calls)
                    if self._fits(x, y, eps, nn.Sequential(drop, act))
                ]
                if not fits:
                    return None
            eps, drop, act = fits[0]
        return Foreign(self.roles, eps, drop, act)

    def _uniform(self, like: Tensor, low: float, high: float) -> Tensor:
        values = torch.rand(like.shape, generator=self.generator, device="cpu")
        return values * (high - low) + low

    def _put_values(self, part: nn.Module) -> None:
        homes: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for held in homes:
            for name, tensor in list(held.items()):
                if tensor is not None and tensor.is_floating_point():
                    value = self._uniform(tensor, 0.1, 0.5)
                    held[name] = nn.Parameter(value) if held is homes[0] else value

    def _put(self, name: str, value: Tensor) -> Tensor:
        held: dict[str, Any] = self.module._parameters
        if name in held:
            value = nn.Parameter(value)
        elif name in self.module._buffers:
            held = self.module._buffers
        else:
            held = vars(self.module)
        held[name] = value
        return value

    def _has(self, name: str) -> bool:
        return isinstance(getattr(self.module, name, None), Tensor)

    def _run(self, scale: float) -> tuple[Tensor, Tensor, _Calls]:
        roles = self.roles
        like = getattr(self.module, roles.mean)
        var = self._put(roles.var, self._uniform(like, 0.5, 2.0) * scale)
        mean = self._put(roles.mean, self._uniform(like, -1.0, 1.0) * scale**0.5)
        if self._has(roles.weight):
            self._put(roles.weight, self._uniform(like, -1.5, 1.5))
        if self._has(roles.bias):
            self._put(roles.bias, self._uniform(like, -1.0, 1.0))
        problem: Exception | None = None
        for first, *rest in _SHAPES:
            shape = (first, like.numel(), *rest)
            noise = torch.randn(shape, generator=self.generator, device="cpu")
            x = noise * _along(var.sqrt(), noise) + _along(mean, noise)
            try:
                with _Calls() as calls:
                    y = self.module.forward(x.clone())
            except Exception as error:  # noqa: BLE001 - another number of axes may do
                problem = error
                continue
            if isinstance(y, Tensor) and y.shape == x.shape:
                return x, y, calls
        raise problem or ValueError("its output has another shape than its input")

    def _epsilons(self) -> Iterator[float]:
        given = self.roles.eps
        if given is not None:
            yield float(getattr(self.module, given) if isinstance(given, str) else given)
            return
        held = (getattr(self.module, name, None) for name in _EPSILONS)
        yield from (float(eps) for eps in held if isinstance(eps, float | int))
        yield from _USUAL_EPS

    def _endings(self, calls: _Calls) -> Iterator[tuple[nn.Module, nn.Module]]:
        """What may stand behind the formula: nothing, its children, a functional activation."""
        wanted = self.roles.activation
        children = list(self.module.children())
        drop = next((c for c in children if isinstance(c, _DropoutNd)), nn.Identity())
        if wanted is not None:
            yield from ((drop, act) for act in _declared_activation(self.module, wanted))
            return
        others = [c for c in children if c is not drop]
        # an activation that ran comes first: on some input nothing might be to be seen of it
        yield from ((drop, act) for act in (*others, *calls.activations))
        yield drop, nn.Identity()

    def _fits(self, x: Tensor, y: Tensor, eps: float, ending: nn.Module) -> bool:
        roles, module = self.roles, self.module
        mean, var = getattr(module, roles.mean), getattr(module, roles.var)
        slope = (var.double() + eps).rsqrt()
        if self._has(roles.weight):
            slope = slope * getattr(module, roles.weight).double()
        z = (x.double() - _along(mean.double(), x)) * _along(slope, x)
        if self._has(roles.bias):
            z = z + _along(getattr(module, roles.bias).double(), x)
        try:
            expected = ending(z.float())
        except Exception:  # noqa: BLE001 - a child that takes something else
            return False
        if not isinstance(expected, Tensor) or expected.shape != y.shape:
            return False
        scale = float(expected.abs().max())
        return float((y - expected).abs().max()) <= _TOLERANCE * scale


def _along(values: Tensor, x: Tensor) -> Tensor:
    """(C,) in the form that broadcasts over (N, C, *)."""
    return values.reshape(1, -1, *([1] * (x.ndim - 2)))
