"""Small files that never end, or unpack to far more than they are: refused at once."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
import zipfile

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import normswap
from normswap.artifact.record import record_digest
from normswap.checkpoints import load_checkpoint
from normswap.cli.app import app
from normswap.cli.convert import read_plan
from normswap.data.images import read_image
from normswap.errors import ArtifactError, CheckpointError, DataError, PlanError, TrainingError
from normswap.factories import no_larger_than
from normswap.pickles import unfolds
from normswap.regular import check_regular, open_regular, read_text
from normswap.training.checkpoints import read_checkpoint

LARGER = "far larger than the weights"
KINDS = ["fifo", "zero", "link"]


@pytest.fixture
def endless(tmp_path):
    """A function that puts something endless in the place of a file."""

    def put(path, kind):
        path.unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "zero":
            path.symlink_to("/dev/zero")
        else:
            os.mkfifo(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
        return path

    return put


@pytest.fixture(autouse=True)
def at_once():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    source = normswap.load_model("timm/test_resnet", pretrained=False, num_classes=3)
    x = torch.randn(1, 3, 32, 32)
    model = normswap.convert(source.model, "gn", example_inputs=x).model
    folder = tmp_path_factory.mktemp("saved") / "gn"
    normswap.save(model, folder)
    return folder


@pytest.fixture
def artefact(saved, tmp_path):
    """The artefact, its weights linked to, so that each test may change the rest."""
    folder = tmp_path / "gn"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def rewrite(folder, change):
    """Edit the record and sign it again, as a forger would."""
    path = folder / "normswap.json"
    record = json.loads(path.read_text())
    change(record)
    record["record_sha256"] = record_digest(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "normswap.json"])
def test_an_artefact_is_made_of_regular_files(kind, name, artefact, endless):
    endless(artefact / name, kind)
    with pytest.raises(ArtifactError, match="no regular file"):
        normswap.load(artefact)
    result = CliRunner().invoke(app, ["inspect", str(artefact)])
    assert result.exit_code == 1
    assert "no regular file" in result.stderr
    assert "Unexpected" not in result.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_a_regular_file(kind, tmp_path, endless):
    for name in ("w.safetensors", "w.pth"):
        with pytest.raises(CheckpointError, match="no regular file"):
            load_checkpoint(endless(tmp_path / name, "fifo" if kind == "link" else kind))
    with pytest.raises(CheckpointError, match="no regular file"):
        load_checkpoint(endless(tmp_path / "l.pth", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_a_regular_file(kind, tmp_path, endless):
    with pytest.raises(PlanError, match="no regular file"):
        read_plan(endless(tmp_path / "plan.json", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_a_run_is_a_regular_file(kind, tmp_path, endless):
    with pytest.raises(TrainingError, match="no regular file"):
        read_checkpoint(endless(tmp_path / "last.pt", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_a_regular_file(kind, tmp_path, endless):
    with pytest.raises(DataError, match="no regular file"):
        read_image(endless(tmp_path / "a.png", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_an_onnx_file_is_a_regular_file(kind, tmp_path, endless):
    result = CliRunner().invoke(app, ["verify", str(endless(tmp_path / "m.onnx", kind))])
    assert result.exit_code == 1
    assert "no regular file" in result.stderr


def test_regular_files_and_links_to_them_are_read(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link"
    path.write_text("häuser")
    link.symlink_to(path)
    assert read_text(link) == "häuser"
    assert check_regular(link) == 7
    with open_regular(link) as file:
        assert file.read(2) == "hä".encode()[:2]
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")


def test_a_text_of_many_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(PlanError, match="more than any such file has"):
        read_plan(path)


def nested(levels, names):
    inner = {"a.weight": torch.zeros(2)}
    for _ in range(levels):
        inner = dict.fromkeys(names, inner)
    return inner


def test_a_nested_state_dict_is_looked_into_once(tmp_path):
    """Eight names, eight levels: sixteen million ways in."""
    names = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict")
    names += ("model", "net", "module", "weights")
    path = tmp_path / "bomb.pth"
    torch.save(nested(8, names), path)
    assert path.stat().st_size < 4000
    assert list(load_checkpoint(path)) == ["a.weight"]


@pytest.mark.parametrize("levels", [3, 100])
def test_a_state_dict_far_down_is_no_state_dict(levels, tmp_path):
    path = tmp_path / "deep.pth"
    torch.save(nested(levels, ["model"]), path)
    if levels == 3:
        assert list(load_checkpoint(path)) == ["a.weight"]
        return
    with pytest.raises(CheckpointError, match="no weights"):
        load_checkpoint(path)


def test_a_state_dict_in_itself_is_looked_into_once(tmp_path):
    state = {"weight": torch.zeros(2)}
    state["model"] = state
    torch.save(state, tmp_path / "cyclic.pth")
    assert list(load_checkpoint(tmp_path / "cyclic.pth")) == ["weight"]


def test_an_archive_that_grows_when_it_is_unpacked_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1 << 22)}, tmp_path / "plain.pth")
    path = tmp_path / "packed.pth"
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"an archive of \d+ bytes that unpacks to 16\d+"):
        load_checkpoint(path)
    with pytest.raises(TrainingError, match="unpacks to"):
        read_checkpoint(path)
    assert load_checkpoint(tmp_path / "plain.pth")["w"].numel() == 1 << 22


@pytest.mark.parametrize("classes", [1_500_000, 10**12, 10**30])
def test_a_head_larger_than_its_weights_is_refused(classes, artefact):
    rewrite(artefact, lambda record: record["source"].update(num_classes=classes))
    with pytest.raises(ArtifactError, match=f"{LARGER}|cannot be built|recorded argument"):
        normswap.load(artefact)


@pytest.mark.parametrize("layers", [[1_000_000, 1, 1, 1], [1, 1, 1, 20_000]])
def test_more_blocks_than_its_weights_have_are_refused(layers, artefact):
    def change(record):
        record["source"]["arguments"] = {
            "architecture": "test_resnet",
            "options": {"layers": layers},
        }

    rewrite(artefact, change)
    with pytest.raises(ArtifactError, match=f"{LARGER}|cannot be built|recorded argument"):
        normswap.load(artefact)


def test_building_stops_before_the_memory_is_filled():
    weights = [torch.zeros(10)] * 10
    with no_larger_than(weights):
        nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.LazyLinear(3))
    with pytest.raises(normswap.SpecError, match=LARGER), no_larger_than(weights):
        nn.Linear(1 << 20, 1 << 12)  # 16 GB
    with pytest.raises(normswap.SpecError, match=LARGER), no_larger_than(weights):
        nn.Sequential(*(nn.Sequential(nn.ReLU()) for _ in range(10**7)))
    with pytest.raises(normswap.SpecError, match=LARGER), no_larger_than(weights):
        nn.Module().register_buffer("table", torch.empty(1 << 30))
    nn.Linear(3000, 3000)  # and the limit has gone


def test_weights_that_are_not_the_ones_of_the_record_are_seen_at_once(artefact):
    path = artefact / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(artefact, lambda record: record.update(sha256=digest))
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        normswap.load(artefact)


def knotted(levels, close):
    """A tuple of itself, twice, again and again; as a key it would be hashed for ever."""
    grow = b"h\x01\x86q\x01" * levels  # take the last one again, make a pair, keep it
    return b"\x80\x02}q\x00)q\x01" + grow + close


CLOSES = {
    "key": b"K\x01s.",
    "keys": b"q\x020(h\x02K\x01u.",
    "size": b"0ctorch\nSize\nq\x03h\x01\x85RK\x01s.",
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("close", CLOSES)
def test_a_pickle_that_unfolds_without_end_is_refused(close, old, tmp_path):
    path, knot = tmp_path / "knot.pth", knotted(60, CLOSES[close])
    if old:
        path.write_bytes(knot)
    else:
        torch.save({}, tmp_path / "plain.pth")
        with (
            zipfile.ZipFile(tmp_path / "plain.pth") as source,
            zipfile.ZipFile(path, "w") as target,
        ):
            for entry in source.infolist():
                content = source.read(entry)
                target.writestr(entry.filename, knot if "data.pkl" in entry.filename else content)
    with pytest.raises(CheckpointError, match="unfolds to far more than it is"):
        load_checkpoint(path)
    with pytest.raises(TrainingError, match="unfolds to far more than it is"):
        read_checkpoint(path)


@pytest.mark.parametrize("new", [False, True])
def test_pickles_of_optimizers_and_histories_do_not_unfold(new, tmp_path):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(30)))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    history = [(step, {"loss": 0.5, ("train", step): (1, 2, (3, 4))}) for step in range(300)]
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": history}
    torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=new)
    assert not unfolds(tmp_path / "m.pth")
    assert len(load_checkpoint(tmp_path / "m.pth")) == 60


def packed(path, pickled, *names):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as target:
        warnings.simplefilter("ignore")  # the same name twice
        for name, content in zip(names, pickled, strict=True):
            target.writestr(f"archive/{name}", content)
        target.writestr("archive/version", "3\n")


KNOT = knotted(60, CLOSES["key"])
BEHIND = [
    ([KNOT, b"\x80\x02}."], ["data.pkl", "data.pkl"]),  # Python reads the second, torch the first
    ([KNOT], ["DATA.PKL"]),  # torch minds no case
    ([b"\x80\x02}.", KNOT], ["data.pkl", "DATA.pkl"]),
]


@pytest.mark.parametrize("parts", [*BEHIND, None, "padded"], ids=range(5))
@pytest.mark.timeout(60)
def test_an_archive_is_one_archive(parts, tmp_path):
    """What is looked at is what torch reads."""
    path = tmp_path / "m.pth"
    if isinstance(parts, tuple):
        packed(path, *[parts[0], *parts[1]])
    else:
        packed(path, [KNOT], "data.pkl")
        whole = path.read_bytes()
        packed(path, [b"\x80\x02}."], "data.pkl")
        path.write_bytes(whole + (b"\0" * 70_000 if parts else path.read_bytes()))
    for read, error in ((load_checkpoint, CheckpointError), (read_checkpoint, TrainingError)):
        with pytest.raises(error, match=r"same name twice|behind another|not a zip|unfolds"):
            read(path)


def number(value):
    return b"\x8a\x08" + value.to_bytes(8, "little")


LARGE = number(1 << 36)
STRIDED = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ"
VIEW = b"(" + STORAGE + b"K\0" + LARGE + b"\x85K\0\x85\x89ccollections\nOrderedDict\n)Rt"
CALLS = {
    "bytearray": b"cbuiltins\nbytearray\n" + LARGE + b"\x85R",
    "bytearray of Python 2": b"c__builtin__\nbytearray\n" + LARGE + b"\x85R",
    "kept and called": b"cbuiltins\nbytearray\nq\x01" + LARGE + b"\x85q\x02R",
    "storage": b"ctorch\nFloatStorage\n" + LARGE + b"\x85R",
    "untyped": b"ctorch.storage\nUntypedStorage\n" + LARGE + b"\x85R",
    "tensor": b"ctorch\nTensor\n" + LARGE + b"\x85R",
    "new": b"ctorch\nTensor\n" + LARGE + b"\x85\x81",
    "a view": STRIDED + VIEW + b"R",
    "through a type": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + STRIDED + b"ctorch\nTensor\n"
    + VIEW + b"}tR",
}  # fmt: skip


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_a_pickle_that_asks_for_memory_is_refused(call, old, tmp_path):
    """Each of them is allowed by ``weights_only``, and none takes a hundred bytes for gigabytes."""
    path, pickled = tmp_path / "m.pth", b"\x80\x02" + CALLS[call] + b"."
    path.write_bytes(pickled) if old else packed(path, [pickled], "data.pkl")
    assert unfolds(path)
    with pytest.raises(CheckpointError, match="unfolds to far more than it is"):
        load_checkpoint(path)
    with pytest.raises(TrainingError, match="unfolds to far more than it is"):
        read_checkpoint(path)


@pytest.mark.parametrize("new", [False, True])
def test_what_torch_saves_by_itself_does_not_unfold(new, tmp_path):
    weight = torch.randn(3, 5, 7)
    content = {
        "weight": weight.transpose(0, 2),
        "part": weight[1:, ::2],
        "parameter": nn.Parameter(weight),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 10**6),
        "repeated": torch.zeros(2).expand(100, 2),
        "bytes": b"abc",
        "bytearray": bytearray(b"abc"),
        "sparse": torch.eye(3).to_sparse(),
        "half": weight.bfloat16(),
    }
    path = tmp_path / "m.pth"
    torch.save(content, path, _use_new_zipfile_serialization=new)
    assert not unfolds(path)
    assert set(load_checkpoint(path)) == {n for n, v in content.items() if hasattr(v, "shape")}
