"""What every kernel test measures with: the error rule against float64, and a loop over thread counts."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are small: waking a second thread takes longer than the work, much longer on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """The error of ours is at most twice that of plain PyTorch at the same dtype, both against float64.

    Measured over a whole tensor, largest error and root mean square alike. The floor, a few units in the last place of float32,
    matters where plain PyTorch happens to be exact; inputs are of size 1, so it is never below that of 1.
    """

    def check(name: str, ours: Tensor, plain: Tensor, exact: Tensor, floor: float = 2e-7) -> None:
        assert ours.shape == exact.shape and ours.dtype == plain.dtype, (name, ours.shape, exact.shape, ours.dtype)
        if ours.numel() == 0:
            return
        known = torch.isfinite(exact)
        assert torch.equal(ours.double()[~known], exact[~known]), f"{name}: other infinities"
        ours, plain, exact = ours.double()[known], plain.double()[known], exact[known]
        assert torch.isfinite(ours).all(), f"{name}: not finite"
        if ours.numel() == 0:
            return
        scale = max(1.0, exact.abs().max().item())
        for kind, size in (("largest", lambda e: e.abs().max()), ("rms", lambda e: e.square().mean().sqrt())):
            mine, theirs = size(ours - exact).item(), size(plain - exact).item()
            assert mine <= 2 * theirs + floor * scale, (
                f"{name}: {kind} error {mine:.3g}, plain {theirs:.3g}, of {scale:.3g}"
            )

    return check


@pytest.fixture
def each_thread_count() -> Callable[[Callable[[], list[Tensor]]], None]:
    """check(f): f() gives the same bits with 1, 2, 3 and 8 threads."""

    def check(call: Callable[[], list[Tensor]]) -> None:
        torch.set_num_threads(1)
        first = call()
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for i, (one, many) in enumerate(zip(first, call(), strict=True)):
                assert torch.equal(one, many), f"result {i} differs with {threads} threads"

    return check
