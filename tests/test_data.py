"""Preprocessing, image files and labelled folders."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from normswap import data
from normswap.errors import DataError, InstallationError

SMALL = data.Preprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)


def _image(path, colour=(200, 30, 90), size=(24, 20), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def _truncated(path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


@pytest.fixture
def split_folder(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog", "eel"):
            for i in range(count):
                _image(tmp_path / split / name / f"{i}.png", (i * 20, len(name), 7))
    return tmp_path


# ------------------------------------------------------------------------------- preprocessing


def test_preprocessing_survives_json():
    wanted = data.Preprocessing((3, 16, 112, 112), (0.4, 0.3, 0.2), (1, 2, 3), crop_mode="squash")
    assert data.Preprocessing.from_json(json.loads(json.dumps(wanted.to_json()))) == wanted


@pytest.mark.parametrize(
    "bad",
    [
        {"input_size": [3, 0, 4]},
        {"input_size": [3, 2.5, 4]},
        {"input_size": "large"},
        {"input_size": []},
        {"input_size": [1, 2, 3, 4, 5]},
        {"mean": [0.5]},
        {"mean": ["a", "b", "c"]},
        {"mean": [float("nan")] * 3},
        {"std": [1, 0, 1]},
        {"std": None},
        {"crop_pct": "much"},
        {"crop_pct": True},
        {"crop_pct": 0},
        {"interpolation": "magic"},
        {"interpolation": ["bilinear"]},
        {"crop_mode": None},
        {"unknown": 1},
    ],
)
def test_preprocessing_refuses(bad):
    with pytest.raises(DataError, match=r"preprocessing\."):
        data.Preprocessing.from_json({**data.Preprocessing().to_json(), **bad})


@pytest.mark.parametrize("bad", [None, 3, [], "x"])
def test_preprocessing_refuses_what_is_no_mapping(bad):
    with pytest.raises(DataError):
        data.Preprocessing.from_json(bad)


def test_resized():
    assert SMALL.resized(32).input_size == (3, 32, 32)
    assert SMALL.resized((20, 30)).input_size == (3, 20, 30)
    assert data.Preprocessing((3, 8, 16, 16)).resized(32).input_size == (3, 8, 32, 32)
    assert SMALL.resized(None) is SMALL
    with pytest.raises(DataError):
        SMALL.resized((1, 2, 3))
    with pytest.raises(DataError):
        SMALL.resized(0)


def test_the_size_for_tests_is_taken_where_there_is_one():
    plain = data.Preprocessing()
    assert plain.tested() == plain
    assert "test_input_size" not in plain.to_json()
    other = data.Preprocessing((3, 176, 176), test_input_size=(3, 224, 224), test_crop_pct=0.95)
    assert data.Preprocessing.from_json(other.to_json()) == other
    assert other.tested() == data.Preprocessing((3, 224, 224), crop_pct=0.95)
    assert other.resized(100).tested() == data.Preprocessing((3, 100, 100), crop_pct=0.95)
    assert other.with_channels(1).tested().input_size == (1, 224, 224)
    for bad in ({"test_input_size": (1, 9, 9)}, {"test_input_size": (3, 9)}, {"test_crop_pct": 0}):
        with pytest.raises(DataError, match=next(iter(bad))):
            data.Preprocessing(**bad)


@pytest.mark.parametrize("name", ["resnet50:IMAGENET1K_V2", "efficientnet_b3", "inception_v3"])
def test_transform_is_that_of_torchvisions_weights(name):
    from torchvision import models

    from normswap import sources

    noise = np.random.default_rng(1).integers(0, 255, (411, 617, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    model, _, tag = name.partition(":")
    weights = models.get_model_weights(model)[tag or "DEFAULT"]
    wanted = weights.transforms()(image)
    source = sources.build(f"torchvision/{name}", pretrained=False)
    assert torch.allclose(data.transform(source.preprocessing)(image), wanted, atol=1e-6)


def test_every_preset_of_torchvision_gets_its_resize_back():
    import math

    from torchvision import models

    for name in models.list_models():
        for weights in models.get_model_weights(name):
            preset = weights.transforms()
            crop = getattr(preset, "crop_size", None)
            if crop:  # timm resizes to floor(crop / crop_pct)
                assert (
                    math.floor(crop[0] / (crop[0] / preset.resize_size[0]))
                    == (preset.resize_size[0])
                )


def test_transform_can_be_sent_to_workers():
    make = pickle.loads(pickle.dumps(data.transform(SMALL, train=True)))
    assert make(Image.new("RGB", (40, 30))).shape == (3, 16, 16)


def test_training_transform_augments():
    image = Image.fromarray(np.random.default_rng(2).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    make = data.transform(SMALL, train=True, hflip=0.5)
    torch.manual_seed(0)
    assert not torch.equal(make(image), make(image))
    plain = data.transform(SMALL)
    assert torch.equal(plain(image), plain(image))


@pytest.mark.parametrize("size", [(5,), (4, 8), (3, 4, 8, 8)])
def test_models_that_take_no_images(size):
    channels = size[0]
    wanted = data.Preprocessing(size, (0.0,) * channels, (1.0,) * channels)
    with pytest.raises(DataError, match="to read image files"):
        data.transform(wanted)


# --------------------------------------------------------------------------------- image modes


def test_16_bit_and_float_images_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    expected = np.rint(ramp / 257).astype(int)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.tif")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    for name in ("deep.png", "deep.tif", "float.tif"):
        image = data.read_image(tmp_path / name)
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image)[..., 1].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_converted(mode, channels):
    image = data.to_channels(Image.new(mode, (5, 4)), channels)
    assert image.mode == ("RGB" if channels == 3 else "L")


def test_palette_with_transparency_does_not_warn(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "p.png", transparency=bytes([0, 128]))
    assert data.read_image(tmp_path / "p.png").getpixel((0, 0)) == (10, 200, 30)


# --------------------------------------------------------------------------- unlabelled folders


def test_image_files_at_any_depth_sorted(tmp_path):
    wanted = [_image(tmp_path / name) for name in ("a/b/c/1.PNG", "a/z.jpg", "k.bmp")]
    _image(tmp_path / ".hidden/1.png")
    _image(tmp_path / "a/._1.png")
    (tmp_path / "notes.txt").write_text("x")
    assert data.image_files(tmp_path) == sorted(wanted)
    assert data.image_files(wanted[0]) == [wanted[0]]


def test_linked_folders_are_followed_once(tmp_path):
    _image(tmp_path / "store/1.png")
    images = tmp_path / "images"
    images.mkdir()
    (images / "linked").symlink_to(tmp_path / "store")
    (images / "again").symlink_to(images)  # a circle
    (images / "gone.png").symlink_to(tmp_path / "nothing")
    assert data.image_files(images) == [images / "linked/1.png"]


def test_empty_or_missing_folder(tmp_path):
    with pytest.raises(DataError, match="without images"):
        data.load_images(tmp_path, SMALL)
    with pytest.raises(DataError, match="nothing there"):
        data.load_images(tmp_path / "no", SMALL)


def test_load_images(tmp_path):
    for i in range(10):
        _image(tmp_path / str(i) / "x.png", (i * 25,) * 3)
    images = data.load_images(tmp_path, SMALL)
    assert images.shape == (10, 3, 16, 16)
    expected = (torch.arange(10) * 25 / 255 - 0.5) / 0.25
    assert torch.allclose(images[:, 0, 0, 0], expected, atol=1e-6)
    few = data.load_images(tmp_path, SMALL, limit=2)
    assert torch.allclose(few[:, 0, 0, 0], expected[[2, 7]], atol=1e-6)
    assert len(data.load_images(tmp_path, SMALL, limit=99)) == 10
    with pytest.raises(DataError, match="limit"):
        data.load_images(tmp_path, SMALL, limit=0)


def test_load_images_of_one_channel(tmp_path):
    _image(tmp_path / "x.png", (255, 255, 255))
    grey = data.Preprocessing((1, 8, 8), (0.5,), (0.5,))
    assert torch.equal(data.load_images(tmp_path, grey), torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp", "gif"])
def test_broken_images_are_named_or_skipped(tmp_path, suffix, caplog):
    _image(tmp_path / "good.png")
    bad = _truncated(tmp_path / f"bad.{suffix}")
    with pytest.raises(DataError, match=rf"{bad}: got a broken image") as caught:
        data.load_images(tmp_path, SMALL)
    assert "\n" not in str(caught.value)
    assert len(data.load_images(tmp_path, SMALL, on_broken="skip")) == 1
    assert "skipped 1 of 2 images" in caplog.text


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.jpg").write_text("no image at all")
    for name in ("a.png", "b.jpg"):
        with pytest.raises(DataError, match=name):
            data.load_images(tmp_path / name, SMALL)
    with pytest.raises(DataError, match="all broken"):
        data.load_images(tmp_path, SMALL, on_broken="skip")
    with pytest.raises(DataError, match="'error' or 'skip'"):
        data.load_images(tmp_path, SMALL, on_broken="ignore")


# ----------------------------------------------------------------------------- labelled folders


def test_split_folders(split_folder):
    train = data.labelled_dataset(split_folder, SMALL, "train", train=True)
    val = data.labelled_dataset(split_folder, SMALL)
    assert train.class_names == val.class_names == ("cat", "dog", "eel")
    assert (len(train), len(val)) == (12, 6)
    assert val.targets == [0, 0, 1, 1, 2, 2]
    image, target = val[5]
    assert (image.shape, target) == ((3, 16, 16), 2)
    assert data.has_splits(split_folder)
    assert not data.has_splits(split_folder / "val")


def test_class_numbers_follow_the_models_class_names(split_folder):
    val = data.labelled_dataset(split_folder, SMALL, class_names=["eel", "newt", "dog", "cat"])
    assert sorted(set(val.targets)) == [0, 2, 3]
    assert val.samples[0][0].parent.name == "cat"
    assert val.targets[0] == 3
    with pytest.raises(DataError, match="does not know: dog, eel"):
        data.labelled_dataset(split_folder, SMALL, class_names=["cat"])


def test_nested_class_folders_belong_to_the_top_one(split_folder):
    _image(split_folder / "val/cat/deep/er/x.png")
    val = data.labelled_dataset(split_folder, SMALL)
    assert val.class_names == ("cat", "dog", "eel")
    assert val.targets.count(0) == 3


def test_class_folder_missing_in_val(split_folder):
    (split_folder / "val/dog").rename(split_folder / "val/wolf")
    with pytest.raises(DataError, match=r"val: got class folders missing: dog"):
        data.labelled_dataset(split_folder, SMALL)
    _image(split_folder / "val/dog/1.png")
    with pytest.raises(DataError, match=r"not in train: wolf"):
        data.labelled_dataset(split_folder, SMALL)


def test_empty_class_folder_and_no_class_folders(split_folder, tmp_path):
    (split_folder / "train/fox").mkdir()
    (split_folder / "val/fox").mkdir()
    with pytest.raises(DataError, match="fox: got a class folder without images"):
        data.labelled_dataset(split_folder, SMALL, "train")
    flat = tmp_path / "flat"
    _image(flat / "x.png")
    with pytest.raises(DataError, match="no class folders"):
        data.labelled_dataset(flat, SMALL)
    with pytest.raises(DataError, match="nothing there"):
        data.labelled_dataset(tmp_path / "none", SMALL)


def test_half_a_split(split_folder):
    (split_folder / "val").rename(split_folder / "elsewhere")
    with pytest.raises(DataError, match="train alone; need a folder val"):
        data.labelled_dataset(split_folder, SMALL)
    assert len(data.labelled_dataset(split_folder, SMALL, "train")) == 12
    assert len(data.labelled_dataset(split_folder, SMALL, "val", val_split=0.25)) == 3


def test_val_split_is_a_partition_that_names_alone_decide(split_folder):
    flat = split_folder / "train"
    parts = [data.labelled_dataset(flat, SMALL, s, val_split=0.25) for s in ("train", "val")]
    train, val = ({path for path, _ in part.samples} for part in parts)
    assert not train & val
    assert len(train | val) == 12
    assert parts[1].targets == [0, 1, 2]
    moved = split_folder.parent / f"{split_folder.name}-moved"
    flat.rename(moved)
    again = data.labelled_dataset(moved, SMALL, "val", val_split=0.25)
    assert [p.relative_to(moved) for p, _ in again.samples] == [
        p.relative_to(flat) for p, _ in parts[1].samples
    ]
    others = [
        data.labelled_dataset(moved, SMALL, "val", val_split=0.25, seed=s).samples for s in range(9)
    ]
    assert any(other != others[0] for other in others)
    with pytest.raises(DataError, match="val_split"):
        data.labelled_dataset(moved, SMALL, "val", val_split=1.5)
    assert len(data.labelled_dataset(moved, SMALL)) == 12


def test_a_class_may_be_called_train(tmp_path):
    for name in ("car", "plane", "train"):
        _image(tmp_path / name / "1.png")
    assert data.labelled_dataset(tmp_path, SMALL).class_names == ("car", "plane", "train")


def test_imagenet_folders_find_their_class(tmp_path):
    _image(tmp_path / "n01443537/1.png")
    names = [f"readable {i}" for i in range(1000)]
    assert data.labelled_dataset(tmp_path, SMALL, class_names=names).targets == [1]


def test_broken_labelled_images(split_folder, caplog):
    bad = _truncated(split_folder / "val/dog/0.jpg")
    stop = data.labelled_dataset(split_folder, SMALL)
    assert len(stop) == 7
    with pytest.raises(DataError, match=str(bad)):
        [stop[i] for i in range(len(stop))]
    skip = data.labelled_dataset(split_folder, SMALL, on_broken="skip")
    assert skip.skipped == (bad,)
    assert len([skip[i] for i in range(len(skip))]) == 6
    assert "skipped 1 of 7" in caplog.text


def test_dataset_works_in_loader_workers(split_folder):
    loader = torch.utils.data.DataLoader(
        data.labelled_dataset(split_folder, SMALL), batch_size=4, num_workers=1
    )
    assert [len(targets) for _, targets in loader] == [4, 2]


def test_named_dataset_of_torchvision(split_folder):
    named = data.labelled_dataset("torch/folder", SMALL, root=split_folder, split="val")
    assert named.class_names == ("cat", "dog", "eel")
    image, target = named[5]
    assert (image.shape, target) == ((3, 16, 16), 2)


def test_named_datasets_that_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match=r"torch/nosuch: got AssertionError"):
        data.labelled_dataset("torch/nosuch", SMALL, root=tmp_path)
    with pytest.raises(DataError, match=r"torch/cifar10: got RuntimeError: Dataset not found"):
        data.labelled_dataset("torch/cifar10", SMALL, root=tmp_path)
    with pytest.raises((InstallationError, DataError)):
        data.labelled_dataset("hfds/nobody/nothing", SMALL)


def test_a_class_name_that_two_classes_share_is_refused(tmp_path):
    for name in ("crane", "dog"):
        _image(tmp_path / name / "1.png")
    with pytest.raises(DataError, match="several classes"):
        data.labelled_dataset(tmp_path, SMALL, class_names=("crane", "dog", "crane"))


def test_a_folder_with_one_part_alone_can_be_divided(tmp_path):
    for at in range(8):
        _image(tmp_path / f"val/dog/{at}.png")
    parts = [
        data.labelled_dataset(tmp_path, SMALL, split, val_split=0.5) for split in ("train", "val")
    ]
    assert [len(part) for part in parts] == [4, 4]
