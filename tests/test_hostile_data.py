"""Data that nobody vouches for: what headers and texts promise is measured before it is made."""

import json
import os
import struct
import time
import zlib

import numpy as np
import PIL.Image
import pytest

from normswap.data import MAX_PIXELS, Preprocessing, read_image, transform
from normswap.data import images as image_files
from normswap.data.detection import detection_dataset
from normswap.data.segmentation import read_mask, segmentation_dataset
from normswap.errors import DataError

WANTED = Preprocessing((3, 32, 32))


def save(path, *shape, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full(shape, value, np.uint8)).save(path)
    return path


def png_header(path, width, height):
    """A grey PNG of that size, of which little more than the header is there."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + head
    size, check = struct.pack(">I", len(head)), struct.pack(">I", zlib.crc32(chunk))
    begun = struct.pack(">I", 100) + b"IDAT"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + size + chunk + check + begun)
    return path


@pytest.fixture
def decoded(monkeypatch):
    """The sizes of all images that are decoded."""
    found = []
    real = image_files.decode

    def noted(image):
        found.append(image.size)
        real(image)

    for room in ("images", "labelled", "segmentation"):
        monkeypatch.setattr(f"normswap.data.{room}.decode", noted)
    return found


def test_a_mask_of_another_size_is_not_decoded(tmp_path, decoded):
    save(tmp_path / "train/images/a.png", 32, 32, 3)
    mask = save(tmp_path / "train/masks/a.png", 8, 8)
    png_header(mask, 30_000, 30_000)
    with pytest.raises(DataError, match="a mask of 30000x30000; need 32x32"):
        segmentation_dataset(tmp_path, WANTED, "train")
    with pytest.raises(DataError, match="a mask of 30000x30000; need 32x32"):
        segmentation_dataset(tmp_path, WANTED, "train", class_names=["a", "b"])[0]
    png_header(mask, 1 << 30, 1 << 30)
    with pytest.raises(DataError, match=f"need at most {MAX_PIXELS:,}"):
        read_mask(mask)
    assert set(decoded) <= {(32, 32)}


def test_a_mask_names_no_more_classes_than_there_can_be(tmp_path):
    save(tmp_path / "train/images/a.png", 8, 8, 3)
    mask = tmp_path / "train/masks/a.png"
    mask.parent.mkdir()
    PIL.Image.fromarray(np.full((8, 8), 65_535, np.uint16)).save(mask)
    assert len(segmentation_dataset(tmp_path, WANTED, "train").class_names) == 65_536
    large = PIL.Image.fromarray(np.full((8, 8), 1 << 30, np.int32))
    large.save(mask.with_suffix(".tiff"))
    mask.unlink()
    with pytest.raises(DataError, match=f"the class number {1 << 30}; need numbers below"):
        segmentation_dataset(tmp_path, WANTED, "train")


def test_the_second_page_of_an_image_is_as_large_as_the_first(tmp_path, decoded):
    pages = [PIL.Image.fromarray(np.zeros((n, n), np.uint8)) for n in (8, 8, 600)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[2:])
    with pytest.raises(DataError, match=r"pages of \(8, 8\) and of \(600, 600\) pixels"):
        read_image(tmp_path / "a.tiff", 2, max_pixels=100)
    pages[0].save(tmp_path / "b.tiff", save_all=True, append_images=pages[:1] * 500)
    start = time.monotonic()
    with pytest.raises(DataError, match="501 pages"):
        read_image(tmp_path / "b.tiff", 2)
    assert time.monotonic() - start < 2
    pages[0].save(tmp_path / "c.tiff", save_all=True, append_images=pages[1:2])
    assert len(read_image(tmp_path / "c.tiff", 2).images) == 2


def test_a_large_tiff_is_bounded_by_our_bound_alone(tmp_path, monkeypatch):
    """Pillow looks at its own a second time, when it decodes one."""
    image = PIL.Image.fromarray(np.zeros((40, 40), np.uint8))
    image.save(tmp_path / "a.tiff", compression="tiff_adobe_deflate")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(tmp_path / "a.tiff", 1).size == (40, 40)
    assert PIL.Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(DataError, match="need at most 1,599"):
        read_image(tmp_path / "a.tiff", 1, max_pixels=1599)


def test_no_other_program_draws_an_image(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_a, **_k: pytest.fail("ran"))
    path = tmp_path / "a.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(DataError, match="EPS, which another program would have to draw"):
        read_image(path)


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1)])
def test_a_line_of_pixels_is_not_resized_to_a_field(shape, tmp_path):
    image = read_image(save(tmp_path / "a.png", *shape, 3))
    with pytest.raises(DataError, match="edges of 1 and 30000 pixels"):
        transform(Preprocessing((3, 224, 224)))(image)
    assert transform(Preprocessing((3, 224, 224), crop_mode="squash"))(image).shape[1:] == (
        224,
        224,
    )
    assert transform(Preprocessing((3, 224, 224)))(image.resize((30, 900))).shape[1:] == (224, 224)


HUGE = [
    {"input_size": [3, 40_000, 40_000]},
    {"input_size": [3, 1 << 62, 1 << 62]},
    {"input_size": [3, 10**400, 1]},
    {"test_input_size": [3, 60_000, 60_000]},
    {"crop_pct": 1e-3},
    {"crop_pct": 1e-300},
    {"test_crop_pct": 1e-6},
    {"std": [10**400] * 3},
    {"std": [1e-300] * 3},
    {"mean": [1e300] * 3},
    {"crop_pct": 10**400},
]


@pytest.mark.parametrize("fields", HUGE, ids=str)
def test_an_input_that_no_memory_holds_is_refused(fields):
    with pytest.raises(DataError, match=r"preprocessing\."):
        Preprocessing.from_json(fields)


def test_random_interpolation_is_for_training(tmp_path):
    image = read_image(save(tmp_path / "a.png", 40, 40, 3))
    wanted = Preprocessing((3, 32, 32), interpolation="random")
    assert transform(wanted)(image).shape == transform(wanted, train=True)(image).shape


GOOD = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "categories": [{"id": 1, "name": "x"}],
    "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 4, 4], "category_id": 1}],
}
BOX = {"image_id": 1, "category_id": 1}
BAD = [
    {"images": [{"id": 1, "file_name": name}]}
    for name in ("../a.png", "/a.png", "a.png\0", "x" * 5000, "no.png", None)
]
BAD += [
    {key: value} for key in GOOD for value in (5, None, "a", ["a"], [[1]], [5], [None], {"a": 1})
]
BAD += [
    {"images": [{"id": [1], "file_name": "a.png"}]},
    {"categories": [{"id": 1, "name": "a"}, {"id": "b", "name": "c"}]},
    {"categories": [{"id": {}, "name": "a"}]},
    {"annotations": [{**BOX, "image_id": [1], "bbox": [0, 0, 1, 1]}]},
    {"annotations": [{**BOX, "category_id": [1], "bbox": [0, 0, 1, 1]}]},
    {"annotations": [{**BOX, "bbox": [1, 1, 10**400, 1]}]},
    {"annotations": [{**BOX, "bbox": [1, 1, float("nan"), 1]}]},
]


@pytest.mark.parametrize("change", BAD, ids=lambda value: str(value)[:50])
def test_annotations_that_are_none(change, tmp_path):
    save(tmp_path / "train/a.png", 8, 8, 3)
    save(tmp_path / "a.png", 8, 8, 3)
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations/instances_train.json"
    file.write_text(json.dumps(GOOD))
    assert len(detection_dataset(tmp_path, "train")) == 1
    file.write_text(json.dumps({**GOOD, **change}))
    try:
        detection_dataset(tmp_path, "train")[0]
    except DataError as error:
        assert "instances_train.json" in str(error)  # noqa: PT017 - a few are fine as they are


@pytest.mark.parametrize("text", ["5", "null", "[]", "[" * 100_000, '{"images":1e999}', "\xff", ""])
def test_annotations_that_are_no_json(text, tmp_path):
    save(tmp_path / "train/a.png", 8, 8, 3)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train.json").write_text(text)
    with pytest.raises(DataError, match=r"instances_train\.json"):
        detection_dataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("label", "match"),
    [("99999 .5 .5 .5 .5", "class number 99999"), (f"{10**12} .5 .5 .5 .5", "class number 1000")],
)
def test_boxes_name_no_more_classes_than_there_can_be(label, match, tmp_path):
    save(tmp_path / "images/train/a.png", 8, 8, 3)
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/a.txt").write_text(label)
    with pytest.raises(DataError, match=match):
        detection_dataset(tmp_path, "train")


@pytest.mark.parametrize("kind", ["broken", "bomb", "fifo"])
def test_boxes_on_what_is_no_image(kind, tmp_path):
    image = save(tmp_path / "images/train/a.png", 8, 8, 3)
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/a.txt").write_text("0 .5 .5 .5 .5")
    if kind == "broken":
        image.write_bytes(b"x")
    elif kind == "bomb":
        png_header(image, 1 << 30, 1 << 30)
    else:
        image.unlink()
        os.mkfifo(image)
    with pytest.raises(DataError, match=r"a\.png|labels without an image"):
        detection_dataset(tmp_path, "train")
