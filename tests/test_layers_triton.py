"""Triton's kernels without a GPU: interpreted, and compiled for a card that is not here."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from normswap.layers import FilterResponseNorm2d
from normswap.layers.gpu import launching, tiles

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no wheel for this system"
)


def interpreter_counts():
    """Triton 3.6's takes one element of an array for a number, which numpy 2.4 refuses."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return True
    try:
        return int(np.ones(1)) == 1
    except TypeError:
        return False


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=HERE.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_triton
@pytest.mark.parametrize("layer", ["frn", "brn", "cbn or vectors"])
def test_kernels_in_the_interpreter(layer):
    if not interpreter_counts():
        pytest.skip("this Triton's interpreter and this numpy do not go together")
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-k", layer]
    done = run("-m", "pytest", HERE / "triton_cases.py", *options, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="ptxas comes with the wheel for Linux")
def test_kernels_compile_for_a_card(tmp_path):
    """What the interpreter lets pass, a compiler may not."""
    done = run(HERE / "triton_compile.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("forward_parts", "backward_whole", "backward_channels", "moments", "renormalise"):
        assert name in done.stdout


def test_everything_can_be_imported_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import normswap.layers.gpu.filter_response, normswap.layers.gpu.batch_renorm\n"
        "import normswap.layers.gpu.cross_iteration, normswap.layers.gpu.vectors\n"
        "import normswap.layers.gpu.language as language\n"
        "assert language.tl is None\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_layer_on_the_cpu_does_not_bring_triton():
    code = (
        "import sys, torch; from normswap.layers import BatchRenorm2d, FilterResponseNorm2d\n"
        "for layer in (BatchRenorm2d(3), FilterResponseNorm2d(3)):\n"
        "    layer(torch.ones(2, 3, 4, 4, requires_grad=True)).sum().backward()\n"
        "assert 'normswap.layers.gpu.language' not in sys.modules\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_no_tensor_of_the_cpu_is_taken():
    assert not launching.can_launch(torch.ones(2, 3, 4, 4))
    assert not launching.can_launch(torch.ones(2, 3, 4, 4, device="meta"))
    assert FilterResponseNorm2d(3)(torch.ones(2, 3, 4, 4)).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("samples", [1, 2, 32, 1000])
@pytest.mark.parametrize("channels", [1, 3, 64, 2048])
@pytest.mark.parametrize("positions", [1, 49, 196, 3136, 12544, 160000])
@pytest.mark.parametrize("dense_channels", [False, True])
def test_tiles_cover_a_batch_once(samples, channels, positions, dense_channels):
    cut = tiles.cut(samples, channels, positions, dense_channels)
    assert cut.channels & (cut.channels - 1) == 0
    assert cut.positions & (cut.positions - 1) == 0
    assert cut.channels * cut.positions <= tiles.WHOLE
    across = -(-channels // cut.channels)
    assert cut.programs == samples * across * cut.parts
    assert (cut.parts - 1) * cut.length < positions <= cut.parts * cut.length
    if cut.parts == 1:
        assert cut.positions >= positions or cut.length == positions
    if cut.parts > 1:
        assert cut.length % cut.positions == 0
    assert cut.warps in (1, 2, 4, 8, 16)


@pytest.mark.parametrize("samples", [1, 2, 32, 1000])
@pytest.mark.parametrize("channels", [1, 3, 64, 2048])
@pytest.mark.parametrize("positions", [1, 49, 196, 3136, 12544, 160000])
@pytest.mark.parametrize("dense_channels", [False, True])
def test_shares_cover_a_batch_once(samples, channels, positions, dense_channels):
    cut = tiles.share(samples, channels, positions, dense_channels)
    assert cut.channels & (cut.channels - 1) == 0
    assert cut.positions & (cut.positions - 1) == 0
    assert cut.channels * cut.positions <= 4096
    sample_parts = cut.parts // cut.row_parts
    assert cut.parts == sample_parts * cut.row_parts <= 128
    assert (sample_parts - 1) * cut.samples < samples <= sample_parts * cut.samples
    assert (cut.row_parts - 1) * cut.length < positions <= cut.row_parts * cut.length
    assert cut.programs == cut.parts * -(-channels // cut.channels)


@pytest.mark.parametrize("dense_channels", [False, True])
@pytest.mark.parametrize(
    ("channels", "positions"), [(64, 112**2), (256, 56**2), (64, 200**2), (2048, 49), (64, 400**2)]
)
def test_two_images_keep_a_large_card_busy(channels, positions, dense_channels):
    assert tiles.cut(2, channels, positions, dense_channels).programs >= 128
    samples, row = (1, 2 * positions) if dense_channels else (2, positions)
    assert tiles.share(samples, channels, row, dense_channels).programs >= 128


@needs_triton
@pytest.mark.parametrize("name", ["batch_renorm", "cross_iteration", "filter_response", "vector"])
def test_kernels_assume_nothing_of_where_a_vector_begins(name):
    """A plan does not ask it, so a compiled kernel may meet a view of a flat buffer."""
    batches = {"x", "y", "grad", "grad_x"}  # of which a plan knows it
    numbers = {"eps", "rate", "r_low", "r_high", "d_high", "share", "correction", "largest"}
    numbers |= {f"{of}_{axis}" for of in ("stride", "shift", "variances") for axis in "ncsk"}
    module = importlib.import_module(f"normswap.layers.gpu.{name}_kernels")
    kernels = [k for k in vars(module).values() if hasattr(k, "params") and len(k.params) > 8]
    assert kernels
    for kernel in kernels:
        assumed = {
            parameter.name
            for parameter in kernel.params
            if not parameter.is_constexpr and not parameter.do_not_specialize_on_alignment
        }
        assert not {n for n in assumed - batches - numbers if n.islower()}, kernel.__name__
