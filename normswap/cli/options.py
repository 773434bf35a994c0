"""The options that several commands share."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from normswap.children import FOREVER, ROOT, SECONDS, safe_path
from normswap.cli.completion import complete_model, complete_target
from normswap.cli.console import quiet_libraries, results_alone
from normswap.cli.wording import reword
from normswap.errors import NormSwapError, in_short
from normswap.files import contents, sole_writer
from normswap.room import full
from normswap.targets import FALLBACKS, TARGETS, read_target, split_targets

if TYPE_CHECKING:
    from torch import Tensor

    from normswap.sources import Source

MOST_IMAGES = 1024
"""More unlabelled images would not help, and fill the memory."""

Function = TypeVar("Function", bound=Callable[..., Any])


class Command(click.Command):
    """A command whose results alone reach stdout, whatever the libraries below it print."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """``--image-size H W`` beside ``--image-size EDGE``: two numbers become one value."""
        return super().parse_args(ctx, _joined_sizes(args))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the callback; third parties' chatter is shown with ``--debug`` only."""
        _say_at_once(self.name)
        debug = ctx.meta.get("debug", False)
        with safe_path(), results_alone(), quiet_libraries(debug=debug):
            _settings_of_pictures()
            try:
                return super().invoke(ctx)
            except NormSwapError as error:
                reword(error, self._options())
                raise

    def _options(self) -> dict[str, str]:
        """Argument → option, for what is shown in the help text."""
        options = (p for p in self.params if isinstance(p, click.Option) and not p.hidden)
        return {
            name: text
            for option in options
            for name, text in ((str(option.name), option.opts[0]), *_negations(option))
        }


def _negations(option: click.Option) -> Iterator[tuple[str, str]]:
    """``--no-validation`` beside ``--validation``, for its own name alone."""
    yield from ((text, text) for text in option.secondary_opts)


def _say_at_once(command: str | None) -> None:
    """Whoever watches is told why nothing happens: torch takes seconds to import."""
    if command != "verify" and "torch" not in sys.modules and sys.stderr.isatty():
        sys.stderr.write(f"normswap {command}: loading torch …\n")
        sys.stderr.flush()


def _settings_of_pictures() -> None:
    """Settings for matplotlib in the current folder are somebody else's; ``usetex`` runs LaTeX."""
    if Path("matplotlibrc").exists():
        with contextlib.chdir(ROOT), contextlib.suppress(ImportError):
            importlib.import_module("matplotlib")  # it reads them when it is imported


def _joined_sizes(words: list[str]) -> list[str]:
    """One word where a height and a width stand behind ``--image-size``.

    Example:
        >>> _joined_sizes(["--image-size", "224", "320", "DIR"])
        ['--image-size', '224x320', 'DIR']
    """
    if "--image-size" not in words:
        return words
    at = words.index("--image-size")
    edges = words[at + 1 : at + 3]
    if len(edges) == 2 and all(edge.isdecimal() for edge in edges):
        words = [*words[: at + 1], "x".join(edges), *words[at + 3 :]]
    return words


class ImageSize(click.ParamType):  # type: ignore[type-arg]
    """One edge, or a height and a width."""

    name = "size"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How the help names it."""
        del param, ctx
        return "EDGE | H W"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | tuple[int, int]:
        """``224``, ``224x320``, or what was converted already."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        edges = value.split("x")
        if len(edges) > 2 or not all(edge.isdecimal() and int(edge) > 0 for edge in edges):
            self.fail(f"got {value!r}; need one edge, or height and width: 224 320.", param, ctx)
        return int(edges[0]) if len(edges) == 1 else (int(edges[0]), int(edges[1]))


def _note_debug(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["debug"] = True


def debug_option() -> click.Option:
    """``--debug``, for a command or the group."""
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_note_debug,
        help="Show tracebacks and the warnings of other libraries.",
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON alone on stdout.")

skip_broken_option = click.option(
    "--skip-broken", is_flag=True, help="Skip broken images instead of stopping."
)

force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")

timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=0, max=FOREVER),
    default=SECONDS,
    show_default=True,
    callback=lambda _ctx, _parameter, value: value or None,
    help="Seconds that an ONNX file may run, in a process of its own that may take 8 GiB; "
    "0: here, without limits.",
)


def _processes(_ctx: click.Context, _parameter: click.Parameter, value: str) -> int:
    """A number, or for ``auto`` what suits this machine, which is said."""
    if value != "auto":
        if not value.isdecimal():
            raise click.BadParameter(f"got {value!r}; need a number from 0 on, or auto.")
        return int(value)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # one core for the training itself; beyond eight they only wait for it
    found = min(8, max(0, (cores or 1) // beside - 1))
    text = f"--workers auto: {found} for {cores or 1} cores and {beside} processes"
    click.echo(text, err=True)  # the log opens later
    return found


workers_option = click.option(
    "--workers",
    metavar="N|auto",
    default="0",
    show_default=True,
    callback=_processes,
    help="Processes that read images; auto: as many as there are cores to spare, at most 8.",
)


def cli_command(
    name: str, *, epilog: str | None = None
) -> Callable[[Callable[..., None]], click.Command]:
    """Like ``click.command``, with ``--debug`` and stdout kept for results."""

    def decorate(function: Callable[..., None]) -> click.Command:
        made = click.command(name, cls=Command, epilog=epilog)(function)
        made.params.append(debug_option())
        return made

    return decorate


_WITH_VALUE = ("checkpoint", "num_classes", "image_size", "checkpoint_prefix", "in_chans")


@dataclass(frozen=True)
class ModelChoice:
    """MODEL and the options that say how to build it."""

    spec: str
    checkpoint: Path | None
    pretrained: bool
    num_classes: int | None
    device: str | None
    seed: int
    image_size: int | tuple[int, int] | None
    in_chans: int | None = None
    checkpoint_prefix: str | None = None
    ignore_head: bool = False
    batchnorms: tuple[str, ...] = ()
    trust: tuple[str, ...] = ()
    allow_nonfinite: bool = False

    def words(self) -> Iterator[str]:
        """MODEL and the options that make it this one, for a command to copy."""
        yield self.spec
        flags = {
            "--no-pretrained": not self.pretrained,
            "--ignore-head": self.ignore_head,
            "--allow-nonfinite": self.allow_nonfinite,
        }
        yield from (flag for flag, given in flags.items() if given)
        for option in _WITH_VALUE:
            value = getattr(self, option)
            if value is not None:
                parts = value if isinstance(value, tuple) else (value,)
                yield from (f"--{option.replace('_', '-')}", *map(str, parts))
        for text in self.batchnorms:
            yield from ("--batchnorm", text)
        for spec in self.trust:
            yield from ("--trust", spec)

    def consent(self) -> Iterator[str]:
        """What opens a directory that was made from this model: ``--trust`` where code is named."""
        named = self.spec.startswith(("python:", "hf-hub:"))
        for spec in dict.fromkeys((*self.trust, *((self.spec,) if named else ()))):
            yield from ("--trust", spec)

    @property
    def short_name(self) -> str:
        """What to call files that come from this model, in a command to copy."""
        name = self.spec.rstrip("/").rpartition("/")[2].rpartition(":")[2]
        return re.sub(r"\W+", "-", name).strip("-")

    def load(self) -> Source:
        """Seed torch and build the model, in eval mode and on the device asked for."""
        import torch

        from normswap.artifact import load_model

        torch.manual_seed(self.seed)
        self._declare()
        source = load_model(
            self.spec,
            pretrained=self.pretrained,
            checkpoint=self.checkpoint,
            num_classes=self.num_classes,
            image_size=self.image_size,
            in_chans=self.in_chans,
            checkpoint_prefix=self.checkpoint_prefix,
            ignore_head=self.ignore_head,
            device=check_device(self.device),
            trust=self.trust,
            allow_nonfinite=self.allow_nonfinite,
        )
        source.model.eval()
        return source

    def _declare(self) -> None:
        from normswap.factories.declared import declare_batchnorm

        for text in self.batchnorms:
            declare_batchnorm(text)

    def inputs(self, source: Source) -> Any:
        """Example inputs of the size asked for, on the device of the model."""
        return source.example_inputs(image_size=self.image_size, seed=self.seed)

    def images(self, source: Source, folder: Path, *, skip_broken: bool = False) -> Tensor:
        """Unlabelled images as one batch, at most ``MOST_IMAGES``, on the device of the model."""
        from normswap.data import load_images

        preprocessing = source.preprocessing.resized(self.image_size)
        on_broken = "skip" if skip_broken else "error"
        images = load_images(folder, preprocessing, limit=MOST_IMAGES, on_broken=on_broken)
        return images.to(check_device(self.device))


def model_options(function: Function) -> Function:
    """Add MODEL and its options; the callback gets them as ``chosen: ModelChoice``."""
    names = [field.name for field in fields(ModelChoice) if field.name != "spec"]

    @functools.wraps(function)
    def wrapper(*, model: str, **values: Any) -> Any:
        chosen = ModelChoice(model, **{name: values.pop(name) for name in names})
        return function(chosen=chosen, **values)

    for option in reversed(_MODEL_OPTIONS):
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


trust_option = click.option(
    "--trust",
    multiple=True,
    metavar="SPEC",
    help="A python: or hf-hub: source that a directory may name, because you trust its author.",
)

_MODEL_OPTIONS = (
    click.argument("model", shell_complete=complete_model),
    click.option(
        "--checkpoint",
        type=click.Path(path_type=Path),
        help="Weights: .safetensors, or .pth (read without running code). Nothing is downloaded.",
    ),
    click.option(
        "--pretrained/--no-pretrained",
        default=True,
        help="Pretrained weights (the default) or none.",
    ),
    click.option("--num-classes", type=click.IntRange(min=1), help="Size of the classifier."),
    click.option(
        "--device", help="cpu, cuda, cuda:1, mps … [default: cpu; to train, what there is]"
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="For all random numbers."),
    click.option("--image-size", type=ImageSize(), help="Of the input, in pixels."),
    click.option(
        "--checkpoint-prefix",
        metavar="PREFIX",
        help="What the model's keys in the file begin with, encoder_q. for example [default: the "
        "one that fits].",
    ),
    click.option(
        "--ignore-head",
        is_flag=True,
        help="A head that the file lacks, or has in another size, starts afresh.",
    ),
    click.option(
        "--in-chans",
        type=click.IntRange(min=1),
        help="Channels of the input, where they are not 3. Pretrained stems follow timm's rule.",
    ),
    click.option(
        "--batchnorm",
        "batchnorms",
        multiple=True,
        metavar="CLASS",
        help="A BatchNorm class of your own that is not recognised: package.module:Class, or "
        "package.module:Class(weight=gamma, eps=0.001, activation=relu). May be repeated.",
    ),
    trust_option,
    click.option(
        "--allow-nonfinite",
        is_flag=True,
        help="Take weights that are not finite and negative variances, to look at them.",
    ),
)


def check_device(name: str | None) -> str:
    """The device's name, if torch can use it here.

    Raises:
        NormSwapError: it is no device, or not there.
    """
    import torch

    if name in (None, "cpu"):
        return "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise NormSwapError(
            "--device",
            got=f"{name!r} ({in_short(error)})",
            need="a device that torch can use here",
            hint="--device cpu",
        ) from error
    return str(name)


def known_target(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """The callback of ``--to``: a target, or a usage error with the nearest names."""
    if value is not None:
        check_target(value, "one")
    return value


def known_targets(_ctx: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """The callback of a ``--to`` that takes several targets, with commas."""
    names = tuple(dict.fromkeys(split_targets(value)))
    if not names:
        raise click.BadParameter(f"got nothing; need some of {', '.join(TARGETS)}.")
    for name in names:
        check_target(name, "some")
    return names


def targets_option(
    default: str, help_text: str, *, callback: Callable[..., Any] = known_targets
) -> Callable[[Function], Function]:
    """A ``--to`` that takes several targets, as ``targets``."""
    return click.option(
        "--to",
        "targets",
        callback=callback,
        shell_complete=complete_target,
        default=default,
        show_default=True,
        metavar="TARGET,…",
        help=help_text,
    )


def batch_size_option(default: int, help_text: str) -> Callable[[Function], Function]:
    """``--batch-size``, where it is a number."""
    return click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help=help_text,
    )


def report_option(name: str, help_text: str) -> Callable[[Function], Function]:
    """An option for a file that is a picture, JSON or a table, by its ending."""
    file = click.Path(path_type=Path, dir_okay=False)
    return click.option(name, type=file, metavar="FILE", help=help_text)


def known_fallback(
    _ctx: click.Context, _parameter: click.Parameter, value: str | None
) -> str | None:
    """The callback of ``--fallback``: one of ``FALLBACKS``, with settings if it is a target."""
    if value is None or value in FALLBACKS:
        return value
    if value.partition("(")[0] not in FALLBACKS:
        raise click.BadParameter(f"got {value!r}; need one of {', '.join(FALLBACKS)}.")
    check_target(value, "one")
    return value


def check_target(text: str, how_many: str) -> None:
    """A usage error unless ``text`` is a target, with settings that it can have.

    Raises:
        BadParameter: saying what it can be.
    """
    try:
        name, settings = read_target(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from error
    if name not in TARGETS:
        near = get_close_matches(name, TARGETS, n=2, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise click.BadParameter(f"got {name!r}; need {how_many} of {', '.join(TARGETS)}.{hint}")
    if settings:
        from normswap.recipes import recipe_for

        try:
            recipe_for(text)
        except NormSwapError as error:
            raise click.BadParameter(str(error)) from error


def check_output(
    path: Path, *, force: bool, hint: str = "--force, which replaces it, or another -o"
) -> None:
    """Find out before long work whether a directory can be written, and keep others out of it.

    Raises:
        NormSwapError: it exists and is not an empty directory, cannot be made, or another run is
            writing it.
    """
    if path.exists() and not path.is_dir():
        raise NormSwapError(
            str(path), got="a file", need="a new or an empty directory", hint="another -o"
        )
    check_parent(path)
    keep_others_out(path)
    if contents(path) and not force:
        raise NormSwapError(
            str(path), got="a directory that is not empty", need="a new or an empty one", hint=hint
        )


def check_file(path: Path, *, force: bool) -> None:
    """Find out before long work whether a file can be written, and keep others off it.

    Raises:
        NormSwapError: it exists, its folder may not be written to, or another run is writing it.
    """
    if path.is_dir():
        raise NormSwapError(
            str(path),
            got="a directory",
            need="the name of a file",
            hint=f"-o {path / 'model.onnx'}",
        )
    check_parent(path)
    keep_others_out(path)
    if path.exists() and not force:
        raise NormSwapError(
            str(path),
            got="a file that exists",
            need="a new one",
            hint="--force, which replaces it, or another path",
        )


def keep_others_out(path: Path) -> None:
    """Be the only one who writes there until the command ends.

    Raises:
        BusyError: another run is writing it.
        NormSwapError: nothing can be written there.
    """
    try:
        click.get_current_context().with_resource(sole_writer(path))
    except OSError as error:
        if full(error):
            raise
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> NormSwapError:
    """The one line for a place where nothing can be written, whatever the system calls it."""
    return NormSwapError(
        str(path),
        got=f"a place that cannot be written to ({error.strerror})",
        need="a writable folder",
        hint="another path",
    )


def check_parent(path: Path) -> None:
    """Find out before long work whether something can be written beside ``path``.

    Raises:
        NormSwapError: the nearest existing folder is none or may not be written to.
    """
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise NormSwapError(str(parent), got="a file", need="a directory", hint="another -o")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise NormSwapError(
            str(parent),
            got="no permission to write",
            need="a writable directory",
            hint="another -o",
        )
