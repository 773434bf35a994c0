"""What every recipe shares: how a replacement takes over from the BatchNorm it replaces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap import layers
from normswap.errors import PlanError
from normswap.graph.norms import BatchNormState, fused_parts, state_of
from normswap.graph.sites import Site
from normswap.recipes.matching import Affine

SMALLEST_MAP = 4
"""Per-sample statistics of fewer elements than this say nothing: such sites take the fallback."""

LONGEST_SCHEDULE = 0.3
"""Share of a training run that the schedule of a layer may take."""

_TRANSFERRED_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

_ORIGIN = "_normswap_origin"

RECIPES: dict[str, type[Recipe]] = {}
"""Every recipe by the name of its target; a recipe enters itself when its class is made."""


@dataclass(frozen=True)
class Recipe(ABC):
    """How one family of targets takes a BatchNorm's place, and all that is true of that family.

    A recipe says whether it can take a site (``refusal``), settles what depends on the site
    (``settle``) and builds the new module from the old one (``build``). It changes nothing but the
    layer that it built. Whoever wants to know something of a target asks its recipe: by
    :func:`normswap.recipes.recipe_for` from a name, by :func:`normswap.recipes.recipe_of` from a
    layer.

    Attributes:
        target: its name.
        fallback: what a site becomes that it cannot take, unless the user says otherwise.
        per_sample: its layer normalises each sample by itself and keeps no running statistics.
            Of all others eval mode is the BatchNorm that was replaced, exactly.
        wired: its layer has to know the module that makes its input.
        takes_as: what a layer with an activation inside is called in a report.
        layers: the classes that it builds.
        apart: what several processes do not share of its layer, in words.
        formerly: settings that a plan of version 0.1 does not have, as they were then.
        evidence: what a matched conversion kept of a real network, in words.
        pace: how much larger a rate of fine-tuning its layers want by default than others do,
            because their start is farther from their end.
    """

    target: ClassVar[str] = ""
    fallback: ClassVar[str] = "keep"
    per_sample: ClassVar[bool] = False
    wired: ClassVar[bool] = False
    takes_as: ClassVar[str] = ""
    layers: ClassVar[tuple[type[nn.Module], ...]] = ()
    apart: ClassVar[str | None] = None
    formerly: ClassVar[Mapping[str, Any]] = {}
    evidence: ClassVar[str | None] = None
    pace: ClassVar[float] = 1.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "target" in vars(cls):
            RECIPES[cls.target] = cls

    def __post_init__(self) -> None:
        for name, fine, need in self.limits():
            if not fine:
                value, usual = getattr(self, name), type(self).__dataclass_fields__[name].default
                raise PlanError(
                    f"{self.target}({name}={value})",
                    got=repr(value),
                    need=need,
                    hint=f"{self.target}({name}={usual})",
                )

    @property
    def buffers_beside_parameters(self) -> bool:
        """Whether its layer holds running statistics beside a γ and β that may be trained."""
        return not self.per_sample

    def limits(self) -> Iterator[tuple[str, bool, str]]:
        """Every hyper-parameter with whether its value is usable, and what would be."""
        yield from ()

    @abstractmethod
    def refusal(self, site: Site, model: nn.Module) -> str | None:
        """Why this recipe cannot take ``site`` of ``model``; None if it can."""

    def settle(self, site: Site, norm: nn.Module) -> Recipe:
        """This recipe with everything decided that depends on the site."""
        del site, norm
        return self

    @abstractmethod
    def build(
        self, norm: nn.Module, *, rank: int, init: str, activation: str | None = None
    ) -> nn.Module:
        """The module that takes the place of ``norm``.

        Args:
            norm: the BatchNorm; it is not changed, but parameters may be shared with it.
            rank: number of spatial dimensions of its input.
            init: ``match``, ``copy`` or ``reset``.
            activation: which activation behind ``norm`` it takes the place of too, or None.
        """

    def warnings(self, site: Site, *, init: str) -> tuple[str, ...]:
        """What a user should know about this conversion of ``site``."""
        del site, init
        return ()

    @property
    def takes(self) -> frozenset[str]:
        """The activations, by canonical name, whose place its layer can take besides BN's."""
        return frozenset()

    @property
    def insists(self) -> bool:
        """Whether it takes no site without an activation to take."""
        return False

    # what is true of a layer that it built; of BatchNorm in eval mode, unless a recipe says more

    @classmethod
    def read(cls, layer: nn.Module) -> Recipe:
        """The recipe behind ``layer``, an instance of one of ``layers``."""
        del layer
        return cls()

    def drift(self, state: BatchNormState) -> float | None:
        """Relative output error to expect of a matched layer; None if it cannot be known."""
        del state
        return None if self.per_sample else 0.0

    def standardise(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """What ``layer`` multiplies by γ and adds β to; None if it needs statistics it lacks.

        A ``per_sample`` recipe says it itself: calibration and passage ask for it.
        """
        state = state_of(layer)
        if state.mean is None:
            return None
        return F.batch_norm(x, state.mean, state.var, None, None, False, 0.0, state.eps)

    def scaled(self, layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """``standardise`` times ``weight`` (C,), by one kernel where there is one for both."""
        standard = self.standardise(layer, x)
        if standard is None:
            raise NotImplementedError(f"{type(self).__name__}.standardise says nothing of {layer}")
        return standard * weight.view(-1, *[1] * (x.dim() - 2)).to(standard.dtype)

    def sharing(self, layer: nn.Module) -> int | None:
        """In how many groups the channels of ``layer`` share statistics; None if they do not."""
        del layer
        return None

    def sharing_at(self, state: BatchNormState) -> int | None:
        """The same of a layer to be built, where a producer may get any scale."""
        del state
        return None

    def aim(self, layer: nn.Module, y: Tensor) -> Tensor:
        """What γ·x̂ + β of ``layer`` is to equal where the BatchNorm gave ``y``."""
        del layer
        return y

    def taken(self, layer: nn.Module) -> str | None:
        """Which activation's place ``layer`` took."""
        found: str | None = vars(layer).get(_ORIGIN, {}).get("taken")
        return found

    def standalone(self, layer: nn.Module) -> str | None:
        """The call that makes a layer like this one without normswap.

        It may name ``torch``, ``nn`` and the classes of :mod:`normswap.standalone`. None: a
        BatchNorm has the same keys and, in eval mode, the same function.
        """
        del layer
        return None

    # training

    def wire(
        self, layer: nn.Module, producer: nn.Module, *, norm: nn.Module, init: str
    ) -> Callable[[], None]:
        """Tell a ``wired`` layer which module makes its input.

        Args:
            layer: what ``build`` made.
            producer: the module.
            norm: the BatchNorm whose place ``layer`` took.
            init: as in ``build``.

        Returns:
            What undoes it.
        """
        raise NotImplementedError

    def stagger(self, layer: nn.Module, number: int) -> None:
        """Spread what a ``wired`` layer does not do in every step over the steps.

        Args:
            layer: what ``build`` made.
            number: of the wired layers of the model, which it is.
        """
        del layer, number

    def let_go(self, layer: nn.Module) -> None:
        """``layer`` has been replaced: it must not look at its producer any more."""
        del layer

    def schedule(self, layer: nn.Module) -> dict[str, int]:
        """The iterations that ``layer`` counts in, by the name of its attribute."""
        del layer
        return {}

    def set_schedule(self, layer: nn.Module, schedule: dict[str, int]) -> None:
        """Give ``layer`` what ``schedule`` returned."""
        del layer, schedule

    def fitted_schedule(self, layer: nn.Module, iterations: int) -> dict[str, int]:
        """The schedule that ``layer`` should have in a run of so many training forwards."""
        del iterations
        return self.schedule(layer)

    @property
    def short(self) -> str:
        """The target, with what tells two of its layers apart in a summary."""
        return self.target

    # as data

    def to_json(self) -> dict[str, Any]:
        """Target name and hyper-parameters as plain data, without what was left unsaid."""
        return {"target": self.target, **{name: asdict(self)[name] for name in self._said()}}

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in self._said())
        return f"{self.target}({settings})" if settings else self.target

    def _said(self) -> list[str]:
        """The hyper-parameters, but for those that are None where nothing was said."""
        own = fields(self)
        return [f.name for f in own if f.default is not None or getattr(self, f.name) is not None]

    def __getitem__(self, name: str) -> Any:
        # version 0.1 had a dict in the place of the recipe in a plan
        return {"target": self.target, **asdict(self)}[name]


class Tracked(Recipe):
    """A target with BatchNorm's running statistics, which in eval mode is BatchNorm exactly.

    Attributes:
        family: of its layers in :mod:`normswap.layers`.
    """

    family: ClassVar[str]

    def refusal(self, site: Site, model: nn.Module) -> str | None:
        del model
        return needs_running_statistics(site)

    def build(
        self, norm: nn.Module, *, rank: int, init: str, activation: str | None = None
    ) -> nn.Module:
        del init, activation
        state, own = state_of(norm), factory(norm) | self.settings(norm)
        affine = state.weight is not None
        new = ranked(self.family, rank)(state.channels, eps=state.eps, affine=affine, **own)
        return take_over(norm, share_tensors(norm, new))

    def settings(self, norm: nn.Module) -> dict[str, Any]:
        """What its layer's constructor takes besides, in the place of ``norm``."""
        return {"momentum": origin_of(norm)["momentum"], **asdict(self)}


def ranked(family: str, rank: int) -> type[nn.Module]:
    """The class of ``family`` in :mod:`normswap.layers` for ``rank`` spatial dimensions."""
    found: type[nn.Module] = getattr(layers, f"{family}{max(rank, 1)}d")
    return found


def ranks(family: str) -> tuple[type[nn.Module], ...]:
    """The classes of ``family`` for 1, 2 and 3 spatial dimensions."""
    return tuple(ranked(family, rank) for rank in (1, 2, 3))


def needs_running_statistics(site: Site) -> str | None:
    """The refusal of a target that cannot do without running statistics."""
    if site.calls == 0:
        return NEVER_RAN
    return None if site.tracked else "it has no running statistics (track_running_stats=False)"


NEVER_RAN = "it never ran, in eval or in training mode"


def needs_a_producer(site: Site) -> str | None:
    """The refusal of a target that works with the layer that alone makes its input."""
    producer = site.producer
    if producer is None:
        return f"no convolution or linear layer makes its input ({site.no_producer})"
    if producer.shared:
        return f"{producer.name} feeds several BatchNorms"
    if producer.calls > 1 or site.calls > 1:
        return f"{producer.name} or the BatchNorm runs more than once in a forward"
    return None


def needs_a_map(site: Site) -> str | None:
    """The refusal of a per-sample target where a sample has too few elements per channel."""
    if site.elements is None:
        return NEVER_RAN
    if site.rank == 0:
        return "its input is (N, C): one element per channel and sample (or token)"
    if site.elements < SMALLEST_MAP:
        size = "x".join(map(str, site.spatial or ()))
        return f"its smallest map is {size}, fewer than {SMALLEST_MAP} elements"
    return None


def factory(norm: nn.Module) -> dict[str, Any]:
    """``device`` and ``dtype`` of a BatchNorm, for the constructor of its replacement."""
    tensors = (*norm.parameters(recurse=False), *norm.buffers(recurse=False))
    floats = [t for t in tensors if t.is_floating_point()]
    if not floats:
        return {"device": None, "dtype": None}
    return {"device": floats[0].device, "dtype": floats[0].dtype}


def share_tensors(norm: nn.Module, new: nn.Module) -> nn.Module:
    """Give ``new`` the very parameters and buffers of ``norm``; optimizers and ties stay valid.

    A γ or β that ``norm`` holds as a buffer (frozen classes) becomes a parameter without gradient.
    """
    state = state_of(norm)
    for name, tensor in (("weight", state.weight), ("bias", state.bias)):
        new.register_parameter(name, _as_parameter(tensor))
    for name, tensor in (("running_mean", state.mean), ("running_var", state.var)):
        if name in new._buffers:
            new._buffers[name] = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor
    if state.batches is not None and "num_batches_tracked" in new._buffers:
        new._buffers["num_batches_tracked"] = state.batches
    return new


def _as_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


def set_affine(norm: nn.Module, new: nn.Module, matched: Affine | None, init: str) -> nn.Module:
    """Give a per-sample normaliser its γ and β, with the dtype and gradient flags of ``norm``.

    Args:
        norm: the BatchNorm that is replaced.
        new: its replacement, with parameters ``weight`` and ``bias`` of shape (C,).
        matched: what the match says; None if ``norm`` has no running statistics to match.
        init: ``match``, ``copy`` or ``reset``; ``match`` without ``matched`` copies.
    """
    old = state_of(norm)
    for name in ("weight", "bias"):
        parameter = getattr(new, name)
        source = getattr(old, name)
        if init == "match" and matched is not None:
            value = getattr(matched, name)
        else:
            value = source if init != "reset" else None
        with torch.no_grad():
            if value is not None:
                parameter.copy_(value.detach())
        parameter.requires_grad_(source.requires_grad if source is not None else True)
    return new


def take_over(
    norm: nn.Module, new: nn.Module, *, act: nn.Module | None = None, taken: str | None = None
) -> nn.Module:
    """Carry mode, hooks, origin and fused children from ``norm`` to ``new``.

    Args:
        norm: the BatchNorm that is replaced.
        new: its replacement.
        act: what stands in the place of a fused activation; None keeps the activation itself.
        taken: the activation whose place ``new`` takes too.
    """
    parts = fused_parts(norm)
    if parts is not None and fused_parts(new) is None:
        layers.fuse(new, parts[0], parts[1] if act is None else act)
    new.training = norm.training
    for name in _TRANSFERRED_HOOKS:
        hooks = vars(norm).get(name)
        if hooks:
            vars(new)[name] = hooks
    origin = {"momentum": origin_of(norm)["momentum"]}
    vars(new)[_ORIGIN] = origin if taken is None else {**origin, "taken": taken}
    return new


def looks_fresh(state: BatchNormState) -> bool:
    """Whether no batch has touched the running statistics."""
    # not num_batches_tracked: weights that came from another framework leave it at 0
    return (
        state.mean is not None
        and state.var is not None
        and not state.mean.any()
        and bool((state.var == 1).all())
    )


def origin_of(norm: nn.Module) -> dict[str, Any]:
    """What ``bn`` needs to restore the first BatchNorm: its momentum."""
    origin = vars(norm).get(_ORIGIN)
    return dict(origin) if origin else {"momentum": state_of(norm).momentum}


def mark(layer: nn.Module, target: str) -> nn.Module:
    """Note on ``layer`` which recipe made it: GroupNorm, say, is what several make."""
    vars(layer)[_ORIGIN]["target"] = target
    return layer


def target_of(layer: nn.Module) -> str | None:
    """What ``mark`` noted."""
    found: str | None = vars(layer).get(_ORIGIN, {}).get("target")
    return found


def on_meta(module: nn.Module) -> bool:
    """Whether a module's parameters have no values."""
    return any(p.is_meta for p in module.parameters(recurse=False))


def has_statistics(state: BatchNormState) -> bool:
    """Whether ``state`` has running statistics to match; on the meta device nothing has values."""
    return state.mean is not None and state.var is not None and not state.mean.is_meta


def affine_warnings(site: Site, init: str) -> tuple[str, ...]:
    """What a per-sample target has to do about γ, β or statistics that are not there."""
    found = []
    if not site.tracked and init == "match":
        found.append("no running statistics to match: γ and β are copied")
    if not site.affine:
        found.append("the BN had no γ or no β: what is missing is created")
    return tuple(found)
