"""Images without traps: what is validated, what is divided, what is refused, how images vary."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import normswap
from normswap import data
from normswap.cli.app import app
from normswap.data import Preprocessing
from normswap.errors import DataError

SPEC = "timm/resnet18"
FAST = ("--epochs", "1", "--batch-size", "4", "--image-size", "32", "--teacher", "none")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(item) for item in arguments])
    assert result.exit_code == code, result.output
    return result


def pictures(folder, classes=("ant", "bee"), count=6, seed=0):
    generator = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = generator.integers(0, 60, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(noise + 60 * number).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("flat") / "insects")


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divided")
    for part in ("train", "val"):
        pictures(folder / part)
    return folder


def tune(*arguments, code=0):
    return run(
        "finetune", SPEC, "--no-pretrained", "--num-classes", "2", *FAST, *arguments, code=code
    )


@pytest.mark.parametrize("command", ["finetune", "sweep"])
def test_one_folder_without_a_division_is_refused(command, flat, tmp_path):
    result = run(command, SPEC, "--no-pretrained", "--data", flat, "-o", tmp_path / "out", code=1)
    assert "no images to validate on" in result.stderr
    assert "--val-split 0.2" in result.stderr
    assert "--no-validation" in result.stderr


def test_training_without_validation_is_a_choice(flat, tmp_path):
    result = tune("--data", flat, "--no-validation", "-o", tmp_path / "out", "--json")
    found = json.loads(result.stdout)
    assert found["epochs"][0]["val_top1"] is None
    assert found["kept"] == "last"


def test_a_division_of_what_is_divided_already_is_refused(divided, tmp_path):
    result = tune("--data", divided, "--val-split", "0.2", "-o", tmp_path / "out", code=1)
    assert "validation part of their own" in result.stderr
    tune("--data", divided, "--val-split", "0.2", "--no-validation", "-o", tmp_path / "o", code=1)


def test_evaluate_scores_what_was_kept_out_of_training(flat, tmp_path):
    tune("--data", flat, "--val-split", "0.34", "--seed", "3", "-o", tmp_path / "out")
    found = run("evaluate", tmp_path / "out", "--data", flat, "--json")
    assert json.loads(found.stdout)["images"] == 4
    assert "kept out of training" in found.stderr
    same = run("evaluate", tmp_path / "out", "--data", flat, "--val-split", "0.5", "--json")
    assert json.loads(same.stdout)["images"] == 6
    history = json.loads((tmp_path / "out" / "normswap.json").read_text())["history"]
    assert [entry["step"] for entry in history] == ["fine-tuned"]
    assert history[0]["division"]["data"] == "insects"
    assert str(flat) not in json.dumps(history)


def test_evaluate_says_when_the_folder_has_changed(tmp_path):
    folder = pictures(tmp_path / "insects")
    tune("--data", folder, "--val-split", "0.34", "-o", tmp_path / "out")
    Image.new("RGB", (20, 20)).save(folder / "ant" / "new.png")
    found = run("evaluate", tmp_path / "out", "--data", folder, "--json")
    assert json.loads(found.stdout)["images"] == 13
    assert "have changed since" in found.stderr
    elsewhere = pictures(tmp_path / "others", seed=1)
    found = run("evaluate", tmp_path / "out", "--data", elsewhere, "--json")
    assert json.loads(found.stdout)["images"] == 12


def test_evaluate_refuses_a_division_of_divided_data(divided):
    result = run(
        "evaluate", SPEC, "--no-pretrained", "--num-classes", "2", "--image-size", "32",
        "--data", divided, "--val-split", "0.5", code=2,
    )  # fmt: skip
    assert "parts already" in result.stderr


def test_evaluate_refuses_folders_that_say_nothing_of_the_outputs(flat, tmp_path):
    arguments = ("evaluate", SPEC, "--no-pretrained", "--image-size", "32", "--data", flat)
    result = run(*arguments, code=1)
    assert "2 class folders" in result.stderr
    assert "1000 outputs of unknown names" in result.stderr
    names = [f"class {number}" for number in range(1000)]
    names[7], names[3] = "ant", "bee"
    (tmp_path / "map.txt").write_text("\n".join(names) + "\n")
    found = run(*arguments, "--class-map", tmp_path / "map.txt", "--json")
    assert json.loads(found.stdout)["images"] == 12


def test_imagenets_own_folders_need_no_map(tmp_path):
    folder = pictures(tmp_path / "some", ("n01440764", "n01443537"))
    found = run(
        "evaluate", SPEC, "--no-pretrained", "--image-size", "32", "--data", folder, "--json"
    )
    assert json.loads(found.stdout)["images"] == 12


# --- broken and large files ---------------------------------------------------------------------


def spoilt(tmp_path):
    folder = pictures(tmp_path / "spoilt")
    for name in ("ant/2.png", "bee/5.png"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:60])
    return folder


def test_broken_files_are_found_before_training(tmp_path):
    folder = spoilt(tmp_path)
    arguments = ("--data", folder, "--no-validation", "--check-data", "-o", tmp_path / "out")
    result = tune(*arguments, code=1)
    assert "2 of 12 images broken" in result.stderr
    assert "ant/2.png" in result.stderr
    assert "bee/5.png" in result.stderr
    assert "fine-tuning" not in result.stderr
    result = tune(*arguments, "--skip-broken", "--json")
    assert "ant/2.png" in result.stderr
    assert json.loads(result.stdout)["broken"] == []


def test_skipped_files_are_named(tmp_path):
    folder = spoilt(tmp_path)
    result = tune("--data", folder, "--no-validation", "--skip-broken", "-o", tmp_path / "out")
    assert "ant/2.png" in result.stderr
    assert "bee/5.png" in result.stderr
    found = run("evaluate", tmp_path / "out", "--data", folder, "--skip-broken")
    assert "ant/2.png" in found.stderr


def test_large_images_load_up_to_a_stated_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would refuse 400
    folder = pictures(tmp_path / "large")
    assert len(list(data.labelled_dataset(folder, Preprocessing((3, 8, 8))))) == 12
    assert Image.MAX_IMAGE_PIXELS == 100
    small = data.labelled_dataset(folder, Preprocessing((3, 8, 8)), max_pixels=399)
    with pytest.raises(
        DataError, match=r"20 x 20 = 400 pixels; need at most 399.*--max-pixels 400"
    ):
        small[0]
    result = tune(
        "--data", folder, "--no-validation", "--max-pixels", "399", "-o", tmp_path / "out", code=1
    )
    assert "400 pixels" in result.stderr


# --- how images vary ----------------------------------------------------------------------------


def test_training_images_are_cropped_a_little_and_never_mirrored():
    wedge = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))).convert("RGB")
    make = data.transform(Preprocessing((3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3), train=True)
    torch.manual_seed(0)
    for _ in range(30):
        rows = make(wedge).mean((0, 1))
        assert rows[-1] > rows[0]
        assert rows[-1] - rows[0] > 1.2  # of the 2 that the whole wedge spans


def test_options_of_augmentation_reach_timm(divided, tmp_path, monkeypatch):
    seen = {}
    real = data.labelled.transform

    def spy(preprocessing, train=False, **augmentation):
        if train:
            seen.update(augmentation)
        return real(preprocessing, train, **augmentation)

    monkeypatch.setattr(data.labelled, "transform", spy)
    tune(
        "--data", divided, "-o", tmp_path / "out", "--scale", "0.5", "1", "--ratio", "1", "1",
        "--hflip", "0.5", "--vflip", "0.1", "--color-jitter", "0.2", "--aa", "rand-m3", "--reprob",
        "0.2",
    )  # fmt: skip
    assert seen == {
        "scale": (0.5, 1.0),
        "ratio": (1.0, 1.0),
        "hflip": 0.5,
        "vflip": 0.1,
        "color_jitter": 0.2,
        "auto_augment": "rand-m3",
        "re_prob": 0.2,
    }


def test_no_aug_trains_on_the_images_as_they_are(divided, tmp_path):
    tune("--data", divided, "--no-aug", "-o", tmp_path / "out")
    result = tune("--data", divided, "--no-aug", "--hflip", "1", "-o", tmp_path / "o", code=2)
    assert "--no-aug leaves" in result.stderr


def test_what_the_model_wants_of_its_input_can_be_changed_and_is_remembered(divided, tmp_path):
    tune(
        "--data", divided, "-o", tmp_path / "out", "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2",
        "--interpolation", "bilinear", "--crop-pct", "1",
    )  # fmt: skip
    found = normswap.load_model(tmp_path / "out").preprocessing
    assert (found.mean, found.std) == ((0.5,) * 3, (0.2,) * 3)
    assert (found.interpolation, found.crop_pct) == ("bilinear", 1.0)
    result = tune("--data", divided, "--mean", "0.5", "-o", tmp_path / "o", code=2)
    assert "need 3, one for each channel" in result.stderr


@pytest.mark.parametrize("words", [("32", "48"), ("32x48",)])
def test_height_and_width_may_differ(words, divided, tmp_path):
    tuned = tmp_path / "tuned"
    spec = (SPEC, "--no-pretrained", "--num-classes", "2")
    short = ("--epochs", "1", "--batch-size", "4", "--teacher", "none", "-o", tuned)
    run("finetune", *spec, "--data", divided, "--image-size", *words, *short)
    kept = json.loads((tuned / "normswap.json").read_text())["preprocessing"]
    assert kept["input_size"] == [3, 32, 48]
    run("evaluate", "--image-size", *words, tuned, "--data", divided)


@pytest.mark.parametrize("words", ["0", "32x", "axb", "1x2x3", "-4"])
def test_a_size_is_one_or_two_numbers(words, divided, tmp_path):
    result = tune("--data", divided, "-o", tmp_path / "out", f"--image-size={words}", code=2)
    assert "need one edge, or height and width: 224 320" in result.output


def test_workers_and_batch_size_say_what_auto_means(divided, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    result = tune("--data", divided, "-o", tmp_path / "out", "--workers", "auto")
    assert "--workers auto: 2 for 6 cores and 2 processes" in result.output
    for option, need in (
        ("--workers", "from 0 on, or auto"),
        ("--batch-size", "from 1 on, or auto"),
    ):
        result = tune("--data", divided, "-o", tmp_path / "more", option, "some", code=2)
        assert f"got 'some'; need a number {need}" in result.output
    result = tune(
        "--data",
        divided,
        "-o",
        tmp_path / "more",
        "--batch-size",
        "auto",
        "--device",
        "cpu",
        code=2,
    )
    assert "got the CPU; need one GPU" in " ".join(result.output.split())


def test_a_tracker_that_is_not_installed_is_named(divided, tmp_path):
    result = tune("--data", divided, "-o", tmp_path / "out", "--track", "nobody", code=1)
    assert "'nobody', which is no tracker; need one of" in result.output
