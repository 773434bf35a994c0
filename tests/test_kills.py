"""Whoever is killed at whatever file event: a complete old or a complete new result stands.

By default every event of ``save`` and some changes of names in the others, the last ones among
them; with ``NORMSWAP_KILLS`` above 1 every event of all, and two writers race for half a minute.
"""

import itertools
import json
import multiprocessing
import os
import shutil
import time
from functools import partial

import kills
import numpy as np
import pytest
import torch
import training_runs
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import normswap
from normswap import artifact, files
from normswap.files import file_digest
from normswap.onnx import export
from normswap.onnx.file.identity import graph_hash
from normswap.onnx.file.parsing import read_onnx
from normswap.onnx.writing import program
from normswap.onnx.writing.program import Draft
from normswap.training.checkpoints import LAST, read_checkpoint

LONG = int(os.environ.get("NORMSWAP_KILLS", "1")) > 1
NAMES = ("os.rename", "normswap.exchange", "shutil.rmtree")  # events after which a name has changed
SPEC = "python:normswap.tour:digits_net"


def every_event(work, prepare, all_of_them, start="fork"):
    """Folders in which ``work(folder)`` was killed, one for each of its events."""
    folder = prepare("whole")
    killed, events = kills.run(work, (folder,), folder, start=start)
    assert not killed
    assert len(events) > 5
    chosen = list(range(len(events)))
    if not all_of_them:
        named = [at for at in chosen if events[at].startswith(NAMES)]
        chosen = [*named[:-3:4], *named[-3:]]
    for number in chosen:
        folder = prepare(str(number))
        killed, _ = kills.run(work, (folder,), folder, number, start)
        assert killed
        yield folder


def preparer(base, tmp_path):
    """A copy of a folder for every kill."""

    def prepare(name):
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        return folder

    return prepare


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3))


def numbered(value):
    model = Small()
    nn.init.constant_(model.conv.weight, value)
    nn.init.zeros_(model.conv.bias)
    return model


def number_of(folder):
    return artifact.load(folder, into=Small()).conv.weight.unique().tolist()


# ----------------------------------------------------------------------------------------- save


@pytest.mark.parametrize("beside", [(), ("mine.txt", "best.pt")])
@pytest.mark.parametrize("exchange", [True, False])
def test_save(beside, exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    base = tmp_path / "base"
    artifact.save(numbered(1.0), base / "out")
    for name in beside:
        (base / "out" / name).write_text(name)
    complete = names(base)
    mine = [path.stat().st_ino for path in (base / "out").iterdir() if path.name in beside]
    found = set()

    def work(folder):
        artifact.save(numbered(2.0), folder / "out", force=True)

    for folder in every_event(work, preparer(base, tmp_path), all_of_them=True):
        (value,) = number_of(folder / "out")
        found.add(value)
        if exchange and not beside:  # whoever reads the files by himself sees one artefact
            record = json.loads((folder / "out" / artifact.record.RECORD).read_text())
            assert record["sha256"] == file_digest(folder / "out" / "model.safetensors")
            state = load_file(folder / "out" / "model.safetensors")
            assert state["conv.weight"].unique().tolist() in ([1.0], [2.0])
        artifact.save(numbered(3.0), folder / "out", force=True)
        assert names(folder) == complete
        assert number_of(folder / "out") == [3.0]
    assert found == {1.0, 2.0}
    assert mine == [p.stat().st_ino for p in (base / "out").iterdir() if p.name in beside]


def test_save_under_a_new_name(tmp_path):
    (tmp_path / "base").mkdir()
    found = set()

    def work(folder):
        artifact.save(numbered(2.0), folder / "a" / "out")

    for folder in every_event(work, preparer(tmp_path / "base", tmp_path), all_of_them=True):
        there = (folder / "a" / "out").exists()
        found.add(there)
        assert not there or number_of(folder / "a" / "out") == [2.0]
        artifact.save(numbered(3.0), folder / "a" / "out", force=there)
        assert names(folder / "a")[0] == "out"
        assert len(names(folder / "a")) == 4
    assert found == {True, False}


# --------------------------------------------------------------------------------------- export


@pytest.fixture
def proven_once(tmp_path, monkeypatch):
    """Export and proof take a second; each model goes through them once."""
    kept, real = {}, export.prove_fastest

    def prove(asked, path, options):
        value = float(asked.subject.model.conv.weight.mean())
        folder = tmp_path / f"proven {value}"
        if value not in kept:
            draft, parity = real(asked, path, options)
            kept[value] = draft.options, parity
            shutil.copytree(path.parent, folder)
        shutil.copytree(folder, path.parent, dirs_exist_ok=True)
        written, parity = kept[value]
        return Draft(read_onnx(path), None, written), parity

    monkeypatch.setattr(export, "prove_fastest", prove)


@pytest.mark.parametrize("limit", [0, 1 << 30])  # 0: the weights lie beside the file
def test_export(limit, tmp_path, monkeypatch, proven_once):
    monkeypatch.setattr(program, "ONE_FILE_BYTES", limit)
    base, x = tmp_path / "base", torch.randn(2, 3, 8, 8)

    def write(value, folder):
        normswap.export_onnx(numbered(value), folder / "m.onnx", example_inputs=x)

    write(1.0, base)
    write(2.0, tmp_path / "other")
    one, two = (digest(folder / "m.onnx") for folder in (base, tmp_path / "other"))
    assert one != two
    found = set()
    for folder in every_event(partial(write, 2.0), preparer(base, tmp_path), LONG):
        assert normswap.verify_onnx(folder / "m.onnx").passed
        found.add(digest(folder / "m.onnx"))
        write(1.0, folder)
        assert len(names(folder)) == (1 if limit else 2)
        assert digest(folder / "m.onnx") == one
    assert found == {one, two}


def digest(path):
    return graph_hash(read_onnx(path))


# ------------------------------------------------------------------------------------ finetune


def pictures(folder):
    generator = np.random.default_rng(0)
    for name, number in itertools.product("ab", range(4)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (16, 16), np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the children have it: another number of threads gives other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder with a fine-tuned network, and the command line that replaces it."""
    place = tmp_path_factory.mktemp("tuned")
    data = pictures(place / "data")
    training_runs.command_line("convert", SPEC, "--no-pretrained", "--to", "gn", "-o", place / "gn")

    shape = ("--val-split", "0.5", "--epochs", "1", "-o")
    command = partial(training_runs.replaced, ("finetune", place / "gn", "--data", data, *shape))
    command(1, place / "base")
    return place / "base", command


def test_finetune(tuned, tmp_path):
    base, command = tuned
    complete = names(base)
    command(2, tmp_path / "other")
    old, new = (weights_of(folder) for folder in (base, tmp_path / "other"))
    assert old != new
    found = []
    work = partial(command, 2, "--force")
    for folder in every_event(work, preparer(base, tmp_path), LONG, "forkserver"):
        found.append(weights_of(folder))
        assert read_checkpoint(folder / "out" / LAST)["options"]["seed"] == (
            2 if found[-1] == new else 1
        )
        pending = (folder / ".out.next" / LAST).exists()
        if pending or found[-1] == new:  # the run goes on where it was killed
            command(2, "--resume", folder)
        else:
            command(2, "--force", folder)
        assert names(folder) == complete
        assert weights_of(folder) == new
    assert {str(item) for item in found} == {str(old), str(new)}


def weights_of(folder):
    return files.weights_digest(normswap.load(folder / "out").state_dict())


def test_force_that_fails_keeps_the_earlier_run(tuned, tmp_path):
    base, command = tuned
    folder = preparer(base, tmp_path)("kept")
    (folder / "out" / "mine.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    with pytest.raises(AssertionError, match="nonsense"):
        command(2, "--force", "--optimizer", "nonsense", folder)
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before
    assert names(folder)[0] == "out"
    command(2, "--force", folder)
    assert sorted(before) == names(folder / "out")
    assert (folder / "out" / "mine.txt").read_text() == "mine"
    assert weights_of(folder) != weights_of(base)


# --------------------------------------------------------------------------------------- sweep


def test_sweep(tmp_path):
    whole = training_runs.small_sweep(tmp_path / "by itself")
    complete = names(tmp_path / "by itself")
    (tmp_path / "base").mkdir()
    prepare = preparer(tmp_path / "base", tmp_path)
    for folder in every_event(training_runs.small_sweep, prepare, LONG, "forkserver"):
        for path in folder.rglob("*.json"):
            json.loads(path.read_text())
        found = training_runs.small_sweep(folder)
        assert [(c.top1, c.loss) for c in found.cells] == [(c.top1, c.loss) for c in whole.cells]
        assert names(folder) == complete


# ----------------------------------------------------------------------------------- two writers


def write_often(folder, value, until, counts):
    wrote = refused = 0
    while time.monotonic() < until:
        try:
            artifact.save(numbered(value), folder / "out", force=True)
            wrote += 1
        except normswap.errors.BusyError:
            refused += 1
    counts.put((wrote, refused))


@pytest.mark.parametrize("beside", [False, True])
def test_two_writers_and_a_reader(beside, tmp_path):
    context = multiprocessing.get_context("fork")
    artifact.save(numbered(1.0), tmp_path / "out")
    if beside:
        (tmp_path / "out" / "mine.txt").write_text("mine")
    until = time.monotonic() + (30 if LONG else 1)
    counts = context.Queue()
    arguments = [(tmp_path, value, until, counts) for value in (1.0, 2.0)]
    writers = [context.Process(target=write_often, args=one) for one in arguments]
    for writer in writers:
        writer.start()
    reads = []
    while any(writer.is_alive() for writer in writers):
        reads.append(number_of(tmp_path / "out"))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    wrote = sum(counts.get()[0] for _ in writers)
    assert wrote > 2
    assert len(reads) > 2
    assert all(found in ([1.0], [2.0]) for found in reads)
    assert names(tmp_path)[0] == "out"
    assert len(names(tmp_path)) == 5 if beside else 4
