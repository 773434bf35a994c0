"""A converted model lives on without normswap."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import normswap
from normswap import layers, standalone
from normswap.cli.app import app
from normswap.errors import ArtifactError
from normswap.recipes import RECIPES
from normswap.targets import TARGETS

CASES = [
    ("timm/test_resnet", "gn"),
    ("timm/test_resnet", "frn"),  # a ReLU that is a module of its own
    ("timm/test_efficientnet", "frn"),  # activations inside the BatchNorms
    ("timm/test_efficientnet", "ln"),
    ("timm/test_efficientnet", "evonorm"),
    ("timm/test_byobnet", "gn"),
    ("torchvision/resnet18", "frn"),  # one ReLU module, called at several places: edited methods
    ("torchvision/shufflenet_v2_x0_5", "brn"),
    ("torchvision/squeezenet1_0", "bn"),
    ("timm/test_resnet", "cbn"),
    ("timm/test_resnet", "frozen"),
    ("timm/test_resnet", "in"),
]
_HERE = {target for _, target in CASES}
CASES += [("timm/test_resnet", t) for t in TARGETS if RECIPES[t].per_sample and t not in _HERE]

WITHOUT = """
import runpy, sys, torch
sys.modules["normswap"] = None  # as if it were not installed
build = runpy.run_path(sys.argv[1] + "/model.py")["build"]
model = build()
assert not any(m.__module__.startswith("normswap") for m in map(type, model.modules()))
assert not model.training
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[1] + "/x.pt")), sys.argv[1] + "/y.pt")
"""


def converted(spec, target, seed=0):
    torch.manual_seed(seed)
    options = {} if spec.endswith("squeezenet1_0") else {"num_classes": 7}
    source = normswap.load_model(spec, pretrained=False, **options)
    for module in source.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = source.example_inputs(batch_size=2, image_size=64)
    if target != "bn":
        normswap.convert(source.model, target, example_inputs=x)
    with torch.no_grad():
        for name, parameter in source.model.named_parameters():
            if name.endswith("tau"):
                nn.init.normal_(parameter, std=0.3)  # a ReLU left behind a TLU would show
    return source.model.eval(), x


@pytest.mark.parametrize(("spec", "target"), CASES)
def test_the_plain_model_gives_the_same(spec, target, tmp_path):
    model, x = converted(spec, target)
    folder = normswap.unwrap(model, tmp_path / "plain", example_inputs=x)
    text = (folder / "model.py").read_text()
    assert "normswap." not in text.replace("normswap.git", "")
    sys.path.insert(0, str(folder))
    namespace: dict[str, object] = {"__file__": str(folder / "model.py")}
    try:
        exec(compile(text, "model.py", "exec"), namespace)
    finally:
        sys.path.remove(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(namespace["build"]()(x), model(x), rtol=1e-4, atol=1e-5)


def test_it_needs_no_normswap(tmp_path):
    model, x = converted("timm/test_efficientnet", "frn")
    folder = normswap.unwrap(model, tmp_path / "plain", example_inputs=x)
    torch.save(x, folder / "x.pt")
    run = [sys.executable, "-c", WITHOUT, str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(folder / "y.pt"), model(x), rtol=1e-4, atol=1e-5)


def test_a_file_that_gives_something_else_is_not_written(tmp_path, monkeypatch):
    model, x = converted("timm/test_resnet", "gn")
    from normswap.recipes import GroupNorm

    monkeypatch.setattr(
        GroupNorm, "standalone", lambda _, m: f"nn.GroupNorm({m.num_channels}, {m.num_channels})"
    )
    with pytest.raises(ArtifactError, match="of their scale away"):
        normswap.unwrap(model, tmp_path / "plain", example_inputs=x)
    assert list(tmp_path.iterdir()) == []


def test_a_per_sample_layer_without_a_plain_form_is_named(tmp_path, monkeypatch):
    model, x = converted("timm/test_resnet", "gn")
    from normswap.recipes import GroupNorm

    monkeypatch.setattr(GroupNorm, "standalone", lambda _recipe, _layer: None)
    with pytest.raises(ArtifactError, match=r"got a GroupNorm\w* in the place of a BatchNorm"):
        normswap.unwrap(model, tmp_path / "plain", example_inputs=x)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_unknown_source_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="source is not known"):
        normswap.unwrap(nn.Sequential(nn.BatchNorm2d(3)), tmp_path / "plain")


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("tlu", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_the_standalone_frn_is_the_layer(rank, tlu, learnable):
    torch.manual_seed(0)
    ours = getattr(layers, f"FilterResponseNorm{max(rank, 1)}d")(
        4, learnable_eps=learnable, tlu=tlu
    )
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    plain = standalone.FilterResponseNorm(4, learnable_eps=learnable, tlu=tlu)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, *([3] * rank))
    torch.testing.assert_close(plain(x), ours(x))


def test_every_per_sample_target_can_be_written():
    from normswap.recipes import RECIPES, base

    for recipe in RECIPES.values():
        if recipe.per_sample and "standalone" not in vars(recipe):
            assert recipe.standalone is not base.Recipe.standalone, recipe.target


def test_what_is_known_of_images_and_classes_goes_along(tmp_path, monkeypatch):
    """A name is a name, whatever stands in it."""
    from click.testing import CliRunner

    model, _ = converted("timm/test_resnet", "gn")
    names = ["a", 'b"; import os', "c\n'", "犬", "\U0001f600 \\", "f", ""]
    normswap.save(model, tmp_path / "gn", class_names=names)
    run = CliRunner().invoke(app, ["unwrap", str(tmp_path / "gn"), "-o", str(tmp_path / "plain")])
    assert run.exit_code == 0, run.output
    home: dict[str, object] = {"__file__": str(tmp_path / "plain" / "model.py"), "__name__": "m"}
    exec(compile((tmp_path / "plain" / "model.py").read_text("utf-8"), "m", "exec"), home)
    assert home["CLASS_NAMES"] == names
    wanted = normswap.provenance.provenance_of(model).preprocessing
    assert home["PREPROCESSING"] == wanted
    assert {"input_size", "mean", "std", "crop_pct", "interpolation"} <= set(wanted)
    assert "model.py also has PREPROCESSING: what images have to be" in run.stdout
    assert "model.py also has CLASS_NAMES: the names of its outputs" in run.stdout
    assert "its model was run and gives what this one gives" in run.stdout
    last = run.stdout.splitlines()[-1]
    assert last.startswith("next: ")
    done = subprocess.run(
        ["sh", "-c", last.removeprefix("next: ").replace("python -c", f"{sys.executable} -c")],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "'crop_pct'" in done.stdout
    assert "犬" in done.stdout


def test_the_command(tmp_path):
    from click.testing import CliRunner

    model, _ = converted("timm/test_resnet", "gn")
    normswap.save(model, tmp_path / "gn")
    arguments = ["unwrap", str(tmp_path / "gn"), "-o", str(tmp_path / "plain")]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    assert sorted(p.name for p in (tmp_path / "plain").iterdir()) == ["model.pth", "model.py"]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "not empty" in again.stderr
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
