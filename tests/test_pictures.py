"""Pictures are whole or not there, and matplotlib is imported in one file only."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

import normswap
from normswap import pictures


def draw_all(folder):
    yield pictures.drift(
        {"predicted": [0.1, None], "alone": [None, None]}, ["bn1", ""], "t", folder / "a.svg"
    )
    yield pictures.learning_curve(
        [1, 2], {"loss": ([2, 1], [None, 3])}, folder / "b.png", percent=True
    )
    lines = {"bn": [(1, 0.5, 0.4, 0.6), (2, 0.6, 0.6, 0.6)], "gn": []}
    yield pictures.accuracy_by_batch(lines, [1, 2], "bn", folder / "c.png")
    yield pictures.accuracy_bars({"bn": 0.9, "gn": 0.8}, 0.1, "t", "%", folder / "d.png")
    image, mask = np.zeros((20, 30, 3)), np.arange(600).reshape(20, 30) % 50
    boxes = [((2, 3, 12, 18), "a $ 0.9", 4)]
    rows = [[pictures.Scene(image, "$", boxes, classes=5), pictures.Scene(image, "", (), mask, 50)]]
    yield pictures.scenes(rows, folder / "e.png")


def test_every_picture_is_drawn_and_replaces_another(tmp_path):
    for _ in range(2):
        found = list(draw_all(tmp_path))
    assert all(path.stat().st_size > 2000 for path in found)
    assert sorted(tmp_path.iterdir()) == sorted(found)
    assert found[0].read_bytes().startswith(b"<?xml")


def test_the_highest_point_lies_below_the_frame(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "_save", lambda figure, _path: seen.append(figure))
    pictures.drift({"measured": [0.97, 1.0, None]}, ["a", "b", "c"], "t", tmp_path / "a.png")
    (axes,) = seen[0].axes
    assert 1.05 <= axes.get_ylim()[1] <= 1.2


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path):
    path = pictures.accuracy_bars({"bn": 0.9}, 0.1, "t", "%", tmp_path / "d.png")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"mathtext|Parse"):
        pictures.accuracy_bars({"bn": 0.9}, 0.1, r"$\no$", "%", path)
    assert path.read_bytes() == before


def test_matplotlib_has_one_door():
    package = Path(normswap.__file__).parent
    users = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            users |= {path.name for name in names if name.split(".")[0] == "matplotlib"}
    assert users == {"pictures.py"}


def test_a_box_lies_on_the_edges_of_what_it_is_around(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.append(figure) or path)
    image = np.zeros((4, 6, 3))
    image[1:3, 2:5] = 1.0
    scene = pictures.Scene(image, "", [((2, 1, 5, 3), "box", 1)], mask=image[..., 0], classes=2)
    pictures.scenes([[scene]], tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert [tuple(shown.get_extent()) for shown in axes.images] == [(0, 6, 4, 0)] * 2
    (frame,) = axes.patches
    assert frame.get_bbox().extents.tolist() == [2, 1, 5, 3]
