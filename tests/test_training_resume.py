"""A run that was broken off and resumed is the run that was not."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import re
import signal
import threading
import time

import pytest
import torch
import training_runs
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from training_runs import (
    HARD,
    HEAVY,
    Augmented,
    Net,
    Stop,
    hard_run,
    same,
    samples,
    stop_at,
    weights,
)

from normswap import files
from normswap.data import Preprocessing, labelled_dataset
from normswap.data.detection import Annotated, DetectionImages
from normswap.data.segmentation import SegmentationImages
from normswap.errors import TrainingError
from normswap.training import FineTune, TrainingInterrupted, finetune, read_metrics
from normswap.training.checkpoints import read_checkpoint, write_checkpoint
from normswap.training.identity import data_identity

KILLS = int(os.environ.get("NORMSWAP_KILLS", "1"))  # 20 shows more and takes minutes
NORMS = ("gn", "frn", "brn", "cbn")
PASSAGES = ("gn passage", "frn passage")  # over 13 of 18 updates
QUIET = {"tensorboard": False}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    found = {}

    def run(norm):
        if norm not in found:
            out = tmp_path_factory.mktemp(norm)
            model, history = hard_run(norm, out)
            found[norm] = (weights(model), history, read_metrics(out))
        return found[norm]

    return run


@pytest.mark.parametrize("norm", ["bn", *NORMS, *PASSAGES])
@pytest.mark.parametrize("step", [4, 7])
def test_resumed_run_is_bit_equal_to_the_unbroken_one(norm, step, unbroken, tmp_path):
    expected, history, _ = unbroken(norm)
    with pytest.raises(Stop):  # the progress call comes before the checkpoint of its step
        hard_run(norm, tmp_path, progress=stop_at(step))
    assert read_checkpoint(tmp_path / "last.pt")["place"]["step"] == step - 1
    torch.manual_seed(99)  # nothing may depend on the process that resumes
    model, resumed = hard_run(norm, tmp_path)
    assert same(expected, weights(model))
    assert resumed.resumed_from == step - 1
    assert [e.val_loss for e in resumed.epochs] == [e.val_loss for e in history.epochs]
    assert [e.train_loss for e in resumed.epochs] == [e.train_loss for e in history.epochs]


def lines(path):
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def test_steps_relative_to_the_weights_resume_bit_equal(tmp_path):
    """Their sizes are those of the start, also for a run that goes on from later weights."""

    def net():
        found = Net("gn")
        kernels = [p for p in found.parameters() if p.ndim > 1]
        with torch.no_grad():
            for number, kernel in enumerate(kernels):
                kernel.mul_(4.0 ** (number % 3 - 1))
        return found

    def run(out, **more):
        model = net()
        finetune(model, samples(24), samples(8, seed=1), options, out=tmp_path / out, **more)
        return weights(model)

    options = FineTune(batch_size=4, epochs=3, checkpoint_every=0, **QUIET)
    assert options.relative
    whole = run("whole")
    with pytest.raises(Stop):
        run("broken", progress=stop_at(9))
    assert same(run("broken", resume=True), whole)


@pytest.mark.parametrize("norm", [*NORMS, *PASSAGES])
def test_killed_runs_end_with_the_weights_of_the_unbroken_one(norm, unbroken, tmp_path):
    expected = unbroken(norm)[0]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["training_runs", *HEAVY])
    chance = random.Random(norm)
    for number in range(KILLS):
        out, result = tmp_path / f"run{number}", tmp_path / f"weights{number}.pt"
        arguments = (norm, out, result)
        process = processes.Process(target=training_runs.child_run, args=arguments)
        process.start()
        wanted = chance.randint(1, 13)  # of 18 updates
        while lines(out / "metrics.jsonl") < wanted and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was over too soon"
        process = processes.Process(target=training_runs.child_run, args=arguments)
        process.start()
        process.join()
        assert same(expected, torch.load(result, weights_only=True)), f"kill {number}"


def test_resume_cuts_metrics_back_to_the_checkpoint(unbroken, tmp_path):
    with pytest.raises(Stop):
        hard_run("gn", tmp_path, progress=stop_at(7))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:  # written after the last checkpoint, and half a line
        file.write(json.dumps({"kind": "step", "step": 8}) + "\n" + '{"kind": "st')
    hard_run("gn", tmp_path)
    keys = ("kind", "step", "epoch", "loss", "train_loss", "val_loss", "learning_rate")
    expected = [[row.get(k) for k in keys] for row in unbroken("gn")[2]]
    assert [[row.get(k) for k in keys] for row in read_metrics(tmp_path)] == expected


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_finishes_the_step_saves_and_leaves(name, unbroken, tmp_path):
    def progress(now):
        if now.step == 5:
            os.kill(os.getpid(), getattr(signal, name))

    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(TrainingInterrupted, match=f"got {name} at step 5; need 18") as caught:
        hard_run("cbn", tmp_path, progress=progress)
    assert caught.value.history.interrupted == name
    assert caught.value.history.steps == 5
    assert signal.getsignal(getattr(signal, name)) is before
    model, _ = hard_run("cbn", tmp_path)
    assert same(unbroken("cbn")[0], weights(model))


def test_second_interrupt_leaves_at_once(tmp_path):
    def progress(_now):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        hard_run("gn", tmp_path, progress=progress)


def test_runs_outside_the_main_thread(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(hard_run("gn", tmp_path)))
    thread.start()
    thread.join()
    assert done[0][1].steps == 18


def test_finished_run_is_loaded_and_left_alone(unbroken, tmp_path, caplog):
    hard_run("brn", tmp_path)
    stamp = (tmp_path / "last.pt").stat().st_mtime_ns
    caplog.set_level("INFO", "normswap")
    model, history = hard_run("brn", tmp_path)
    assert "had finished" in caplog.text
    assert (tmp_path / "last.pt").stat().st_mtime_ns == stamp
    assert same(unbroken("brn")[0], weights(model))
    assert len(history.epochs) == 3


def test_resume_with_other_options_names_them(tmp_path):
    with pytest.raises(Stop):
        hard_run("gn", tmp_path, progress=stop_at(3))
    changed = dataclasses.replace(HARD, learning_rate=0.1, workers=1)
    with pytest.raises(TrainingError, match=r"learning_rate=0.1 \(was 0.05\)") as caught:
        finetune(Net("gn"), Augmented(23), samples(9, seed=1), changed, out=tmp_path, resume=True)
    assert "workers" not in str(caught.value)
    with pytest.raises(TrainingError, match=r"samples=22 \(was 23\)"):
        finetune(Net("gn"), Augmented(22), samples(9, seed=1), HARD, out=tmp_path, resume=True)
    with pytest.raises(TrainingError, match=r"a model that differs.*norm1"):
        finetune(Net("bn"), Augmented(23), samples(9, seed=1), HARD, out=tmp_path, resume=True)


def test_a_run_of_a_release_without_an_option_goes_on_as_that_release_did():
    written = HARD.to_json()
    del written["loss"], written["passage"]
    assert HARD.differences(written) == []
    changed = dataclasses.replace(HARD, loss="bce", passage=0.5)
    assert changed.differences(written) == [
        "loss='bce' (was 'cross-entropy')",
        "passage=0.5 (was None)",
    ]


def test_fresh_start_does_not_overwrite_an_earlier_run(tmp_path):
    with pytest.raises(Stop):
        hard_run("gn", tmp_path, progress=stop_at(3))
    with pytest.raises(TrainingError, match=r"checkpoint of an earlier run.*resume=True"):
        hard_run("gn", tmp_path, resume=False)
    with pytest.raises(TrainingError, match="no output folder"):
        hard_run("gn", None, resume=True)


def test_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(Stop):
        hard_run("gn", tmp_path, progress=stop_at(3))
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingError, match=r"last\.pt: got .*; need a training checkpoint"):
        hard_run("gn", tmp_path)
    torch.save({"format": 99}, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match="got format 99"):
        hard_run("gn", tmp_path)


@pytest.mark.parametrize("at", [0.3, 0.5, 0.7])
def test_a_flipped_bit_is_noticed(at, tmp_path):
    with pytest.raises(Stop):
        hard_run("gn", tmp_path, progress=stop_at(3))
    raw = bytearray((tmp_path / "last.pt").read_bytes())
    raw[int(at * len(raw))] ^= 4
    (tmp_path / "last.pt").write_bytes(bytes(raw))
    with pytest.raises(TrainingError, match=r"last\.pt: got"):
        hard_run("gn", tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("step", -5), ("step", 999), ("epoch", 7), ("batch", 1.5), ("batch", None)]
)
def test_a_place_that_the_run_does_not_have(name, value, tmp_path):
    with pytest.raises(Stop):
        hard_run("gn", tmp_path, progress=stop_at(3))
    found = torch.load(tmp_path / "last.pt", weights_only=True)
    found["place"][name] = value
    torch.save(found, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match="does not agree with its own SHA-256"):
        hard_run("gn", tmp_path)
    del found["sha256"]
    torch.save(found, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match="no hash of its content"):
        hard_run("gn", tmp_path)
    write_checkpoint(tmp_path / "last.pt", found)
    with pytest.raises(TrainingError, match=f"got {name}={value}; need a place in the run"):
        hard_run("gn", tmp_path)


def test_another_machine_is_told_in_one_line(tmp_path, caplog, monkeypatch):
    with pytest.raises(Stop):
        hard_run("gn", tmp_path, progress=stop_at(3))
    hard_run("gn", tmp_path, progress=None)
    assert "resumed with" not in caplog.text
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    hard_run("gn", tmp_path)
    (line,) = [text for text in caplog.messages if "resumed with" in text]
    assert re.match(r"resumed with threads=77 \(was \d+\): the last bits may", line)


def pictures(folder):
    for name, shade in (("a", 10), ("b", 200)):
        for number in range(3):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), shade + number).save(path)
    return folder


def rename(folder):
    (folder / "a" / "0.png").rename(folder / "a" / "00.png")


def move(folder):
    (folder / "a" / "0.png").rename(folder / "b" / "3.png")
    (folder / "b" / "0.png").rename(folder / "a" / "0.png")


def other_size(folder):
    Image.effect_noise((9, 9), 50).save(folder / "a" / "0.png")


def same_size(folder):
    path = folder / "a" / "0.png"
    size = path.stat().st_size
    Image.new("L", (8, 8), 77).save(path)
    assert path.stat().st_size == size


@pytest.mark.parametrize(
    ("change", "checked", "message"),
    [
        (rename, False, "training data with other file names"),
        (move, False, "training data with other file names"),
        (other_size, False, "training data with files of other sizes"),
        (same_size, True, "training data with other contents"),
        (same_size, False, None),
    ],
)
def test_other_data_are_refused(change, checked, message, tmp_path):
    folder = pictures(tmp_path / "pictures")
    want = Preprocessing((1, 8, 8), (0.5,), (0.5,), crop_pct=1.0)
    options = FineTune(batch_size=2, epochs=1, tensorboard=False, check_data=checked)

    def run():
        data = labelled_dataset(folder, want, "train")
        return finetune(Net("gn"), data, None, options, out=tmp_path / "out", resume=True)

    run()
    run()
    change(folder)
    if message is None:
        run()
        return
    with pytest.raises(TrainingError, match=f"resume from .*: got {message}"):
        run()


def test_data_may_move_as_a_whole(tmp_path):
    want = Preprocessing((1, 8, 8), (0.5,), (0.5,))
    first = data_identity(labelled_dataset(pictures(tmp_path / "one"), want, "train"))
    (tmp_path / "one").rename(tmp_path / "two")
    assert data_identity(labelled_dataset(tmp_path / "two", want, "train")) == first
    assert set(first) == {"samples", "names", "sizes", "labels"}


def test_every_form_of_data_has_an_identity(tmp_path):
    images, labels = samples(6)
    folder = pictures(tmp_path / "one")
    want = Preprocessing((1, 8, 8), (0.5,), (0.5,))
    files = labelled_dataset(folder, want, "train")
    forms = {
        "pair": (images, labels),
        "loader": DataLoader(TensorDataset(images, labels)),
        "subset": Subset(files, [0, 1]),
        "other subset": Subset(files, [1, 0]),
        "both": ConcatDataset([files, files]),
        "torchvision": ImageFolder(folder),
        "own": Augmented(6),
    }
    found = {name: data_identity(form) for name, form in forms.items()}
    assert found["pair"] == found["loader"]
    assert found["subset"]["names"] != found["other subset"]["names"]
    assert found["both"]["samples"] == 12
    assert "names" in found["both"]
    assert found["torchvision"] == data_identity(files)
    assert set(found["own"]) == {"samples", "labels"}
    read = data_identity(forms["own"], contents=True)
    assert read == data_identity(Augmented(6), contents=True)
    other = Augmented(6)
    other.images += 1
    assert read != data_identity(other, contents=True)


def test_failed_write_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    write_checkpoint(path, {"format": 1, "place": 1})

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"No space left.*freeing disk space"):
        write_checkpoint(path, {"format": 1, "place": 2})
    assert read_checkpoint(path)["place"] == 1
    assert [item.name for item in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")  # noqa: PTH110
def test_full_disk_in_the_middle_of_a_write(tmp_path, monkeypatch):
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr(files, "_fresh", lambda *_: tmp_path / "full")
    with pytest.raises(TrainingError, match="need room for the checkpoint"):
        write_checkpoint(tmp_path / "last.pt", {"format": 1, "tensor": torch.zeros(1000)})


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("own_generator", [False, True])
def test_resume_with_the_callers_own_loader(workers, own_generator, tmp_path):
    def run(out, progress=None):
        generator = torch.Generator().manual_seed(5) if own_generator else None
        loader = DataLoader(
            Augmented(21), batch_size=4, shuffle=True, num_workers=workers, generator=generator
        )
        model = Net("cbn", dropout=0.2)
        options = FineTune(epochs=2, checkpoint_every=0, **QUIET)
        finetune(model, loader, options=options, out=out, resume=True, progress=progress)
        return weights(model)

    expected = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "broken", stop_at(8))
    torch.manual_seed(3)
    assert same(expected, run(tmp_path / "broken"))


def test_number_of_workers_changes_nothing():
    def run(workers):
        model = Net("bn", dropout=0.2)
        options = FineTune(batch_size=3, epochs=1, workers=workers, **QUIET)
        finetune(model, Augmented(11), options=options)
        return weights(model)

    assert same(run(0), run(2))


def test_best_weights_survive_a_resume(tmp_path):
    def run(out, progress=None):
        model = Net("gn")
        options = FineTune(
            epochs=4, learning_rate=0.3, keep="best", checkpoint_every=0, batch_size=4, **QUIET
        )
        history = finetune(
            model,
            samples(24),
            samples(9, 1),
            options,
            out=out,
            resume=True,
            progress=progress,
        )
        return weights(model), history

    expected, history = run(tmp_path / "whole")
    assert history.kept == "best"
    assert history.best.val_top1 == max(e.val_top1 for e in history.epochs)
    assert history.best.epoch < 4  # else the last weights would pass for the best
    with pytest.raises(Stop):
        run(tmp_path / "broken", stop_at(23))
    assert same(expected, run(tmp_path / "broken")[0])
    assert same(expected, read_checkpoint(tmp_path / "whole" / "best.pt")["model"])


def test_resume_with_another_model_leaves_it_as_it_was(tmp_path):
    data, options = samples(), FineTune(batch_size=4, epochs=1)
    finetune(Net("gn"), data, options=options, out=tmp_path)
    other = Net("frn")
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(TrainingError, match="differs from the run's"):
        finetune(other, data, options=FineTune(batch_size=4, epochs=1), out=tmp_path, resume=True)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_best_needs_something_to_be_best_at():
    with pytest.raises(TrainingError, match="val_data"):
        finetune(Net("gn"), samples(), options=FineTune(keep="best"))


def test_masks_and_boxes_have_an_identity(tmp_path):
    folder = pictures(tmp_path / "one")
    files = sorted(folder.rglob("*.png"))
    want = Preprocessing((1, 8, 8), (0.5,), (0.5,))
    masks = SegmentationImages(list(zip(files[:3], files[3:], strict=True)), ["x", "y"], want)
    first = data_identity(masks)
    assert set(first) == {"samples", "names", "sizes", "labels"}
    swapped = SegmentationImages(list(zip(files[3:], files[:3], strict=True)), ["x", "y"], want)
    assert data_identity(swapped)["names"] != first["names"]
    box = Annotated(files[0], ((0.0, 0.0, 2.0, 2.0),), (1,), (False,), files[0])
    moved = dataclasses.replace(box, boxes=((0.0, 0.0, 2.0, 3.0),))
    one, other = (data_identity(DetectionImages([item], ["b", "x"])) for item in (box, moved))
    assert one["names"] == other["names"]
    assert one["labels"] != other["labels"]


def test_labels_that_name_an_address_do_not_count():
    class Odd(Augmented):
        def __init__(self):
            super().__init__(4)
            self.targets = [object() for _ in range(4)]

    assert data_identity(Odd()) == data_identity(Odd())
