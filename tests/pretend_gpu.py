"""A device for machines without a GPU, on which whole trainings run: its tensors are apart from the CPU's, its copies come late.

A tensor on it is a wrapper around one in host memory, so that numbers are those of the CPU, to the bit. What a GPU would refuse is
refused: an operation on tensors of two devices, reading one through numpy. Work given to a side stream is done when somebody waits
for it and not before, as late as a GPU may do it: a copy that nobody waits for leaves what was there, and a staging buffer that is
filled again too early sends the wrong bytes. Whatever makes the host wait for the device is noted in `waits`. Its memory is counted,
by storages that tensors on it hold, and an allocation beyond a cap is an OutOfMemoryError; the workspaces of kernels are not in it.

It is torch's PrivateUse1 device, in Python, under the name "pretend".
"""

import contextlib
import importlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from enginepost import kernels

NAME = "pretend"
aten = torch.ops.aten
waits: list[str] = []  # names of the operations that made the host wait
caps: list[float] = []  # shares of its memory that a process was held to

TOTAL = 8 << 30  # bytes of its memory


class Memory:
    """Bytes of the storages that tensors on the device hold: now, at most so far, at most allowed."""

    def __init__(self) -> None:
        self.now, self.most, self.most_allowed = 0, 0, float("inf")
        self._held: dict[int, list[int]] = {}  # storage: [tensors, bytes]
        self._lock = threading.RLock()  # a tensor may die in the thread that reads weights

    def take(self, held: torch.Tensor) -> list[int]:
        """For a tensor that holds this one from now on; what comes back is for `free`."""
        storage = held.untyped_storage()
        with self._lock:
            entry = self._held.get(storage._cdata)
            if entry is None:
                nbytes = storage.nbytes()
                if self.now + nbytes > self.most_allowed:
                    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.")
                entry = self._held[storage._cdata] = [0, nbytes]
                self.now += nbytes
                self.most = max(self.most, self.now)
            entry[0] += 1
        return [storage._cdata]

    def free(self, taken: list[int]) -> None:
        with self._lock:
            entry = self._held[taken[0]]
            entry[0] -= 1
            if entry[0] == 0:
                self.now -= entry[1]
                del self._held[taken[0]]


memory = Memory()

# Their results have a size that only the device knows.
_SIZED = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor)


class Stream:
    """Work given to it is kept until somebody waits for it. `None` stands for the device's own stream, which works at once."""

    def __init__(self, device: Any = None) -> None:
        self.queue: list[Callable[[], object]] = []
        self.done = 0
        self.lock = threading.RLock()  # the reader of weights waits for copies too

    def work(self, until: int | None = None) -> None:
        with self.lock:
            while self.done < (len(self.queue) if until is None else until):
                self.queue[self.done]()
                self.queue[self.done] = lambda: None
                self.done += 1

    synchronize = work

    def wait_event(self, event: "Event") -> None:
        if event.stream is not self:
            event.stream.work(event.mark)

    def wait_stream(self, other: "Stream") -> None:
        if other is not self:
            other.work()


class Event:
    def record(self, stream: Stream | None = None) -> None:
        self.stream = _current() if stream is None else stream
        self.mark = len(self.stream.queue)


_own = Stream()
_thread = threading.local()


def _current() -> Stream:
    return getattr(_thread, "stream", _own)


class _Module(_DummyBackendModule):
    """What `torch.get_device_module` gives."""

    Stream, Event = Stream, Event

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def current_stream(self, device: Any = None) -> Stream:
        return _current()

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = _current()
        _thread.stream = stream
        yield
        _thread.stream = before

    # No generator of its own draws anything; torch's checks of an op save and restore the state of the accelerator there is.
    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        assert state.numel() == 0

    def memory_allocated(self, device: Any = None) -> int:
        return memory.now

    def max_memory_allocated(self, device: Any = None) -> int:
        return memory.most

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        memory.most = memory.now

    def empty_cache(self) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        _own.work()

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 7 << 30, TOTAL

    def get_device_name(self, device: Any = None) -> str:
        return "NVIDIA GeForce RTX 4060"

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        caps.append(fraction)
        memory.most_allowed = fraction * TOTAL


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)


class OnDevice(torch.Tensor):
    """A tensor on the device; `held` is where its numbers are."""

    held: torch.Tensor
    taken: list[int]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
        )  # fmt: skip
        made.held, made.taken = held, memory.take(held)
        weakref.finalize(made, memory.free, made.taken).atexit = False
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held})"

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        pass

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor on the device to numpy; copy it to host memory first")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            # Exchanges what C++ holds and leaves Python's attributes.
            taken = memory.take(args[1].held)
            memory.free(args[0].taken)
            args[0].held, args[0].taken[0] = args[1].held, taken[0]
        with torch._C.DisableTorchFunctionSubclass():  # the default would make what is on the host one of us again
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    here: dict[int, OnDevice] = {}
    host: list[torch.Tensor] = []

    def held(x: Any) -> Any:
        if isinstance(x, OnDevice):
            here[id(x.held)] = x
            return x.held
        if isinstance(x, torch.Tensor) and x.dim() > 0 and x.device.type == "cpu":
            host.append(x)
        return x

    wanted = kwargs.pop("device", None)
    wanted = None if wanted is None else torch.device(wanted).type
    if kwargs.pop("pin_memory", False):
        assert wanted in (None, "cpu")
    inner, options = tree_map(held, args), tree_map(held, kwargs)
    if func is aten._pin_memory.default:
        assert not here
        return inner[0].clone()
    copy = func in (aten.copy_.default, aten._to_copy.default)
    if here and host and not copy:
        raise RuntimeError(f"{func}: tensors on two devices: {[tuple(x.shape) for x in host]} of them on the CPU")
    if wanted is not None and func is not aten._to_copy.default:
        options["device"] = "cpu"
    to_device = bool(here) if wanted is None else wanted == NAME
    if func is aten.copy_.default:
        return _copy(args, inner, options)
    if here and (func is aten._local_scalar_dense.default or func in _SIZED or (copy and not to_device)):
        if not (func is aten.repeat_interleave.Tensor and options.get("output_size") is not None):
            waits.append(str(func))
        _own.work()
    if copy and to_device and not here and not options.get("non_blocking"):
        waits.append("copy of pageable memory")
    masks = here and func in (aten.index.Tensor, aten.index_put_.default) and inner[1]
    if masks and any(m is not None and m.dtype == torch.bool for m in masks):
        waits.append(f"{func} with a mask")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = func(*inner, **options)

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, OnDevice):
            return x
        if id(x) in here and not (copy and not to_device):
            return here[id(x)]
        if copy and any(x is y for y in inner):
            x = x.clone()
        return OnDevice(x) if to_device else x

    return tree_map(wrapped, out)


def _copy(args: tuple[Any, ...], inner: Any, options: dict[str, Any]) -> Any:
    target, source = inner[0], inner[1]
    later = bool(options.get("non_blocking") or (len(inner) > 2 and inner[2]))
    stream = _current()
    if stream is not _own and later:
        stream.queue.append(lambda: target.copy_(source))
        return args[0]
    if type(args[0]) is not type(args[1]) and not later and isinstance(args[1], torch.Tensor) and args[1].dim():
        waits.append("a copy between the devices")
    target.copy_(source)
    return args[0]


class _Mode(TorchDispatchMode):
    """New tensors on the device, and copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _patched(name: str, before: Callable[..., Any]) -> Callable[..., Any]:
    """`native` and `to_dlpack` of enginepost.kernels, for which a tensor on the device is the one that it holds."""

    def call(*args: Any, **kwargs: Any) -> Any:
        places = {type(x) for x in args if isinstance(x, torch.Tensor)}
        if name == "native" and OnDevice in places and len(places) > 1:
            raise RuntimeError(
                f"a kernel is given tensors on two devices: {[tuple(x.shape) for x in args if x is not None]}"
            )
        return before(*(x.held if isinstance(x, OnDevice) else x for x in args), **kwargs)

    return call


@contextlib.contextmanager
def present() -> Iterator[torch.device]:
    """Within, tensors may be made on `DEVICE`, and the CPU's kernels take them."""
    waits.clear()
    memory.most, memory.most_allowed = memory.now, float("inf")
    modules = [importlib.import_module(f"enginepost.kernels.{name}").__dict__ for name in kernels.FAMILIES]
    before = [(m, {n: m[n] for n in ("native", "to_dlpack") if n in m}) for m in modules]
    for m, found in before:
        m.update({name: _patched(name, function) for name, function in found.items()})
    try:
        with _Mode(), torch.autograd.set_multithreading_enabled(False):
            yield DEVICE
    finally:
        for m, found in before:
            m.update(found)
