"""What the guide and the notebooks say runs as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_lines_of_the_guide_run():
    text = (EXAMPLES / "GUIDE.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    space: dict = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, "GUIDE.md", "exec"), space)
    assert type(space["model"].bn1).__name__.startswith("Frozen")
    assert space["detector"].backbone.bn1.num_groups == 32
    assert space["backbone"].layer4[0].bn1.num_groups == 32


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cells = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in cells)
    space: dict = {"__name__": name}
    for block in code:
        exec(compile(block, name, "exec"), space)
    assert space["parity"].passed


def test_there_are_two_notebooks():
    assert len(list(EXAMPLES.glob("*.ipynb"))) == 2


def test_the_readme_is_short_and_its_links_lead_somewhere():
    readme = EXAMPLES.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for link in re.findall(r"\]\(([^)#]+)", text + (EXAMPLES / "GUIDE.md").read_text("utf-8")):
        places = [readme.parent / link, EXAMPLES / link]
        assert link.startswith("https:") or any(place.exists() for place in places), link
