"""What every kernel test measures with: the error rule against float64, loops over thread counts and schedules, and the backends.

A test that takes the fixture `backend` runs once for each: "reference", "cpu", "emulated" (the CUDA kernels in the emulator) and
"cuda" (on a GPU, skipped where there is none). Its tensors go to the kernels through `backend.to`.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_build import build_emulated
from torch import Tensor

from enginepost.kernels import backend as kernel_backend

SCHEDULES = ("forward", "reverse", "shuffled")


@dataclass(frozen=True)
class Backend:
    name: str

    @property
    def gpu(self) -> bool:
        """True where CUDA kernels run: float16 is taken, and shapes should be small when they are emulated."""
        return self.name in ("emulated", "cuda")

    @property
    def emulated(self) -> bool:
        return self.name == "emulated"

    def to(self, *tensors: Any) -> Any:
        """The tensors where this backend's kernels read them; None stays None. One tensor gives one."""
        moved = [t.cuda() if self.name == "cuda" and isinstance(t, Tensor) else t for t in tensors]
        return moved[0] if len(moved) == 1 else moved


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    """The emulated kernels, built when first asked for (a minute or two, once)."""
    return kernel_backend.load_emulated(build_emulated())


@pytest.fixture(params=["reference", "cpu", "emulated", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    name = request.param
    if name == "cpu" and kernel_backend._core is None:
        pytest.skip("the native extension is not built")
    if name == "cuda" and not (kernel_backend._cuda and torch.cuda.is_available()):
        pytest.skip("no CUDA GPU" if kernel_backend._cuda else "this build has no CUDA kernels")
    if name == "emulated":
        module = request.getfixturevalue("emulated_module")
        seed = zlib.crc32(request.node.nodeid.encode())  # every test has its schedule, the same one every time
        module.set_schedule(SCHEDULES[seed % 3], seed)
    with kernel_backend.use_backend(name if name in ("reference", "emulated") else ""):
        yield Backend(name)


@pytest.fixture
def hopper(
    request: pytest.FixtureRequest, emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The emulator as an sm_90 card with the test module's MULTIPROCESSORS that is asked for wgmma, its kernels as the backend."""
    monkeypatch.setenv("ENGINEPOST_WGMMA", "1")
    emulated_module.set_card(90, request.module.MULTIPROCESSORS)
    emulated_module.statistics()
    with kernel_backend.use_backend("emulated"):
        yield emulated_module
    emulated_module.set_card(80, 108)


@pytest.fixture
def each_schedule(emulated_module: ModuleType) -> Callable[[Callable[[], list[Tensor]]], None]:
    """check(f): f() gives the same bits in every order of warps and blocks that the emulator knows."""

    def check(call: Callable[[], list[Tensor]]) -> None:
        first: list[Tensor] | None = None
        for schedule, seed in (*((s, 0) for s in SCHEDULES), ("shuffled", 1)):
            emulated_module.set_schedule(schedule, seed)
            with kernel_backend.use_backend("emulated"):
                results = call()
            first = results if first is None else first
            for i, (one, other) in enumerate(zip(first, results, strict=True)):
                assert torch.equal(one, other), f"result {i} differs with the {schedule} schedule"

    return check


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
        ours, plain, exact = ours.cpu(), plain.cpu(), exact.cpu()
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
