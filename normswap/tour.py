"""The tour: the whole job on real handwritten digits, small enough for two processor cores.

Trains a BatchNorm network, then does what a user would do, through the functions a user calls:
load, walk, convert, fine-tune, save, export. Nothing is downloaded. This room only strings calls
together and keeps the score; it knows nothing that the other rooms do not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import normswap
from normswap import pictures
from normswap.copying import copied
from normswap.data import Preprocessing, labelled_dataset
from normswap.errors import InstallationError
from normswap.files import write_whole

Digits = tuple[Tensor, Tensor]  # images, labels

RESULTS = "results.json"
PICTURE = "accuracy.png"
SPEC = "python:normswap.tour:digits_net"

_logger = logging.getLogger("normswap")
_LATENCY_RUNS = 300
_TRAINING_IMAGES = 1297  # of 1797; the other 500 are the test
_ORIGINAL, _COPIED, _MATCHED = "BN original", "GN, copied", "GN, matched"
_CALIBRATED = "GN, matched, calibrated without labels"
_TUNED = "GN, matched, fine-tuned at batch 2"


class DigitsNet(nn.Module):
    """ResNet-20 of He et al. 2015 (section 4.2) for grey images, in torchvision's naming.

    Args:
        num_classes: outputs of ``fc``.

    Shape:
        (N, 1, 16, 16) to (N, num_classes).

    Reference:
        He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385.
    """

    preprocessing = Preprocessing((1, 16, 16), (0.5,), (0.5,), "bilinear", crop_pct=1.0)

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(_Block(16, 16), _Block(16, 16), _Block(16, 16))
        self.layer2 = nn.Sequential(_Block(16, 32, stride=2), _Block(32, 32), _Block(32, 32))
        self.layer3 = nn.Sequential(_Block(32, 64, stride=2), _Block(64, 64), _Block(64, 64))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.downsample(x)
        result: Tensor = self.relu(y)
        return result


def digits_net(num_classes: int = 10) -> DigitsNet:
    """The tour's BatchNorm network, untrained: ``python:normswap.tour:digits_net``."""
    return DigitsNet(num_classes)


@dataclass(frozen=True)
class Stage:
    """One row of the tour's table.

    Attributes:
        name: what was done.
        accuracy: top-1 on the 500 test digits, 0 to 1.
        share: the same, divided by the BN original's.
        onnx_error: scale-normalised error of the exported file; None if it was not exported.
        latency_ms: median time of one image in onnxruntime; None if it was not exported.
    """

    name: str
    accuracy: float
    share: float
    onnx_error: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Tour:
    """What the tour found.

    Attributes:
        stages: the rows of its table, the BN original first.
        folder: where the artefacts lie.
        picture: accuracy per stage, a PNG.
        seconds: the time it took.
    """

    stages: tuple[Stage, ...]
    folder: Path
    picture: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "folder": str(self.folder),
            "picture": str(self.picture),
            "seconds": round(self.seconds, 1),
        }


def take_tour(
    folder: str | Path,
    *,
    seed: int = 0,
    calibration_seconds: float = 10.0,
    report: Callable[[str], None] = _logger.info,
) -> Tour:
    """Train, convert, fine-tune and export on real digits.

    Args:
        folder: where digits, checkpoint, artefacts, ONNX files, picture and results go.
        seed: of the initial weights and the order of the images.
        calibration_seconds: time for the label-free calibration.
        report: called with one line at the start of every step.

    Returns:
        The table; the same is written to ``results.json`` in the folder.

    Raises:
        InstallationError: scikit-learn, which brings the digits, is not installed.
    """
    start = time.monotonic()
    folder = Path(folder)
    with _one_thread():
        stages = _stages(folder, seed, calibration_seconds, report)
    picture = draw(stages, folder / PICTURE)
    tour = Tour(stages, folder, picture, time.monotonic() - start)
    write_whole(folder / RESULTS, json.dumps(tour.to_json(), indent=2) + "\n")
    return tour


def _stages(
    folder: Path, seed: int, seconds: float, report: Callable[[str], None]
) -> tuple[Stage, ...]:
    report("1/6 writing 1,797 handwritten digits to image folders")
    write_digits(folder / "digits")
    train, test = (read_digits(folder / "digits", split) for split in ("train", "val"))
    report("2/6 training a ResNet-20 with BatchNorm on 1,297 of them, mixed in pairs")
    checkpoint = train_original(folder / "bn.safetensors", train, seed)
    bn = normswap.load_model(SPEC, checkpoint=checkpoint).model
    sites = normswap.walk(bn, test[0][:1])
    report(f"3/6 swapping its {len(sites)} BatchNorms, each way")
    swapped = conversions(bn, test[0][:1])
    report(f"4/6 calibrating GN for {seconds:.0f} s; fine-tuning it at batch size 2")
    calibrated, tuned = (copied(swapped[_MATCHED]) for _ in range(2))
    normswap.calibrate(calibrated, bn, train[0][:256], seconds=seconds, seed=seed)
    normswap.finetune(tuned, train, None, normswap.FineTune(batch_size=2, epochs=1, seed=seed))
    normswap.save(tuned, folder / "gn", force=True)
    models = {_ORIGINAL: bn, _COPIED: swapped.pop(_COPIED), _MATCHED: swapped.pop(_MATCHED)}
    models |= {_CALIBRATED: calibrated, _TUNED: tuned, **swapped}
    report("5/6 exporting both networks to ONNX, each with its proof")
    files = {_ORIGINAL: folder / "bn.onnx", _TUNED: folder / "gn.onnx"}
    proofs = {
        name: normswap.export_onnx(models[name], path, example_inputs=test[0][:1])
        for name, path in files.items()
    }
    report("6/6 measuring accuracy and latency")
    latencies = latency(files, test[0][:1])
    top1 = {name: normswap.evaluate(model, test).top1 for name, model in models.items()}
    return tuple(
        Stage(
            name,
            accuracy=top1[name],
            share=top1[name] / top1[_ORIGINAL],
            onnx_error=proofs[name].max_relative_error if name in proofs else None,
            latency_ms=latencies.get(name),
        )
        for name in models
    )


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as 8×8 PNGs: ``train/CLASS/NUMBER.png`` and ``val/…``.

    Raises:
        InstallationError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InstallationError(
            "normswap demo",
            got="no package named scikit-learn",
            need="it, for its handwritten digits",
            hint="pip install 'normswap[demo]'",
        ) from error
    from PIL import Image

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    for position, number in enumerate(order.tolist()):
        split = "train" if position < _TRAINING_IMAGES else "val"
        path = folder / split / str(digits.target[number]) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 255 / 16).astype("uint8")).save(path)


def read_digits(folder: Path, split: str) -> Digits:
    """The digits of a folder, preprocessed once: so small a network would wait for the decoder."""
    dataset: Any = labelled_dataset(folder, DigitsNet.preprocessing, split=split)
    images, labels = zip(*dataset, strict=True)
    return torch.stack(images), torch.tensor(labels)


def train_original(path: Path, train: Digits, seed: int) -> Path:
    """Train the BatchNorm network, with mixup as most published weights are, and save it."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model = digits_net()
    recipe = normswap.FineTune(batch_size=32, epochs=8, learning_rate=0.1, mixup=0.4, seed=seed)
    normswap.finetune(model, train, None, recipe)
    return write_whole(path, lambda part: save_file(model.state_dict(), part))


def conversions(bn: nn.Module, example: Tensor) -> dict[str, nn.Module]:
    """The network swapped in several ways, without any training; the original stays as it is."""
    gn = normswap.GroupNorm(groups="auto")
    wanted: dict[str, tuple[Any, str]] = {
        _COPIED: (gn, "copy"),
        _MATCHED: (gn, "match"),
        "FRN, matched": ("frn", "match"),
        "BRN": ("brn", "match"),
        "CBN": ("cbn", "match"),
        "frozen BN": ("frozen", "match"),
    }
    return {
        name: normswap.convert(copied(bn), recipe, example_inputs=example, init=init).model
        for name, (recipe, init) in wanted.items()
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """So small a network gains nothing from a second thread, and loses much on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def latency(files: Mapping[str, Path], image: Tensor) -> dict[str, float]:
    """Median milliseconds of one image in onnxruntime; the files take turns, to share the noise."""
    import onnxruntime

    sessions = {
        name: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for name, path in files.items()
    }
    times: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(_LATENCY_RUNS):
        for name, session in sessions.items():
            feed = {session.get_inputs()[0].name: image.numpy()}
            start = time.perf_counter()
            session.run(None, feed)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def draw(stages: Sequence[Stage], path: Path) -> Path:
    """Accuracy per stage, as horizontal bars, into a PNG."""
    shares = {stage.name: stage.accuracy for stage in stages}
    axis = "accuracy on 500 handwritten digits, %"
    pictures.accuracy_bars(shares, 0.1, "ResNet-20 after each swap", axis, path)
    return path
