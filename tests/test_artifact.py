"""Save and load: the same bits, or one clear error and nothing half-written."""

import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import normswap
from normswap import artifact, files, sources, swap, whereabouts
from normswap.artifact import record, writing
from normswap.errors import ArtifactError, CheckpointError, SpecError
from normswap.provenance import add_history, provenance_of, remember

SPEC = "timm/test_resnet"


@pytest.fixture
def source():
    torch.manual_seed(0)
    found = artifact.load_model(SPEC, pretrained=False, num_classes=3)
    for module in found.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return found


@pytest.fixture
def saved(source, tmp_path):
    artifact.save(source.model, tmp_path / "out", class_names=["a", "b", "c"])
    return tmp_path / "out"


def _rewrite(folder, **changes):
    """Change fields and make the record agree with itself again, as an attacker would."""
    path = folder / record.RECORD
    document = {**json.loads(path.read_text()), **changes}
    document["record_sha256"] = record.record_digest(document)
    path.write_text(json.dumps(document))


def _only(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


# --------------------------------------------------------------------------------- round trips


def test_round_trip_is_bit_identical_and_keeps_the_record(source, saved):
    add_history(source.model, "fine-tuned", top1=0.9)
    artifact.save(source.model, saved, force=True)
    loaded = artifact.load_model(saved)
    inputs = source.example_inputs(2)
    with torch.no_grad():
        assert torch.equal(loaded.model(inputs), source.model(inputs))
    assert not loaded.model.training
    assert loaded.preprocessing == source.preprocessing
    assert provenance_of(loaded.model).source == source.origin
    assert provenance_of(loaded.model).history == ({"step": "fine-tuned", "top1": 0.9},)
    assert torch.equal(loaded.example_inputs(2), inputs)


def test_the_same_bits_where_kernels_depend_on_alignment(tmp_path):
    source = artifact.load_model("timm/resnet18", pretrained=False, num_classes=5)
    loaded = artifact.load(artifact.save(source.model, tmp_path / "out"))
    inputs = source.example_inputs(1)
    with torch.no_grad():
        assert torch.equal(loaded(inputs), source.model(inputs))
    assert {parameter.data_ptr() % 64 for parameter in loaded.parameters()} == {0}


def test_the_same_bits_in_a_fresh_process(source, saved, tmp_path):
    inputs = source.example_inputs(1)
    torch.save(inputs, tmp_path / "x.pt")
    code = (
        "import torch, normswap\n"
        f"m = normswap.load({str(saved)!r})\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r}, weights_only=True)\n"
        f"torch.save(m(x).detach(), {str(tmp_path / 'y.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], check=True)
    with torch.no_grad():
        wanted = source.model(inputs)
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept(source, tmp_path, dtype):
    source.model.to(dtype)
    loaded = artifact.load(artifact.save(source.model, tmp_path / "out"))
    old, new = source.model.state_dict(), loaded.state_dict()
    assert all(new[k].dtype == v.dtype and torch.equal(new[k], v) for k, v in old.items())


def test_mixed_types_are_kept(source, tmp_path):
    source.model.half()
    for module in source.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    loaded = artifact.load(artifact.save(source.model, tmp_path / "out"))
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {
        k: v.dtype for k, v in source.model.state_dict().items()
    }


def test_buffers_outside_the_state_dict_take_the_type(tmp_path):
    source = artifact.load_model("timm/levit_128s", pretrained=False)
    source.model.double()
    loaded = artifact.load_model(artifact.save(source.model, tmp_path / "out"))
    with torch.no_grad():
        inputs = source.example_inputs()
        assert torch.equal(loaded.model(inputs), source.model(inputs))


def test_memory_format_is_kept(source, tmp_path):
    source.model.to(memory_format=torch.channels_last)
    loaded = artifact.load(artifact.save(source.model, tmp_path / "out"))
    strides = [p.stride() for p in source.model.parameters()]
    assert [p.stride() for p in loaded.parameters()] == strides
    plain = artifact.load_model(SPEC, pretrained=False, num_classes=3).model
    assert strides != [p.stride() for p in plain.parameters()]


def test_frozen_parameters_stay_frozen(source, tmp_path):
    for index, parameter in enumerate(source.model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
    loaded = artifact.load(artifact.save(source.model, tmp_path / "out"))
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in source.model.parameters()
    ]


def test_saving_does_not_change_the_model(source, tmp_path):
    source.model.train()
    before = {k: v.clone() for k, v in source.model.state_dict().items()}
    artifact.save(source.model, tmp_path / "out")
    assert source.model.training
    assert all(torch.equal(v, before[k]) for k, v in source.model.state_dict().items())


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.alias = self.norm
        self.other = nn.Conv2d(3, 4, 3, bias=False)
        self.other.weight = self.conv.weight
        whole = torch.arange(8.0)
        self.register_buffer("left", whole[:6])
        self.register_buffer("right", whole[2:])
        self.register_buffer("scalar", torch.tensor(3.5))
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("turned", torch.rand(3, 5).t())

    def forward(self, x):
        return self.alias(self.norm(self.conv(x)) + self.other(x))


def make_tied():
    return _Tied()


def test_ties_aliases_views_scalars_and_empties(tmp_path):
    model = _Tied().eval()
    nn.init.normal_(model.norm.running_mean)
    artifact.save(model, tmp_path / "out")
    loaded = artifact.load(tmp_path / "out", into=_Tied())
    assert loaded.other.weight is loaded.conv.weight
    assert loaded.alias is loaded.norm
    old, new = model.state_dict(), loaded.state_dict()
    assert list(old) == list(new)
    assert all(torch.equal(new[k], v) for k, v in old.items())
    stored = json.loads((tmp_path / "out" / record.RECORD).read_text())
    assert stored["aliases"]["other.weight"] == "conv.weight"


# ------------------------------------------------------------------- models of unknown source


def test_unknown_source_names_both_ways(tmp_path):
    artifact.save(_Tied(), tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"into=.*source='python:package\.module:factory'"):
        artifact.load(tmp_path / "out")


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "artifact_factory.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
        "def other():\n"
        "    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))\n"
        "def sized(image_size=32):\n"
        "    edge = image_size // 8\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4),"
        " nn.MaxPool2d(8), nn.Flatten(), nn.Linear(4 * edge * edge, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("artifact_factory", None)


@pytest.mark.usefixtures("factory")
def test_source_named_at_save(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    artifact.save(model, tmp_path / "out", source="python:artifact_factory:net")
    x = torch.rand(1, 3, 8, 8)
    with pytest.raises(ArtifactError, match=r"Try --trust python:artifact_factory:net \(trust="):
        artifact.load(tmp_path / "out")
    loaded = artifact.load(tmp_path / "out", trust="python:artifact_factory:net")
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ArtifactError, match="does not build this model"):
        artifact.save(model, tmp_path / "two", source="python:artifact_factory:other")
    with pytest.raises(ArtifactError, match="does not build this model"):
        artifact.save(model, tmp_path / "two", source="python:artifact_factory:nowhere")
    assert not (tmp_path / "two").exists()


def test_model_changed_by_hand_is_not_lost(source, tmp_path, caplog):
    source.model.fc = nn.Linear(source.model.fc.in_features, 9)
    artifact.save(source.model, tmp_path / "out")
    assert "into=" in caplog.text
    fresh = artifact.load_model(SPEC, pretrained=False, num_classes=9).model
    loaded = artifact.load(tmp_path / "out", into=fresh)
    assert torch.equal(loaded.fc.weight, source.model.fc.weight)


def test_an_edited_eps_is_not_lost_without_a_word(source, tmp_path, caplog):
    norms = [m for m in source.model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].eps = 0.1
    x = source.example_inputs(2)
    model = swap.convert(source.model, "frozen", example_inputs=x).model
    artifact.save(model, tmp_path / "out")
    assert "eps=0.1" in caplog.text
    with pytest.raises(ArtifactError, match="into"):
        artifact.load(tmp_path / "out")


@pytest.mark.parametrize(
    "edit",
    [
        lambda net: setattr(net, "maxpool", nn.Identity()),
        lambda net: setattr(net.conv1[0], "stride", (1, 1)),
        lambda net: setattr(net, "act1", nn.Tanh()),
    ],
)
def test_an_edit_that_no_state_dict_shows_is_not_lost_without_a_word(
    edit, source, tmp_path, caplog
):
    names = set(dict(source.model.named_modules()))
    edit(source.model)
    assert set(dict(source.model.named_modules())) == names
    x = source.example_inputs(2)
    model = swap.convert(source.model, "gn", example_inputs=x).model
    artifact.save(model, tmp_path / "out")
    assert "into=" in caplog.text
    with pytest.raises(ArtifactError, match="into"):
        artifact.load(tmp_path / "out")


@pytest.mark.usefixtures("factory")
def test_the_size_that_a_factory_was_given_is_remembered(tmp_path, caplog):
    source = artifact.load_model("python:artifact_factory:sized", image_size=48)
    assert source.origin["weights"] == "none"
    model = swap.convert(source.model, "gn", example_inputs=source.example_inputs(2)).model
    artifact.save(model, tmp_path / "out")
    assert not caplog.text
    again = artifact.load_model(tmp_path / "out", trust=["python:artifact_factory:sized"])
    x = again.example_inputs(2)
    assert x.shape[2:] == (48, 48)
    assert torch.equal(again.model(x), model(x))


def test_a_mounted_folder_is_filled_in_place(saved, source, tmp_path, monkeypatch):
    stat, target = Path.stat, tmp_path / "out"

    def other_device(path, **options):
        found = stat(path, **options)
        return Mounted(found) if path == target else found

    class Mounted:
        def __init__(self, found):
            self.st_dev, self.st_mode = found.st_dev + 1, found.st_mode

    (target / "mine.txt").write_text("mine")
    monkeypatch.setattr(Path, "stat", other_device)
    rename = Path.rename

    def inside_alone(path, new):  # nothing can be renamed into a mounted volume
        assert target in path.parents
        assert target in Path(new).parents
        return rename(path, new)

    monkeypatch.setattr(Path, "rename", inside_alone)
    artifact.save(source.model, target, force=True)
    assert artifact.load(target) is not None
    assert not list(tmp_path.glob(".*"))
    assert not list(target.glob(".*"))
    assert (target / "mine.txt").read_text() == "mine"


def test_into_a_model_that_does_not_fit(saved):
    with pytest.raises(ArtifactError, match=r"tensors missing.*tensors left over"):
        artifact.load(saved, into=nn.Sequential(nn.Conv2d(3, 4, 3)))
    other = artifact.load_model(SPEC, pretrained=False, num_classes=4).model
    with pytest.raises(ArtifactError, match=r"of another shape: fc\.weight \(3, \d+\) for \(4, "):
        artifact.load(saved, into=other)


# --------------------------------------------------------------------------------------- damage


def test_any_edited_byte_of_the_weights(saved):
    path = saved / record.WEIGHTS
    good = path.read_bytes()
    for spot in (0, 9, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[spot] ^= 1
        path.write_bytes(bytes(bad))
        with pytest.raises(ArtifactError, match="SHA-256"):
            artifact.load(saved)
    path.write_bytes(good[:-5])
    with pytest.raises(ArtifactError, match="SHA-256"):
        artifact.load(saved)
    path.unlink()
    with pytest.raises(ArtifactError, match="No such file"):
        artifact.load(saved)


def test_any_edited_byte_of_the_record(saved):
    path = saved / record.RECORD
    good = path.read_bytes()
    quiet = 0
    for spot in range(0, len(good), 7):
        bad = bytearray(good)
        bad[spot] ^= 1
        path.write_bytes(bytes(bad))
        try:
            artifact.load(saved)
        except ArtifactError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            quiet += 1
            assert good[spot : spot + 1].isspace()  # layout alone
    assert quiet < len(good) // 14


def test_newer_format(saved):
    _rewrite(saved, format_version=2)
    with pytest.raises(ArtifactError, match=r"format_version 2.*pip install --upgrade normswap"):
        artifact.load(saved)


@pytest.mark.parametrize(
    ("field", "bad"),
    [(f, b) for f in ("format_version",) for b in (None, "1", 0, True, 1.5, [])]
    + [(f, b) for f in ("plans", "history") for b in (None, 3, "x", [3], {"a": 1})]
    + [(f, b) for f in ("frozen", "channels_last", "class_names") for b in (3, "x", [3], {})]
    + [(f, b) for f in ("aliases",) for b in (3, [], {"a": 3}, {"a": "nowhere"})]
    + [(f, b) for f in ("dtype",) for b in (None, 3, "int8", "load", "nothing")]
    + [(f, b) for f in ("sha256",) for b in (None, 3, "00")]
    + [("preprocessing", b) for b in (3, [], {"input_size": "x"}, {"colour": 1})]
    + [("source", b) for b in (3, [], {}, {"spec": 3}, {"spec": "nonsense"})]
    + [("source", {"spec": "timm/resnet18", "num_classes": b}) for b in ("x", -1, [])]
    + [("source", {"spec": "python:os:abort"}), ("source", {"spec": "python:builtins:exit"})]
    + [("source", {"spec": SPEC, "arguments": {"architecture": 3, "options": 4}})]
    + [("plans", [{}]), ("plans", [{"entries": 3}])],
)
def test_hostile_records_are_one_kind_of_error(saved, field, bad):
    _rewrite(saved, **{field: bad})
    with pytest.raises(ArtifactError) as caught:
        artifact.load_model(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, "\x00"])
def test_records_that_are_no_records(saved, text):
    (saved / record.RECORD).write_text(text)
    with pytest.raises(ArtifactError):
        artifact.load(saved)


def test_directories_that_are_no_artefacts(tmp_path):
    with pytest.raises(ArtifactError, match=r"no normswap\.json"):
        artifact.load_model(tmp_path)
    with pytest.raises(ArtifactError, match=r"no normswap\.json"):
        artifact.load(tmp_path / "none")
    with pytest.raises(SpecError, match="normswap directory"):
        artifact.load_model(str(tmp_path / "none"))


def test_an_artefact_brings_its_own_weights_and_head(saved):
    with pytest.raises(ArtifactError, match="num_classes"):
        artifact.load_model(saved, num_classes=4)
    with pytest.raises(ArtifactError, match="checkpoint"):
        artifact.load_model(saved, checkpoint="x.pth")


# -------------------------------------------------------------------------------------- writing


def test_a_directory_in_use_is_refused_without_force(source, saved):
    before = (saved / record.RECORD).read_bytes()
    with pytest.raises(ArtifactError, match=r"not empty.*--force"):
        artifact.save(source.model, saved)
    assert (saved / record.RECORD).read_bytes() == before
    _only(saved.parent, "out")


def test_an_empty_directory_is_fine(source, tmp_path):
    (tmp_path / "out").mkdir()
    artifact.save(source.model, tmp_path / "out")
    _only(tmp_path / "out", *record.OWN_FILES)
    _only(tmp_path, "out")


def test_parents_are_made(source, tmp_path):
    artifact.save(source.model, tmp_path / "a" / "b" / "out")
    _only(tmp_path / "a" / "b", "out")


def test_force_replaces_the_artefact_and_keeps_other_files(source, saved):
    (saved / "curve.png").write_text("picture")
    (saved / "checkpoints").mkdir()
    (saved / "checkpoints" / "last.pt").write_text("x")
    with torch.no_grad():
        source.model.fc.bias.fill_(7.0)
    artifact.save(source.model, saved, force=True)
    assert artifact.load(saved).fc.bias.tolist() == [7.0] * 3
    _only(saved, *record.OWN_FILES, "curve.png", "checkpoints")
    assert (saved / "checkpoints" / "last.pt").read_text() == "x"
    _only(saved.parent, "out")


def test_force_never_overwrites_what_is_not_normswaps(source, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ArtifactError, match=r"no artefact but holds README\.md"):
        artifact.save(source.model, tmp_path, force=True)
    assert (tmp_path / "README.md").read_text() == "mine"
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}")
    artifact.save(source.model, run, force=True)
    _only(run, *record.OWN_FILES, "metrics.jsonl")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ArtifactError, match="got a file"):
        artifact.save(source.model, file, force=True)


def test_files_are_as_readable_as_any_other(saved):
    (saved.parent / "plain").touch()
    wanted = (saved.parent / "plain").stat().st_mode
    assert {(saved / name).stat().st_mode for name in record.OWN_FILES} == {wanted}


def _fail_with(number):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (writing, "save_file"),
        (files, "flush"),
        (writing.Path, "write_text"),
        (writing.Path, "mkdir"),
        (writing.Path, "rename"),
    ],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("force", [False, True])
def test_full_disk_and_no_permission_leave_nothing_behind(
    source, tmp_path, monkeypatch, owner, name, number, force
):
    target = tmp_path / "place" / "out"
    target.parent.mkdir()
    if force:
        artifact.save(source.model, target)
        (target / "mine.txt").write_text("mine")  # so that names cannot simply be exchanged
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _fail_with(number))
        with pytest.raises(ArtifactError, match=os.strerror(number)) as caught:
            artifact.save(source.model, target, force=force)
    assert "\n" not in str(caught.value)
    if force:
        _only(target.parent, "out")
        artifact.load(target)
    else:
        _only(target.parent)


def test_interruption_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "flush", interrupt)
    with pytest.raises(KeyboardInterrupt):
        artifact.save(source.model, tmp_path / "out")
    _only(tmp_path)


def test_safetensors_own_io_error_is_one_clear_error(source, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise writing.SafetensorError("Error while serializing: I/O error: No space left")

    monkeypatch.setattr(writing, "save_file", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        artifact.save(source.model, tmp_path / "out")
    _only(tmp_path)


def test_models_that_cannot_be_saved(tmp_path):
    with pytest.raises(ArtifactError, match="meta device"):
        artifact.save(nn.Linear(2, 2, device="meta"), tmp_path / "out")

    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ArtifactError, match="no tensor"):
        artifact.save(Odd(2, 2), tmp_path / "out")
    _only(tmp_path)


def test_record_is_plain_json_whatever_the_history_holds(source, tmp_path):
    import numpy as np

    add_history(
        source.model,
        "evaluated",
        top1=torch.tensor(0.5),
        loss=float("nan"),
        where=tmp_path,
        images=np.int64(4),
        sizes=(1, 2),
    )
    artifact.save(source.model, tmp_path / "out")
    text = (tmp_path / "out" / record.RECORD).read_text()
    assert "NaN" not in text
    (entry,) = provenance_of(artifact.load(tmp_path / "out")).history
    assert entry == {
        "step": "evaluated",
        "top1": 0.5,
        "loss": None,
        "where": str(tmp_path),
        "images": 4,
        "sizes": [1, 2],
    }


def test_model_card_tells_what_was_swapped_and_how_to_load():
    document = {
        "model": "Net",
        "plans": [
            {
                "target": "gn",
                "entries": [
                    {"names": ["bn1"], "kind": "BatchNorm2d", "becomes": "gn"}
                    | {"recipe": {"groups": 32}, "init": "match", "reason": None},
                    {
                        "names": ["bn|2", "alias"],
                        "kind": "BatchNorm2d",
                        "becomes": "frozen",
                        "reason": "1x1",
                    },
                ],
            }
        ],
        "history": [{"step": "evaluated", "top1": 0.9}],
    }
    card = artifact.writing.model_card(document, "out")
    assert "| BatchNorm2d | gn | 1 |" in card
    assert "| `bn1` | gn | groups=32 | match |  |" in card
    assert r"| `bn\|2`, `alias` | frozen |  |  | 1x1 |" in card
    assert "| evaluated | top1=0.9 |" in card
    assert 'normswap.load("out", into=' in card


def test_model_card_sets_the_score_beside_the_originals():
    facts = {"step": "fine-tuned", "val_top1": 0.934, "original_top1": 0.95, "start_top1": None}
    card = artifact.writing.model_card({"model": "Net", "history": [facts, {"step": "x"}]}, "out")
    assert "| score on the validation images | top-1 93.4 % |" in card
    assert "| score of the BatchNorm original there | top-1 95.0 % |" in card
    assert "score before fine-tuning" not in card
    facts |= {"val_metric": 12.345, "start_metric": 3.0}
    card = artifact.writing.model_card({"model": "Net", "history": [facts]}, "out")
    assert "| score on the validation images | 12.35 |" in card
    assert "| score before fine-tuning there | 3 |" in card


@pytest.mark.parametrize("target", ["gn(groups=8)", "ln", "gn(groups=8)+"])
def test_weights_load_strictly_into_the_librarys_own_norm_layer(target):
    import timm
    import torchvision
    from timm.layers import GroupNorm

    groups = 1 if target == "ln" else 8
    inputs = torch.randn(2, 3, 64, 64)
    init = "steady" if target.endswith("+") else "match"  # producers are scaled: still plain
    for make, layer in (
        (lambda **k: timm.create_model("test_resnet", **k), partial(GroupNorm, num_groups=groups)),
        (torchvision.models.resnet18, partial(torch.nn.GroupNorm, groups)),
    ):
        model = make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        result = normswap.convert(model, target.rstrip("+"), example_inputs=inputs, init=init)
        plain = make(norm_layer=layer)
        plain.load_state_dict(result.model.state_dict())
        with torch.no_grad():
            assert torch.allclose(plain.eval()(inputs), result.model.eval()(inputs), atol=1e-4)


def test_converted_model_round_trip(tmp_path):
    for target in ("gn", "frn", "brn", "frozen"):
        fresh = artifact.load_model(SPEC, pretrained=False, num_classes=3)
        inputs = fresh.example_inputs(2)
        model = swap.convert(fresh.model, target, example_inputs=inputs).model.eval()
        loaded = artifact.load(artifact.save(model, tmp_path / target))
        with torch.no_grad():
            assert torch.equal(loaded(inputs), model(inputs)), target
        (wanted,) = provenance_of(model).plans
        assert provenance_of(loaded).plans == (json.loads(json.dumps(wanted)),)
        assert "bn1" in (tmp_path / target / record.CARD).read_text()


def test_class_names_given_at_save(source, saved):
    assert provenance_of(artifact.load(saved)).class_names == ("a", "b", "c")
    remember(source.model, class_names=("x", "y", "z"))
    artifact.save(source.model, saved, force=True)
    assert artifact.load_model(saved).class_names == ("x", "y", "z")


def test_no_folder_of_this_machine_leaves_it(tmp_path, monkeypatch):
    home = tmp_path / "secret_home"
    home.mkdir()
    torch.save(
        sources.build("timm/test_resnet", pretrained=False).model.state_dict(), home / "w.pth"
    )
    source = sources.build("timm/test_resnet", checkpoint=home / "w.pth")
    x = source.example_inputs()
    normswap.convert(source.model, "gn", example_inputs=x)
    normswap.save(source.model, tmp_path / "gn")
    normswap.export_onnx(source.model, tmp_path / "gn.onnx", example_inputs=x)
    for file in [*(tmp_path / "gn").iterdir(), tmp_path / "gn.onnx"]:
        assert b"secret_home" not in file.read_bytes(), file
    origin = normswap.load_model(tmp_path / "gn").origin
    assert origin["checkpoint"] == "w.pth"
    original = sources.original(origin)  # this machine remembers the place, another does not
    assert sources.weights_digest(original) == origin["sha256"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with pytest.raises(CheckpointError, match=r"w\.pth: got no such file here.*--teacher"):
        sources.original(origin)
    monkeypatch.chdir(home)
    assert sources.weights_digest(sources.original(origin)) == origin["sha256"]


def test_a_remembered_place_is_a_hint_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whereabouts.note_checkpoint("abc", tmp_path / "w.pth")
    assert whereabouts.find_checkpoint("abc", "w.pth") == Path("w.pth")  # it is not there
    (tmp_path / "w.pth").touch()
    assert whereabouts.find_checkpoint("abc", "w.pth") == tmp_path / "w.pth"
    for spoilt in ("[1]", "{", "[" * 100_000, '{"abc": 3}'):
        (tmp_path / "normswap" / "checkpoints.json").write_text(spoilt)
        assert whereabouts.find_checkpoint("abc", "w.pth") == Path("w.pth")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "w.pth"))  # a file: no cache to be had
    whereabouts.note_checkpoint("abc", tmp_path / "w.pth")


def test_the_same_model_is_the_same_bytes_whatever_order_metadata_come_in(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    found = []
    for number in range(8):  # of two entries, safetensors writes either first
        file = tmp_path / f"{number}.safetensors"
        save_file({"a": torch.ones(3)}, file, metadata={"format": "pt", "é": "1", "b": "2"})
        writing._sort_metadata(file)
        found.append(file.read_bytes())
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "é": "1", "b": "2"}
        assert torch.equal(load_file(file)["a"], torch.ones(3))
    assert len(set(found)) == 1
