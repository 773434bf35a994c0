"""The command line advises options, and no Python."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

import normswap
from normswap.cli.app import COMMANDS, app
from normswap.cli.wording import without_arguments, worded
from normswap.recipes import RECIPES

PACKAGE = Path(normswap.__file__).parent
OPTIONS = {
    option
    for name in COMMANDS
    for parameter in app.get_command(None, name).params
    for option in (*parameter.opts, *parameter.secondary_opts)
}
SETTINGS = {field.name for recipe in RECIPES.values() for field in fields(recipe)}
"""What is typed as it is: ``gn(groups=8)``."""
CALLERS = {
    # arguments that every command fills in itself, or that click has checked
    "drift.py", "recommendation.py", "sweeps.py", "swap/optimizer.py", "training/batches.py",
    "training/checkpoints.py", "training/tasks/__init__.py", "training/tasks/detection.py",
}  # fmt: skip
KEYWORD = re.compile(r"\b([a-z]\w*)=(?=[\w'\"\[{…])")


def text_of(node):
    """A hint as it may be shown: what is filled in becomes a word."""
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "4" for v in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.Constant):
        return str(node.value)
    return " or ".join(text_of(n) for n in ast.walk(node) if isinstance(n, ast.Constant))


def hints():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(("layers/", "recipes/", "cli/")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == "hint":
                    yield name, text_of(node.value)


def test_there_are_hints_with_both():
    found = [text for _, text in hints() if KEYWORD.search(text)]
    assert len(found) > 30
    assert any("--skip-broken (on_broken='skip')" in text for text in found)


def test_hints_that_name_arguments_name_options():
    """Of every hint in the package, with the options of all commands."""
    wrong = []
    for name, text in hints():
        shown = worded(text, OPTIONS)
        python = [word for word in KEYWORD.findall(shown) if word not in SETTINGS]
        if python and name not in CALLERS and not shown.startswith("in Python "):
            wrong.append(f"{name}: {shown}")
    assert wrong == []


def test_hints_that_name_options_name_some_that_there_are():
    unknown = {
        f"{name}: {option}"
        for name, text in hints()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"`[^`]*`", "", text))
        if option not in OPTIONS
    }
    assert unknown == set()


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        ("--resume (resume=True): t/last.pt holds step 4", "--resume: t/last.pt holds step 4"),
        ("`normswap finetune a -o b` with it (load(…), then finetune)", None),
        ("--trust S (trust='S') if you can, or load(d, into=a model)", "--trust S if you can"),
        ("saving it, or load(d, into=…), or another", "saving it, or another"),
        ("load(d, into=x), or save(m, d)", "in Python load(d, into=x), or save(m, d)"),
        ("smaller, --amp bf16 (amp='bf16') or --no-such (x=1)", "smaller or --amp bf16"),
        ("gn(groups=16)", None),
        ("groups=4 or 8", None),
        ("r_max=3, d_max=5", None),
        ("another -o", None),
        ("--no-validation", None),
    ],
)  # fmt: skip
def test_wording(hint, shown):
    assert worded(hint, OPTIONS) == (hint if shown is None else shown)


def test_brackets_that_hold_no_argument_stay():
    for text in (
        "skipped 3 of 9 images (broken): a (1).png",
        "--calibrate-moves norms (calibrate(parameters='norms')) and (so on)",
    ):
        assert without_arguments(text) == text.replace(" (calibrate(parameters='norms'))", "")


@pytest.fixture
def broken(tmp_path):
    from PIL import Image

    for number in range(12):
        path = tmp_path / "data" / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * number, 90, 200 - 9 * number)).save(path)
    path.write_bytes(b"no image at all")
    return tmp_path / "data"


SMALL = ["timm/test_resnet", "--no-pretrained", "--image-size", "32"]


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("command", ["convert", "export", "recommend"])
def test_one_broken_image_is_no_dead_end(command, broken, tmp_path):
    more = ("--to", "gn", "--calibrate", broken, "--calibrate-seconds", 3, "-o", tmp_path / "o")
    if command == "export":
        more = ("--images", broken, "-o", tmp_path / "o.onnx")
    if command == "recommend":
        more = ("--data", broken, "--seconds", 3)
    done = run(command, *SMALL, *more)
    assert done.exit_code == 1
    assert "11.png: got a broken image (UnidentifiedImageError: cannot identify" in done.stderr
    assert done.stderr.rstrip().endswith("Try removing it, or --skip-broken.")
    assert "_io." not in done.stderr
    done = run(command, *SMALL, *more, "--skip-broken")
    assert done.exit_code == 0, done.stderr
    assert "skipped 1 of 12 images: broken" in done.stderr


def test_skipping_broken_images_goes_with_images(tmp_path):
    for more in (("convert", "--to", "gn"), ("export",)):
        done = run(more[0], *SMALL, *more[1:], "--skip-broken", "-o", tmp_path / "o")
        assert done.exit_code == 2
        assert "--skip-broken goes with" in done.stderr
    done = run("recommend", *SMALL, "--skip-broken")
    assert done.exit_code == 2
    assert "--skip-broken goes with --data IMAGES" in done.stderr


def test_an_argument_that_is_at_fault_is_shown_as_its_option(broken, tmp_path):
    data = ("--data", broken, "--val-split", 0.5, "--skip-broken", "--epochs", 1)
    done = run("finetune", *SMALL, *data, "--no-validation", "-o", tmp_path / "t")
    assert done.exit_code == 2
    data = ("--data", broken, "--skip-broken", "--no-validation", "--keep", "best")
    done = run("finetune", *SMALL, *data, "-o", tmp_path / "t")
    assert done.exit_code == 1
    assert "Try leaving --no-validation out, or --keep last." in done.stderr


def test_who_interrupts_is_told_the_option(broken, tmp_path, monkeypatch):
    from normswap.training.loop import TrainingInterrupted

    def stop(*_, **__):
        hint = "--resume (resume=True): t/last.pt holds step 4"
        raise TrainingInterrupted("finetune", got="SIGINT at step 4", need="9 steps", hint=hint)

    monkeypatch.setattr(normswap, "finetune", stop)
    data = ("--data", broken, "--skip-broken", "--no-validation")
    done = run("finetune", *SMALL, *data, "-o", tmp_path / "t")
    assert done.exit_code == 130
    assert done.stderr.rstrip().endswith("Try --resume: t/last.pt holds step 4.")


def test_a_command_line_of_a_resumed_run_that_does_not_exist_says_so(broken, tmp_path):
    data = ("--data", broken, "--skip-broken", "--no-validation", "--epochs", 1, "--batch-size", 4)
    out = tmp_path / "mistyped"
    done = run("finetune", *SMALL, *data, "--resume", "-o", out)
    assert done.exit_code == 0, done.stderr
    said = f"nothing to resume in {out}; starting a new run"
    assert said in done.stderr
    done = run("finetune", *SMALL, *data, "--resume", "-o", out)
    assert done.exit_code == 0, done.stderr
    assert "nothing to resume" not in done.stderr


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
def test_an_empty_folder_is_not_to_be_divided(task, tmp_path):
    (tmp_path / "data").mkdir()
    data = ("--data", tmp_path / "data", "--task", task, "-o", tmp_path / "t")
    done = run("finetune", *(SMALL[:2] if task == "detection" else SMALL), *data)
    assert done.exit_code == 1
    assert "--val-split" not in done.stderr
    assert "images to validate on" not in done.stderr
    assert not (tmp_path / "t").exists()


def test_the_history_says_what_was_trained_and_what_is_kept(broken, tmp_path):
    data = ("--data", broken, "--skip-broken", "--val-split", 0.5, "--lr", 1e-9, "--epochs", 2)
    (broken / "train").rename(tmp_path / "one")
    data = ("--data", tmp_path / "one", *data[2:])
    done = run("finetune", *SMALL, *data, "-o", tmp_path / "t")
    assert done.exit_code == 0, done.stderr
    entry = json.loads((tmp_path / "t" / "normswap.json").read_text())["history"][-1]
    assert entry["epochs"] == 2
    kept = json.loads(run("finetune", *SMALL, *data, "-o", tmp_path / "u", "--json").stdout)["best"]
    number = kept["epoch"]
    assert entry["kept"] == f"best, {f'epoch {number}' if number else 'the start'}"
    assert "epochs=2" in (tmp_path / "t" / "README.md").read_text()
    done = run("evaluate", tmp_path / "t", "--data", tmp_path / "one", "--skip-broken",
               "--confusion", tmp_path / "c.jpg")  # fmt: skip
    assert f"wrote {tmp_path / 'c.jpg'}" in done.stdout
    done = run("evaluate", tmp_path / "t", "--data", tmp_path / "one", "--confusion", "c.doc")
    assert (done.exit_code, "need a name ending in .png" in done.stderr) == (2, True)


def test_every_file_that_convert_writes_is_named(broken, tmp_path):
    more = ("--to", "gn", "--calibrate", broken, "--skip-broken", "--calibrate-seconds", 20)
    files = ("-o", tmp_path / "o", "--drift", tmp_path / "d.png", "--costs", tmp_path / "c.json")
    done = run("convert", *SMALL, *more, "--keep", 50, *files)
    assert done.exit_code == 0, done.stderr
    for name in ("o", "d.png", "c.json"):
        assert f"wrote {tmp_path / name}" in done.stdout.splitlines()
    assert "layers converted, the others frozen" in done.stdout
