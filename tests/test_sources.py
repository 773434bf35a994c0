"""Specs, weights and example inputs; nothing here touches a network."""

import argparse
import builtins
import os
import pickle
import socket
import sys
import textwrap
import urllib.error
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from normswap import checkpoints, libraries, sources
from normswap.errors import CheckpointError, InstallationError, SpecError
from normswap.factories.timm_models import timm_preprocessing
from normswap.provenance import provenance_of


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every name look-up and connection fails at once, as on a machine without a network."""

    def refuse(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def factory_module(tmp_path, monkeypatch):
    """A module of the user's own, importable only because it lies in the current folder."""
    (tmp_path / "own_factory_module.py").write_text(
        textwrap.dedent(
            """
            from torch import nn

            def net(num_classes=4):
                return nn.Sequential(
                    nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
                )

            def sized(image_size=8, pretrained=False):
                model = net()
                model.input_size = (1, image_size, image_size)
                model.asked_pretrained = pretrained
                model.class_names = ["a", "b", "c", "d"]
                return model

            class Zoo:
                small = staticmethod(net)
                number = 3

            def volume():
                return nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4))

            def vector():
                return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))

            def nothing():
                return 3

            def broken():
                raise KeyError("weights")
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    yield "own_factory_module"
    sys.modules.pop("own_factory_module", None)


@pytest.mark.parametrize(
    ("spec", "size", "task"),
    [
        ("timm/resnet18", (3, 224, 224), "image"),
        ("timm/resnet18.a1_in1k", (3, 224, 224), "image"),
        ("timm/test_resnet", (3, 160, 160), "image"),
        ("torchvision/mobilenet_v3_small", (3, 224, 224), "image"),
        ("torchvision/resnet18:IMAGENET1K_V1", (3, 224, 224), "image"),
        ("torchvision/inception_v3", (3, 299, 299), "image"),
        ("torchvision/googlenet", (3, 224, 224), "image"),
        ("torchvision/r3d_18", (3, 16, 112, 112), "video"),
        ("torchvision/lraspp_mobilenet_v3_large", (3, 520, 520), "image"),
        ("torchvision/ssdlite320_mobilenet_v3_large", (3, 320, 320), "detection"),
        ("torchvision/raft_small", (3, 128, 128), "flow"),
    ],
)
def test_build_and_rebuild(spec, size, task):
    source = sources.build(spec, pretrained=False)
    assert source.preprocessing.input_size == size
    assert source.task == task
    assert not source.model.training
    assert provenance_of(source.model).source == source.origin
    again = sources.rebuild(source.origin)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in source.model.state_dict().items()
    }


def test_num_classes_reaches_every_head_and_the_rebuild():
    source = sources.build("torchvision/googlenet", pretrained=False, num_classes=7)
    heads = {n: m.out_features for n, m in source.model.named_modules() if n.endswith("fc2")}
    assert source.model.fc.out_features == 7
    assert heads == {"aux1.fc2": 7, "aux2.fc2": 7}
    assert sources.rebuild(source.origin).fc.out_features == 7


@pytest.mark.parametrize(
    "spec", ["timm/resnet10t", "torchvision/mobilenet_v3_small", "torchvision/raft_small"]
)
def test_example_inputs_fit_and_repeat(spec):
    source = sources.build(spec, pretrained=False)
    first, second = source.example_inputs(1), source.example_inputs(1)
    pairs = zip(first, second, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first[0], source.example_inputs(1, seed=1)[0])
    with torch.no_grad():
        source.model(*first) if isinstance(first, tuple) else source.model(first)


def test_example_inputs_of_a_detector_are_a_list_of_images():
    source = sources.build("torchvision/ssdlite320_mobilenet_v3_large", pretrained=False)
    images = source.example_inputs(2, image_size=64)
    assert [tuple(image.shape) for image in images] == [(3, 64, 64)] * 2
    assert min(float(image.min()) for image in images) >= 0
    with torch.no_grad():
        assert len(source.model(images)) == 2


def test_example_inputs_take_the_type_of_the_weights():
    source = sources.build("timm/resnet10t", pretrained=False)
    source.model.double()
    assert source.example_inputs().dtype == torch.float64


@pytest.mark.parametrize("name", ["resnet10t", "resnet50.a1_in1k", "mobilenetv3_small_100"])
def test_images_for_tests_are_those_of_timms_own_validation(name):
    cfg = libraries.library("timm").get_pretrained_cfg(name).to_dict()
    timm_data = libraries.library("timm.data")
    right = timm_data.resolve_data_config({}, pretrained_cfg=cfg, use_test_size=True)
    found = timm_preprocessing(cfg)
    assert found.tested().input_size == right["input_size"]
    assert found.tested().crop_pct == right["crop_pct"]
    assert found.input_size == cfg["input_size"]


def test_image_size_reaches_architectures_that_must_know_it():
    source = sources.build("timm/levit_128s", pretrained=False, image_size=160)
    assert source.example_inputs().shape == (1, 3, 160, 160)
    with torch.no_grad():
        assert source.model(source.example_inputs()).shape == (1, 1000)
    again = sources.rebuild(source.origin)
    with torch.no_grad():
        again(source.example_inputs())


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("timm/resnet19", "timm/resnet18"),
        ("timm/mobilenetv3", "timm/mobilenetv3_"),
        ("torchvision/resnet5", "torchvision/resnet50"),
        ("timm/resnet18.nosuch_tag", r"timm/resnet18\.a1_in1k"),
        ("torchvision/resnet18:NOPE", "IMAGENET1K_V1"),
        ("resnet18", "timm/resnet18 or torchvision/resnet18"),
        ("python:json", "python:my_models:make_net"),
        ("python:no_such_module_here:make", "installing it"),
        ("python:os:abort", "Python's own library"),
        ("", "normswap list"),
        ("timm/", "normswap list"),
    ],
)
def test_unknown_specs_say_what_to_try(spec, match):
    with pytest.raises(SpecError, match=match) as caught:
        sources.build(spec, pretrained=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["timm/resnet18.a1_in1k", "torchvision/resnet18", "hf-hub:timm/resnet18.a1_in1k"]
)
def test_no_network_names_the_ways_out(spec, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SpecError, match=r"--checkpoint .*--no-pretrained") as caught:
        sources.build(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("x"), ConnectionError("y"), TimeoutError()]
)
def test_any_download_failure_is_one_spec_error(error, monkeypatch):
    import torchvision

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fail)
    with pytest.raises(SpecError, match="--no-pretrained"):
        sources.build("torchvision/resnet18")


def test_httpx_errors_count_as_network_errors(monkeypatch):
    import timm

    class ConnectError(Exception):  # no OSError, and not everyone has httpx installed
        __module__ = "httpx"

    def fail(*_args, **_kwargs):
        raise ConnectError("no route")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(SpecError, match="--no-pretrained"):
        sources.build("timm/resnet18")


def test_model_without_pretrained_weights_says_so():
    with pytest.raises(SpecError, match=r"no pretrained weights.*--no-pretrained"):
        sources.build("timm/vovnet39a")


def test_no_download_without_pretrained(monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    source = sources.build("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", pretrained=False)
    assert source.task == "detection"


def _state_of(monkeypatch, weights_kind, model):
    monkeypatch.setattr(weights_kind, "get_state_dict", lambda *_a, **_k: model.state_dict())


def test_pretrained_torchvision_with_another_head(monkeypatch):
    import torchvision

    trained = torchvision.models.mobilenet_v3_small(weights=None).eval()
    _state_of(monkeypatch, torchvision.models.MobileNet_V3_Small_Weights, trained)
    source = sources.build("torchvision/mobilenet_v3_small", num_classes=5)
    assert source.model.classifier[3].out_features == 5
    assert torch.equal(source.model.features[0][0].weight, trained.features[0][0].weight)
    assert torch.equal(source.model.classifier[0].weight, trained.classifier[0].weight)
    assert source.class_names is None
    full = sources.build("torchvision/mobilenet_v3_small")
    assert len(full.class_names) == 1000
    assert full.origin["weights"] == "pretrained"


def test_pretrained_googlenet_keeps_its_input_transform(monkeypatch):
    import torchvision

    trained = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False)
    _state_of(monkeypatch, torchvision.models.GoogLeNet_Weights, trained)
    source = sources.build("torchvision/googlenet")
    again = sources.rebuild(source.origin)
    assert source.model.transform_input is again.transform_input is True
    assert source.model.aux1 is again.aux1 is None
    assert set(again.state_dict()) == set(source.model.state_dict())


def test_frozen_norms_of_a_pretrained_detector_become_ordinary_ones(monkeypatch):
    from torchvision.models import detection
    from torchvision.ops import FrozenBatchNorm2d

    kind = detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights
    builder = detection.fasterrcnn_mobilenet_v3_large_320_fpn
    blank = builder(weights=None, weights_backbone=None)
    for module in blank.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    _state_of(monkeypatch, kind, blank)
    frozen = builder(weights=kind.DEFAULT).eval()
    assert any(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules())
    source = sources.build("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn")
    kinds = {type(m) for m in source.model.modules()}
    assert nn.BatchNorm2d in kinds
    assert FrozenBatchNorm2d not in kinds
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        old = frozen.backbone(images)
        new = source.model.backbone(images)
    for key, value in old.items():
        scale = float(value.abs().max())
        assert float((new[key] - value).abs().max()) < 1e-5 * scale
    again = sources.rebuild(source.origin)
    eps = {n: m.eps for n, m in source.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert eps == {n: m.eps for n, m in again.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert set(again.state_dict()) == set(source.model.state_dict())


def test_pretrained_timm_goes_through_its_download_code(monkeypatch):
    import timm

    trained = timm.create_model("test_resnet", pretrained=False)
    calls = []

    def give(*args, **_kwargs):
        calls.append(args)
        return trained.state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", give)
    source = sources.build("timm/test_resnet.r160_in1k")
    assert calls
    assert len(source.class_names) == 1000
    assert sources.weights_digest(source.model) == sources.weights_digest(trained)
    again = sources.original(source.origin)
    assert sources.weights_digest(again) == source.origin["sha256"]
    with torch.no_grad():
        next(trained.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="other weights"):
        sources.original(source.origin)


def test_hub_models_are_rebuilt_without_the_hub(monkeypatch):
    cfg = {"architecture": "test_resnet", "num_classes": 3, "input_size": [1, 64, 64]}
    cfg |= {"mean": [0.5], "std": [0.5], "label_names": ["x", "y", "z"], "hf_hub_id": "me/it"}
    args = {"in_chans": 1}
    monkeypatch.setattr(
        "timm.models.load_model_config_from_hf", lambda *_a, **_k: (cfg, "test_resnet", args)
    )
    source = sources.build("hf-hub:me/it", pretrained=False)
    assert source.preprocessing.input_size == (1, 64, 64)
    monkeypatch.undo()
    again = sources.rebuild(source.origin, trust="hf-hub:me/it")
    assert again(torch.zeros(1, 1, 64, 64)).shape == (1, 3)


# ----------------------------------------------------------------------------------- factories


def test_python_factories(factory_module):
    source = sources.build(f"python:{factory_module}:net", num_classes=6)
    assert source.preprocessing.input_size == (1, 224, 224)
    assert source.model(source.example_inputs(2, image_size=9)).shape == (2, 6)
    assert os.getcwd() not in sys.path  # noqa: PTH109
    assert sources.build(f"python:{factory_module}:Zoo.small").model(torch.zeros(1, 1, 9, 9)).any()
    assert sources.build(f"python:{factory_module}:volume").example_inputs().shape[1] == 2
    assert sources.build(f"python:{factory_module}:vector").example_inputs(3).shape == (3, 5)


def test_python_factory_gets_what_it_names(factory_module):
    source = sources.build(f"python:{factory_module}:sized", image_size=12)
    assert source.preprocessing.input_size == (1, 12, 12)
    assert source.model.asked_pretrained is True
    assert source.class_names == ("a", "b", "c", "d")
    plain = sources.build(f"python:{factory_module}:sized", pretrained=False)
    assert plain.preprocessing.input_size == (1, 8, 8)
    assert plain.model.asked_pretrained is False


@pytest.mark.parametrize(
    ("attribute", "options", "match"),
    [
        ("nett", {}, "net"),
        ("nothing", {}, "nn.Module"),
        ("Zoo.number", {}, "function or class"),
        ("broken", {}, "KeyError from the factory"),
        ("vector", {"num_classes": 3}, "takes num_classes"),
    ],
)
def test_python_factories_that_fail(factory_module, attribute, options, match):
    with pytest.raises(SpecError, match=match):
        sources.build(f"python:{factory_module}:{attribute}", **options)


# --------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained():
    return sources.build("timm/test_resnet", pretrained=False).model


def _same(model, other):
    return sources.weights_digest(model) == sources.weights_digest(other)


def _prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}},
        lambda s: {"state_dict_ema": s, "state_dict": {k: v * 0 for k, v in s.items()}},
        lambda s: {"model_ema": {"n_averaged": torch.tensor(1), **_prefixed(s, "module.")}},
        lambda s: {"state_dict": _prefixed(s, "module."), "args": argparse.Namespace(lr=0.1)},
        lambda s: _prefixed(s, "_orig_mod."),
        lambda s: _prefixed(s, "module._orig_mod."),
        lambda s: _prefixed(s, "_orig_mod.module."),
        lambda s: {"checkpoint": 1, "state_dict": {"model": s}},
        lambda s: {"state_dict": _prefixed(s, "model."), "epoch": 3},
        lambda s: {"model": s, "model_ema": {"decay": torch.tensor(0.9)}},
    ],
)
def test_wrappers_are_taken_off(wrap, trained, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(wrap(trained.state_dict()), path)
    source = sources.build("timm/test_resnet", checkpoint=path)
    assert _same(source.model, trained)
    assert source.origin["weights"] == "checkpoint"
    assert sources.weights_digest(sources.original(source.origin)) == source.origin["sha256"]


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_model_whose_own_attribute_is_called_module(prefix, tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    own = Wrapped()
    torch.save(_prefixed(own.state_dict(), prefix), tmp_path / "own.pth")
    fresh = Wrapped()
    checkpoints.fit_checkpoint(fresh, checkpoints.load_checkpoint(tmp_path / "own.pth"))
    assert _same(fresh, own)


@pytest.mark.parametrize("name", ["weights.safetensors", "pytorch_model.bin"])
def test_safetensors_are_known_by_content(name, trained, tmp_path):
    save_file(trained.state_dict(), tmp_path / name)
    assert _same(sources.build("timm/test_resnet", checkpoint=tmp_path / name).model, trained)


def test_old_files_without_counters_and_with_densenet_names(tmp_path):
    import re

    import torchvision

    model = torchvision.models.densenet121(weights=None)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert set(old) - set(model.state_dict())
    torch.save(old, tmp_path / "densenet121.pth")
    loaded = sources.build("torchvision/densenet121", checkpoint=tmp_path / "densenet121.pth").model
    assert _same(loaded, model)


def test_optional_parts_follow_the_checkpoint(tmp_path):
    import torchvision

    for aux in (True, False):
        model = torchvision.models.googlenet(weights=None, aux_logits=aux, init_weights=False)
        torch.save(model.state_dict(), tmp_path / "g.pth")
        loaded = sources.build("torchvision/googlenet", checkpoint=tmp_path / "g.pth")
        assert _same(loaded.model, model)
        assert loaded.model.transform_input is False


class _Attack:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_never_runs(tmp_path, legacy):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    payload = {"state_dict": {"weight": torch.ones(1)}, "x": _Attack(marker)}
    torch.save(payload, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"more than tensors: .*mkdir.*nothing of it was run"):
        sources.build("timm/test_resnet", checkpoint=path)
    assert not marker.exists()
    path.write_bytes(pickle.dumps(_Attack(marker)))
    with pytest.raises(CheckpointError):
        checkpoints.load_checkpoint(path)
    assert not marker.exists()


def test_unsafe_loading_cannot_be_switched_on_from_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"x": _Attack(marker)}, path)
    with pytest.raises(CheckpointError):
        checkpoints.load_checkpoint(path)
    assert not marker.exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        checkpoints.load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.98])
def test_truncated_files(name, keep, trained, tmp_path):
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(trained.state_dict(), path)
    else:
        save_file(trained.state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=r"w\.\w+: got an unreadable file of \d+ bytes") as e:
        checkpoints.load_checkpoint(path)
    assert "\n" not in str(e.value)


def test_garbled_files_are_one_kind_of_error(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    good = (tmp_path / "w.pth").read_bytes()
    for _ in range(150):
        spot, value = torch.randint(0, 256, (2,), generator=generator).tolist()
        bad = bytearray(good)
        bad[spot % len(bad)] = value
        (tmp_path / "w.pth").write_bytes(bytes(bad))
        try:
            checkpoints.load_checkpoint(tmp_path / "w.pth")
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], torch.ones(2), {"state_dict": {}}])
def test_files_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no weights"):
        checkpoints.load_checkpoint(tmp_path / "w.pth")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoints.load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="a folder"):
        checkpoints.load_checkpoint(tmp_path)


def test_keys_and_shapes_that_do_not_fit_are_named(trained, tmp_path):
    state = dict(trained.state_dict())
    path = tmp_path / "w.safetensors"
    save_file({k: v for k, v in state.items() if k != "conv1.0.weight"}, path)
    missing = next(iter(state))
    rest = {k: v for k, v in state.items() if k != missing}
    save_file(rest | {"surplus": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=rf"1 missing keys: {missing}; 1 extra keys: surplus"):
        sources.build("timm/test_resnet", checkpoint=path)
    save_file(state | {missing: torch.ones(2, 2)}, path)
    with pytest.raises(
        CheckpointError, match=rf"1 tensors of another shape: {missing} \(2, 2\) for"
    ):
        sources.build("timm/test_resnet", checkpoint=path)


def test_a_head_of_another_size_is_explained(trained, tmp_path):
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    small = sources.build("timm/test_resnet", pretrained=False, num_classes=10).model
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match=r"--num-classes 10 \(num_classes=10\)"):
        sources.build("timm/test_resnet", checkpoint=tmp_path / "small.safetensors")


# ----------------------------------------------------------------------- lists, heads, packages


def test_list_models():
    names = sources.list_models()
    assert {"timm/resnet50", "torchvision/resnet50"} <= set(names)
    assert sources.list_models("torchvision/resnet5*") == ["torchvision/resnet50"]
    assert "timm/resnet18.a1_in1k" in sources.list_models("timm/resnet18.*")
    assert all("resnext" in name for name in sources.list_models("resnext"))


def test_count_batchnorms():
    assert sources.count_batchnorms("torchvision/resnet50") == 53
    assert sources.count_batchnorms("timm/efficientnet_b0") == 49
    assert sources.count_batchnorms("timm/vit_tiny_patch16_224") == 0


def test_count_batchnorms_where_meta_does_not_do(tmp_path, monkeypatch):
    (tmp_path / "computing_factory.py").write_text(
        "import torch\n"
        "def net():\n"
        "    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))\n"
        "    assert float(model[0].weight.sum()) < 1e9\n"
        "    return model\n"
    )
    monkeypatch.chdir(tmp_path)
    assert sources.count_batchnorms("python:computing_factory:net") == 1
    sys.modules.pop("computing_factory")


@pytest.mark.parametrize("spec", ["timm/test_resnet", "torchvision/googlenet"])
def test_resize_head(spec):
    source = sources.build(spec, pretrained=False)
    body = {k: v.clone() for k, v in source.model.state_dict().items() if "conv" in k}
    names = sources.resize_head(source.model, 5, ["a", "b", "c", "d", "e"])
    assert names
    assert provenance_of(source.model).class_names == ("a", "b", "c", "d", "e")
    assert all(torch.equal(source.model.state_dict()[k], v) for k, v in body.items())
    assert source.model(source.example_inputs()).shape == (1, 5)
    again = sources.rebuild(provenance_of(source.model).source)
    assert again(source.example_inputs()).shape == (1, 5)
    assert sources.resize_head(source.model, 5) == []


def test_resize_head_needs_a_source():
    with pytest.raises(SpecError, match="unknown source"):
        sources.resize_head(nn.Linear(2, 2), 3)


@pytest.mark.parametrize(
    "record",
    [{}, {"spec": 3}, {"spec": "timm/resnet18", "arguments": []}]
    + [{"spec": "timm/resnet18", "num_classes": bad} for bad in ("7", 0, True, 2.5)]
    + [
        {"spec": "timm/resnet18", "arguments": {"architecture": "resnet18", "options": bad}}
        for bad in (3, {"pretrained": True}, {"checkpoint_path": "x"})
    ],
)
def test_malformed_records(record):
    with pytest.raises(SpecError):
        sources.rebuild(record)


def test_a_torchvision_built_for_another_torch_is_explained(monkeypatch):
    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name.partition(".")[0] == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args, **kwargs)

    def import_module(name, package=None):
        del package
        return broken(name)

    monkeypatch.setattr(libraries.importlib, "import_module", import_module)
    for name in ("torchvision.models", "timm"):
        with pytest.raises(InstallationError, match="pip install --force-reinstall torch torchvis"):
            libraries.library(name)


def test_a_missing_package_is_explained():
    with pytest.raises(InstallationError, match="pip install no_such_package_at_all"):
        libraries.library("no_such_package_at_all.sub")


def test_nothing_warns_on_any_torchvision_builder_with_flags():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("googlenet", "inception_v3", "mnasnet0_5", "shufflenet_v2_x0_5"):
            sources.build(f"torchvision/{name}", pretrained=False)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_bare_pickle_with_code_is_named_and_not_run(tmp_path, protocol):
    import os
    import pickle

    from normswap.checkpoints import load_checkpoint

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "bad.pth"
    path.write_bytes(pickle.dumps({"weight": Payload()}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"posix\.mkdir; nothing of it was run"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()
