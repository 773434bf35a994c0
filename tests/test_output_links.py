"""An output that somebody else made may hold links; nothing is written where they lead."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import ArtifactError, NormSwapError, TrainingError
from normswap.files import content_digest
from normswap.sweeps import sweep
from normswap.training import records

OPTIONS = normswap.FineTune(epochs=1, batch_size=2, tensorboard=False, device="cpu")
DATA = torch.arange(96.0).reshape(6, 1, 4, 4) / 96, torch.arange(6) % 2


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def train(out):
    return normswap.finetune(net(), DATA, DATA, OPTIONS, out=out, resume=True)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", ["metrics.jsonl", "last.pt", "best.pt", "learning_curve.png"])
def test_a_resumed_run_writes_into_its_folder(name, there, tmp_path):
    """``metrics.jsonl`` was a link to a file that held no metrics: it was emptied."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    train(run)
    content = (run / name).read_bytes() if name == "last.pt" else b"mine"
    if there or name == "last.pt":
        victim.write_bytes(content)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    with pytest.raises(TrainingError) if name == "best.pt" else contextlib.nullcontext():
        train(run)  # what it goes on from must be a checkpoint
    if there or name == "last.pt":
        assert victim.read_bytes() == content
    else:
        assert not victim.exists()
    assert name != "metrics.jsonl" or not (run / name).is_symlink()


@pytest.mark.parametrize(
    "change", ["a moment", "all moments", "-1 steps", "-2 steps", "finished", "no finished"]
)
def test_a_checkpoint_that_is_no_state_of_its_run(change, tmp_path):
    """Signed anew: what the hash cannot tell."""
    stop = replace(OPTIONS, epochs=2, checkpoint_every=0)

    def once(now):
        if now.step == 2:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, NormSwapError)):
        normswap.finetune(net(), DATA, DATA, stop, out=tmp_path, progress=once)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["sha256"]
    moments = list(state["optimizer"]["state"].values())
    if "moment" in change:
        for moment in moments if change == "all moments" else moments[:1]:
            del moment["exp_avg_sq"]
    elif "steps" in change:
        moments[0]["step"] = torch.tensor(float(change.split()[0]))
    elif change == "finished":
        state["finished"] = "x"
    else:
        del state["finished"]
    torch.save({**state, "sha256": content_digest(state)}, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match=r"no field 'exp_avg_sq'|\.step is|finished"):
        normswap.finetune(net(), DATA, DATA, stop, out=tmp_path, resume=True)


class Own(torch.utils.data.Dataset):
    """Samples that nobody but itself knows."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return DATA[0][index], int(DATA[1][index])


def test_what_was_not_compared_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "normswap")
    for data, said in ((Own(), True), (DATA, False)):
        out = tmp_path / str(said)
        for _ in range(2):
            normswap.finetune(net(), data, DATA, OPTIONS, out=out, resume=True)
        told = [text for text in caplog.messages if "only the number of samples" in text]
        assert len(told) == said
        assert not told or "going on with training data of which" in told[0]
        caplog.clear()


def test_a_fresh_run_in_a_folder_with_a_link(tmp_path):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("mine")
    for name in ("metrics.jsonl", "last.pt", "best.pt"):
        (run / name).symlink_to(victim if name == "metrics.jsonl" else tmp_path / name)
    train(run)
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "victim"]
    assert len(records.read_metrics(run)) > 0


def test_cells_and_events_lie_in_their_folder(tmp_path):
    victim = tmp_path / "victim"
    (victim / "gn-b2-s0").mkdir(parents=True)
    (victim / "gn-b2-s0" / "key").write_text("mine")
    for name in ("sweep/cells", f"run/{records.EVENTS}"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(TrainingError, match=r"cells: got a link.*Try removing the link"):
        sweep(
            net(), DATA, DATA, targets=["gn"], batch_sizes=[2], seeds=1, options=OPTIONS,
            out=tmp_path / "sweep",
        )  # fmt: skip
    with pytest.raises(TrainingError, match=f"{records.EVENTS}: got a link"):
        records.MetricsLog(tmp_path / "run", step=0, tensorboard=True)
    assert (victim / "gn-b2-s0" / "key").read_text() == "mine"
    assert [path.name for path in victim.iterdir()] == ["gn-b2-s0"]


def test_an_artefact_that_is_being_replaced_is_one(tmp_path, monkeypatch):
    """Its record was looked for where it no longer lay; 1 of many writers in 30 s was refused."""
    from normswap.artifact import writing

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    normswap.save(model, tmp_path / "out")
    real, calls = writing.read_record, []

    def late(folder):
        calls.append(folder)
        if len(calls) == 1:
            normswap.save(model, tmp_path / "other")
            for path in (tmp_path / "other").iterdir():
                path.replace(folder / path.name)
            raise ArtifactError(str(folder), got="nothing there", need="it", hint="again")
        return real(folder)

    monkeypatch.setattr(writing, "read_record", late)
    normswap.save(model, tmp_path / "out", force=True)
    assert len(calls) > 1
