"""Masks and boxes: every layout, joint transforms, and one line for whatever is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from normswap.data import Preprocessing
from normswap.data.detection import BACKGROUND, detection_dataset
from normswap.data.segmentation import segmentation_dataset
from normswap.errors import DataError

SMALL = Preprocessing((3, 16, 24), (0.0,) * 3, (1.0,) * 3, "bilinear")


def picture(path, size=(24, 16), mark=None):
    """A black image; ``mark`` = (x0, y0, x1, y1) is white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros((size[1], size[0], 3), np.uint8)
    if mark:
        values[mark[1] : mark[3], mark[0] : mark[2]] = 255
    Image.fromarray(values).save(path)


def mask(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    (image if mode is None else image.convert(mode)).save(path)


def drawn(kind=np.uint8, high=2):
    values = np.zeros((16, 24), kind)
    values[4:8, 6:18] = high
    return values


# ------------------------------------------------------------------------------- segmentation

LAYOUTS = {
    "split outside": ("{split}/images", "{split}/masks", {}),
    "split inside": ("images/{split}", "masks/{split}", {}),
    "divided here": ("images", "masks", {"val_split": 0.34}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_masks(layout, tmp_path):
    images, masks, options = LAYOUTS[layout]
    for split, names in (("train", "abcd"), ("val", "ef")):
        for name in names:
            picture(tmp_path / images.format(split=split) / f"{name}.png", mark=(6, 4, 18, 8))
            mask(tmp_path / masks.format(split=split) / f"{name}.png", drawn())
    found = {s: segmentation_dataset(tmp_path, SMALL, s, **options) for s in ("train", "val")}
    assert (len(found["train"]), len(found["val"])) == (4, 2)
    assert not {i for i, _ in found["train"].pairs} & {i for i, _ in found["val"].pairs}
    image, labels = found["val"][0]
    assert (image.shape, image.dtype) == ((3, 16, 24), torch.float32)
    assert (labels.shape, labels.dtype) == ((16, 24), torch.int64)
    assert torch.equal(labels == 2, image[0] == 1)
    assert found["val"].class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("values", "mode"), [(drawn(), None), (drawn(np.uint16, 2), None), (drawn(), "P")]
)
def test_masks_of_every_depth(values, mode, tmp_path):
    picture(tmp_path / "val/images/a.png")
    if mode == "P":
        image = Image.fromarray(values, "P")
        image.putpalette([c for i in range(256) for c in (i, 255 - i, 0)])
        (tmp_path / "val/masks").mkdir(parents=True)
        image.save(tmp_path / "val/masks/a.png")
    else:
        mask(tmp_path / "val/masks/a.png", values)
    _, labels = segmentation_dataset(tmp_path, SMALL)[0]
    assert labels.unique().tolist() == [0, 2]


def test_image_and_mask_are_augmented_together(tmp_path):
    picture(tmp_path / "train/images/a.png", size=(96, 64), mark=(0, 0, 30, 64))
    mask(tmp_path / "train/masks/a.png", (np.arange(96)[None] < 30).repeat(64, 0).astype(np.uint8))
    data = segmentation_dataset(tmp_path, SMALL, "train", train=True)
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        image, labels = data[0]
        assert ((image[0] > 0.5) == (labels == 1)).float().mean() > 0.93  # but for the edge
        seen.add(int(labels.sum()))
    assert len(seen) > 5


def test_ignored_pixels_stay_and_class_names_are_read(tmp_path):
    picture(tmp_path / "val/images/a.png")
    values = drawn()
    values[0, 0] = 255
    mask(tmp_path / "val/masks/a.png", values)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    data = segmentation_dataset(tmp_path, SMALL)
    assert data.class_names == ("sky", "road", "car")
    assert data[0][1][0, 0] == 255


def test_the_models_own_numbers_are_kept_in_masks(tmp_path):
    picture(tmp_path / "val/images/a.png")
    values = drawn()
    values[0, 0] = 255
    mask(tmp_path / "val/masks/a.png", values)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    data = segmentation_dataset(tmp_path, SMALL, class_names=("sky", "car", "dog", "road"))
    assert data.class_names == ("sky", "car", "dog", "road")
    assert sorted(data[0][1].unique().tolist()) == [0, 1, 255]  # a car is 1 there, not 2
    with pytest.raises(DataError, match=r"classes\.txt: got classes .* not know: car"):
        segmentation_dataset(tmp_path, SMALL, class_names=("sky", "road"))
    mask(tmp_path / "val/masks/a.png", drawn(high=3))  # a class of the model that is not theirs
    with pytest.raises(DataError, match=r"a\.png: got class 3; need 0 to 2"):
        segmentation_dataset(tmp_path, SMALL, class_names=("sky", "car", "dog", "road"))[0]


BAD_MASKS = {
    "another size": (lambda p: mask(p, np.zeros((8, 8), np.uint8)), r"a\.png: got a mask of 8x8"),
    "a class too many": (lambda p: mask(p, drawn(high=9)), r"a\.png: got class 9; need 0 to 2"),
    "colours": (lambda p: picture(p), r"a\.png: got a mask of mode RGB"),
    "broken": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\nx"), r"a\.png: got a broken mask"),
}


@pytest.mark.parametrize("fault", BAD_MASKS)
def test_a_bad_mask_is_one_line_that_names_it(fault, tmp_path):
    picture(tmp_path / "val/images/a.png")
    (tmp_path / "val/masks").mkdir(parents=True)
    make, words = BAD_MASKS[fault]
    make(tmp_path / "val/masks/a.png")
    with pytest.raises(DataError, match=words):
        segmentation_dataset(tmp_path, SMALL, class_names=("a", "b", "c"))[0]


def test_halves_that_do_not_fit(tmp_path):
    picture(tmp_path / "images/a.png")
    picture(tmp_path / "images/b.png")
    mask(tmp_path / "masks/a.png", drawn())
    with pytest.raises(DataError, match=r"b\.png: got an image without its other half"):
        segmentation_dataset(tmp_path, SMALL, val_split=0.5)
    (tmp_path / "images/b.png").unlink()
    mask(tmp_path / "masks/c.png", drawn())
    with pytest.raises(DataError, match=r"c\.png: got a mask without its other half"):
        segmentation_dataset(tmp_path, SMALL, val_split=0.5)


def test_layouts_that_are_none(tmp_path):
    with pytest.raises(DataError, match="got nothing there"):
        segmentation_dataset(tmp_path / "none", SMALL)
    with pytest.raises(DataError, match=r"no val part.*--val-split"):
        segmentation_dataset(tmp_path, SMALL)
    picture(tmp_path / "val/images/a.png")
    mask(tmp_path / "val/masks/a.png", drawn())
    with pytest.raises(DataError, match="divided already"):
        segmentation_dataset(tmp_path, SMALL, val_split=0.5)


# ---------------------------------------------------------------------------------- detection


def coco(file, images, annotations=None, categories=(("cat", 7), ("dog", 3))):
    file.parent.mkdir(parents=True, exist_ok=True)
    default = [
        {"id": i, "image_id": i, "category_id": 7, "bbox": [2, 3, 10, 5]}
        for i, _ in enumerate(images)
    ]
    data = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(images)],
        "categories": [{"name": name, "id": number} for name, number in categories],
        "annotations": default if annotations is None else annotations,
    }
    file.write_text(json.dumps(data))


def coco_folder(root, annotations=None):
    picture(root / "images/a.png", mark=(2, 3, 12, 8))
    picture(root / "images/b.png", mark=(2, 3, 12, 8))
    coco(root / "annotations.json", ["a.png", "b.png"], annotations)


@pytest.mark.parametrize("layout", ["coco", "roboflow", "yolo", "yolo outside"])
def test_every_layout_of_boxes(layout, tmp_path):
    for split, names in (("train", ["a.png", "b.png"]), ("val", ["c.png"])):
        home = {
            "coco": tmp_path / f"{split}2017",
            "roboflow": tmp_path / split,
            "yolo": tmp_path / "images" / split,
            "yolo outside": tmp_path / split / "images",
        }[layout]
        for name in names:
            picture(home / name, mark=(2, 3, 12, 8))
        if layout == "coco":
            coco(tmp_path / f"annotations/instances_{split}2017.json", names)
        elif layout == "roboflow":
            coco(home / "_annotations.coco.json", names)
        else:
            labels = (
                tmp_path / "labels" / split if layout == "yolo" else tmp_path / split / "labels"
            )
            labels.mkdir(parents=True)
            for name in names:
                text = f"1 {7 / 24} {5.5 / 16} {10 / 24} {5 / 16}\n"
                (labels / name).with_suffix(".txt").write_text(text)
    train, val = (detection_dataset(tmp_path, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1)
    image, target = val[0]
    torch.testing.assert_close(target["boxes"], torch.tensor([[2.0, 3, 12, 8]]))
    assert target["labels"].tolist() == [2]
    assert val.class_names[0] == BACKGROUND
    x0, y0, x1, y1 = target["boxes"][0].int().tolist()
    assert bool((image[:, y0:y1, x0:x1] == 1).all())
    assert int((image == 1).sum()) == 3 * 50
    assert (image.dtype, target["labels"].dtype) == (torch.float32, torch.int64)


def test_boxes_are_flipped_with_their_image(tmp_path):
    coco_folder(tmp_path)
    data = detection_dataset(tmp_path, "train", train=True, val_split=0.5)
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        image, target = data[0]
        x0, y0, x1, y1 = target["boxes"][0].int().tolist()
        assert bool((image[:, y0:y1, x0:x1] == 1).all())
        seen.add(x0)
    assert seen == {2, 12}


def test_an_image_without_boxes_is_a_sample(tmp_path):
    coco_folder(tmp_path, annotations=[])
    _, target = detection_dataset(tmp_path, "train", val_split=0.5)[0]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


def test_crowds_are_left_out_of_training(tmp_path):
    crowd = {"id": 1, "image_id": 0, "category_id": 3, "bbox": [1, 1, 5, 5], "iscrowd": 1}
    coco_folder(tmp_path, [crowd, {**crowd, "id": 2, "image_id": 1}])
    options = {"val_split": 0.5}
    assert len(detection_dataset(tmp_path, "train", train=True, **options)[0][1]["boxes"]) == 0
    assert detection_dataset(tmp_path, "val", **options)[0][1]["crowd"].tolist() == [True]


def test_the_models_own_numbers_are_kept(tmp_path):
    coco_folder(tmp_path)
    names = (BACKGROUND, "horse", "dog", "N/A", "cat")
    data = detection_dataset(tmp_path, val_split=0.5, class_names=names)
    assert data[0][1]["labels"].tolist() == [4]
    with pytest.raises(DataError, match="classes that the model does not know: cat"):
        detection_dataset(tmp_path, val_split=0.5, class_names=(BACKGROUND, "dog"))


BOX = {"id": 5, "image_id": 0, "category_id": 7, "bbox": [2, 3, 10, 5]}
BAD_BOXES = {
    "no area": ({**BOX, "bbox": [2, 3, 0, 5]}, "annotation 5 with the box .* which has no area"),
    "outside": ({**BOX, "bbox": [2, 3, 100, 5]}, r"the box .* on a\.png, which is 24x16"),
    "no numbers": ({**BOX, "bbox": [1, 2, "x", 4]}, "annotation 5 with the box"),
    "no category": ({k: v for k, v in BOX.items() if k != "category_id"}, "without a category"),
    "another category": ({**BOX, "category_id": 9}, "of the category 9, which it does not list"),
    "another image": ({**BOX, "image_id": 77}, "an annotation on image 77"),
    "not finite": ({**BOX, "bbox": [2, 3, 1e999, 5]}, "annotation 5 with the box"),
}


@pytest.mark.parametrize("fault", BAD_BOXES)
def test_a_bad_box_is_one_line_that_names_the_file(fault, tmp_path):
    annotation, words = BAD_BOXES[fault]
    coco_folder(tmp_path, [annotation])
    with pytest.raises(DataError, match=rf"annotations\.json: got .*{words}"):
        [list(detection_dataset(tmp_path, s, val_split=0.5)) for s in ("train", "val")]


def test_missing_images_and_files_that_are_none(tmp_path):
    coco_folder(tmp_path)
    (tmp_path / "images/b.png").unlink()
    with pytest.raises(DataError, match=r"annotations\.json: got the image 'b\.png'"):
        detection_dataset(tmp_path, val_split=0.5)
    coco(tmp_path / "annotations.json", ["../images/a.png"])
    with pytest.raises(DataError, match="which is not in"):
        detection_dataset(tmp_path, val_split=0.5)
    for text in ("{", "[]", "[" * 100_000, '{"images": 3}'):
        (tmp_path / "annotations.json").write_text(text)
        with pytest.raises(DataError, match=r"annotations\.json: got "):
            detection_dataset(tmp_path, val_split=0.5)


BAD_LINES = {
    "1 0.5 0.5 x 0.2": "line 1",
    "1 0.5 0.5": "line 1",
    "7 0.5 0.5 0.1 0.1": "line 1: class 7 of 2",
    "-1 0.5 0.5 0.1 0.1": "line 1: class -1",
    "0 0.5 0.5 0 0.1": "no area",
    "0 nan 0.5 0.1 0.1": "no area",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines_of_yolo(line, tmp_path):
    picture(tmp_path / "images/val/a.png")
    (tmp_path / "labels/val").mkdir(parents=True)
    (tmp_path / "labels/val/a.txt").write_text(line)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=rf"a\.txt: got .*{BAD_LINES[line]}"):
        detection_dataset(tmp_path)


def test_labels_without_an_image(tmp_path):
    picture(tmp_path / "images/val/a.png")
    (tmp_path / "labels/val").mkdir(parents=True)
    (tmp_path / "labels/val/b.txt").write_text("")
    with pytest.raises(DataError, match=r"b\.txt: got labels without an image"):
        detection_dataset(tmp_path)
