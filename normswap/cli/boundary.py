"""The one place where exceptions become exit codes and a line on stderr."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from normswap.cli.console import one_line
from normswap.errors import NormSwapError, ParityError
from normswap.room import full

DONE, FAILED, USAGE, PARITY, INTERRUPTED = 0, 1, 2, 3, 130

_SYSTEM = {
    errno.EACCES: ("permission denied", "the right to use it", "another path, or chmod"),
    errno.EPERM: ("permission denied", "the right to use it", "another path, or chmod"),
    errno.EROFS: ("a read-only file system", "the right to write there", "another path"),
    errno.EISDIR: ("a directory", "the name of a file", "another path"),
    errno.ENOTDIR: ("a file in the place of a folder", "a folder", "another path"),
    errno.ENOENT: ("nothing there", "an existing file", "another path"),
    errno.ELOOP: ("a link", "a file or a folder in its place", "removing the link"),
}

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "onnxscript",
    "safetensors",
    "accelerate",
    "matplotlib",
)


def exit_code(run: Callable[[], Any], *, debug: bool) -> int:
    """Run a command line and say how it ended.

    Args:
        run: the parsed call; returns an exit code, or anything else for success.
        debug: print the traceback of what went wrong.

    Returns:
        0 done, 1 error, 2 wrong usage, 3 the ONNX file is not the model, 130 interrupted.
    """
    try:
        result = run()
        sys.stdout.flush()
    except BrokenPipeError:  # `normswap list | head`: the reader has gone, and that is fine
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the boundary
        if debug:
            traceback.print_exc()
        code, message = describe(error)
        # whoever asks for nothing is shown what there is: that is no complaint
        click.echo(message, err=not isinstance(error, click.exceptions.NoArgsIsHelpError))
        return code
    return result if isinstance(result, int) else DONE


def describe(error: BaseException) -> tuple[int, str]:
    """The exit code of an exception and the text that stands for it."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return USAGE, error.format_message()
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "normswap"
        text = f"{command}: {error.format_message()}"
        advised = " Try " in text  # by the error that was wrapped
        return USAGE, one_line(text if advised else f"{text} Try '{command} --help'.")
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return INTERRUPTED, "normswap: interrupted; what was already saved is complete."
    if isinstance(error, ParityError):
        return PARITY, one_line(str(error))
    if type(error).__name__ == "TrainingInterrupted":  # by name: its room needs torch
        return INTERRUPTED, one_line(str(error))
    if isinstance(error, NormSwapError):
        return FAILED, one_line(str(error))
    return FAILED, one_line(_foreign(error))


def _foreign(error: BaseException) -> str:
    """A line for what normswap did not raise itself."""
    if got := full(error):
        where = getattr(error, "filename", None) or "file system"
        return f"{where}: got {got}; need space for the output. Try freeing some, or another disk."
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        got, need, hint = _SYSTEM[error.errno]
        return f"{error.filename or 'file system'}: got {got}; need {need}. Try {hint}."
    if isinstance(error, OSError) and error.filename and error.strerror:
        got = error.strerror[:1].lower() + error.strerror[1:]
        return f"{error.filename}: got {got}; need a path that can be used. Try another one."
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return (
            "memory: got less than this run needs; need room for one batch. "
            "Try a smaller --batch-size or --image-size, or --device cpu."
        )
    if isinstance(error, ModuleNotFoundError) and error.name in _PACKAGES:
        return (
            f"{error.name}: got no such package; need it for this command ('verify' alone does "
            "without). Try 'pip install normswap', with its dependencies."
        )
    return f"{type(error).__name__}: {error}. Unexpected: run again with --debug."
