"""Compile the kernels for sm_90 where no such card is, and print what each takes.

Triton asks its driver for the target and gives the result back to it; this one has no device.
"""

import sys

import torch


class Driver:
    """What Triton asks of a driver on the way to a launch, which does nothing here."""

    class utils:  # noqa: N801 - Triton's name
        @staticmethod
        def load_binary(name, kernel, shared, device):
            return None, None, 0, 0, 1024

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232448}

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None


def compile_and_tell(launch, arguments):
    compiled = launch._kernel[launch._grid](*arguments, *launch._constants, num_warps=launch._warps)
    launch._run = compiled[launch._grid]
    ptx = compiled.asm["ptx"]
    assert ".local" not in ptx, compiled.name
    assert compiled.asm["cubin"]
    vectors = sum(f".v{n}." in line for n in (2, 4) for line in ptx.splitlines())
    assert vectors < 100, f"{compiled.name} shuffles its tiles through shared memory"
    sys.stdout.write(f"{compiled.name} {launch._warps} warps, {vectors} vector accesses\n")


def filter_response(shape, channels_last, dtype):
    from normswap.layers.gpu import filter_response as frn

    x = torch.zeros(shape, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    vectors = tuple(torch.ones(shape[1]) for _ in range(4))
    y, root = frn.forward(x, *vectors, 1e-6)
    assert frn.backward(y, x, root, vectors, (True,) * 5) is not None
    y, root = frn.forward(x, None, None, None, None, 1e-6)
    assert frn.backward(y, x, root, (None,) * 4, (True, *[False] * 4)) is not None


def batch_renorm(shape, channels_last, dtype):
    from normswap.layers.gpu import batch_renorm as brn

    x = torch.zeros(shape, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    vectors = [torch.ones(shape[1]) for _ in range(4)]
    for weight, bias, counter, momentum in (
        (*vectors[:2], torch.tensor(1), 0.1),
        (None, None, torch.tensor(1), None),
        (None, None, None, None),
    ):
        running = brn.Running(*vectors[2:], counter)
        plan = brn.plan_for(x, weight, bias, running, momentum)
        y, statistics = brn.forward(plan, x, weight, bias, running, momentum, 1e-5, (3.0, 5.0))
        assert brn.backward(y, x, weight, bias, statistics, (True, True, True)) is not None


def cross_iteration(shape, channels_last, dtype):
    from normswap.layers.gpu import cross_iteration as cbn

    x = torch.zeros(shape, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias, mean, variance, share = (torch.ones(shape[1]) for _ in range(5))
    arguments = x, x, weight, bias, mean, variance
    assert cbn.backward(*arguments, share, 1e-5, (True, True, True, True)) is not None
    arguments = x, x, None, None, mean, variance
    assert cbn.backward(*arguments, 0.5, 1e-5, (True, False, False, False)) is not None


def vectors():
    from normswap.layers.gpu import vectors

    channel = torch.ones(200)
    assert vectors.track(*[channel] * 4, torch.tensor(1), 0.1, 1.1)
    assert vectors.track(*[channel] * 4, torch.tensor(1), None, 1.1)
    assert vectors.track(*[channel] * 4, None, None, 1.1)
    for dtype in (torch.float32, torch.bfloat16):
        assert vectors.forget(torch.ones(200, 9, dtype=dtype), torch.ones(1, 9), channel, channel)
    rows = torch.ones(7, 200)
    assert vectors.join(channel, rows, rows, 3, "drop") is not None
    assert vectors.join(channel, rows, rows.t().contiguous().t(), 0, "max") is not None


def main():
    from triton.runtime.driver import driver

    from normswap.layers.gpu.launching import Launch

    driver.set_active(Driver())
    Launch._first = compile_and_tell
    filter_response((2, 64, 28, 28), False, torch.float32)
    batch_renorm((2, 64, 28, 28), False, torch.float32)
    shape, dtype = (2, 64, 144, 144), torch.bfloat16
    filter_response(shape, True, dtype)
    batch_renorm(shape, True, dtype)
    cross_iteration(shape, True, dtype)
    vectors()


if __name__ == "__main__":
    main()
