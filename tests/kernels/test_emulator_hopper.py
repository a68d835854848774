"""The emulator's mbarriers, TMA and wgmma: right products are right, planted mistakes are caught by schedules that can see them."""

import pytest
import torch

SCHEDULES = ["forward", "reverse", "shuffled"]


@pytest.fixture(params=SCHEDULES)
def schedule(request, emulated_module):
    emulated_module.set_schedule(request.param, 3)
    return request.param


def product(module, fault="", kind="shared", m=128, n=256, k=320, dtype=torch.bfloat16):
    """Largest error of the planted product, relative to float32's; NaN where data was read that is not there."""
    torch.manual_seed(0)
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    exact = a.float() @ b.float().T
    if kind == "across":
        a, b = a.T.contiguous(), b.T.contiguous()
    c = torch.full((m, n), float("nan"))
    module.planted_wgmma(fault, kind, a.data_ptr(), b.data_ptr(), c.data_ptr(), m, n, k, dtype == torch.float16)
    return (c - exact).abs().max().item()


def twice(module, fault=""):
    """Whether y = 2 x, through TMA both ways, of a matrix that is not a whole number of boxes."""
    torch.manual_seed(0)
    x = torch.randn(100, 136).bfloat16()
    room = torch.full((101, 136), 7.0).bfloat16()
    module.planted_twice(fault, x.data_ptr(), room.data_ptr(), 100, 136)
    assert (room[100] == 7).all(), "a store went beyond the tensor"
    return torch.equal(room[:100], 2 * x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["shared", "across", "registers"])
def test_right_products(emulated_module, schedule, kind, dtype):
    emulated_module.statistics()
    assert product(emulated_module, kind=kind, dtype=dtype) < 1e-4
    counts = emulated_module.statistics()
    assert counts["wgmma"] == 4 * 4 * 5 * 4  # blocks, warps, steps of 64, of 16
    assert counts["tma"] == 4 * 5 * (3 if kind == "across" else 2)


def test_right_copies(emulated_module, schedule):
    assert twice(emulated_module)


@pytest.mark.parametrize("fault", ["late wait", "stride", "swizzle"])
def test_wrong_products_are_wrong(emulated_module, schedule, fault):
    assert not product(emulated_module, fault) < 1.0


# What is overwritten too early is seen where wgmma reads late, which is what the schedule `forward` makes of it.
@pytest.mark.parametrize("fault, kind", [("release", "shared"), ("registers", "registers")])
@pytest.mark.parametrize("order", ["forward", "shuffled"])
def test_operands_overwritten_under_way(emulated_module, fault, kind, order):
    emulated_module.set_schedule(order, 3)
    assert not product(emulated_module, fault, kind) < 1.0


STOPPED = {
    "full wait": r"deadlock|already has its 1 arrivals",
    "parity": r"deadlock.*at the mbarrier at 49152 \(phase \d: 1 arrivals",
    "no wait": r"returns while its wgmma are under way: wgmma.wait_group is missing",
    "less bytes": r"deadlock.*0 arrivals and -4096 bytes missing",
    "more bytes": r"deadlock.*0 arrivals and 128 bytes missing",
    "fence": r"wgmma: no wgmma.fence since",
    "init fence": r"the mbarrier at 49152 was initialised without a fence for the async proxy",
    "touch": r"accumulators were written between wgmma and wgmma.wait_group",
    "warp left": r"warp 2 issued fewer wgmma than another of its warpgroup",
    "overwrite": r"the mbarrier at shared address 49152 was overwritten",
    "register count": r"setmaxnreg.inc: from 255 to 240 registers",
    "empty count": r"deadlock.*phase 1: 1 arrivals",
}


@pytest.mark.parametrize("fault", STOPPED)
def test_wrong_uses_stop_the_launch(emulated_module, schedule, fault):
    with pytest.raises(RuntimeError, match=STOPPED[fault]):
        product(emulated_module, fault)
    assert product(emulated_module) < 1e-4, "the next launch runs as if nothing had been"


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_mbarriers_used_before_they_are_made(emulated_module, order):
    emulated_module.set_schedule(order, 3)
    with pytest.raises(RuntimeError, match="no mbarrier was initialised"):
        product(emulated_module, "init barrier")


def test_writes_that_the_async_proxy_does_not_see(emulated_module, schedule):
    assert not twice(emulated_module, "async fence")


def test_store_that_is_not_waited_for(emulated_module, schedule):
    with pytest.raises(RuntimeError, match="returns while its bulk stores are under way"):
        twice(emulated_module, "store wait")


def test_tensor_maps_that_the_driver_would_refuse(emulated_module):
    x = torch.zeros(64, 68).bfloat16()
    with pytest.raises(RuntimeError, match="a stride is not a multiple of 16"):
        emulated_module.planted_twice("", x.data_ptr(), x.data_ptr(), 64, 68)
    with pytest.raises(RuntimeError, match="the address is not a multiple of 16"):
        emulated_module.planted_twice("", x.data_ptr() + 2, x.data_ptr(), 32, 64)
