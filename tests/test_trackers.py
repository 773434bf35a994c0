"""Trackers, which accelerate knows by name."""

from __future__ import annotations

import pytest
from accelerate import tracking
from training_runs import Net, samples

from normswap.errors import TrainingError
from normswap.training import FineTune, finetune, read_metrics

SHORT = {"epochs": 2, "batch_size": 4, "log_every": 1, "tensorboard": False}


class Noted(tracking.GeneralTracker):
    """Keeps what it is told."""

    name = "aim"
    requires_logging_directory = False
    all = []  # noqa: RUF012

    def __init__(self, run_name, **_options):
        super().__init__()
        self.run_name, self.config, self.lines, self.over = run_name, {}, [], False
        self.all.append(self)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_options):
        self.lines.append((step, values))

    def finish(self):
        self.over = True


@pytest.fixture
def noted(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "aim", Noted)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.AIM])
    Noted.all.clear()
    return Noted.all


@pytest.mark.parametrize("folder", [True, False])
def test_a_tracker_gets_every_line(folder, noted, tmp_path):
    out = tmp_path / "run" if folder else None
    finetune(Net("gn"), samples(8), samples(6, 1), FineTune(track=["aim"], **SHORT), out=out)
    [tracker] = noted
    assert tracker.over
    assert tracker.run_name == "normswap"
    assert (tracker.config["batch_size"], tracker.config["optimizer"]) == (4, "adamw")
    steps = [step for step, values in tracker.lines if "step/loss" in values]
    assert steps == [1, 2, 3, 4]
    scores = [values["epoch/val_top1"] for _, values in tracker.lines if "epoch/val_top1" in values]
    assert len(scores) == 2
    if folder:
        rows = [row for row in read_metrics(out) if row["kind"] == "epoch"]
        assert scores == [row["val_top1"] for row in rows]


def test_a_tracker_of_a_run_that_breaks_off_is_finished_too(noted):
    def stop(now):
        raise KeyError(now.step)

    with pytest.raises(KeyError):
        finetune(Net("gn"), samples(8), options=FineTune(track=["aim"], **SHORT), progress=stop)
    assert noted[0].over


def test_a_tracker_that_is_not_there_is_said_before_anything_else(monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(TrainingError, match=r"'wandb', which is not installed.*pip install wandb"):
        finetune(Net("gn"), samples(), options=FineTune(track=("wandb",), **SHORT))
    with pytest.raises(TrainingError, match=r"'wandbb', which is no tracker; need one of aim"):
        finetune(Net("gn"), samples(), options=FineTune(track=("wandbb",), **SHORT))
    with pytest.raises(TrainingError, match="need a tuple of names"):
        FineTune(track="wandb")
