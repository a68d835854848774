"""`enginepost.load`: a Transformer with its tokenizer, for use from Python: logits, log-probabilities, text."""

from collections.abc import Collection, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from enginepost.data import Tokenizer, render
from enginepost.device import choose, sent
from enginepost.errors import EnginepostError
from enginepost.generate.decode import generate
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.model import Transformer, load_model

DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float32": torch.float32, "fp32": torch.float32}
STREAM_TOKENS = 8192  # tokens of one forward pass of `logprobs`

Messages = list[dict[str, Any]]


def load(
    path: str | Path, adapter: str | Path | None = None, dtype: str = "bfloat16", device: torch.device | str = "cpu",
    quantize: str | None = None,
) -> "LanguageModel":  # fmt: skip
    """A model directory, ready to use.

    Args: path: a Hugging Face model directory; adapter: a PEFT LoRA directory to put on top; dtype: "bfloat16" or "float32";
        device: "cpu", "cuda", "cuda:1" or "auto" (a GPU whose kernels pass their tests, else the CPU), or a torch device;
        quantize: "nf4", "nf4-double" or "fp4" for linear layers in 4 bits (a `*-bnb-4bit` model is anyway).
    Raises: EnginepostError for a bad path, an unsupported model, an adapter that does not fit.
    """
    if dtype not in DTYPES:
        raise EnginepostError(f"dtype {dtype!r} is not known; use {' or '.join(map(repr, ('bfloat16', 'float32')))}")
    # An adapter may have a tokenizer beside it: that of its training, chat template included.
    beside = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    tokenizer = adapter if adapter is not None and beside else path
    where = device if isinstance(device, torch.device) else choose(device)
    return LanguageModel(
        load_model(path, dtype=DTYPES[dtype], device=where, adapter=adapter, quantize=quantize), tokenizer
    )


class LanguageModel:
    """A model with its tokenizer (read from the directory `path` when first needed)."""

    def __init__(self, model: Transformer, path: str | Path) -> None:
        self.model, self.path = model, Path(path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path)

    @torch.no_grad()
    def logits(self, ids: Sequence[int] | Tensor) -> Tensor:
        """ids `[T]` of one sequence -> float32 `[T, V]`."""
        return self.model.logits(self._hidden([_flat(ids)]))

    @torch.no_grad()
    def logprobs(self, ids: Any) -> Any:
        """log p(ids[t] | ids[:t]) for t = 1 .. T-1, float32 `[T-1]`. A list of sequences gives a list of such tensors."""
        if isinstance(ids, Tensor) or (len(ids) > 0 and isinstance(ids[0], Integral)):
            return self.logprobs([ids])[0]
        sequences = [_flat(s) for s in ids]
        results: list[Tensor] = []
        while len(results) < len(sequences):
            first = end = len(results)
            total = 0
            while end < len(sequences) and (end == first or total + len(sequences[end]) <= STREAM_TOKENS):
                total += len(sequences[end])
                end += 1
            results += self._logprobs(sequences[first:end])
        return results

    def _logprobs(self, sequences: list[Tensor]) -> list[Tensor]:
        skip = torch.full((1,), -100, dtype=torch.int64)
        targets = torch.cat([torch.cat([s[1:], skip[: len(s)]]) for s in sequences])
        model = self.model
        hidden = self._hidden(sequences)
        logprob = linear_logprob(
            hidden, model.head_table, sent(targets, model.device), softcap=model.spec.final_softcap
        )[0]
        return [part[:-1] for part in logprob.split([len(s) for s in sequences])]

    def _hidden(self, sequences: list[Tensor]) -> Tensor:
        device, ids = self.model.device, torch.cat(sequences)
        self.model.check(ids)
        starts = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0)
        positions = torch.cat([torch.arange(len(s)) for s in sequences])
        return self.model.hidden(sent(ids, device), sent(starts.to(torch.int32), device), sent(positions, device))

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of raw text, with the beginning-of-text token in front where the tokenizer's model expects one."""
        tokenizer = self.tokenizer
        ids = tokenizer.encode(text)
        if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids = [tokenizer.bos_id, *ids]
        return ids

    def chat_prompt(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Ids of a conversation in the model's chat template, up to where the assistant's answer begins."""
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            raise EnginepostError(f"{self.path} has no chat template, so it takes no messages; give the prompt as text")
        text = render(
            messages, tokenizer.chat_template, tools, add_generation_prompt=True, **tokenizer.special_tokens
        )  # fmt: skip
        return tokenizer.encode(text)

    def generate(
        self, prompts: str | Sequence[str | Sequence[int]] | None = None, *,
        messages: Messages | list[Messages] | None = None, max_new_tokens: int = 256, temperature: float = 0.0,
        top_p: float = 1.0, top_k: int = 0, stop_ids: Collection[int] | None = None, seed: int = 0,
    ) -> list[str]:  # fmt: skip
        """Continue text, or answer conversations.

        Args:
            prompts: a text, or a list of texts (or of token ids), each continued as it is.
            messages: instead of prompts, a conversation `[{"role", "content"}, ...]` or a list of them, in the model's template.
            stop_ids: default the tokenizer's. The rest as in `enginepost.generate.generate`.
        Returns: a list of the new texts, one for each prompt, without special tokens.
        """
        if (prompts is None) == (messages is None):
            raise EnginepostError("generate needs either prompts or messages")
        if messages is not None:
            conversations = [messages] if messages and isinstance(messages[0], dict) else messages
            encoded = [self.chat_prompt(m) for m in conversations]  # type: ignore[arg-type]
        else:
            several = [prompts] if isinstance(prompts, str) else prompts or []
            encoded = [self.encode_prompt(p) if isinstance(p, str) else list(p) for p in several]
        stops = self.tokenizer.stop_ids if stop_ids is None else stop_ids
        new = generate(
            self.model, encoded, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
            stop_ids=stops, seed=seed,
        )  # fmt: skip
        return [self.tokenizer.decode(self._known(ids), skip_special=True) for ids in new]

    def _known(self, ids: list[int]) -> list[int]:
        # An embedding may have more rows than the tokenizer has tokens; a model rarely draws one, and it spells nothing.
        return [i for i in ids if i < self.tokenizer.vocab_size]


def _flat(ids: Sequence[int] | Tensor) -> Tensor:
    flat = torch.as_tensor(ids, dtype=torch.int64).cpu()
    if flat.dim() != 1:
        raise EnginepostError(f"expected token ids of one sequence, [T], got shape {list(flat.shape)}")
    return flat
