"""Models that give scores instead of tokens, as Hugging Face stores them.

    sequence classification   score.weight [labels, H]               one score of a whole sequence, at its last token
    token classification      score.weight [labels, H], score.bias   a score for each token (process reward models: wrong, right)

The backbone is the Transformer without its head. The directory of a PEFT adapter of such a model (task_type SEQ_CLS or TOKEN_CLS,
`score` among modules_to_save) stands for its base model with the adapter on top.
"""

import json
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from enginepost.checkpoint import Checkpoint, Writer, copy_side_files, write_bytes
from enginepost.data.packing import Sequence, collate, plan_batches
from enginepost.device import placed
from enginepost.errors import EnginepostError
from enginepost.model.layout import read_config
from enginepost.model.lora import load_adapter, save_adapter
from enginepost.model.spec import FAMILIES
from enginepost.model.transformer import Transformer
from enginepost.model.weights import load_model

KINDS = {"sequence": "SequenceClassification", "token": "TokenClassification"}
TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}


@dataclass
class Scorer:
    """A backbone and its score head. kind: "sequence" or "token"."""

    model: Transformer
    head: nn.Linear
    kind: str
    tokenizer: str  # the directory that has it

    def token_scores(self, ids: Tensor, cu_seqlens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """float32 `[N, labels]` at the rows int64 `[N]` of a stream."""
        return head_scores(self.model, self.head, self.model.hidden(ids, cu_seqlens, positions).index_select(0, rows))

    @torch.no_grad()
    def score(self, sequences: Items[Items[int]], max_tokens: int = 8192) -> list[float]:
        """One score a sequence of token ids, in their order: of a model with one label. Packed to at most max_tokens a pass."""
        lengths = [len(s) for s in sequences]
        found = [0.0] * len(lengths)
        for members in plan_batches(lengths, batch_size=1, max_length=max([max_tokens, *lengths])) if lengths else []:
            plain = [np.asarray(sequences[i], dtype=np.int32) for i in members]
            host = collate([Sequence(ids, np.zeros(len(ids), np.bool_), 0, "") for ids in plain])
            self.model.check(host.ids)
            batch = placed(host, self.model.device)
            last = batch.cu_seqlens[1:].long() - 1
            values = self.token_scores(batch.ids, batch.cu_seqlens, batch.positions, last)[:, 0]
            for i, value in zip(members, values.tolist(), strict=True):
                found[i] = value
        return found


def head_scores(model: Any, head: nn.Linear, hidden: Tensor) -> Tensor:
    """hidden `[N, H]` of the backbone -> float32 `[N, labels]`."""
    scale = model.spec.logit_scale  # a matter of the token head, which `hidden` has inside
    return head(hidden.float() / scale)


def new_head(model: Any, labels: int, *, bias: bool, seed: int) -> nn.Linear:
    """A float32 head as Hugging Face starts it: normal with the config's initializer_range, bias zero."""
    head = nn.Linear(model.spec.hidden_size, labels, bias=bias, device=model.device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(
            torch.empty(head.weight.shape).normal_(0.0, model.spec.initializer_range, generator=generator)
        )
        if head.bias is not None:
            head.bias.zero_()
    return head


def classification_kind(config: dict[str, Any]) -> str | None:
    """ "sequence" or "token" where config.json is that of a classification model, else None."""
    named = config.get("architectures") or []
    return next((kind for kind, end in KINDS.items() if any(str(a).endswith(f"For{end}") for a in named)), None)


def load_scorer(
    path: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> Scorer:  # fmt: skip
    """Load a classification checkpoint, or a PEFT adapter of one with its base.

    Raises: EnginepostError when the directory holds another kind of model, or no `score.weight` that fits.
    """
    path = Path(path)
    if (path / "adapter_config.json").exists():
        return _from_adapter(path, dtype, device)
    config = read_config(path)
    kind = classification_kind(config)
    if kind is None:
        raise EnginepostError(
            f"{path}: config.json names {config.get('architectures')}, which gives tokens, not scores; expected a model "
            "for sequence or token classification, such as what method reward or prm writes"
        )
    model = load_model(path, dtype, device, classifier=True)
    checkpoint = Checkpoint(path)
    tensors = {n: checkpoint.tensor(n) for n in checkpoint.names if n.startswith("score.")}
    return Scorer(model, _head(model, tensors, path), kind, str(path))


def _from_adapter(path: Path, dtype: torch.dtype, device: torch.device | str) -> Scorer:
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    task, base = config.get("task_type"), config.get("base_model_name_or_path")
    kind = next((k for k, name in TASKS.items() if name == task), None)
    if kind is None or not base:
        raise EnginepostError(
            f"{path}: adapter_config.json says task_type {task!r} and base {base!r}; expected SEQ_CLS or TOKEN_CLS and the "
            "directory of the base model, such as what method reward or prm writes"
        )
    theirs = read_config(base)
    model = load_model(base, dtype, device, classifier=classification_kind(theirs) is not None)
    full = load_adapter(model, path, full_tensors=True)
    unknown = [n for n in full if not n.startswith("score.")]
    if unknown:
        raise EnginepostError(f"{path}: besides the score head it replaces {unknown[0]!r}; fuse it into its base first")
    model.requires_grad_(False)
    return Scorer(model.eval(), _head(model, full, path), kind, str(path))


def _head(model: Transformer, tensors: dict[str, Tensor], path: Path) -> nn.Linear:
    weight, bias = tensors.get("score.weight"), tensors.get("score.bias")
    if weight is None or weight.dim() != 2 or weight.shape[1] != model.spec.hidden_size:
        found = "none" if weight is None else list(weight.shape)
        raise EnginepostError(
            f"{path}: expected score.weight of shape [labels, {model.spec.hidden_size}], found {found}"
        )
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=model.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    return head.requires_grad_(False)


def save_scorer(
    model: Any, head: nn.Linear, directory: Path, *, kind: str, source: str | Path, pad_id: int | None
) -> None:
    """Write what `load_scorer` and transformers read: a classification checkpoint, or the adapter of one where the model has one.

    source: the base model, whose tokenizer files are copied; pad_id: what transformers needs for batches of several rows.
    """
    labels = {0: "LABEL_0"} if kind == "sequence" else {0: "wrong", 1: "right"}
    tensors = {f"score.{n}": p.detach() for n, p in head.named_parameters()}
    if model.lora_settings is not None:
        save_adapter(model, directory, base_model=source, full=tensors, task_type=TASKS[kind])
        copy_side_files(source, directory)
        return
    dtype = model.dtype
    config = dict(model.config)
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    causal = FAMILIES[model.spec.family].architecture
    config["architectures"] = [causal.replace("ForCausalLM", f"For{KINDS[kind]}")]
    config |= {
        "num_labels": len(labels),
        "id2label": {str(i): name for i, name in labels.items()},
        "label2id": {name: i for i, name in labels.items()},
        "pad_token_id": config.get("pad_token_id") if config.get("pad_token_id") is not None else pad_id,
    }
    kept = {n: t for n, t in model.checkpoint_tensors().items() if n != "lm_head.weight"} | tensors
    with Writer(directory, {n: (dtype, tuple(t.shape)) for n, t in kept.items()}) as writer:
        for name, tensor in kept.items():
            writer.write(name, tensor.to(dtype))
        copy_side_files(source, directory)
        write_bytes(directory / "config.json", (json.dumps(config, indent=2) + "\n").encode())
