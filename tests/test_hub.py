"""The hub, through huggingface_hub's own client, against a stand-in of its endpoint here.

No test here asks another machine.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub.constants
import pytest
import torch
from click.testing import CliRunner

import normswap
from normswap.cli.app import app
from normswap.errors import ArtifactError, SpecError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the endpoint as one commit and one download need; files of any repository."""

    files: ClassVar[dict] = {}
    made: ClassVar[set] = set()
    asked: ClassVar[list] = []

    def log_message(self, *_):
        pass

    def _json(self, data, status=200):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        self.asked.append(self.path)
        body, host = self._body(), self.headers["Host"]
        if self.path.endswith("/repos/create"):
            name = json.loads(body)
            self.made.add(f"{name.get('organization')}/{name['name']}")
            self._json({"url": f"http://{host}/{name.get('organization')}/{name['name']}"})
        elif "/preupload/" in self.path:
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            self._json({"files": modes})
        elif "/commit/" in self.path:
            repo = "/".join(self.path.split("/")[3:5])
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[repo, value["path"]] = base64.b64decode(value["content"])
            self._json({"commitOid": COMMIT, "commitUrl": f"http://{host}/{repo}/commit/{COMMIT}"})
        else:
            self._json({})

    def do_GET(self):
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            repo = "/".join(parts[2:4])
            names = [name for owner, name in self.files if owner == repo]
            siblings = [{"rfilename": name} for name in names]
            if names or repo in self.made:
                self._json({"id": repo, "sha": COMMIT, "siblings": siblings})
            else:
                self._json({"error": "not found"}, 404)
            return
        content = self.files.get(("/".join(parts[:2]), "/".join(parts[4:])))
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
            content = b""
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.files, Hub.made, Hub.asked = {}, set(), []
    constants = huggingface_hub.constants
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # not in old ones
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def artefact(tmp_path):
    source = normswap.load_model("timm/test_resnet", pretrained=False, num_classes=3)
    x = source.example_inputs(2)
    model = normswap.convert(source.model, "gn", example_inputs=x).model.eval()
    folder = normswap.save(model, tmp_path / "mine", class_names=["cat", "dog", "eel"])
    (folder / "last.pt").write_bytes(b"a checkpoint that stays here")
    with torch.no_grad():
        return folder, x, model(x)


def test_what_is_pushed_loads_again(hub, artefact):
    folder, x, expected = artefact
    done = normswap.push_to_hub(folder, "me/mine")
    assert done.url.endswith(COMMIT)
    assert {name for _, name in hub.files} == {"README.md", "model.safetensors", "normswap.json"}
    source = normswap.load_model("hf-hub:me/mine")
    with torch.no_grad():
        assert torch.equal(source.model(x), expected)
    assert source.class_names == ("cat", "dog", "eel")
    assert not any("last.pt" in path for path in hub.asked)


def test_a_dry_run_asks_no_network(hub, artefact):
    found = normswap.push_to_hub(artefact[0], "me/mine", dry_run=True)
    assert hub.asked == []
    assert found.url is None
    head, _, card = found.card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: normswap" in head
    assert "- gn" in head
    assert 'normswap.load_model("hf-hub:me/mine").model' in card
    assert "normswap unwrap hf-hub:me/mine" in card
    assert "<details><summary>3 classes</summary>" in card


def test_a_model_is_saved_for_the_purpose(hub):
    source = normswap.load_model("timm/test_resnet", pretrained=False)
    assert normswap.push_to_hub(source.model, "me/plain", dry_run=True).files["normswap.json"] > 100


def test_the_card_names_base_model_and_score(hub, artefact):
    from normswap.artifact.hub import hub_card

    document = {
        "source": {"spec": "timm/resnet18.a1_in1k", "task": "image"},
        "history": [{"step": "fine-tuned", "val_top1": 0.75}, {"step": "exported"}],
        "plans": [{"target": "gn(groups=8)", "entries": []}],
    }
    card = hub_card(document, "me/mine")
    assert "base_model: timm/resnet18.a1_in1k" in card
    assert "value: 0.75" in card
    assert "pipeline_tag: image-classification" in card


def test_the_command_shows_what_it_would_do_and_does_it(hub, artefact):
    folder = str(artefact[0])
    dry = CliRunner().invoke(app, ["push", folder, "me/mine", "--dry-run"])
    assert dry.exit_code == 0, dry.stderr
    assert "library_name: normswap" in dry.stdout
    assert dry.stdout.splitlines()[-1] == f"next: normswap push {folder} me/mine"
    done = CliRunner().invoke(app, ["push", folder, "me/mine", "--json"])
    assert json.loads(done.stdout)["spec"] == "hf-hub:me/mine"
    seen = CliRunner().invoke(app, ["inspect", "hf-hub:me/mine", "--json"])
    assert seen.exit_code in (0, 1)  # all of its BatchNorms are gone
    assert "Traceback" not in seen.stderr


def test_an_artefact_from_the_hub_runs_no_code(hub, tmp_path, monkeypatch):
    (tmp_path / "hub_net.py").write_text(
        "from pathlib import Path\nfrom torch import nn\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
    )
    monkeypatch.chdir(tmp_path)
    source = normswap.load_model("python:hub_net:make", pretrained=False)
    normswap.push_to_hub(normswap.save(source.model, tmp_path / "mine"), "me/mine")
    (tmp_path / "ran").unlink()
    monkeypatch.delitem(__import__("sys").modules, "hub_net")
    with pytest.raises(ArtifactError, match="python:hub_net:make, which runs code"):
        normswap.load_model("hf-hub:me/mine")
    assert not (tmp_path / "ran").exists()
    assert normswap.load_model("hf-hub:me/mine", trust="python:hub_net:make").model


def test_damage_on_the_way_is_found(hub, artefact):
    normswap.push_to_hub(artefact[0], "me/mine")
    weights = bytearray(hub.files["me/mine", "model.safetensors"])
    weights[-1] ^= 1
    hub.files["me/mine", "model.safetensors"] = bytes(weights)
    with pytest.raises(ArtifactError, match="edited or damaged"):
        normswap.load_model("hf-hub:me/mine")


def test_a_damaged_artefact_stays_here(hub, artefact):
    (artefact[0] / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="edited or damaged"):
        normswap.push_to_hub(artefact[0], "me/mine")
    assert hub.asked == []


def test_a_repository_without_an_artefact_is_timms(hub):
    hub.files["me/other", "README.md"] = b"nothing of ours"
    with pytest.raises(SpecError, match="hf-hub:me/other"):
        normswap.load_model("hf-hub:me/other")


@pytest.mark.parametrize("name", ["mine", "a/b/c", "../x", "me/ mine", ""])
def test_names_of_no_repository(name, artefact):
    with pytest.raises(ArtifactError, match="got no name of a repository"):
        normswap.push_to_hub(artefact[0], name)
