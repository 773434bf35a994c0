from __future__ import annotations

import gc
import json

import torch
from torch import nn

import normswap
from normswap.benchmark import compare, kept_for_backward
from normswap.running import channels_last, put_channels_last


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )


def test_rows_for_every_target_beside_batchnorm():
    x = torch.randn(2, 3, 8, 8)
    targets = {name: name for name in ("gn", "frn", "brn", "cbn")}
    found = compare(net(), targets, x, rounds=3, warmup=8, onnx=False)
    rows = {row.target: row for row in found.rows}
    assert list(rows) == ["bn", *targets]
    assert rows["bn"].training.median == 1.0
    assert rows["cbn"].state > 0
    assert rows["gn"].state == 0
    assert found.to_json()["rows"][0]["target"] == "bn"


def test_compiled_variants_stand_beside_the_eager_ones():
    x = torch.randn(2, 3, 8, 8)
    found = compare(net(), {"frn": "frn"}, x, rounds=1, warmup=1, compiled=True, onnx=False)
    assert [(row.target, row.compiled) for row in found.rows] == [
        ("bn", False),
        ("frn", False),
        ("bn", True),
        ("frn", True),
    ]
    assert all(row.training.median > 0 and row.inference.median > 0 for row in found.rows)
    assert [row.kept > 0 for row in found.rows] == [True, True, False, False]


def test_a_variant_that_cannot_train_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    found = compare(model, {"brn": "brn"}, torch.randn(1, 3, 1, 1), rounds=1, onnx=False)
    assert "cannot train here: Expected more than 1 value" in found.rows[0].note
    assert found.rows[0].training is None
    assert found.rows[1].note == ""


def test_onnx_latency_is_measured():
    found = compare(net(), {"gn": "gn"}, torch.randn(2, 3, 8, 8), rounds=2, warmup=1)
    assert found.rows[1].onnx.median > 0


def test_kept_bytes_are_the_activations_that_backward_needs():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    relu = nn.Sequential(nn.ReLU())
    assert kept_for_backward(relu, x) == x.numel() * 4
    bn = nn.BatchNorm2d(3)
    stored = kept_for_backward(bn, x)
    assert x.numel() * 4 <= stored <= x.numel() * 4 + 200


def test_mixed_precision_keeps_fewer_bytes_and_leaves_the_weights_alone():
    model = net()
    x = torch.randn(2, 3, 8, 8)
    plain = compare(model, {"gn": "gn"}, x, rounds=1, warmup=1, onnx=False).rows
    mixed = compare(model, {"gn": "gn"}, x, rounds=1, warmup=1, onnx=False, amp="bf16").rows
    assert all(a.kept < b.kept for a, b in zip(mixed, plain, strict=True))
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_nothing_of_a_measurement_stays_in_memory():
    def layers():
        gc.collect()
        return sum(type(held).__name__ == "CrossIterationBatchNorm2d" for held in gc.get_objects())

    x = torch.randn(2, 3, 8, 8)
    model = normswap.convert(net().train(), "cbn", example_inputs=x).model  # whose nodes hold it
    model[2] = nn.Sigmoid()  # whose node keeps its own output
    for _ in range(2):
        model(x)
    before = layers()
    assert kept_for_backward(model, x) > 0
    assert layers() == before


def test_measuring_leaves_the_model_alone():
    model = net().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compare(
        model, {"frn": normswap.FilterResponseNorm()}, torch.randn(2, 3, 8, 8), rounds=1, onnx=False
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training


def test_the_command_prints_json_alone(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from normswap.cli.app import app

    (tmp_path / "small_net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "python:small_net:make", "--no-pretrained", "--rounds", "2", "--no-onnx"]
    run = CliRunner().invoke(app, [*arguments, "--image-size", "16", "--to", "gn,cbn:2", "--json"])
    assert run.exit_code == 0, run.stderr
    assert [row["target"] for row in json.loads(run.stdout)["rows"]] == ["bn", "gn", "cbn:2"]
    mixed = ["--amp", "bf16", "--channels-last"]
    table = CliRunner().invoke(app, [*arguments, *mixed, "--image-size", "16", "--to", "gn"])
    assert "ratio to BatchNorm" in table.stdout
    assert CliRunner().invoke(app, [*arguments, "--to", "gn:4"]).exit_code == 2


def test_channels_last_is_for_volumes_too():
    conv, linear = nn.Conv3d(3, 4, 3), nn.Linear(3, 4)
    put_channels_last(nn.Sequential(conv, linear))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert linear.weight.is_contiguous()
    flat = torch.randn(2, 3)
    assert channels_last(flat) is flat
