"""What the walker reports, as plain data: sites, their producers, their consumers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Producer:
    """The convolution, transposed convolution or linear layer whose output a BN normalises.

    Attributes:
        name: qualified name of the module.
        op: ``conv1d`` … ``conv_transpose3d`` or ``linear``.
        kind: class name of the module, for example ``Conv2dSame``.
        calls: how often the module ran in one forward.
        shared: whether its output feeds more than one BN.
        plain: whether the operation ran on the module's own input and stored weight.
        around: the BN runs inside this module, behind its operation.
        alone: whether the BN, and nothing else, reads its output.
    """

    name: str
    op: str
    kind: str
    calls: int = 1
    shared: bool = False
    plain: bool = True
    around: bool = False
    alone: bool = True


@dataclass(frozen=True)
class CallSite:
    """Where in a module's source an activation is called, as the interpreter reports it.

    Attributes:
        owner: qualified name of the module whose method holds the call.
        method: name of that method.
        position: line, column, end line, end column; lines counted from the method's first.
        digest: SHA-256 of the method's source.
        obstacle: None, or the reason why the call cannot be taken out of the method.
        moody: the method reads ``self.training``, so it may take another path in training; the
            name is that of the field in plan files.
    """

    owner: str
    method: str
    position: tuple[int, int, int, int]
    digest: str = ""
    obstacle: str | None = None
    moody: bool = False


@dataclass(frozen=True)
class Removal:
    """One way to take an activation out of a model, for a normaliser to take its place.

    Attributes:
        how: ``absorb`` (it lives in the BN), ``module`` (it becomes an identity under all its
            names), ``slot`` (one name in an ``nn.Sequential`` becomes an identity) or ``call``
            (one call leaves the method of its block).
        names: the names that become identities.
        feeders: the BN modules whose outputs the activation is applied to by this route; all of
            them have to get a layer that replaces it for the removal to be right.
        obstacle: None, or why this way is closed.
        call: for ``call``, where it is.
        op: which activation it is, by canonical name.
    """

    how: str
    names: tuple[str, ...] = ()
    feeders: tuple[str, ...] = ()
    obstacle: str | None = None
    call: CallSite | None = None
    op: str = "relu"


@dataclass(frozen=True)
class Activation:
    """The activation that is the only consumer of a BN's output.

    Attributes:
        op: canonical name: ``relu``, ``leaky_relu``, ``silu`` …
        name: qualified name of its module; None if it is functional.
        fused: it lives inside the BN module (timm's ``BatchNormAct2d``).
        uses: how many calls the activation's module has in one forward (1 if functional).
        ways: to take it out, the least invasive first; none for most kinds.
    """

    op: str
    name: str | None
    fused: bool = False
    uses: int = 1
    ways: tuple[Removal, ...] = ()

    @property
    def removals(self) -> tuple[Removal, ...]:
        """For a ReLU, the ways to take it out."""
        return self.ways if self.op == "relu" else ()


@dataclass(frozen=True)
class Site:
    """One BatchNorm module of a model and what surrounds it.

    Attributes:
        names: every qualified name that reaches the module; ``""`` is the model itself.
        kind: class name, for example ``BatchNormAct2d``.
        channels: number of features C.
        rank: number of spatial dimensions of its input: 0 for (N, C), 1, 2 or 3; from the class
            if the module never ran.
        dtype: dtype of its parameters, for example ``torch.float32``.
        calls: calls in one forward; 0 if it never ran.
        mode: ``eval`` or ``train``, the mode in which it was first seen to run; None if never.
        spatial: the smallest feature map seen, for example ``(7, 7)``; None if it never ran.
        producer: what makes its input, or None.
        no_producer: why ``producer`` is None, for example ``"add"`` or ``"cat"``; else None.
        activation: the sole consumer of its output when that is an activation, or None.
        affine: it has a weight (γ) and a bias (β).
        tracked: it has running statistics.
        mixed: its inputs do not all have the same number of dimensions.
        notes: anything else worth a line in a report.
    """

    names: tuple[str, ...]
    kind: str
    channels: int
    rank: int
    dtype: str = "torch.float32"
    calls: int = 1
    mode: str | None = "eval"
    spatial: tuple[int, ...] | None = None
    producer: Producer | None = None
    no_producer: str | None = None
    activation: Activation | None = None
    affine: bool = True
    tracked: bool = True
    mixed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The first of the module's names."""
        return self.names[0]

    @property
    def elements(self) -> int | None:
        """Number of elements of the smallest feature map; 1 for (N, C); None if it never ran."""
        if self.spatial is None:
            return None
        product = 1
        for size in self.spatial:
            product *= size
        return product


@dataclass(frozen=True)
class Other:
    """Something that normalises activations as a BN does, and is no module that can be replaced.

    Attributes:
        name: where it is: ``block:batch_norm`` for a call in the code of ``block``,
            ``block.norms[0]`` for a module that hangs in a plain list.
        kind: ``batch_norm``, or the class name of a module that torch does not know of.
        channels: number of features C.
        rank: number of spatial dimensions of its input.
        reason: why it cannot be replaced.
    """

    name: str
    kind: str
    channels: int
    rank: int
    reason: str


@dataclass(frozen=True)
class Graph:
    """All sites of a model, in the order in which they first ran.

    Attributes:
        sites: one entry per BN module.
        device: ``meta`` if the model could be run without arithmetic, else where it ran.
        notes: what the walker wants said about the model as a whole.
        others: what normalises activations with BatchNorm and is no site.
    """

    sites: tuple[Site, ...]
    device: str = "meta"
    notes: tuple[str, ...] = field(default=())
    others: tuple[Other, ...] = field(default=())

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if name in site.names:
                return site
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)
