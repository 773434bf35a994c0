"""A self-test that travels inside the file: a seed, and the outputs that belong to it.

The inputs come from splitmix64 in plain integer arithmetic, so that every platform, numpy version
and language makes the same ones; they are multiples of 2⁻²² and exact even in float32.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normswap.onnx.file.detections import detects
from normswap.onnx.file.parity import HALF_CEILING, Array

MAX_INPUT_ELEMENTS = 1 << 28
MAX_STORED = 4096
"""Outputs above this size keep an evenly spaced sample of their values."""

MAX_TOLERANCE = HALF_CEILING
"""The largest error that a file may ask to be allowed: what float16 may cost."""
ROUNDING = 1e-6
"""The scale is kept in float64, the values in float32."""
CHUNK = 1 << 20
"""Numbers that are made at once, so that a large input takes little more memory than itself."""

SQUARE = 16
"""Edge of the squares of a generated image, in pixels."""

_GAMMA = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix64(seed: int, count: int, start: int = 0) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The first ``count`` numbers of the splitmix64 generator, or those from ``start`` on.

    Example:
        >>> [int(z) for z in splitmix64(1234567, 3)]
        [6457827717110365317, 3203168211198807973, 9817491932198370423]

    Reference: Steele, Lea and Flood, *Fast splittable pseudorandom number generators*,
    OOPSLA 2014; the constants are those of Vigna's public-domain implementation.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(
            _GAMMA
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
        return z ^ (z >> np.uint64(31))


def uniform(seed: int, shape: Sequence[int], dtype: str = "float64") -> Array:
    """Numbers in [−2, 2) on a grid of 2⁻²², variance 4/3, the same everywhere."""
    return _filled(
        shape, dtype, lambda start, count: _grid(splitmix64(seed, count, start) >> np.uint64(40))
    )


def pictured(seed: int, shape: Sequence[int], dtype: str = "float32") -> Array:
    """An image of values in [0, 1): squares of one colour each, and noise over them.

    White noise alone looks the same everywhere to a network; a detector finds nothing in it.
    """
    *front, height, width = shape
    rows, columns = -(-height // SQUARE), -(-width // SQUARE)
    coarse = uniform(seed, (*front, rows, columns)) / 4 + 0.5
    large = coarse.repeat(SQUARE, -2).repeat(SQUARE, -1)[..., :height, :width]
    fine = uniform(seed + 1_000_003, shape) / 4 + 0.5
    return np.asarray(0.75 * large + 0.25 * fine).astype(dtype)


def _grid(bits: Array) -> Array:
    return bits.astype(np.float64) * 2.0**-22 - 2.0


def _filled(shape: Sequence[int], dtype: str, make: Callable[[int, int], Array]) -> Array:
    """An array made chunk by chunk."""
    flat = np.empty(math.prod(shape), dtype)
    for start in range(0, flat.size, CHUNK):
        count = min(CHUNK, flat.size - start)
        flat[start : start + count] = make(start, count).astype(dtype)
    return flat.reshape(tuple(shape))


@dataclass(frozen=True)
class TestInput:
    """How one input of the self-test is made.

    Attributes:
        shape: its shape, batch included.
        dtype: numpy name of its dtype.
        seed: of the generator; for integers the value is ``low + z mod (high − low + 1)``.
        low: smallest integer value.
        high: largest integer value.
        values: the input itself, flattened, in place of the generator's numbers; for inputs
            without rows, whose values may have to be these.
        picture: it is an image of ``pictured``.
    """

    __test__ = False  # pytest collects classes of this name

    shape: tuple[int, ...]
    dtype: str
    seed: int
    low: int = 0
    high: int = 0
    values: tuple[float, ...] | None = None
    picture: bool = False

    def make(self) -> Array:
        """The input itself."""
        if self.picture:
            return pictured(self.seed, self.shape, self.dtype)
        if self.values is not None:
            return np.array(self.values).astype(self.dtype).reshape(self.shape)
        if np.dtype(self.dtype).kind == "f":
            return uniform(self.seed, self.shape, self.dtype)
        span = np.uint64(self.high - self.low + 1)

        def draw(start: int, count: int) -> Array:
            return (splitmix64(self.seed, count, start) % span).astype(np.int64) + self.low

        return _filled(self.shape, self.dtype, draw)


@dataclass(frozen=True)
class Expected:
    """What one output of the self-test must be.

    Attributes:
        name: of the output.
        shape: its shape.
        scale: ``max|ref|`` of the whole output.
        tolerance: largest ``max|Δ| / scale`` that passes.
        torch_error: torch's own error against float64.
        values: the output, or an evenly spaced sample of it, flattened.
    """

    name: str
    shape: tuple[int, ...]
    scale: float
    tolerance: float
    torch_error: float
    values: Array

    @classmethod
    def of(cls, name: str, reference: Array, tolerance: float, torch_error: float) -> Expected:
        """Keep what is needed of a reference output."""
        scale = float(np.max(np.abs(reference.astype(np.float64)), initial=0.0))
        kept = sample(reference).astype(np.float32)
        return cls(name, tuple(reference.shape), scale, tolerance, torch_error, kept)

    def to_json(self) -> dict[str, Any]:
        """Plain data; the values as base64 of little-endian float32."""
        packed = base64.b64encode(self.values.astype("<f4").tobytes()).decode("ascii")
        return {
            "name": self.name,
            "shape": list(self.shape),
            "scale": self.scale,
            "tolerance": self.tolerance,
            "torch_error": self.torch_error,
            "float32": packed,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], *, most: float = math.inf) -> Expected:
        """The inverse of ``to_json``; a larger tolerance than ``most`` becomes that.

        Raises:
            ValueError: if ``data`` is not what ``to_json`` makes.
        """
        try:
            values = np.frombuffer(base64.b64decode(data["float32"], validate=True), dtype="<f4")
            found = cls(
                str(data["name"]),
                tuple(int(size) for size in data["shape"]),
                float(data["scale"]),
                min(float(data["tolerance"]), most),
                float(data["torch_error"]),
                values,
            )
        except (KeyError, TypeError, OverflowError, binascii.Error) as error:
            raise ValueError(f"expected output: {error}") from error
        found.check()
        return found

    def check(self) -> None:
        """Raise for a claim that proves nothing.

        Raises:
            ValueError: a tolerance beyond any proof's, a scale that is not the values', or not as
                many values as belong to the shape.
        """
        if not 0 < self.tolerance <= MAX_TOLERANCE:
            raise ValueError(
                f"self-test: a tolerance of {self.tolerance:g} for output {self.name[:80]!r}; "
                f"need one up to {MAX_TOLERANCE:g}"
            )
        count = math.prod(self.shape)
        if any(size < 0 for size in self.shape) or self.values.size != min(count, MAX_STORED):
            raise ValueError("self-test: expected values that do not fill their shape")
        most = float(np.max(np.abs(self.values), initial=0.0))
        whole = count == self.values.size
        known = most <= self.scale * (1 + ROUNDING) and (
            not whole or self.scale <= most * (1 + ROUNDING)
        )
        if not (math.isfinite(self.scale) and known):
            raise ValueError("self-test: a scale that is not the one of its expected values")


def sample(array: Array) -> Array:
    """At most ``MAX_STORED`` values of an array, evenly spaced over it."""
    flat = array.reshape(-1)
    if flat.size <= MAX_STORED:
        return flat
    positions = np.arange(MAX_STORED, dtype=np.int64) * flat.size // MAX_STORED
    return flat[positions]


@dataclass(frozen=True)
class Shift:
    """Another score threshold, at which a detector finds something in the image of its self-test.

    Attributes:
        own: the thresholds that the file has.
        other: the one that it is tested with.
    """

    own: tuple[float, ...]
    other: float


@dataclass(frozen=True)
class SelfTest:
    """Inputs to make and outputs to expect.

    Attributes:
        inputs: one per input of the graph, in order.
        outputs: one per output of the graph, in order; of a detector those that rounding leaves as
            they are, found by name.
        layers: inner values of a detector, before any decision; they are found by name.
        shift: how a detector's threshold is moved for the test.
    """

    inputs: tuple[TestInput, ...]
    outputs: tuple[Expected, ...]
    layers: tuple[Expected, ...] = ()
    shift: Shift | None = None

    @property
    def detector(self) -> bool:
        """Whether the outputs are detections, which have no order."""
        return bool(self.layers) or detects([output.name for output in self.outputs])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        inputs = [
            {"shape": list(i.shape), "dtype": i.dtype, "seed": i.seed, "low": i.low, "high": i.high}
            | ({} if i.values is None else {"values": list(i.values)})
            | ({"picture": True} if i.picture else {})
            for i in self.inputs
        ]
        shift = self.shift and {"own": list(self.shift.own), "other": self.shift.other}
        return {
            "generator": "splitmix64; floats: (z >> 40) * 2**-22 - 2; integers: low + z % span",
            "inputs": inputs,
            "outputs": [output.to_json() for output in self.outputs],
            **({"layers": [layer.to_json() for layer in self.layers]} if self.layers else {}),
            **({"shift": shift} if shift else {}),
        }

    @classmethod
    def from_json(cls, data: Any, *, most: float = math.inf) -> SelfTest:
        """The inverse of ``to_json``; a larger tolerance than ``most`` becomes that.

        Raises:
            ValueError: if ``data`` is not what ``to_json`` makes, or asks for too much memory.
        """
        try:
            inputs = tuple(_input_from_json(item) for item in data["inputs"])
            outputs, layers = (
                tuple(Expected.from_json(item, most=most) for item in items)
                for items in (data["outputs"], data.get("layers", ()))
            )
            shift = _shift_from_json(data.get("shift"))
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"self-test: {error}") from error
        if sum(math.prod(item.shape) for item in inputs) > MAX_INPUT_ELEMENTS:
            raise ValueError("self-test: inputs too large")
        if not any(output.values.size for output in (*outputs, *layers)):
            raise ValueError("self-test: no output to compare")
        found = cls(inputs, outputs, layers, shift)
        _check_detections(found)
        return found


def _shift_from_json(data: Any) -> Shift | None:
    if data is None:
        return None
    shift = Shift(tuple(float(value) for value in data["own"]), float(data["other"]))
    if not shift.own or not all(map(math.isfinite, (*shift.own, shift.other))):
        raise ValueError("self-test: a threshold that is no number")
    return shift


def _check_detections(test: SelfTest) -> None:
    """What is compared as a set must be there as a whole."""
    if any(x.shape[:1] != (1,) and x.values.size != math.prod(x.shape) for x in test.layers):
        raise ValueError("self-test: rows that are not there as a whole")
    if not test.detector or not test.outputs:
        return
    known = {output.name: output for output in test.outputs}
    if len(known) < len(test.outputs) or not detects(tuple(known)):
        raise ValueError("self-test: detections without boxes, labels or scores")
    count = known["scores"].shape[:1]
    shapes = {"scores": count, "labels": count, "boxes": (*count, 4)}
    for name, shape in shapes.items():
        if known[name].shape != shape or known[name].values.size != math.prod(shape):
            raise ValueError(f"self-test: {name} that are no detections")
    if any(output.shape[:1] != count for output in test.outputs) or not count or not count[0]:
        raise ValueError("self-test: not one row per detection")


def _input_from_json(item: dict[str, Any]) -> TestInput:
    found = TestInput(
        tuple(int(size) for size in item["shape"]),
        str(item["dtype"]),
        int(item["seed"]),
        int(item["low"]),
        int(item["high"]),
        None if item.get("values") is None else tuple(float(v) for v in item["values"]),
        item.get("picture") is True,
    )
    if np.dtype(found.dtype).kind not in "fiub" or any(size < 0 for size in found.shape):
        raise ValueError("self-test: an input that cannot be made")
    if found.picture and (len(found.shape) < 3 or np.dtype(found.dtype).kind != "f"):
        raise ValueError("self-test: an image that cannot be made")
    if found.values is not None and len(found.values) != math.prod(found.shape):
        raise ValueError("self-test: an input whose values do not fill its shape")
    if not (0 <= found.seed < 2**64 and -(2**62) < found.low <= found.high < 2**62):
        raise ValueError("self-test: seed or range out of bounds")
    return found
