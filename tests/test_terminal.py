"""What a file says is shown on a terminal and not obeyed by it."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import normswap
from normswap.artifact import record
from normswap.cli import console
from normswap.cli.app import app

# writes to the clipboard, clears the screen, a control of eight bits, turns the text around
HOSTILE = "\x1b]52;c;ZXZpbA==\x07\x1b[2Jx\x9b31m\u202eabc\r\x7f"


def assert_tame(text):
    assert [sign for sign in text if not (sign.isprintable() or sign == "\n")] == []


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    source = normswap.load_model("timm/test_resnet", pretrained=False, num_classes=2, image_size=32)
    model = normswap.convert(source.model, "gn", example_inputs=source.example_inputs()).model
    normswap.save(model, "model", class_names=[HOSTILE + "a", HOSTILE + "b"])
    for name in (HOSTILE + "a", HOSTILE + "b"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        pixels = np.zeros((32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{HOSTILE.replace('/', '')}[red]\n.png")
    return tmp_path / "model"


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_names_of_classes_and_files(more, model):
    for command in (["predict", "model", "data"], ["evaluate", "model", "--data", "data"]):
        extra = ["--per-class"] if command[0] == "evaluate" else []
        found = CliRunner().invoke(app, [*command, *extra, *more])
        assert found.exit_code == 0, found.output
        assert_tame(found.stdout)
        assert_tame(found.stderr)
        if more:
            assert HOSTILE in json.dumps(json.loads(found.stdout), ensure_ascii=False).replace(
                "\\u001b", "\x1b"
            ).replace("\\u0007", "\x07").replace("\\r", "\r")


def test_reasons_in_plans(model):
    data = json.loads((model / record.RECORD).read_text())
    for entry in data["plans"][0]["entries"]:
        entry["reason"] = HOSTILE
    data["record_sha256"] = record.record_digest(data)
    (model / record.RECORD).write_text(json.dumps(data))
    with open("plan.json", "w") as file:  # noqa: PTH123
        json.dump(data["plans"][0], file)
    options = ["--no-pretrained", "--num-classes", "2", "--image-size", "32"]
    for command in (
        ["inspect", "model"],
        ["convert", "timm/test_resnet", *options, "--plan", "plan.json", "-o", "out"],
    ):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, found.output
        assert_tame(found.output)


def test_tables_and_lines(capsys):
    console.print_table([HOSTILE, "[bold]b"], [(HOSTILE, "[red]x")], title=HOSTILE + "[blink]")
    console.say(HOSTILE + "\nline")
    console.print_json({HOSTILE: [HOSTILE, "ä\n"]})
    out = capsys.readouterr().out
    assert_tame(out)
    assert "[red]x" in out
    assert "[bold]b" in out
    assert "[blink]" in out
    assert json.loads(out[out.index("{") :]) == {HOSTILE: [HOSTILE, "ä\n"]}
