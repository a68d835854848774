"""One decoder-only transformer for all families, over a packed stream of tokens; a ModelSpec says what it computes.

    h = embedding[ids]                        [T, H]
    for each block:
        q|k|v = qkv(norm(h))                  [T, (heads + 2 kv_heads) * D], one product
        h = h + o(attention(rope(q), rope(k), v))
        h = h + down(act(gate) * up)          gate|up = gate_up(norm(h)), one product
    hidden = norm(h)                          logits = hidden @ head^T

There is no batch dimension and no mask: `cu_seqlens` says where the sequences of the stream begin. Fused weights hold the rows of
the checkpoint's matrices one below the other; `enginepost.model.weights` knows which rows are whose.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from enginepost.errors import EnginepostError
from enginepost.kernels.attention import attention, attention_qkv
from enginepost.kernels.glu import glu
from enginepost.kernels.lora import LoraPart, Weight, lora_linear
from enginepost.kernels.matmul import mm
from enginepost.kernels.norm import add_rms_norm, rms_norm
from enginepost.kernels.rope import rope
from enginepost.model.chunked import chunked
from enginepost.model.recompute import Kept, recompute
from enginepost.model.rotary import tables
from enginepost.model.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from enginepost.model.lora import LoraSettings
    from enginepost.model.residency import StoredTable, Stream

_Tables = tuple[Tensor, Tensor] | None
FEW_ROWS = 16  # a product with fewer is bound by reading the weight


class Cache(Protocol):
    """Keys and values of earlier tokens, as `Transformer.hidden` uses them; `enginepost.generate.cache` has one."""

    keeps: bool  # whether it remembers what it is given; then there are no gradients

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, window: int, softcap: float, scale: float
    ) -> Tensor:  # fmt: skip
        """Store k, v `[T, Hk, D]` of the stream's tokens; q `[T, H, D]` over all that is stored of its sequence -> `[T, H, D]`."""


class Linear(nn.Module):
    """y = x W^T + b, W `[out, in]`, plus the low-rank updates in `lora` (see `enginepost.model.lora`).

    The weight is a parameter, or frozen: in 4 bits, or streamed (then it is None while its block is not at work).
    """

    weight: Weight

    def __init__(
        self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device, home: torch.device
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=home))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device)) if bias else None
        self.lora = nn.ModuleDict()
        self.parts: tuple[LoraPart, ...] = ()
        self.has_magnitude = False
        self.dropout = 0.0

    def forward(self, x: Tensor, seed: int = 0) -> Tensor:
        """x `[T, in]` -> `[T, out]`; seed keys the dropout of the updates while training."""
        if x.shape[0] < FEW_ROWS and not torch.is_grad_enabled() and not self.training and not self.has_magnitude:
            return self._few(x)
        dropout = self.dropout if self.training and self.parts else 0.0
        return lora_linear(x, self.weight, self.bias, self.parts, dropout=dropout, seed=seed)

    def _few(self, x: Tensor) -> Tensor:
        """A decoding step without gradients: what lora_linear does beside the products is a tenth to a quarter of its time there."""
        y = mm(x, self.weight.t()) if isinstance(self.weight, Tensor) else lora_linear(x, self.weight)
        if self.bias is not None:
            y += self.bias
        for part in self.parts:
            y[:, part.columns] += (x.to(part.A.dtype) @ part.A.t() @ part.B.t()).mul_(part.scaling)
        return y


class Block(nn.Module):
    """Attention and gated MLP, each with its residual addition."""

    def __init__(
        self, spec: ModelSpec, index: int, dtype: torch.dtype, device: torch.device, linears: torch.device
    ) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        self.layer: LayerSpec = spec.layers[index]
        q, kv, hidden, inner = (
            spec.heads * spec.head_dim,
            spec.kv_heads * spec.head_dim,
            spec.hidden_size,
            spec.intermediate_size,
        )

        def vector(size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, dtype=dtype, device=device))

        self.qkv = Linear(hidden, q + 2 * kv, spec.qkv_bias, dtype, device, linears)
        self.o = Linear(q, hidden, spec.output_bias, dtype, device, linears)
        self.gate_up = Linear(hidden, 2 * inner, spec.mlp_bias, dtype, device, linears)
        self.down = Linear(inner, hidden, spec.mlp_bias, dtype, device, linears)
        self.attention_norm = vector(hidden) if spec.pre_norm else None
        self.mlp_norm = vector(hidden) if spec.pre_norm else None
        self.attention_post_norm = vector(hidden) if spec.post_norm else None
        self.mlp_post_norm = vector(hidden) if spec.post_norm else None
        whole = spec.qk_norm == "projection"
        self.q_norm = vector(q if whole else spec.head_dim) if spec.qk_norm else None
        self.k_norm = vector(kv if whole else spec.head_dim) if spec.qk_norm else None

    def forward(
        self, h: Tensor, cu_seqlens: Tensor, tables: _Tables, seed: int = 0, cache: Cache | None = None,
        rows: int | None = None, enter: Callable[[], None] = lambda: None,
    ) -> Tensor:  # fmt: skip
        """h `[T, H]` -> `[T, H]`. tables: this layer's (cos, sin), None where it does not rotate; rows, enter: of the MLP, see
        `enginepost.model.chunked`."""
        eps, offset = self.spec.eps, self.spec.norm_offset
        y = h if self.attention_norm is None else rms_norm(h, self.attention_norm, eps, offset=offset)
        a = self.o(self._attend(self.qkv(y, seed), cu_seqlens, tables, cache), seed + 1)
        a = self._branch(a, self.attention_post_norm)
        if self.mlp_norm is None:
            y = h = h + a
        else:
            y, h = add_rms_norm(a, h, self.mlp_norm, eps, offset=offset)
        if rows is None or rows >= len(y):
            m = self._mlp(y, 0, seed)
        else:
            trained = [p for linear in (self.gate_up, self.down) for p in linear.parameters() if p.requires_grad]
            m = chunked(functools.partial(self._mlp, seed=seed), y, trained, rows, enter)
        return h + self._branch(m, self.mlp_post_norm)

    def _mlp(self, y: Tensor, chunk: int, seed: int) -> Tensor:
        """y `[rows, H]` -> `[rows, H]`; dropout depends on the row within a chunk, so each chunk has a seed of its own."""
        seed += chunk << 44
        return self.down(glu(self.gate_up(y, seed + 2), self.spec.activation), seed + 3)

    def _branch(self, x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = rms_norm(x, norm, self.spec.eps, offset=self.spec.norm_offset)
        return x if self.spec.residual_scale == 1.0 else x * self.spec.residual_scale

    def _attend(self, qkv: Tensor, cu_seqlens: Tensor, tables: _Tables, cache: Cache | None) -> Tensor:
        """qkv `[T, (heads + 2 kv_heads) * D]` -> `[T, heads * D]`."""
        spec = self.spec
        heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
        window, softcap, scale = self.layer.window, spec.attention_softcap, spec.scale
        if self.q_norm is None or self.k_norm is None:
            fused = qkv.view(-1, heads + 2 * kv_heads, dim)
            if tables is not None:
                fused = rope(fused, *tables, heads=heads + kv_heads)
            if cache is None:
                out = attention_qkv(fused, heads, kv_heads, cu_seqlens, window=window, softcap=softcap, scale=scale)
                return out.reshape(-1, heads * dim)
            q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
        else:
            q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
            if spec.qk_norm == "head":
                q, k = q.unflatten(1, (heads, dim)), k.unflatten(1, (kv_heads, dim))
            q = rms_norm(q, self.q_norm, spec.eps, offset=spec.norm_offset).view(-1, heads, dim)
            k = rms_norm(k, self.k_norm, spec.eps, offset=spec.norm_offset).view(-1, kv_heads, dim)
            v = v.unflatten(1, (kv_heads, dim))
            if tables is not None:
                q, k = rope(q, *tables), rope(k, *tables)
        if cache is None:
            out = attention(q, k, v, cu_seqlens, window=window, softcap=softcap, scale=scale)[0]
        else:
            out = cache.attend(self.index, q, k, v, cu_seqlens, window=window, softcap=softcap, scale=scale)
        return out.reshape(-1, heads * dim)


class Transformer(nn.Module):
    """A language model. Weights are uninitialized until `enginepost.model` loads or creates them.

    Attributes: spec; config: the config.json it came from; checkpointing: recompute each block's activations in the backward
    pass instead of keeping them (same bits, less memory): True, or how the inputs are kept (`enginepost.model.recompute`);
    mlp_chunk: tokens of which the MLP of a block is computed at a time (`enginepost.model.chunked`), None for all;
    dropout_seed: keys the dropout of LoRA, to be set anew for every micro-batch of a training run; stream: feeds the blocks their
    weights where those do not stay (`enginepost.model.residency`).
    """

    def __init__(
        self, spec: ModelSpec, config: dict[str, Any], dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", linears: torch.device | str | None = None,
        tables: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """linears: where the weights of the blocks' linear layers are made, "meta" for nowhere; tables: the same of embedding and
        head; default: device."""
        super().__init__()
        device = torch.device(device)
        home = device if linears is None else torch.device(linears)
        self.spec, self.config = spec, config
        self.checkpointing: bool | Kept = False
        self.mlp_chunk: int | None = None
        self.dropout_seed = 0
        self.stream: Stream | None = None
        self.quantization: str | None = None  # "nf4", "nf4-double", "fp4", "fp4-double": of linear layers in 4 bits
        self.lora_settings: LoraSettings | None = None
        self.embedding: Tensor | StoredTable = nn.Parameter(
            torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device if tables is None else tables)
        )
        self.blocks = nn.ModuleList(Block(spec, i, dtype, device, home) for i in range(len(spec.layers)))
        self.norm = nn.Parameter(torch.empty(spec.hidden_size, dtype=dtype, device=device))
        self.head: Tensor | StoredTable | None = None if spec.tied else nn.Parameter(torch.empty_like(self.embedding))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the activations."""
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        """Of the activations."""
        return self.norm.device

    @property
    def frozen(self) -> bool:
        """Whether the linear layers of the blocks have weights that cannot train: in 4 bits, or streamed."""
        return any("weight" not in m._parameters for m in self.modules() if isinstance(m, Linear))

    @property
    def head_weight(self) -> Tensor:
        """`[V, H]`: the weight that turns hidden states into logits. Read from its file each time where it lives on disk, so that it
        is in memory as long as someone holds it."""
        head = self.head_table
        return head if isinstance(head, Tensor) else head.whole()

    @property
    def head_table(self) -> "Tensor | StoredTable":
        """The same for linear_logprob, which takes it in parts where it lives on disk."""
        return self.embedding if self.head is None else self.head

    def hidden(self, ids: Tensor, cu_seqlens: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states after the final norm, ready for the head.

        Args: ids int64 `[T]`; cu_seqlens int32 `[S+1]`; positions int64 `[T]`; cache: of earlier tokens (no gradients).
        Returns: `[T, H]` in the model's dtype. Raises EnginepostError for an id outside the vocabulary; of ids on a GPU `check`
        tells, before they are sent there.
        """
        if ids.device.type == "cpu":  # to look at ids on a GPU would wait for it
            self.check(ids)
        spec = self.spec
        table = self.embedding
        h = F.embedding(ids, table) if isinstance(table, Tensor) else table.rows(ids)
        if spec.embedding_scale != 1.0:
            # Rounded to the weights' dtype first: Gemma was trained so.
            h = h * float(torch.tensor(spec.embedding_scale, dtype=h.dtype))
        turns = [tables(r, positions, cu_seqlens) for r in spec.ropes]
        recompute_blocks = self._recomputes(cache) and torch.is_grad_enabled()
        seed = self.dropout_seed * 4 * len(self.blocks)
        for i in range(len(self.blocks)):
            index = spec.layers[i].rope
            turn = None if index is None else turns[index]
            run = functools.partial(
                self._run, i, cu_seqlens=cu_seqlens, turn=turn, seed=seed + 4 * i, cache=cache
            )  # fmt: skip
            if recompute_blocks and isinstance(self.checkpointing, str):
                trains = any(p.requires_grad for p in self.blocks[i].parameters())
                h = recompute(run, h, trains, self.checkpointing)
            elif recompute_blocks:
                h = checkpoint(run, h, use_reentrant=False, preserve_rng_state=False)
            else:
                h = run(h)
        h = rms_norm(h, self.norm, spec.eps, offset=spec.norm_offset)
        return h if spec.logit_scale == 1.0 else h * spec.logit_scale

    def _recomputes(self, cache: Cache | None) -> bool:
        return self.checkpointing is not False and (cache is None or not cache.keeps)

    def _run(
        self, i: int, h: Tensor, cu_seqlens: Tensor, turn: _Tables, seed: int, cache: Cache | None = None
    ) -> Tensor:
        """Block i, in the forward pass and in recomputation."""
        enter = functools.partial(self.enter, i)
        run = functools.partial(self.blocks[i], h, cu_seqlens, turn, seed, cache, self.mlp_chunk, enter)
        if self.stream is None:
            return run()
        self.stream.enter(i)
        if not torch.is_grad_enabled() or self._recomputes(cache):
            return run()
        with self.stream.by_reference(i):
            return run()

    def enter(self, i: int) -> None:
        """The weights of block i are there when this returns, until another block is entered."""
        if self.stream is not None:
            self.stream.enter(i)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden `[T, H]` -> float32 `[T, V]`, the final softcap applied."""
        z = lora_linear(hidden, self.head_weight).float()
        cap = self.spec.final_softcap
        return z if cap == 0.0 else cap * torch.tanh(z / cap)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Hugging Face name -> a view of the weight under it, in the order of the file.

        Raises: EnginepostError when weights are in 4 bits or streamed.
        """
        from enginepost.model.layout import layout

        if self.frozen:
            raise EnginepostError(
                "the weights of this model are in 4 bits or streamed from disk, so there are no tensors to save or export; load it "
                "from 16-bit weights, with quantize=None and weights='resident'"
            )
        own = dict(self.named_parameters())
        return {e.name: own[e.parameter].detach()[e.start : e.stop] for e in layout(self.spec)}

    def check(self, ids: Tensor) -> None:
        """Raise EnginepostError for an id outside the vocabulary. ids int64 `[T]`, in host memory."""
        if ids.numel() == 0:
            return
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < 0 or high >= self.spec.vocab_size:
            worst = low if low < 0 else high
            where = int((ids == worst).nonzero()[0])
            raise EnginepostError(
                f"token id {worst} at position {where} of the batch is outside the vocabulary of the model (0 to "
                f"{self.spec.vocab_size - 1}); is the tokenizer that of another model?"
            )
