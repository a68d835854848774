"""Training steps of models whose weights are drawn on the device in a moment: what the sections plan and memory measure.

A `Setup` of the planner says what to make. Weights in 4 bits are those of one random block: where they are resident every block
has a copy of its own, as in a run; where they stream from host memory all blocks stream the same pinned blob, so that a 70B
model takes seconds to make and not 40 GB of host memory. What passes over the bus, and what the device holds, is the same. The
streaming itself is `enginepost.model.residency.Stream`. The step is that of method sft: one sequence, all its tokens trained
on.
"""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from enginepost.kernels import nf4
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.model import Transformer, add_lora
from enginepost.model.blob import BlobLayout, PackedMatrix, Piece
from enginepost.model.layout import ALIGNMENT, block_bytes, layout, starting_value
from enginepost.model.residency import Stream, forget, give
from enginepost.model.spec import ModelSpec
from enginepost.plan.memory import PROCESS, Setup, adapter, step_peak
from enginepost.train.objectives.sft import sft_loss
from enginepost.train.optimizer import AdamW


@dataclasses.dataclass(frozen=True)
class Block:
    """The linear layers of a block in 4 bits: where the pieces lie, and the blob in pinned host memory."""

    where: BlobLayout
    pinned: Tensor


def setup_of(config: dict[str, Any], tokens: int, rank: int | None, **fields: Any) -> Setup:
    """The planner's description of a step over one sequence; rank: of an adapter on all linear layers, None for all weights."""
    spec = ModelSpec.from_config(config)
    ranks: Mapping[str, Any] = {}
    sizes: tuple[int, ...] = ()
    if rank is not None:
        ranks, sizes = adapter(spec, "all-linear", rank, {}, bool(fields.get("dora")))
    return Setup(spec=spec, tokens=tokens, full=rank is None, ranks=ranks, adapter_sizes=sizes, device="cuda", **fields)


def planned(s: Setup) -> float:
    """Bytes of the planner's peak that torch's allocator sees: all but the driver's context."""
    return step_peak(s).total - PROCESS["cuda"]


def random_block(spec: ModelSpec, kind: str, device: torch.device) -> Block:
    """A block's linear layers, drawn and quantised on the device."""
    double = kind.endswith("-double")
    linears: dict[str, list[PackedMatrix]] = {}
    parts: list[tuple[Piece, Tensor]] = []
    at = 0
    for entry in layout(spec):
        if not (entry.linear and entry.parameter.startswith("blocks.0.")):
            continue
        matrix = torch.randn(entry.shape, dtype=torch.bfloat16, device=device) * spec.initializer_range
        w = nf4.quantize(matrix, quant_type=kind.removesuffix("-double"), double=double)
        del matrix
        pieces = []
        for tensor in (w.packed, w.absmax, w.nested_absmax, w.nested_code):
            if tensor is not None:
                piece = Piece(Path("drawn"), 0, tensor.dtype, at, tensor.dtype, tensor.numel())
                pieces.append(piece)
                parts.append((piece, tensor))
                at += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
        name = entry.parameter.removeprefix("blocks.0.").removesuffix(".weight")
        rows, columns = w.shape
        linears.setdefault(name, []).append(
            PackedMatrix(tuple(pieces), (rows, columns), w.blocksize, w.quant_type, torch.bfloat16, w.offset)
        )
    if at != block_bytes(spec, 0, quantize=kind):
        raise RuntimeError(f"a block of {at} bytes where the config says {block_bytes(spec, 0, quantize=kind)}")
    blob = torch.empty(at, dtype=torch.uint8, device=device)
    for piece, tensor in parts:
        piece.view(blob).copy_(tensor)
    pinned = torch.empty(at, dtype=torch.uint8, pin_memory=device.type != "cpu")
    pinned.copy_(blob)
    return Block(BlobLayout({name: tuple(found) for name, found in linears.items()}, at), pinned)


def make(s: Setup, config: dict[str, Any], device: torch.device, block: Block | None = None) -> Any:
    """The Transformer of a setup, with its adapter, ready to train. block: of 4-bit weights, default drawn."""
    model = Transformer(s.spec, config, torch.bfloat16, device, linears="meta" if s.quantize is not None else None)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for entry in layout(s.spec):
            if entry.linear and s.quantize is not None:
                continue
            value, rows = starting_value(entry, s.spec), own[entry.parameter].detach()[entry.start : entry.stop]
            if value is None:
                rows.normal_(0.0, s.spec.initializer_range)
            else:
                rows.fill_(value)
    if s.quantize is not None:
        block = block or random_block(s.spec, s.quantize, device)
        where, pinned = block.where, block.pinned
        for each in model.blocks:
            forget(each)
            if s.weights == "resident":
                give(each, where.views(pinned.to(device)))
        if s.weights == "host":
            layouts = [where] * len(s.spec.layers)
            model.stream = Stream(list(model.blocks), layouts, lambda i, _: pinned, device, s.slots, staged=False)
        model.quantization = s.quantize
    if not s.full:
        rank = max(r for parts in s.ranks.values() for r, _ in parts)
        add_lora(model, r=rank, alpha=2 * rank, dropout=0.1 if s.dropout else 0.0, use_dora=s.dora)
    model.checkpointing, model.mlp_chunk = s.checkpointing, s.mlp_chunk
    return model.train()


@dataclasses.dataclass(frozen=True)
class Used:
    """What a step took: bytes at torch's allocator's peak, allocated and reserved, beside what was there before; seconds."""

    allocated: float
    reserved: float
    seconds: float


class Trainee:
    """A model, its optimizer, and what the device held before them."""

    def __init__(self, s: Setup, config: dict[str, Any], device: torch.device, block: Block | None = None) -> None:
        self.setup, self.device, self.api = s, device, torch.get_device_module(device)
        gc.collect()
        self.api.empty_cache()
        self.before = self.api.memory_allocated(device)
        self.model = make(s, config, device, block)
        self.optimizer = AdamW(
            {n: p for n, p in self.model.named_parameters() if p.requires_grad},
            betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, bits=s.moment_bits, in_backward=s.in_backward,
            host=s.states == "host",
        )  # fmt: skip

    def step(self, tokens: int) -> Used:
        """An optimizer step over one sequence of so many tokens in each micro-batch."""
        self.api.synchronize(self.device)
        self.api.reset_peak_memory_stats(self.device)
        begin = time.perf_counter()
        self.optimizer.zero_grad(lr=1e-4)
        for number in range(self.setup.micro_batches):
            loss = self._loss(tokens, number)
            loss.backward()
            del loss
        norm = self.optimizer.grad_norm()
        self.optimizer.step(lr=1e-4, grad_scale=1.0)
        self.api.synchronize(self.device)
        seconds = time.perf_counter() - begin
        if not norm == norm or norm == float("inf"):
            raise RuntimeError(f"the gradient norm of a step of {tokens} tokens is {norm}")
        allocated = self.api.max_memory_allocated(self.device) - self.before
        return Used(float(allocated), float(self.api.max_memory_reserved(self.device)), seconds)

    def _loss(self, tokens: int, number: int) -> Tensor:
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(self.setup.spec.vocab_size, (tokens,), generator=draw).to(self.device)
        targets = torch.cat([ids[1:], ids.new_full((1,), -100)])
        starts = torch.tensor([0, tokens], dtype=torch.int32).to(self.device)
        positions = torch.arange(tokens, device=self.device)
        self.model.dropout_seed = number
        hidden = self.model.hidden(ids, starts, positions)
        logprob, _, _ = linear_logprob(
            hidden, self.model.head_table, targets, softcap=self.setup.spec.final_softcap, entropy=True
        )
        return sft_loss(logprob, tokens * self.setup.micro_batches)


@contextlib.contextmanager
def trainee(s: Setup, config: dict[str, Any], device: torch.device, block: Block | None = None) -> Iterator[Trainee]:
    """A Trainee that leaves nothing on the device."""
    made = Trainee(s, config, device, block)
    try:
        yield made
    finally:
        made.model = made.optimizer = None  # type: ignore[assignment]  # the caller's `as` still holds `made`
        gc.collect()
        made.api.empty_cache()
        forget_pinned()


def forget_pinned() -> None:
    """Give pinned host memory back that torch keeps for later: a longer context has no use for the buffers of a shorter one."""
    getattr(torch._C, "_host_emptyCache", lambda: None)()


@contextlib.contextmanager
def held_to(memory: float, device: torch.device) -> Iterator[None]:
    """Within, the allocator is held to a budget less the driver's context, as a run with `memory` is (train/budget.py)."""
    api = torch.get_device_module(device)
    total = api.mem_get_info(device)[1]
    gc.collect()
    api.empty_cache()
    api.set_per_process_memory_fraction(min(1.0, max(0.0, (memory - PROCESS["cuda"]) / total)), device)
    try:
        yield
    finally:
        api.set_per_process_memory_fraction(1.0, device)


def out_of_memory(call: Callable[[], Used]) -> Used | None:
    """What the call gives, None where it runs out of memory. What it had taken is given back."""
    try:
        return call()
    except torch.OutOfMemoryError:
        pass  # the error holds the frames of the step, and they its tensors
    gc.collect()
    return None
