"""Two processes over gloo: the gradients of one at twice the batch, the same weights in both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import Net, samples

from normswap.training import FineTune, finetune

HERE = Path(__file__).parent
OPTIONS = {
    "epochs": 2,
    "learning_rate": 0.05,
    "optimizer": "momentum",
    "warmup_epochs": 0,
    "checkpoint_every": 0,
    "tensorboard": False,
    "device": "cpu",
}


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def two_processes(folder, *arguments, script=__file__):
    """Run a file twice, as ``torchrun`` would; what both have left in ``folder``."""
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    running = [
        subprocess.Popen(
            [sys.executable, script, str(folder), *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)], errors


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    return (*two_processes(folder), folder)


def alone(norm):
    """One process at batch 2, from the same start."""
    model = Net(norm)
    history = finetune(model, samples(12), samples(7, seed=1), FineTune(batch_size=2, **OPTIONS))
    return model, history


@pytest.mark.parametrize("norm", ["gn", "frn"])
def test_two_processes_at_batch_1_have_the_gradients_of_one_at_batch_2(norm, both):
    """After one update, (w₀ − w₁)/lr is the gradient; decay and momentum are off for it."""
    reference = Net(norm)
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    rate = 0.5
    options = OPTIONS | {"epochs": 1, "learning_rate": rate, "momentum": 0.0, "weight_decay": 0.0}
    finetune(reference, samples(2), options=FineTune(batch_size=2, **options))
    for rank in both[0]:
        for name, value in reference.state_dict().items():
            mine = (before[name] - rank[f"{norm} gradient"][name]) / rate
            torch.testing.assert_close(mine, (before[name] - value) / rate, rtol=0, atol=1e-6)
    assert any(not torch.equal(before[k], v) for k, v in reference.state_dict().items())


@pytest.mark.parametrize("norm", ["gn", "frn"])
def test_whole_run_is_that_of_one_process(norm, both):
    model, history = alone(norm)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(both[0][0][norm][name], value, rtol=1e-4, atol=1e-5)
    report = json.loads((both[2] / f"{norm}.json").read_text())
    assert report["steps"] == history.steps
    for mine, theirs in zip(report["epochs"], history.to_json()["epochs"], strict=True):
        assert mine["val_top1"] == theirs["val_top1"]
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5)
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-5)


@pytest.mark.parametrize("norm", ["gn", "frn", "brn", "cbn"])
def test_processes_stay_in_step(norm, both):
    first, second = both[0]
    assert first[norm].keys() == second[norm].keys()
    assert all(torch.equal(first[norm][name], second[norm][name]) for name in first[norm])


def test_what_is_shared_is_said(both):
    said = both[1][0]
    assert "each process normalises its own batch" in said
    assert "running statistics are those of the first process" in said
    assert "BRN: the correction r, d comes from each process's own batch" in said
    assert "CBN: the window of past batches is each process's own" in said


@pytest.mark.parametrize("norm", ["brn", "cbn"])
def test_resumed_run_of_two_processes_is_the_unbroken_one(norm, both):
    for rank in both[0]:
        assert all(torch.equal(rank[f"{norm} resumed"][k], v) for k, v in rank[norm].items())


def test_checkpoint_of_two_processes_is_refused_by_one(both):
    with pytest.raises(Exception, match=r"processes=1 \(was 2\)"):
        finetune(
            Net("gn"),
            samples(12),
            samples(7, seed=1),
            FineTune(batch_size=1, **OPTIONS),
            out=both[2] / "gn",
            resume=True,
        )


# what each of the two processes does


def _main(folder):
    import logging

    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    found = {}
    for norm in ("gn", "frn"):
        options = OPTIONS | {
            "epochs": 1,
            "learning_rate": 0.5,
            "momentum": 0.0,
            "weight_decay": 0.0,
        }
        model = Net(norm)
        finetune(model, samples(2), options=FineTune(batch_size=1, **options))
        found[f"{norm} gradient"] = model.state_dict()
    for norm in ("gn", "frn", "brn", "cbn"):
        model, history = _run(norm, folder / norm)
        found[norm] = model.state_dict()
        (folder / f"{norm}.json").write_text(json.dumps(history.to_json()))
    for norm in ("brn", "cbn"):
        _break_off(norm, folder / f"{norm}-resumed")
        found[f"{norm} resumed"] = _run(norm, folder / f"{norm}-resumed")[0].state_dict()
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def _run(norm, out, progress=None):
    model = Net(norm)
    options = FineTune(batch_size=1, **OPTIONS)
    history = finetune(
        model,
        samples(12),
        samples(7, seed=1),
        options,
        out=out,
        resume=True,
        progress=progress,
    )
    return model, history


def _break_off(norm, out):
    """A signal to one of the two stops both."""
    from normswap.training import TrainingInterrupted

    def progress(now):
        if now.step == 7:
            os.kill(os.getpid(), 15)

    with pytest.raises(TrainingInterrupted, match="at step 7; need 12"):
        _run(norm, out, progress)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
