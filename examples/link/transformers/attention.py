"""Any Hugging Face model on enginepost's attention, through transformers' registry: no padding is computed, gradients included.

    import attention                                           # registers it
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="enginepost")

`python attention.py` checks a small random model against transformers' own attention: padded, packed, generating, training.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from enginepost import kernels


def starts(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def enginepost_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    is_causal: bool | None = None, position_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None, s_aux: Tensor | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [B, H, Tq, D], key and value [B, Hk, Tk, D]; attention_mask [B, Tk], 0 = padding, or None -> [B, Tq, H, D]."""
    if dropout or s_aux is not None:
        raise ValueError(
            "enginepost: attention has neither dropout nor sinks; set attention_dropout=0 or another implementation"
        )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    options = {
        "causal": getattr(module, "is_causal", True) if is_causal is None else is_causal,
        "window": sliding_window or 0,
        "softcap": softcap or 0.0,
        "scale": scaling,
    }
    if attention_mask is not None:  # padded: take the tokens, put the results back
        kept = attention_mask.bool()
        kept_q = kept[:, -queries:]
        cu_q, cu_k = starts(kept_q.sum(1)), starts(kept.sum(1))
        out = query.new_zeros(query.shape)
        out[kept_q] = kernels.attention(query[kept_q], key[kept], value[kept], cu_q, cu_k, **options)[0]
        return out, None
    if cu_seq_lens_q is not None:
        cu_q, cu_k = cu_seq_lens_q, cu_seq_lens_k
    elif batch == 1 and queries == keys and position_ids is not None and (position_ids == 0).sum() > 1:
        begins = (position_ids.flatten() == 0).nonzero().flatten()  # packed rows: each begins at position 0
        cu_q = cu_k = torch.cat([begins, begins.new_tensor([queries])]).to(torch.int32)
    else:
        cu_q, cu_k = (torch.arange(batch + 1, dtype=torch.int32) * n for n in (queries, keys))
    flat = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
    out, _ = kernels.attention(*flat, cu_q, cu_k, **options)
    return out.view(query.shape), None


AttentionInterface.register("enginepost", enginepost_attention)
AttentionMaskInterface.register("enginepost", flash_attention_mask)  # a mask only where there is padding


def check(name: str, model: torch.nn.Module) -> None:
    ids = torch.randint(3, 90, (2, 24))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    labels = ids.clone()
    labels[0, :8] = -100  # the first token of a row is nobody's target

    def run(implementation: str) -> dict[str, Tensor]:
        model.set_attn_implementation(implementation)
        model.zero_grad()
        result = model(ids, attention_mask=mask, labels=labels)
        result.loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        with torch.no_grad():
            rows = [model(row[-n:][None]).logits[0] for row, n in zip(ids, (17, 24), strict=True)]
            flat = torch.cat([ids[0, 7:], ids[1]])[None]
            positions = torch.cat([torch.arange(17), torch.arange(24)])[None]
            packed = model(flat, position_ids=positions, use_cache=False).logits[0]  # a cache hides where rows begin
        said = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return {
            "logits": result.logits[mask.bool()],
            "gradients": grads,
            "rows": torch.cat(rows),
            "packed": packed,
            "said": said,
        }

    ours, theirs = run("enginepost"), run("eager")
    for what in ("logits", "gradients", "rows", "packed"):
        worst = (ours[what] - theirs[what]).abs().max().item()
        assert worst < 2e-5 * max(1.0, theirs[what].abs().max().item()), (name, what, worst)
    assert torch.allclose(ours["packed"], ours["rows"], atol=1e-5), name
    assert torch.equal(ours["said"], theirs["said"]), name
    print(f"{name}: logits, gradients, packed rows and generated text agree")


def main() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    size |= {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    check("llama", LlamaForCausalLM(LlamaConfig(**size)))
    check("gemma2 (window, softcap)", Gemma2ForCausalLM(Gemma2Config(**size, sliding_window=6)))


if __name__ == "__main__":
    main()
