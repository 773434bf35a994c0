"""``normswap verify``: check an ONNX file again, here or on another machine."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.cli.boundary import PARITY
from normswap.cli.console import print_json, print_table, say, suggest
from normswap.cli.options import cli_command, json_option, timeout_option, trust_option

if TYPE_CHECKING:
    from normswap.onnx import Parity


@cli_command("verify")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", help="Repeat the full proof against this MODEL; needs torch.")
@click.option("--provider", help="onnxruntime execution provider: cpu, cuda … [default: cpu]")
@timeout_option
@trust_option
@click.option("--all", "every", is_flag=True, help="Show every case, not only a summary.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    *,
    file: Path,
    model: str | None,
    provider: str | None,
    timeout: float | None,
    trust: tuple[str, ...],
    every: bool,
    as_json: bool,
) -> None:
    """Check an ONNX FILE again, here or elsewhere.

    Is it the one that was proven, and does it compute what it should? Without --model the file's
    own self-test is run, which needs neither torch nor the model. Exit code 3 if either fails.
    """
    from normswap.onnx import verify_onnx

    taken = _model(model, file, trust)
    parity = verify_onnx(file, **taken, provider=provider, timeout=timeout)
    if as_json:
        print_json({"file": file, **parity.to_json()})
    else:
        print_parity(parity, every=every)
    if not parity.passed:
        ctx.exit(PARITY)
    if not as_json and find_spec("torch") is not None:  # where verify alone is installed: the end
        suggest("predict", file, "IMAGES")


def _model(spec: str | None, file: Path, trust: tuple[str, ...]) -> dict[str, Any]:
    """The model, and its default inputs where the file does not record those of its proof."""
    if spec is None:
        return {}
    from normswap.artifact import load_model
    from normswap.onnx.file.metadata import read_metadata
    from normswap.onnx.file.parsing import read_onnx

    metadata = read_metadata(read_onnx(file))
    source = load_model(spec, trust=trust)
    recorded = metadata is not None and metadata.intact
    return {
        "model": source.model.eval(),
        "example_inputs": None if recorded else source.example_inputs(),
    }


def print_parity(parity: Parity, *, every: bool = False) -> None:
    """The proof as a table: one row per stage, or per case, and the verdict below."""
    rows = [_row(case) for case in parity.cases] if every else _by_stage(parity)
    detector = any(case.output == "detections" for case in parity.cases)
    agreed = "detections" if detector else "top-1"
    if rows:
        print_table(
            ("stage", "cases", "largest error", "tolerance", agreed, ""),
            rows,
            numeric=("cases", "largest error", "tolerance", agreed),
        )
    if parity.passed:
        say(f"parity passed: largest error {parity.max_relative_error:.1e} of the output's scale")
    else:
        say(f"parity FAILED: {parity.failure}")
    for words in _explained({case.stage for case in parity.cases}, rows):
        say(words)
    for note in parity.notes:
        say(f"note: {note}")


def _explained(stages: set[str], rows: list[tuple[Any, ...]]) -> Iterator[str]:
    """What the words of the table mean."""
    if any(row[4] for row in rows):
        yield "top-1: on how many of the decisions that are clear file and model agree"
    if "row independence" in stages:
        yield "row independence: an image's output is the same alone and among others"


def _row(case: Any) -> tuple[Any, ...]:
    verdict = "ok" if case.passed else (case.problem or "FAILED")
    name = f"{case.stage}: {'randomised copy, ' if case.randomised else ''}{case.name}"
    top1 = f"{case.agreed}/{case.decided}" if case.decided else ""
    return name, case.batch, f"{case.error:.1e}", f"{case.tolerance:.1e}", top1, verdict


def _by_stage(parity: Parity) -> list[tuple[Any, ...]]:
    rows = []
    for stage in dict.fromkeys(case.stage for case in parity.cases):
        cases = [case for case in parity.cases if case.stage == stage]
        worst = max(cases, key=lambda case: (not case.passed, case.error))
        decided = sum(case.decided for case in cases)
        top1 = f"{sum(case.agreed for case in cases)}/{decided}" if decided else ""
        verdict = "ok" if all(case.passed for case in cases) else "FAILED"
        error, tolerance = f"{worst.error:.1e}", f"{worst.tolerance:.1e}"
        rows.append((stage, len(cases), error, tolerance, top1, verdict))
    return rows
