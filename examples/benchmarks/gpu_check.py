"""The layers on a CUDA device: right against float64, and as fast as BatchNorm with its ReLU?

    python examples/benchmarks/gpu_check.py                # both, in well under a minute
    python examples/benchmarks/gpu_check.py --only check

The first table says the largest relative error of outputs and gradients; it ends with status 1 if a
kernel was not used or is wrong, or if a training step waits for the device. The second says how
long one forward and backward takes (median), the ratio to BatchNorm + ReLU, and the bandwidth: the
bytes that cannot be avoided (x and the output forward; x, the gradient and the gradient of x
backward) over the time. "host" is the time that Python takes to issue the work, which is what
counts at small batches. "launches" are kernels of one forward and backward. CBN is measured behind
a 1 × 1 convolution, and so is the BatchNorm that it is compared with there.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.layers import BatchRenorm2d, CrossIterationBatchNorm2d, FilterResponseNorm2d
from normswap.layers import plain_filter_response_norm as plain

BOUND = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# of ResNet-50 at 224² and of detectors
TIMED = [(2, 64, 112, 112), (2, 256, 56, 56), (2, 2048, 7, 7), (32, 256, 56, 56), (2, 64, 400, 400)]
CHECKED = [
    *TIMED,
    (3, 512, 28, 28),
    (2, 1024, 14, 14),
    (9, 3, 1, 1),
    (1, 1, 113, 57),
    (5, 67, 9, 31),
]


def format_of(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def maps(shape: tuple[int, ...], dtype: torch.dtype, last: bool, mean: float = 0.0) -> Tensor:
    x = (torch.randn(shape, device="cuda") + mean).to(dtype)
    return x.contiguous(memory_format=format_of(last))


def distance(found: Tensor, expected: Tensor) -> float:
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(error) if bool(torch.isfinite(found).all()) else float("inf")


def frn(channels: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    layer = FilterResponseNorm2d(channels, learnable_eps=channels == 67, device="cuda")

    def definition(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        z = plain(x, w["weight"], w["bias"], None, w.get("eps_l"), layer.eps)
        tau = w["tau"][:, None, None]
        # so near to τ that rounding decides on which side: one such element is seen in the error
        return torch.maximum(z, tau), (z - tau).abs() > 1e-4

    return layer, definition


def brn(channels: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    layer = BatchRenorm2d(channels, r_max=1.5, d_max=0.5, device="cuda")
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.normal_(0.0, 0.5)
    layer.running_var.uniform_(0.5, 2.0)
    mean, variance = layer.running_mean.double(), layer.running_var.double()  # before the batch

    def definition(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        deviation = (variance + layer.eps).sqrt()
        found, own = x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + layer.eps).sqrt()
        r = (own / deviation).clamp(1 / 1.5, 1.5).detach()
        d = ((found - mean) / deviation).clamp(-0.5, 0.5).detach()
        scale, shift = w["weight"] * r, w["weight"] * d + w["bias"]
        hat = (x - found[:, None, None]) / own[:, None, None]
        y = hat * scale[:, None, None] + shift[:, None, None]
        return y, torch.ones_like(y, dtype=torch.bool)

    return layer, definition


def error(make: Callable[..., Any], x: Tensor) -> float:
    """The largest relative error among output and gradients; infinite if no kernel was used."""
    layer, definition = make(x.shape[1])
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, 1.0 if name == "weight" else 0.1, 0.3)
    wide = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    wide_x = x.detach().double().requires_grad_()
    expected, settled = definition(wide_x, wide)
    grad = torch.randn_like(x) * settled
    expected.backward(grad.double())
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    if getattr(y.grad_fn, "kernels", None) is None:
        return float("inf")
    y.backward(grad)
    pairs = [(y.detach(), expected.detach()), (leaf.grad, wide_x.grad)]
    pairs += [(p.grad, wide[n].grad) for n, p in layer.named_parameters()]
    return max(distance(a, b) for a, b in pairs if a is not None and b is not None)


def errors(case: tuple[str, torch.dtype, bool]) -> list[float]:
    name, dtype, last = case
    torch.manual_seed(0)
    make = {"frn": frn, "brn": brn}[name]
    return [error(make, maps(shape, dtype, last, 0.3)) for shape in CHECKED]


def check() -> bool:
    cases = list(itertools.product(("frn", "brn"), BOUND, (False, True)))
    # in processes, because most of the time goes into compiling; what they compile stays on disk
    with multiprocessing.get_context("spawn").Pool(min(len(cases), 8)) as pool:
        found = pool.map(errors, cases, chunksize=1)
    right = True
    for (name, dtype, last), values in zip(cases, found, strict=True):
        largest = max(values)
        right &= largest < BOUND[dtype]
        print(
            f"{name} {str(dtype)[6:]:9}{'nhwc' if last else 'nchw'}  largest error {largest:.1e} "
            f"at {CHECKED[values.index(largest)]}  {'ok' if largest < BOUND[dtype] else 'WRONG'}"
        )
    return right


class Followed(nn.Module):
    """A 1 × 1 convolution with a norm and a ReLU behind it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        channels = int(norm.num_features)  # type: ignore[arg-type]
        self.conv, self.norm = nn.Conv2d(channels, channels, 1, bias=False), norm
        if isinstance(norm, CrossIterationBatchNorm2d):
            norm.attach(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """As in a network."""
        return torch.relu_(self.norm(self.conv(x)))


def norms(channels: int) -> dict[str, nn.Module]:
    relu = partial(nn.ReLU, inplace=True)
    return {
        "bn+relu": nn.Sequential(nn.BatchNorm2d(channels), relu()),
        "frn": FilterResponseNorm2d(channels),
        "brn+relu": nn.Sequential(BatchRenorm2d(channels), relu()),
        "gn+relu": nn.Sequential(nn.GroupNorm(min(32, channels), channels), relu()),
        "conv+bn+relu": Followed(nn.BatchNorm2d(channels)),
        "conv+cbn+relu": Followed(CrossIterationBatchNorm2d(channels, window=4)),
    }


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    with torch.autocast("cuda", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = layer(x.detach().requires_grad_())
    y.backward(grad.to(y.dtype))  # autocast gives GroupNorm's output in float32


def waits() -> bool:
    """Whether a training step of any layer asks the device for an answer, once it runs in."""
    found = False
    for name, layer in norms(64).items():
        layer.cuda()
        x, grad = (torch.randn(2, 64, 14, 14, device="cuda") for _ in range(2))
        for _ in range(8):
            step(layer, x, grad)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(layer, x, grad)
        except RuntimeError as error:
            found = True
            print(f"{name} WAITS for the device: {error}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    print("a step that waits for the device:", "SOME" if found else "none")
    return found


def launches(layer: nn.Module, x: Tensor, grad: Tensor) -> int:
    """Kernels and copies of one step."""
    step(layer, x, grad)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(layer, x, grad)
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


def timed(layer: nn.Module, x: Tensor, rounds: int) -> tuple[float, float]:
    """Milliseconds of the device and of the host, each the median of one step."""
    grad = torch.randn_like(x)
    device, host = [], []
    for turn in range(rounds + 8):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # the host gets ahead: what is timed is the device alone
        start.record()
        begun = time.perf_counter()
        step(layer, x, grad)
        issued = time.perf_counter() - begun
        end.record()
        torch.cuda.synchronize()
        if turn >= 8:
            device.append(start.elapsed_time(end))
            host.append(1e3 * issued)
    return statistics.median(device), statistics.median(host)


def table(rounds: int) -> None:
    print(f"\n{'':40}{'device':>9}{'ratio':>7}{'GB/s':>7}{'host':>8}{'ratio':>7}{'launches':>10}")
    for shape, dtype, last in itertools.product(TIMED, list(BOUND)[:2], (False, True)):
        x = maps(shape, dtype, last)
        base = (1.0, 1.0)
        for name, layer in norms(shape[1]).items():
            device, host = timed(layer.cuda().to(memory_format=format_of(last)), x, rounds)
            if "+bn" in f"+{name}":
                base = device, host
            count = launches(layer, x, torch.ones_like(x)) if shape == TIMED[1] else ""
            rate = 5 * x.numel() * x.element_size() / device / 1e6
            print(
                f"{'x'.join(map(str, shape)):14}{str(dtype)[6:10]:5}"
                f"{'nhwc' if last else 'nchw':5}{name:16}"
                f"{device * 1e3:7.1f}µs{device / base[0]:7.2f}{rate:7.0f}"
                f"{host * 1e3:6.0f}µs{host / base[1]:7.2f}"
                f"{count:>10}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", choices=["check", "time"])
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No CUDA device is here; the tests interpret the kernels instead.")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    begun = time.perf_counter()
    passed = [] if asked.only == "time" else [check(), not waits()]
    if asked.only != "check":
        table(asked.rounds)
    print(f"{time.perf_counter() - begun:.0f} s")
    raise SystemExit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
