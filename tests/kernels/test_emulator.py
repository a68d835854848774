"""The emulator finds what it is there to find: planted mistakes are caught under every schedule; the right kernels are right."""

import os
import subprocess
import sys

import pytest
import torch

SANITIZED = os.environ.get("ENGINEPOST_EMULATED_SANITIZE") == "1"
SCHEDULES = ["forward", "reverse", "shuffled"]


def product(module, fault, m=64, n=128, k=96, dtype=torch.bfloat16):
    """Largest error of the planted product, relative to float32's; NaN where unset data was read."""
    torch.manual_seed(0)
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    c = torch.full((m, n), float("nan"))
    module.planted_matmul(fault, a.data_ptr(), b.data_ptr(), c.data_ptr(), m, n, k, dtype == torch.float16)
    return (c - a.float() @ b.float().T).abs().max().item()


def sums(module, fault):
    x = torch.arange(3 * 128, dtype=torch.float32)
    y = torch.full((3, 2), float("nan"))
    module.planted_sum(fault, x.data_ptr(), y.data_ptr(), 3)
    return torch.equal(y, x.view(3, 128).sum(1, keepdim=True).expand(3, 2))


@pytest.fixture(params=SCHEDULES)
def module(request, emulated_module):
    emulated_module.set_schedule(request.param, 3)
    return emulated_module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 32), (128, 192, 160)], ids=str)
def test_right_product(module, dtype, shape):
    assert product(module, "", *shape, dtype=dtype) < 1e-4


def test_right_sum(module):
    assert sums(module, "")


@pytest.mark.parametrize("fault", ["barrier", "wait", "fragment"])
def test_wrong_products_are_wrong(module, fault):
    error = product(module, fault)
    assert not error < 1.0, f"{fault}: the product came out right, error {error}"


def test_missing_syncwarp(module):
    assert not sums(module, "syncwarp")


@pytest.mark.parametrize(
    "fault, message",
    [
        ("store", r"out of bounds: byte 16384 of 16384 bytes of shared memory"),
        ("alignment", r"warp \d, lane \d+\): ldmatrix: shared address \d+ is not a multiple of 16"),
    ],
)
def test_wrong_accesses_stop_the_launch(module, fault, message):
    if fault == "store" and SANITIZED:
        pytest.skip("AddressSanitizer is there first")
    with pytest.raises(RuntimeError, match=message):
        product(module, fault)
    assert product(module, "") < 1e-4, "the next launch runs as if nothing had been"


@pytest.mark.parametrize(
    "fault, message",
    [
        ("divergence", r"deadlock.*warp 1: lanes 0-31 have returned"),
        ("spin", r"thread 0 \(warp 0, lane 0\): the block waits for one that runs after it"),
        ("arrive", r"deadlock.*warp 3: lanes 0-31 at barrier 1 \(32 of 128 threads\)"),
        ("mask", r"warp \d, lane \d+\): (syncwarp|shfl) of lanes 0-31, while lanes [\d,-]+ wait at (shfl|syncwarp)"),
    ],
)
def test_waiting_for_nobody_is_reported(module, fault, message):
    with pytest.raises(RuntimeError, match=message):
        sums(module, fault)
    assert sums(module, "")


@pytest.mark.skipif(not SANITIZED, reason="of the build with AddressSanitizer (make sanitize)")
@pytest.mark.parametrize("fault, message", [("store", "use-after-poison"), ("global", "heap-buffer-overflow")])
def test_the_sanitizer_names_the_line(emulated_module, fault, message):
    """A store beyond the shared memory of a block, and one beyond the result: the process ends at the line that did it."""
    script = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("_emulated", {emulated_module.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
a, c = torch.zeros(64, 32).bfloat16(), torch.zeros(64, 64)
module.planted_matmul({fault!r}, a.data_ptr(), a.data_ptr(), c.data_ptr(), 64, 64, 32, False)
"""
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr and "planted.cu:" in done.stderr, done.stderr[-3000:]


def test_bank_conflicts_are_counted(emulated_module):
    emulated_module.statistics()
    product(emulated_module, "")
    swizzled = emulated_module.statistics()
    product(emulated_module, "swizzle")
    plain = emulated_module.statistics()
    assert swizzled["ldmatrix"] == plain["ldmatrix"] > 0 and swizzled["mma"] == plain["mma"] == 4 * 16 * 6 * 128 // 128
    assert swizzled["ldmatrix_conflicts"] == 0 and plain["ldmatrix_conflicts"] == 3 * plain["ldmatrix"]


def test_every_16_bit_number_converts_as_torch_does(emulated_module):
    """The emulator's own conversions, which every kernel leans on: through a copy that widens and rounds."""
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        wide = torch.empty(65536)
        emulated_module.convert(bits.data_ptr(), wide.data_ptr(), 65536, dtype == torch.float16, False)
        exact = bits.view(dtype).float()
        known = ~exact.isnan()
        assert torch.equal(wide[known], exact[known]) and wide[~known].isnan().all()
        torch.manual_seed(0)
        x = torch.cat(
            [torch.randn(40000) * 10.0 ** torch.randint(-9, 6, (40000,)), exact[known] * 1.00048828125, exact[known]]
        )
        back = torch.empty(len(x), dtype=torch.int16)
        emulated_module.convert(back.data_ptr(), x.data_ptr(), len(x), dtype == torch.float16, True)
        assert torch.equal(back.view(dtype), x.to(dtype))
