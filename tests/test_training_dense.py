"""Segmentation and detection on the loop: exact resume, kills, signals, two processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import dense_runs
import pytest
import torch
from dense_runs import MODELS, Squares, hard_run
from training_runs import HEAVY, Stop, same, stop_at, weights

from normswap.training import FineTune, TrainingInterrupted, finetune
from normswap.training.checkpoints import read_checkpoint

pytest.importorskip("torchmetrics")

KILLS = int(os.environ.get("NORMSWAP_KILLS", "1"))  # 10 shows more and takes minutes
TASKS = ("segmentation", "detection")
STEPS = 6  # of hard_run: two epochs of three updates


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    found = {}

    def run(task, norm):
        if (task, norm) not in found:
            model, history = hard_run(task, norm, tmp_path_factory.mktemp(task))
            found[task, norm] = (weights(model), history)
        return found[task, norm]

    return run


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("norm", "step"), [("bn", 2), ("cbn", 5)])
def test_resumed_run_is_bit_equal_to_the_unbroken_one(task, norm, step, unbroken, tmp_path):
    expected, history = unbroken(task, norm)
    with pytest.raises(Stop):  # the progress call comes before the checkpoint of its step
        hard_run(task, norm, tmp_path, progress=stop_at(step))
    assert read_checkpoint(tmp_path / "last.pt")["place"]["step"] == step - 1
    torch.manual_seed(99)  # nothing may depend on the process that resumes
    model, resumed = hard_run(task, norm, tmp_path)
    assert same(expected, weights(model))
    assert resumed.resumed_from == step - 1
    assert resumed.steps == STEPS
    assert [e.val_metric for e in resumed.epochs] == [e.val_metric for e in history.epochs]
    assert [e.train_loss for e in resumed.epochs] == [e.train_loss for e in history.epochs]
    assert resumed.start.metric == history.start.metric


@pytest.mark.parametrize("task", TASKS)
def test_killed_runs_end_with_the_weights_of_the_unbroken_one(task, unbroken, tmp_path):
    """Every run is killed once at random, in whatever it does, and goes on in another process."""
    expected = unbroken(task, "brn")[0]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["dense_runs", "torchmetrics.detection", *HEAVY])
    chance = random.Random(task)
    for number in range(KILLS):
        out, result = tmp_path / f"run{number}", tmp_path / f"weights{number}.pt"
        arguments = (task, "brn", out, result)
        process = processes.Process(target=dense_runs.child_run, args=arguments)
        process.start()
        wanted = chance.randint(1, STEPS)  # the start has a line too
        while lines(out / "metrics.jsonl") < wanted and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was over too soon"
        process = processes.Process(target=dense_runs.child_run, args=arguments)
        process.start()
        process.join()
        assert same(expected, torch.load(result, weights_only=True)), f"kill {number}"


def lines(path):
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("task", TASKS)
def test_a_signal_finishes_the_step_saves_and_leaves(task, unbroken, tmp_path):
    def progress(now):
        if now.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match=f"got SIGINT at step 4; need {STEPS}"):
        hard_run(task, "bn", tmp_path, progress=progress)
    model, _ = hard_run(task, "bn", tmp_path)
    assert same(unbroken(task, "bn")[0], weights(model))


# ------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    from test_training_processes import two_processes

    folder = tmp_path_factory.mktemp("both")
    return two_processes(folder, script=__file__)[0]


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_stay_in_step_and_resume(task, both):
    first, second = both
    assert same(first[task], second[task])
    for rank in both:
        assert same(rank[task], rank[f"{task} resumed"])


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_judge_all_of_the_data(task, both):
    """What they found before the first step is what one process finds."""
    alone = finetune(MODELS[task]("gn"), fixed(4, task), fixed(5, task, 1), ONE, task=task)
    for rank in both:
        assert rank[f"{task} start"] == pytest.approx(alone.start.metric, abs=1e-6)


ONE = FineTune(batch_size=1, epochs=1, learning_rate=0.01, device="cpu", tensorboard=False,
               checkpoint_every=0, keep="last")  # fmt: skip


def fixed(count, task, seed=0):
    torch.manual_seed(seed)
    squares = Squares(count, seed, task)
    return [squares[i] for i in range(count)]


def _main(folder):
    torch.set_num_threads(1)
    found = {}
    for task in TASKS:

        def run(out, task=task, progress=None):
            model = MODELS[task]("gn")
            history = finetune(
                model, fixed(4, task), fixed(5, task, 1), ONE, task=task,
                out=folder / out, resume=True, progress=progress,
            )  # fmt: skip
            return model, history

        model, history = run(task)
        found[task], found[f"{task} start"] = model.state_dict(), history.start.metric
        with pytest.raises(TrainingInterrupted, match="at step 2"):
            run(f"{task}-resumed", progress=_leaves)
        found[f"{task} resumed"] = run(f"{task}-resumed")[0].state_dict()
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def _leaves(now):
    if now.step == 2 and int(os.environ["RANK"]) == 0:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
