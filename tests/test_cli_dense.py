"""`normswap finetune`, `evaluate`, `sweep`, `predict` and `bench` with masks and boxes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import normswap
from normswap.cli.app import app

pytest.importorskip("torchmetrics")

SIZE = 32
FAST = ("--epochs", "1", "--batch-size", "2", "--no-pretrained")
MODELS = {
    "segmentation": "python:dense_factories:segmenter",
    "detection": "python:dense_factories:small_detector",
}
TASKS = tuple(MODELS)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(item) for item in arguments])
    assert result.exit_code == code, result.output
    return result


def folder(root, task, count=6, start=0, part=""):
    """Squares of two kinds; masks, or boxes in COCO's JSON."""
    generator = np.random.default_rng(start)
    images, annotations = [], []
    home = root / part if part else root
    (home / "images").mkdir(parents=True)
    (home / "masks").mkdir()
    for number in range(count):
        name = f"{start + number}.png"
        x, y = (int(v) for v in generator.integers(0, SIZE // 2, 2))
        kind = number % 2
        values = generator.integers(0, 30, (SIZE, SIZE, 3), dtype=np.uint8)
        values[y : y + 16, x : x + 16, kind] = 255
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[y : y + 16, x : x + 16] = 1 + kind
        Image.fromarray(values).save(home / "images" / name)
        Image.fromarray(mask).save(home / "masks" / name)
        images.append({"id": number, "file_name": name})
        annotations.append(
            {"id": number, "image_id": number, "category_id": kind, "bbox": [x, y, 16, 16]}
        )
    if task == "detection":
        categories = [{"id": 0, "name": "red"}, {"id": 1, "name": "green"}]
        data = {"images": images, "annotations": annotations, "categories": categories}
        (home / "annotations.json").write_text(json.dumps(data))
        for path in (home / "masks").iterdir():
            path.unlink()
        (home / "masks").rmdir()
    else:
        (root / "classes.txt").write_text("ground\nred\ngreen\n")
    return root


@pytest.fixture(scope="module", params=TASKS)
def tuned(request, tmp_path_factory):
    """A fine-tune of each task on one folder that the command divides, and what it said."""
    task, base = request.param, tmp_path_factory.mktemp(request.param)
    data = folder(base / "squares", task)
    result = run(
        "finetune", MODELS[task], *FAST, "--data", data, "--val-split", "0.34", "-o", base / "out"
    )
    return task, base, data, result


def test_finetune_guesses_the_task_and_says_so(tuned):
    task, base, _, result = tuned
    assert f"task: {task} (" in result.stderr
    assert "new head for 3 classes" in result.stderr
    assert {"segmentation": "val mean IoU", "detection": "val mAP"}[task] in result.stdout
    for name in ("learning_curve.png", "before.png", "after.png"):
        assert (base / "out" / name).read_bytes().startswith(b"\x89PNG")
    history = json.loads((base / "out" / "normswap.json").read_text())["history"]
    assert history[-1]["division"]["data"] == "squares"
    assert history[-1]["val_metric"] is not None


def test_finetune_goes_on_with_resume(tuned):
    task, base, data, _ = tuned
    arguments = ("finetune", MODELS[task], *FAST, "--data", data, "--val-split", "0.34")
    result = run(*arguments, "-o", base / "out", "--resume", "--json")
    assert "had finished" in result.stderr
    assert json.loads(result.stdout)["epochs"][0]["val_metric"] is not None


def test_evaluate_scores_what_was_kept_out_of_training(tuned):
    task, base, data, _ = tuned
    found = run(
        "evaluate", base / "out", "--trust", MODELS[task], "--data", data, "--json", "--per-class"
    )
    facts = json.loads(found.stdout)
    assert (facts["task"], facts["images"]) == (task, 2)
    assert facts["metric"] is not None
    assert {"detection": "mAP 0.5", "segmentation": "mean IoU"}[task] in facts["found"]
    assert {row["class"] for row in facts["classes"]} <= {"ground", "red", "green"}
    shown = run("evaluate", base / "out", "--trust", MODELS[task], "--data", data)
    assert {"detection": "mAP 0.75", "segmentation": "mean IoU"}[task] in shown.stdout
    assert "nan" not in shown.stdout


def test_predict_draws_what_it_says(tuned, tmp_path):
    task, base, data, _ = tuned
    options = ("--min-score", "0") if task == "detection" else ()
    found = run(
        "predict", base / "out", data / "images", "--trust", MODELS[task], "-o", tmp_path / "drawn",
        *options, "--json",
    )  # fmt: skip
    rows = json.loads(found.stdout)
    assert len(rows) == 6
    thing = next(thing for row in rows for thing in row["things"])
    assert thing["name"] in ("ground", "red", "green", "__background__")
    assert (thing["box"] is not None) == (task == "detection")
    if task == "segmentation":
        for row in rows:
            assert sum(thing["share"] for thing in row["things"]) == pytest.approx(1)
    assert (tmp_path / "drawn" / "0.png.png").read_bytes().startswith(b"\x89PNG")
    table = run("predict", base / "out", data / "images/0.png", "--trust", MODELS[task], *options)
    assert {"detection": "box", "segmentation": "of the pixels"}[task] in table.stdout


def test_the_artefact_loads_and_runs(tuned):
    task, base, _, _ = tuned
    model = normswap.load(base / "out", trust=[MODELS[task]]).eval()
    if task == "detection":
        assert set(model([torch.rand(3, 40, 50)])[0]) == {"boxes", "labels", "scores"}
    else:
        assert model(torch.rand(1, 3, SIZE, SIZE))["out"].shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize("task", TASKS)
def test_sweep(task, tmp_path):
    data = folder(tmp_path / "data", task)
    arguments = (
        "sweep", MODELS[task], "--no-pretrained", "--data", data, "--val-split", "0.34", "--epochs",
        "1", "--to", "bn,gn", "--batch-sizes", "2", "--seeds", "1", "-o", tmp_path / "sweep",
    )  # fmt: skip
    printed = run(*arguments)
    assert {"detection": "mAP in %", "segmentation": "mean IoU in %"}[task] in printed.stdout
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 1000
    again = json.loads(run(*arguments, "--json").stdout)
    assert [cell["metric"] is not None for cell in again["cells"]] == [True, True]
    assert all(cell["top1"] is None for cell in again["cells"])


def test_bench_of_a_detector():
    result = run(
        "bench", MODELS["detection"], "--to", "gn", "--rounds", "1", "--image-size", SIZE, "--json"
    )
    rows = json.loads(result.stdout)["rows"]
    assert [row["target"] for row in rows] == ["bn", "gn"]
    assert all(row["training"] is not None and row["kept"] for row in rows)


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("task", "option"),
    [
        ("segmentation", ("--mixup", "0.2")),
        ("segmentation", ("--aa", "rand-m3")),
        ("segmentation", ("--reprob", "0.1")),
        ("detection", ("--cutmix", "0.2")),
        ("detection", ("--label-smoothing", "0.1")),
        ("detection", ("--scale", "0.5", "1")),
        ("detection", ("--teacher", "timm/resnet18")),
        ("detection", ("--mean", "0.5,0.5,0.5")),
        ("detection", ("--ignore-index", "0")),
    ],
)
def test_options_that_mean_nothing_for_the_task_are_refused(task, option, tmp_path):
    result = run(
        "finetune", MODELS[task], *FAST, "--data", tmp_path, "-o", tmp_path / "out", *option, code=2
    )
    assert option[0] in result.stderr
    assert "Leave it out" in result.stderr


def test_a_detector_of_torchvision_resizes_by_itself(tmp_path):
    spec = "torchvision/ssdlite320_mobilenet_v3_large"
    arguments = ("finetune", spec, *FAST, "--data", tmp_path, "-o", tmp_path / "out")
    result = run(*arguments, "--image-size", "64", code=2)
    assert "--image-size: a detector resizes by itself" in result.stderr


def test_options_of_masks_mean_nothing_for_classes(tmp_path):
    arguments = ("finetune", "timm/resnet18", *FAST, "--data", tmp_path, "-o", tmp_path / "out")
    result = run(*arguments, "--ignore-index", "0", code=2)
    assert "--ignore-index: it means nothing for classification" in result.stderr


def test_evaluate_and_predict_refuse_too(tuned, tmp_path):
    task, base, data, _ = tuned
    known = ("--trust", MODELS[task])
    (tmp_path / "map.txt").write_text("a\n")
    result = run(
        "evaluate",
        base / "out",
        *known,
        "--data",
        data,
        "--class-map",
        tmp_path / "map.txt",
        code=2,
    )
    assert "--class-map: it means nothing" in result.stderr
    result = run("predict", base / "out", data / "images", *known, "--top", "2", code=2)
    assert "--top: it means nothing" in result.stderr


def test_augmentation_reaches_masks_and_boxes(tuned, tmp_path):
    task, _, data, _ = tuned
    options = ("--hflip", "0", "--vflip", "0.5", "--color-jitter", "0.2")
    more = ("--scale", "0.5", "1", "--ratio", "1", "1") if task == "segmentation" else ()
    arguments = ("finetune", MODELS[task], *FAST, "--data", data, "--no-validation")
    run(*arguments, *options, *more, "-o", tmp_path / "varied")
    run(*arguments, "--no-aug", "-o", tmp_path / "plain")


def test_a_division_is_needed(tuned, tmp_path):
    task, _, data, _ = tuned
    result = run("finetune", MODELS[task], *FAST, "--data", data, "-o", tmp_path / "out", code=1)
    assert "no images to validate on" in result.stderr


# ------------------------------------------------------------------------------------ bad data


def spoil_mask(data, name="3.png", *, size=None, value=None):
    path = data / "masks" / name
    mask = np.asarray(Image.open(path)).copy() if size is None else np.zeros(size, np.uint8)
    if value is not None:
        mask[2, 2] = value
    Image.fromarray(mask).save(path)


def change(data, edit):
    path = data / "annotations.json"
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


def box(found, value):
    found["annotations"][3]["bbox"] = value


BAD = {
    "a mask of another size": (
        "segmentation", lambda d: spoil_mask(d, size=(8, 9)), r"masks/3.png: got a mask of 9x8"),
    "a class beyond the names": (
        "segmentation", lambda d: spoil_mask(d, value=7), r"masks/3.png: got class 7; need 0 to 2"),
    "a box outside": (
        "detection", lambda d: change(d, lambda f: box(f, [20, 20, 60, 60])),
        r"annotations.json: got the box [20.0, 20.0, 80.0, 80.0] on 3.png, which is 32x32"),
    "a box without area": (
        "detection", lambda d: change(d, lambda f: box(f, [2, 2, 0, 9])),
        "annotations.json: got annotation 3 with the box"),
    "a missing image": (
        "detection", lambda d: (d / "images/3.png").unlink(),
        "annotations.json: got the image '3.png', which is not in"),
    "no category": (
        "detection", lambda d: change(d, lambda f: f["annotations"][3].pop("category_id")),
        "annotations.json: got annotation 3 without a category"),
    "another category": (
        "detection", lambda d: change(d, lambda f: f["annotations"][3].update(category_id=8)),
        "annotations.json: got annotation 3 of the category 8"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_data_are_one_line_that_names_the_file(fault, tmp_path):
    task, spoil, words = BAD[fault]
    data = folder(tmp_path / "data", task)
    spoil(data)
    for number, more in enumerate(((), ("--check-data",))):
        result = run(
            "finetune", MODELS[task], *FAST, "--data", data, "--no-validation", *more,
            "-o", tmp_path / str(number), code=1,
        )  # fmt: skip
        (line,) = [text for text in result.stderr.splitlines() if "got" in text]
        assert words in line
        assert "Try" in line
    result = run("evaluate", MODELS[task], "--no-pretrained", "--data", data, code=1)
    assert words in result.stderr


def test_an_image_without_boxes_is_no_fault(tmp_path):
    data = folder(tmp_path / "data", "detection")
    change(data, lambda found: found["annotations"].pop(3))
    run("finetune", MODELS["detection"], *FAST, "--data", data, "--no-validation",
        "-o", tmp_path / "out")  # fmt: skip


def test_a_class_beyond_the_models_names_the_mask_file(tmp_path):
    """From Python too, where the model is what it is."""
    from dense_runs import Segmenter

    from normswap.data import Preprocessing, segmentation_dataset
    from normswap.errors import DataError

    data = folder(tmp_path / "data", "segmentation")
    want = Preprocessing((3, SIZE, SIZE), (0.5,) * 3, (0.5,) * 3, "bilinear")
    dataset = segmentation_dataset(data, want, "all")
    few = Segmenter(kinds=1)
    with pytest.raises(DataError, match=r"masks/[135]\.png: got class 2; need 0 to 1"):
        normswap.evaluate(few, dataset, task="segmentation")
    with pytest.raises(DataError, match=r"masks/[135]\.png: got class 2; need 0 to 1"):
        normswap.finetune(few, dataset, None, normswap.FineTune(epochs=1), task="segmentation")


def test_a_class_beyond_the_detectors_names_the_image(tmp_path):
    from dense_runs import detector

    from normswap.data import detection_dataset
    from normswap.errors import DataError

    dataset = detection_dataset(folder(tmp_path / "data", "detection"), "all")
    with pytest.raises(DataError, match=r"images/[135]\.png: got class 2; need 0 to 1"):
        normswap.evaluate(detector(kinds=2), dataset, task="detection")


def test_broken_samples_are_skipped_where_that_is_asked_for(tmp_path):
    data = folder(tmp_path / "data", "segmentation")
    spoil_mask(data, size=(8, 9))
    arguments = ("finetune", MODELS["segmentation"], *FAST, "--data", data, "--no-validation")
    result = run(*arguments, "--skip-broken", "-o", tmp_path / "one")
    assert "3.png" in result.stderr
    result = run(*arguments, "--skip-broken", "--check-data", "-o", tmp_path / "two", "--json")
    assert "3.png" in result.stderr
    assert json.loads(result.stdout)["broken"] == []


# ----------------------------------------------------------------------------------- the guess


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("fcn_resnet50", "segmentation"),
        ("lraspp_mobilenet_v3_large", "segmentation"),
        ("ssdlite320_mobilenet_v3_large", "detection"),
        ("fcos_resnet50_fpn", "detection"),
        ("resnet18", "classification"),
    ],
)
def test_torchvisions_families_are_told_by_their_name(name, task):
    import torchvision

    from normswap.training.tasks.guess import guess_task

    more = {} if task == "classification" else {"weights_backbone": None}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **more)
    assert guess_task(model, None).task == task


@pytest.mark.parametrize("task", TASKS)
def test_convert_calibrates_on_images_alone(task, tmp_path):
    data = folder(tmp_path / "data", task, count=8)
    result = run(
        "convert", MODELS[task], "--no-pretrained", "--to", "gn", "--image-size", SIZE,
        "--calibrate", data / "images", "--calibrate-seconds", "1", "-o", tmp_path / "gn",
    )  # fmt: skip
    assert "calibrated" in result.output
    model = normswap.load_model(tmp_path / "gn", trust=[MODELS[task]])
    if task == "detection":  # which normalises its images by itself
        assert model.preprocessing.mean == (0.0,) * 3
