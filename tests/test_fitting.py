"""Checkpoints as people have them: what fits is taken, and what became of the rest is said."""

from __future__ import annotations

import logging

import pytest
import torch
import torchvision
from click.testing import CliRunner
from torch import nn

import normswap
from normswap import sources
from normswap.checkpoints import load_checkpoint
from normswap.cli.app import app
from normswap.errors import CheckpointError, SpecError
from normswap.fitting import fit_checkpoint

SPEC = "timm/test_resnet"


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = sources.build(SPEC, pretrained=False).model
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def without_head(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def saved(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def backbone_is(model, state):
    own = model.state_dict()
    return all(torch.equal(own[name], tensor) for name, tensor in without_head(state).items())


ENCODERS = {
    "MoCo": lambda s: {
        "state_dict": under("module.encoder_q.", without_head(s))
        | {"module.encoder_q.fc.0.weight": torch.ones(4, 4)}
        | {"module.queue": torch.ones(8, 8), "module.encoder_k.fc.0.weight": torch.ones(4, 4)}
    },
    "SimSiam": lambda s: {
        "state_dict": under("module.encoder.", without_head(s))
        | {"module.predictor.0.weight": torch.ones(4, 4)}
    },
    "DINO": lambda s: {
        "student": under("module.backbone.", without_head(s))
        | {"module.head.mlp.0.weight": torch.ones(4, 4)},
        "epoch": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
    },
    "mmpretrain": lambda s: {
        "meta": {"epoch": 1},
        "state_dict": under("backbone.", without_head(s)) | {"head.fc.weight": torch.ones(9, 4)},
    },
    "smp": lambda s: (
        under("encoder.", without_head(s))
        | {"decoder.blocks.0.weight": torch.ones(3, 3), "segmentation_head.0.bias": torch.ones(1)}
    ),
    "encoder only": without_head,
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_taken_with_a_fresh_head_where_one_was_asked_for(
    kind, trained, tmp_path, caplog
):
    path = saved(ENCODERS[kind](trained), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"missing keys: fc\.weight.*--num-classes N.*--ignore"
    ):
        sources.build(SPEC, checkpoint=path)
    for options, classes in (({"num_classes": 7}, 7), ({"ignore_head": True}, 1000)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="normswap"):
            source = sources.build(SPEC, checkpoint=path, **options)
        assert backbone_is(source.model, trained)
        assert source.model.fc.weight.shape[0] == classes
        said = " ".join(caplog.messages)
        assert "a fresh head, 2 tensors: fc.weight, fc.bias" in said
        assert "took" in said
        assert ("left" in said) == (kind != "encoder only")
        # the same original can be had again, fresh head and all
        again = sources.original(source.origin)
        assert sources.weights_digest(again) == source.origin["sha256"]


def test_lightning_files_with_more_than_the_model(trained, tmp_path, caplog):
    content = {
        "state_dict": under("model.", trained)
        | {"loss.weight": torch.ones(5), "val_acc.confmat": torch.ones(2, 2)},
        "pytorch-lightning_version": "2.0",
    }
    with caplog.at_level(logging.WARNING, logger="normswap"):
        source = sources.build(SPEC, checkpoint=saved(content, tmp_path))
    assert backbone_is(source.model, trained)
    assert torch.equal(source.model.fc.weight, trained["fc.weight"])
    assert "left 2: loss.weight, val_acc.confmat" in caplog.text
    assert "under model." in caplog.text


def test_a_second_encoder_has_to_be_chosen_from(trained, tmp_path):
    other = {name: tensor + 1 for name, tensor in trained.items()}
    content = {"state_dict": under("encoder_q.", trained) | under("encoder_k.", other)}
    path = saved(content, tmp_path)
    with pytest.raises(CheckpointError, match=r"2 prefixes: encoder_q\., encoder_k\..*-prefix enc"):
        sources.build(SPEC, checkpoint=path)
    for prefix, state in (("encoder_k.", other), ("module.encoder_q", trained)):
        source = sources.build(SPEC, checkpoint=path, checkpoint_prefix=prefix)
        assert backbone_is(source.model, state)
        assert sources.weights_digest(sources.original(source.origin)) == source.origin["sha256"]
    with pytest.raises(CheckpointError, match=r"no keys under nothing.*encoder_k\. or encoder_q\."):
        sources.build(SPEC, checkpoint=path, checkpoint_prefix="nothing.")


def test_a_head_of_another_size_starts_afresh_where_a_number_was_given(trained, tmp_path, caplog):
    path = saved(trained, tmp_path)
    source = sources.build(SPEC, checkpoint=path, num_classes=5)
    assert backbone_is(source.model, trained)
    assert source.model(source.example_inputs()).shape == (1, 5)
    assert "a fresh head, 2 tensors: fc.weight, fc.bias" in caplog.text
    caplog.clear()
    assert sources.build(SPEC, checkpoint=path).model.fc.weight.shape[0] == 1000
    assert "fresh" not in caplog.text


def test_a_whole_classifier_that_is_missing(tmp_path):
    model = torchvision.models.mobilenet_v3_small(weights=None)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("classifier.")}
    path = saved(state, tmp_path)
    source = sources.build("torchvision/mobilenet_v3_small", checkpoint=path, num_classes=3)
    own = source.model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state.items())
    assert own["classifier.3.weight"].shape[0] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without_head(s) | {"conv1.0.weight": torch.ones(2, 2)}, "another shape: conv1"),
        (lambda s: {k: v for k, v in s.items() if "layer2" not in k}, r"missing keys: layer2\.0"),
        (lambda s: s | {"layer1.9.conv1.weight": torch.ones(2)}, r"extra keys: layer1\.9\.conv1"),
        (
            lambda s: under("encoder.", {k: v for k, v in s.items() if "layer2" not in k}),
            "missing keys",
        ),
    ],
)
def test_another_networks_weights_are_no_fit(change, message, trained, tmp_path):
    """A resnet18 finds all that it needs in a resnet34: that is no reason to take it."""
    with pytest.raises(CheckpointError, match=message):
        sources.build(SPEC, checkpoint=saved(change(trained), tmp_path), num_classes=4)


def test_an_own_model_without_num_classes_has_its_last_layer_for_a_head(tmp_path, monkeypatch):
    (tmp_path / "own_fit.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))\n"
        "    return model\n"
    )
    monkeypatch.chdir(tmp_path)
    whole = sources.build("python:own_fit:net").model.state_dict()
    path = saved({k: v for k, v in whole.items() if not k.startswith("4.")}, tmp_path)
    source = sources.build("python:own_fit:net", checkpoint=path, ignore_head=True)
    assert torch.equal(source.model[0].weight, whole["0.weight"])
    with pytest.raises(CheckpointError, match=r"missing keys: 4\.weight, 4\.bias"):
        sources.build("python:own_fit:net", checkpoint=path)


def test_a_stem_of_three_channels_follows_timms_rule(trained, tmp_path):
    path = saved(trained, tmp_path)
    source = sources.build(SPEC, checkpoint=path, in_chans=1)
    stem = next(name for name in trained if trained[name].ndim == 4)
    assert torch.allclose(source.model.state_dict()[stem], trained[stem].sum(1, keepdim=True))
    assert sources.weights_digest(sources.original(source.origin)) == source.origin["sha256"]


def test_options_without_a_file_are_refused():
    with pytest.raises(SpecError, match=r"checkpoint_prefix \(--checkpoint-prefix\)"):
        sources.build(SPEC, pretrained=False, checkpoint_prefix="a.")
    with pytest.raises(SpecError, match="ignore_head"):
        sources.build(SPEC, pretrained=False, ignore_head=True)


def test_what_was_taken_is_in_the_report():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    state = under("net.", model.state_dict()) | {"loss.weight": torch.ones(2)}
    found = fit_checkpoint(model, state)
    assert (found.prefix, found.left, found.initialised) == ("net.", ("loss.weight",), ())
    assert set(found.taken) == set(model.state_dict())
    assert str(found) == "took 7 tensors under net.; left 1: loss.weight"


def test_on_the_command_line_and_through_an_artefact(trained, tmp_path):
    path = saved(under("a.", trained) | under("b.", trained), tmp_path)
    out = tmp_path / "out"
    command = ["convert", SPEC, "--checkpoint", str(path), "--to", "gn", "-o", str(out)]
    options = ["--checkpoint-prefix", "b.", "--num-classes", "3", "--image-size", "64"]
    assert CliRunner().invoke(app, command).exit_code == 1
    result = CliRunner().invoke(app, command + options)
    assert result.exit_code == 0, result.output
    assert "a fresh head" in result.stderr
    assert normswap.load_model(out).model.fc.weight.shape[0] == 3


def test_names_that_nobody_agreed_on(trained, tmp_path):
    content = {"student": {"backbone": trained}, "teacher": {"backbone": trained}, "optimizer": {}}
    state = load_checkpoint(saved(content, tmp_path))
    assert {name.partition(".")[0] for name in state} == {"student", "teacher"}
    source = sources.build(
        SPEC, checkpoint=tmp_path / "w.pth", checkpoint_prefix="teacher.backbone."
    )
    assert backbone_is(source.model, trained)
