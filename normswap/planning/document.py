"""A plan as data: what becomes what, per site, and why not; readable, and JSON both ways."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from normswap.errors import PlanError, some
from normswap.graph import CallSite, Removal
from normswap.graph.vocabulary import REPLACEABLE
from normswap.reading import Malformed, reading
from normswap.recipes import Recipe, recipe_from_json
from normswap.targets import INITS

PLAN_FORMAT = 1
KEEP = "keep"


@dataclass(frozen=True)
class PlanEntry:
    """What happens to one BatchNorm.

    Attributes:
        names: every qualified name of the module.
        kind: its class name.
        channels: number of features C.
        rank: number of spatial dimensions of its input.
        becomes: name of the target, or ``keep``.
        recipe: what makes the new layer, settled for this site; None if kept.
        init: ``match``, ``copy`` or ``reset``.
        reason: why the site does not get the target that was asked for; None if it does.
        notes: what else a user should know.
        producer: name of the module that makes its input, for a layer that has to know it.
        cost: what its conversion alone costs, in nats of the outputs' softmax, where that was
            measured to decide what is converted.
        scaled: name of the module that makes its input, where its channels get scales with which
            the new layer's statistics differ little from sample to sample.
        removal: how the activation behind it is taken out, for the new layer to take its place.
    """

    names: tuple[str, ...]
    kind: str
    channels: int
    rank: int
    becomes: str
    recipe: Recipe | None = None
    init: str = "match"
    reason: str | None = None
    notes: tuple[str, ...] = ()
    producer: str | None = None
    removal: Removal | None = None
    cost: float | None = None
    scaled: str | None = None

    @property
    def name(self) -> str:
        """The first of the module's names."""
        return self.names[0]


@dataclass(frozen=True)
class Plan:
    """What becomes what in one model; plain data, JSON both ways, and an input of ``convert``.

    Attributes:
        target: what was asked for, in words.
        entries: one per BatchNorm, in data-flow order.
        notes: what the walker said about the model as a whole.
    """

    target: str
    entries: tuple[PlanEntry, ...]
    notes: tuple[str, ...] = field(default=())

    def __iter__(self) -> Iterator[PlanEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def swapped(self) -> tuple[PlanEntry, ...]:
        """The entries that change a module."""
        return tuple(e for e in self.entries if e.becomes != KEEP)

    @property
    def kept(self) -> dict[str, str]:
        """Name → reason of every BatchNorm that stays as it is."""
        return {e.name: e.reason or "" for e in self.entries if e.becomes == KEEP}

    @property
    def idle(self) -> PlanError | None:
        """What to say of a plan that converts nothing, with its reasons; else None."""
        if self.swapped:
            return None
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name or "(root)")
        told = "; ".join(f"{reason} ({some(names)})" for reason, names in reasons.items())
        return PlanError(
            f"the conversion to {self.target}",
            got=f"none of {len(self)} BatchNorm layers that can be converted: {told}",
            need="at least one",
            hint="another target or fallback, or fewer exclusions",
        )

    def counts(self) -> dict[str, int]:
        """How many sites become what."""
        return dict(Counter(e.becomes for e in self.entries))

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "plan_format": PLAN_FORMAT,
            "target": self.target,
            "entries": [_entry_to_json(entry) for entry in self.entries],
            "notes": list(self.notes),
        }

    @staticmethod
    def from_json(data: Any, *, where: str = "plan") -> Plan:
        """The plan that :meth:`to_json` wrote down.

        Args:
            data: plain data, of which nothing is believed.
            where: it comes from, for the error.

        Raises:
            PlanError: if the data is no plan, or one of a newer format.
        """
        with reading(
            where,
            PlanError,
            need=f"a plan of format {PLAN_FORMAT}",
            hint="normswap convert --dry-run --json",
        ):
            if data["plan_format"] > PLAN_FORMAT:
                raise Malformed(f"plan_format {data['plan_format']}")
            entries = tuple(_entry_from_json(entry) for entry in data["entries"])
            names = Counter(name for entry in entries for name in entry.names)
            if twice := [name for name, count in names.items() if count > 1]:
                raise Malformed(f"several entries for {twice[0]}")
            return Plan(str(data["target"]), entries, tuple(map(str, data.get("notes", ()))))

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {name}" for name, n in self.counts().items())
        width = max((len(e.name) for e in self.entries), default=0)
        lines = [f"Plan to {self.target}: {len(self.entries)} BatchNorm layers: {counts}"]
        lines += [f"  {_line(entry, width)}" for entry in self.entries]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _line(entry: PlanEntry, width: int) -> str:
    becomes = entry.becomes if entry.recipe is None else str(entry.recipe)
    parts = [f"{entry.name or '(root)':{width}}  {entry.kind}({entry.channels}) → {becomes}"]
    if entry.producer:
        parts.append(f"wired to {entry.producer}")
    if entry.scaled:
        parts.append(f"{entry.scaled} is scaled by channel")
    if entry.removal:
        parts.append(f"takes the {REPLACEABLE[entry.removal.op]}'s place")
    parts += [text for text in (entry.reason, *entry.notes) if text]
    if entry.cost is not None:
        parts.append(f"costs {entry.cost:.2g} nats alone")
    return "; ".join(parts)


def _entry_to_json(entry: PlanEntry) -> dict[str, Any]:
    return asdict(entry) | {"recipe": entry.recipe and entry.recipe.to_json()}


def _entry_from_json(data: dict[str, Any]) -> PlanEntry:
    known = {f.name for f in fields(PlanEntry)}
    if not isinstance(data, dict) or set(data) - known:
        raise Malformed(f"unknown fields in {data!r:.80}")
    removal = data.get("removal")
    if removal is not None:
        call = removal.get("call")
        if call is not None:
            call = CallSite(**{**call, "position": tuple(call["position"])})
        lists = {key: tuple(removal[key]) for key in ("names", "feeders")}
        removal = Removal(**{**removal, **lists, "call": call})
        _check_removal(removal)
    lists = {key: tuple(map(str, data[key])) for key in ("names", "notes")}
    entry = PlanEntry(**{**data, **lists, "recipe": None, "removal": removal})
    if not entry.names or not isinstance(entry.becomes, str):
        raise Malformed(f"no names in {data!r:.80}")
    entry = replace(entry, recipe=_recipe_of(entry, data.get("recipe") or {}))
    _check_entry(entry)
    return entry


def _recipe_of(entry: PlanEntry, recipe: Any) -> Recipe | None:
    if not isinstance(recipe, dict) or recipe.get("target", KEEP) != entry.becomes:
        raise Malformed(f"{entry.name} becomes {entry.becomes!r} by a recipe {recipe!r:.60}")
    return None if entry.becomes == KEEP else recipe_from_json(recipe)


def _check_removal(removal: Removal) -> None:
    """Strings where strings belong: they are looked up in the model."""
    call = removal.call
    texts = [removal.how, removal.op, *removal.names, *removal.feeders]
    if call is not None:
        texts += [call.owner, call.method, call.digest]
        if len(call.position) != 4 or not all(type(number) is int for number in call.position):
            raise Malformed(f"a call at {call.position!r:.60}")
    if not all(isinstance(text, str) for text in texts):
        raise Malformed(f"a removal of {texts!r:.80}")


_KINDS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "channels": (int,),
    "reason": (str, type(None)),
    "producer": (str, type(None)),
    "scaled": (str, type(None)),
}


def _check_entry(entry: PlanEntry) -> None:
    """What was edited by hand must still be one thing."""
    for name, kinds in _KINDS.items():
        value = getattr(entry, name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise Malformed(f"{entry.name}: {name} {value!r:.60}")
    if entry.rank not in range(4) or isinstance(entry.rank, bool):
        raise Malformed(f"{entry.name}: rank {entry.rank!r}, not 0, 1, 2 or 3")
    gone = None if entry.removal is None else entry.removal.op
    if gone is not None and (entry.recipe is None or gone not in entry.recipe.takes):
        name = REPLACEABLE.get(gone, gone)
        raise Malformed(f"{entry.name}: a {name} is to go, and {entry.becomes} does not replace it")
    if entry.init not in INITS:
        raise Malformed(f"init {entry.init!r}, not one of {', '.join(INITS)}")
