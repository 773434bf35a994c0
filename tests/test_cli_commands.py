"""The commands end to end on a small network: what they print, write and exit with."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import normswap
from normswap.cli.app import app
from normswap.errors import ParityError
from normswap.tour import digits_net

SPEC = "python:normswap.tour:digits_net"
LAYERS = 21


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights with running statistics that look used."""
    torch.manual_seed(0)
    net = digits_net()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    path = tmp_path_factory.mktemp("checkpoint") / "bn.safetensors"
    save_file(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    """The words that name the network on a command line."""
    return (SPEC, "--checkpoint", str(checkpoint))


@pytest.fixture(scope="module")
def artefact(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact") / "gn"
    run("convert", *model, "--to", "gn", "-o", folder)
    return folder


@pytest.fixture(scope="module")
def report(artefact, tmp_path_factory):
    """What `normswap export --json` said."""
    file = tmp_path_factory.mktemp("onnx") / "gn.onnx"
    return json.loads(run("export", artefact, "-o", file, "--json").stdout)


@pytest.fixture(scope="module")
def exported(report):
    return Path(report["file"])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Four random pictures of each of ten classes."""
    folder = tmp_path_factory.mktemp("digits")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8), np.uint8)
    for number, picture in enumerate(pixels):
        path = folder / str(number % 10) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
    return folder


def test_list_counts_batchnorms():
    listed = json.loads(run("list", "torchvision/resnet[15]*", "--json").stdout)
    counts = {entry["model"]: entry["batchnorms"] for entry in listed}
    # He et al. 2015, table 1: one BN per convolution, and one per projection shortcut
    assert counts["torchvision/resnet18"] == 1 + 16 + 3
    assert counts["torchvision/resnet50"] == 1 + 48 + 4
    assert counts["torchvision/resnet152"] == 1 + 150 + 4


def test_list_without_counts_is_a_plain_list_of_names():
    lines = run("list", "timm/*").stdout.splitlines()
    assert len(lines) > 1000
    assert "timm/resnet50" in lines


def test_inspect_json(model):
    found = json.loads(run("inspect", *model, "--json").stdout)
    assert len(found["sites"]) == LAYERS
    first = found["sites"][0]
    assert first["producer"]["name"] == "conv1"
    assert first["activation"]["op"] == "relu"
    assert {"gn", "frn", "brn", "cbn", "frozen"} <= set(found["targets"])


def test_inspect_table(model):
    printed = run("inspect", *model).stdout
    assert "layer3.2.bn2" in printed
    assert "conv2d layer1.0.conv1" in printed
    assert "takes the place of 10 ReLUs" in printed  # one per block, and the stem's


def test_inspect_says_what_a_target_cannot_take():
    printed = run("inspect", SPEC, "--no-pretrained", "--image-size", "4").stdout
    assert "→ frozen" in printed  # its last maps are 1×1


def test_dry_run_writes_nothing_and_its_json_is_a_plan(model, tmp_path):
    plan = json.loads(run("convert", *model, "--to", "cbn", "--dry-run", "--json").stdout)
    assert [entry["becomes"] for entry in plan["entries"]] == ["cbn"] * LAYERS
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    printed = run("convert", *model, "--plan", file, "--dry-run").stdout
    assert "wired to layer1.0.conv1" in printed
    assert list(tmp_path.iterdir()) == [file]


def test_settings_of_cbn_reach_its_layers(model, tmp_path):
    options = ("--to", "cbn", "--window", "4", "--through-history")
    run("convert", *model, *options, "-o", tmp_path / "converted")
    norm = normswap.load(tmp_path / "converted").layer2[0].bn1
    assert norm.window == 4
    assert norm.through_history


def test_a_plan_file_gives_what_its_target_gives(model, tmp_path):
    options = ("--to", "gn", "--groups", "4", "--exclude", "layer3.*")
    plan = tmp_path / "plan.json"
    plan.write_text(run("convert", *model, *options, "--dry-run", "--json").stdout)
    run("convert", *model, *options, "-o", tmp_path / "direct")
    run("convert", *model, "--plan", plan, "-o", tmp_path / "planned")
    first, second = (normswap.load(tmp_path / name) for name in ("direct", "planned"))
    assert isinstance(first.layer3[0].bn1, torch.nn.BatchNorm2d)
    assert first.layer2[0].bn1.num_groups == 4
    for (name, left), right in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("init", ["match", "copy", "reset"])
def test_convert_init(init, model, tmp_path):
    run("convert", *model, "--to", "gn", "--init", init, "-o", tmp_path / "gn")
    weight = normswap.load(tmp_path / "gn").bn1.weight
    original = normswap.load_model(SPEC, checkpoint=model[2]).model.bn1.weight
    assert torch.equal(weight, original) == (init != "match")  # a fresh BN's γ is 1


def test_convert_json(model, tmp_path):
    result = run("convert", *model, "--to", "brn", "-o", tmp_path / "brn", "--json")
    found = json.loads(result.stdout)
    assert found["output"] == str(tmp_path / "brn")
    assert len(found["plan"]["entries"]) == LAYERS
    assert found["kept"] == {}


def test_convert_calibrates(model, digits, tmp_path):
    options = ("--to", "gn", "--calibrate", digits, "--calibrate-seconds", "2", "--json")
    report = json.loads(run("convert", *model, *options, "-o", tmp_path / "gn").stdout)
    drift = report["calibration"]
    assert drift["after"]["output_error"] <= drift["before"]["output_error"]
    record = json.loads((tmp_path / "gn" / "normswap.json").read_text())
    assert [step["step"] for step in record["history"]] == ["calibrated"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--to", "gn"], "do not use it without calibration or fine-tuning"),
        (["--to", "gn", "--init", "copy"], "nothing was matched"),
        (["--to", "brn"], "is the original's function"),
    ],
)
def test_convert_says_how_far_to_trust_the_result(options, line, model, tmp_path):
    drift = tmp_path / "drift.json"
    told = run("convert", *model, *options, "--drift", drift, "-o", tmp_path / "net").stdout
    assert line in " ".join(told.split())
    assert len(json.loads(drift.read_text())["sites"]) == LAYERS


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--to", "gn"], True),
        (["--to", "ln"], True),
        (["--to", "in"], False),
        (["--to", "frn"], False),
        (["--to", "gn", "--init", "copy"], False),
    ],
)
def test_convert_names_the_nearer_start_where_there_is_one(options, told, model, tmp_path):
    out = run("convert", *model, *options, "-o", tmp_path / "net").stdout
    assert ("--init steady" in out) is told


def test_force_replaces(model, tmp_path):
    run("convert", *model, "--to", "brn", "-o", tmp_path / "net")
    run("convert", *model, "--to", "gn", "-o", tmp_path / "net", "--force")
    assert isinstance(normswap.load(tmp_path / "net").bn1, torch.nn.GroupNorm)


def test_a_fresh_process_gives_the_same_bits(artefact, tmp_path):
    model = normswap.load(artefact)
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, normswap\n"
        "model = normswap.load(sys.argv[1])\n"
        "torch.save(model(torch.load(sys.argv[2])).detach(), sys.argv[3])"
    )
    arguments = [artefact, tmp_path / "x.pt", tmp_path / "y.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(x))


def test_export_writes_one_file(exported):
    assert [path.name for path in exported.parent.iterdir()] == ["gn.onnx"]
    onnx.checker.check_model(str(exported))


def test_export_json(report):
    assert report["passed"] is True
    assert report["max_relative_error"] <= 1e-4
    assert {1, 2, 5} <= {case["batch"] for case in report["cases"]}


def test_failed_proof_is_exit_code_3_with_its_table_and_no_file(artefact, tmp_path):
    arguments = ["export", artefact, "-o", tmp_path / "net.onnx", "--tolerance", "1e-12"]
    result = run(*arguments, code=3)
    assert "FAILED" in result.stdout
    assert "net.onnx" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_parity_errors_from_anywhere_are_exit_code_3(monkeypatch):
    def fail(*_, **__):
        raise ParityError("net.onnx", got="noise", need="the model", hint="again")

    monkeypatch.setattr("normswap.artifact.load_model", fail)
    assert (
        run("inspect", SPEC, code=3).stderr == "net.onnx: got noise; need the model. Try again.\n"
    )


def test_verify_alone_needs_no_torch(exported):
    code = (
        "import sys\n"
        "from normswap.cli.app import app\n"
        "try:\n    app(['verify', sys.argv[1]])\n"
        "except SystemExit as done:\n    assert done.code == 0, done.code\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "parity passed" in done.stdout


def test_verify_against_the_model(exported, artefact):
    found = json.loads(run("verify", exported, "--model", artefact, "--json").stdout)
    assert found["passed"] is True
    assert max(case["batch"] for case in found["cases"]) > 1  # the whole proof, not the self-test


def test_verify_against_the_model_at_another_size(artefact, tmp_path):
    path = tmp_path / "small.onnx"
    names = ["--input-name", "photo", "--output-name", "classes"]
    run("export", artefact, "-o", path, "--image-size", "24", *names)
    opened = normswap.onnx.load_onnx(path)
    assert (opened.input_names, opened.output_names) == (("photo",), ("classes",))
    found = json.loads(run("verify", path, "--model", artefact, "--json").stdout)
    assert found["passed"]
    assert normswap.onnx.load_onnx(path).preprocessing["input_size"][-2:] == [24, 24]


def test_verify_of_an_edited_file_is_exit_code_3(exported, tmp_path):
    edited = tmp_path / "edited.onnx"
    proto = onnx.load(exported)
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 4)
    values = 3 * onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(proto, edited)
    assert "FAILED" in run("verify", edited, code=3).stdout
    assert json.loads(run("verify", edited, "--json", code=3).stdout)["passed"] is False


def test_evaluate_gives_the_file_the_accuracy_of_its_model(artefact, exported, digits):
    found = [
        json.loads(run("evaluate", what, "--data", digits, "--json").stdout)
        for what in (artefact, exported)
    ]
    assert found[0]["images"] == 40
    assert found[0]["top1"] == found[1]["top1"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "edge", "word"),
    [((), 224, "trained at 176×176"), (("--image-size", "64"), 64, "crop 0.95")],
)
def test_evaluate_takes_timms_size_for_tests_and_says_so(options, edge, word, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "0.png")
    network = ("timm/resnet10t", "--no-pretrained", "--num-classes", "2")
    arguments = ("evaluate", *network, "--data", tmp_path, *options)
    found = json.loads(run(*arguments, "--json").stdout)
    assert (found["input_size"], found["crop_pct"]) == ([3, edge, edge], 0.95)
    text = run(*arguments).stdout
    assert f"seen at {edge}×{edge}, crop 0.95" in text
    assert word in text


def test_evaluate_table_and_broken_images(artefact, digits, tmp_path):
    good = next((digits / "3").iterdir())
    for number in range(10):
        (tmp_path / "data" / str(number)).mkdir(parents=True)
        (tmp_path / "data" / str(number) / "a.png").write_bytes(good.read_bytes())
    (tmp_path / "data" / "3" / "b.png").write_bytes(good.read_bytes()[:30])
    arguments = ("evaluate", artefact, "--data", tmp_path / "data")
    assert "b.png" in run(*arguments, code=1).stderr
    assert run(*arguments, "--skip-broken").stdout.split()[-2:] == ["10", "1"]


def test_results_stay_alone_on_stdout_when_libraries_print(model, monkeypatch):
    real = normswap.walk

    def chatty(*arguments, **options):
        print("chatter")  # noqa: T201
        return real(*arguments, **options)

    monkeypatch.setattr("normswap.walk", chatty)
    result = run("inspect", *model, "--json")
    json.loads(result.stdout)
    assert "chatter" in result.stderr


def test_seed_decides_random_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("convert", SPEC, "--no-pretrained", "--to", "gn", "--seed", seed, "-o", tmp_path / name)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
