"""The sweep: same start, same samples, linear rule, resumable, table and picture."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from training_runs import Augmented, Net, samples, weights

from normswap import GroupNorm, sweeps
from normswap.errors import TrainingError
from normswap.sweeps import Cell, Sweep, draw_sweep, sweep
from normswap.training import FineTune

TRAIN, VAL = samples(16), samples(9, seed=1)
ONE_EPOCH = FineTune(batch_size=4, epochs=1, learning_rate=0.08, optimizer="sgd", log_every=1)


def small(**changes):
    arguments = {
        "targets": ["bn"],
        "batch_sizes": [2, 4],
        "seeds": 2,
        "options": ONE_EPOCH,
    } | changes
    return sweep(arguments.pop("model", None) or Net("bn"), TRAIN, VAL, **arguments)


def test_cells_share_start_samples_and_linear_rule():
    model = Net("bn")
    before = weights(model)
    found = small(model=model)
    assert [cell.name for cell in found.cells] == ["bn-b2-s0", "bn-b2-s1", "bn-b4-s0", "bn-b4-s1"]
    assert [cell.learning_rate for cell in found.cells] == pytest.approx([0.04, 0.04, 0.08, 0.08])
    assert {cell.samples for cell in found.cells} == {16}
    assert len({cell.start_top1 for cell in found.cells}) == 1
    assert all(cell.failure is None and 0 <= cell.top1 <= 1 for cell in found.cells)
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_cells_are_the_same_whatever_else_is_swept():
    alone = small(batch_sizes=[4], seeds=[1]).cells[0]
    among = small().cells[3]
    assert (alone.name, alone.top1, alone.loss) == (among.name, among.top1, among.loss)


@pytest.mark.parametrize("target", ["gn", "frn", "brn", "cbn"])
@pytest.mark.parametrize("from_scratch", [False, True])
def test_every_target_trains(target, from_scratch):
    found = small(targets=[target], batch_sizes=[1], seeds=1, from_scratch=from_scratch)
    assert found.cells[0].failure is None
    assert (found.cells[0].start_top1 is None) is from_scratch


def test_from_scratch_starts_depend_on_the_seed_alone(monkeypatch):
    starts = []

    def remember(model, *_arguments, **_options):
        starts.append(copy.deepcopy(model.conv1.weight))
        raise TrainingError("here", got="enough", need="no more", hint="nothing")

    monkeypatch.setattr(sweeps, "finetune", remember)
    found = small(from_scratch=True)
    assert "enough" in found.cells[0].failure
    seed0, seed1 = starts[:2], starts[2:]  # the sweep goes seed by seed
    assert torch.equal(seed0[0], seed0[1])
    assert torch.equal(seed1[0], seed1[1])
    assert not torch.equal(seed0[0], seed1[0])
    starts.clear()
    small(model=lambda: nn.Module.train(Net("bn")), from_scratch=True, seeds=1)
    assert torch.equal(starts[0], Net("bn").conv1.weight)


def test_finished_cells_are_not_run_again(tmp_path, monkeypatch):
    first = small(out=tmp_path)
    assert sorted(item.name for item in (tmp_path / "cells").iterdir()) == [
        f"{cell.name}.json" for cell in first.cells
    ]
    trained = []
    plain = sweeps.finetune
    monkeypatch.setattr(
        sweeps, "finetune", lambda *a, **k: trained.append(a[3].batch_size) or plain(*a, **k)
    )
    second = small(out=tmp_path, batch_sizes=[2, 4, 8])
    assert trained == [8, 8]
    assert [c for c in second.cells if c.batch_size < 8] == list(first.cells)
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert len(written["cells"]) == 6
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_broken_off_cell_goes_on_from_its_checkpoint(tmp_path):
    class Stop(Exception):  # noqa: N818
        pass

    def stop(now):
        if now.done == 1 + 6 / 8:  # the second cell, after six of its eight updates
            raise Stop

    expected = small()
    options = FineTune(
        batch_size=4,
        epochs=1,
        learning_rate=0.08,
        optimizer="sgd",
        log_every=1,
        checkpoint_every=0,
        workers=0,
    )
    with pytest.raises(Stop):
        small(out=tmp_path, seeds=1, batch_sizes=[4, 2], options=options, progress=stop)
    shares = []
    found = small(out=tmp_path, options=options, progress=lambda now: shares.append(now.share))
    assert shares[0] == 6 / 8 / len(found.cells)
    assert [(c.name, c.top1, c.loss) for c in found.cells] == [
        (c.name, c.top1, c.loss) for c in expected.cells
    ]


def test_samples_are_those_that_were_seen():
    model, data = Net("bn"), samples(9)
    found = sweep(
        model, data, VAL, targets=["bn"], batch_sizes=[1, 2, 4], seeds=1, options=ONE_EPOCH
    )
    assert [cell.samples for cell in found.cells] == [9, 8, 8]


@pytest.mark.parametrize("field", ["top1", "seconds", "failure", "recipe", "sha256", None])
def test_an_edited_cell_is_refused(field, tmp_path):
    one = {"batch_sizes": [4], "seeds": 1, "out": tmp_path}
    small(**one)
    path = tmp_path / "cells" / "bn-b4-s0.json"
    cell = json.loads(path.read_text())
    if field is None:
        del cell["sha256"]
    else:
        cell[field] = 0.999
    path.write_text(json.dumps(cell))
    with pytest.raises(TrainingError, match=r"bn-b4-s0\.json: got content.*SHA-256.*removing"):
        small(**one)
    path.unlink()
    assert small(**one).cells[0].top1 is not None


def test_a_folder_belongs_to_its_data_and_tells_of_another_machine(tmp_path, caplog, monkeypatch):
    one = {"targets": ["bn"], "batch_sizes": [4], "seeds": 1, "options": ONE_EPOCH}
    sweep(Net("bn"), TRAIN, VAL, out=tmp_path, **one)
    images, labels = TRAIN
    with pytest.raises(TrainingError, match="training data with other labels"):
        sweep(Net("bn"), (images, labels.flip(0)), VAL, out=tmp_path, **one)
    with pytest.raises(TrainingError, match="validation data with other contents"):
        sweep(Net("bn"), TRAIN, (VAL[0] + 1, VAL[1]), out=tmp_path, **one)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    sweep(Net("bn"), TRAIN, VAL, out=tmp_path, **one)
    assert "gone on with threads=77 (was " in caplog.text


def test_folder_with_other_settings_is_refused(tmp_path):
    small(out=tmp_path, seeds=1)
    path = tmp_path / "settings.json"
    settings = json.loads(path.read_text())
    del settings["options"]["loss"]  # as a release wrote it that did not have the option
    path.write_text(json.dumps(settings))
    assert small(out=tmp_path, seeds=1).cells
    del settings["options"]
    path.write_text(json.dumps(settings))
    with pytest.raises(TrainingError, match=r"settings\.json: got .*need the settings of a sweep"):
        small(out=tmp_path, seeds=1)
    path.unlink()
    small(out=tmp_path, seeds=1)
    with pytest.raises(TrainingError, match=r"from_scratch: True \(was False\)"):
        small(out=tmp_path, from_scratch=True)


def test_cell_that_cannot_train_says_why():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    found = small(model=flat, batch_sizes=[1, 4], seeds=1)
    assert "one value per channel" in found.cells[0].failure
    assert found.cells[1].top1 is not None
    assert found.rows()[1][1] == "failed"


def test_mapping_of_labels_to_targets_and_data_sets():
    found = sweep(
        Net("bn"),
        Augmented(8),
        VAL,
        targets={"groups of one": "in", "control": "bn"},
        batch_sizes=[4],
        seeds=1,
        options=ONE_EPOCH,
    )
    assert found.targets == ("groups of one", "control")
    assert found.cells[0].name == "groups_of_one-b4-s0"


def test_loader_is_refused():
    with pytest.raises(TrainingError, match="batch size is fixed"):
        sweep(Net("bn"), DataLoader(Augmented(8)), VAL)


def cells(values):
    return tuple(
        Cell(target, size, seed, 0.1, top1=top1) for (target, size, seed), top1 in values.items()
    )


def test_table_and_points(tmp_path):
    found = Sweep(
        cells(
            {
                ("bn", 2, 0): 0.5,
                ("bn", 2, 1): 0.7,
                ("bn", 8, 0): 0.9,
                ("gn", 2, 0): None,
                ("gn", 8, 0): 0.8,
            }
        ),
        {},
    )
    point = found.point("bn", 2)
    assert (point.mean, point.low, point.high, point.seeds) == (pytest.approx(0.6), 0.5, 0.7, 2)
    assert point.deviation == pytest.approx(0.02**0.5)
    assert found.rows() == [
        ["target", "2", "8"],
        ["bn", "60.0 ± 14.1", "90.0"],
        ["gn", "failed", "80.0"],
    ]
    assert str(found).splitlines()[1].split() == ["bn", "60.0", "±", "14.1", "90.0"]
    assert draw_sweep(found, tmp_path / "picture.png").stat().st_size > 5000
    assert json.loads(json.dumps(found.to_json()))["points"][0]["mean"] == pytest.approx(0.6)


def test_a_folder_belongs_to_one_model_and_its_labels_to_one_recipe(tmp_path):
    one = {"batch_sizes": [4], "seeds": 1, "out": tmp_path}
    small(targets={"gn": GroupNorm(groups=1)}, **one)
    with pytest.raises(TrainingError, match="a cell of"):
        small(targets={"gn": GroupNorm(groups=2)}, **one)
    other = Net("bn")
    other.conv1.weight.data.mul_(2)
    with pytest.raises(TrainingError, match="model"):
        small(model=other, **one)


def test_from_scratch_the_weights_of_the_module_do_not_count(tmp_path):
    one = {"batch_sizes": [4], "seeds": 1, "out": tmp_path, "from_scratch": True}
    other = Net("bn")
    other.conv1.weight.data.mul_(2)
    assert small(**one).cells == small(model=other, **one).cells


def test_labels_that_share_a_file_are_refused():
    with pytest.raises(TrainingError, match="share one file"):
        small(targets={"gn 1": "gn", "gn_1": "frn"})


def test_a_failed_cell_is_tried_again(tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise TrainingError("here", got="no memory", need="some", hint="more")

    one = {"batch_sizes": [4], "seeds": 1, "out": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "finetune", fail)
        assert small(**one).cells[0].failure is not None
    assert small(**one).cells[0].failure is None


def test_options_that_one_batch_size_refuses_fail_that_cell_alone():
    options = FineTune(batch_size=4, epochs=1, mixup=0.2)
    found = small(batch_sizes=[1, 4], seeds=1, options=options)
    assert [cell.failure is None for cell in found.cells] == [False, True]


def test_the_validation_data_must_not_choose_a_cell():
    with pytest.raises(TrainingError, match="must not choose"):
        small(options=FineTune(keep="best"))


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"bn": 0.6, "gn": 0.9, "brn": 0.8}, r"at batch 2: gn, 90.0 %, the most accurate of 3"),
        (
            {"bn": 0.6, "gn": 0.9, "brn": 0.896},
            r"brn, 89.6 %, as good as gn \(90.0 %\), and it runs",
        ),
        (
            {"bn": 0.9, "gn": 0.904},
            r"bn, 90.0 %, as good as gn .*, and nothing has to be converted",
        ),
        ({"cbn": 0.7, "frozen": 0.7, "frn": 0.7}, r"frozen, 70.0 %"),
        ({"gn": 0.7, "mine": 0.7}, r"gn, 70.0 %"),
        ({"gn": 0.7, "brn": None}, r"gn, 70.0 %$"),
        ({"gn(groups=4)": 0.7, "frn": 0.6}, r"gn\(groups=4\), 70.0 %, the most"),
    ],
)
def test_it_recommends_the_most_accurate_or_the_cheapest_that_is_as_good(scores, said):
    cells = [Cell(name, size, 0, 0.1, top1=top1) for name, top1 in scores.items() for size in (2,)]
    cells += [Cell(name, 8, 0, 0.1, top1=0.99) for name in scores]
    assert re.search(said, Sweep(tuple(cells), {}).recommendation)


def test_seeds_that_differ_widen_what_is_as_good():
    scores = {"gn": (0.8, 1.0), "bn": (0.79, 0.81)}
    cells = [
        Cell(name, 2, seed, 0.1, top1=top1)
        for name, pair in scores.items()
        for seed, top1 in enumerate(pair)
    ]
    assert "bn, 80.0 %, as good as gn (90.0 %)" in Sweep(tuple(cells), {}).recommendation
    assert Sweep((Cell("gn", 2, 0, 0.1, failure="no"),), {}).recommendation is None
