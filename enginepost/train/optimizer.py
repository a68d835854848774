"""AdamW over named parameters, with everything that accumulates in float32.

Parameters in float32 (LoRA always, full fine-tuning with dtype fp32) accumulate their gradients in `.grad` as usual. A bfloat16
parameter keeps a float32 master copy, which is what the optimizer moves, and a float32 gradient: after each backward a hook adds
the bfloat16 gradient to it and frees the latter. Weight decay applies to matrices only (not to norm weights, biases, magnitudes).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from enginepost.errors import EnginepostError
from enginepost.kernels.adamw import adamw_step, global_norm


class AdamW:
    """State of the optimizer. `steps` counts the updates made."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.parameters = dict(parameters)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.steps = 0
        self.exp_avg = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.parameters.items()}
        self.exp_avg_sq = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.parameters.items()}
        self.masters = {n: p.detach().float() for n, p in self.parameters.items() if p.dtype != torch.float32}
        self._grads = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        for name in self.masters:
            self.parameters[name].register_post_accumulate_grad_hook(self._accumulate(name))

    def _accumulate(self, name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            if p.grad is not None:
                self._grads[name].add_(p.grad)
                p.grad = None

        return hook

    def gradients(self) -> dict[str, Tensor]:
        """Float32 gradients accumulated since `zero_grad`, of every parameter that has one."""
        plain = {n: p.grad for n, p in self.parameters.items() if n not in self.masters and p.grad is not None}
        return {**self._grads, **plain}

    def grad_norm(self) -> float:
        return global_norm(list(self.gradients().values()))

    def step(self, *, lr: float, grad_scale: float = 1.0) -> None:
        """One update from the accumulated gradients, times `grad_scale` (the clip)."""
        self.steps += 1
        gradients = self.gradients()
        groups: dict[tuple[bool, bool], list[str]] = {}
        for name in gradients:
            groups.setdefault((self.parameters[name].ndim >= 2, name in self.masters), []).append(name)
        for (matrix, mastered), names in groups.items():
            adamw_step(
                [self.parameters[n].detach() for n in names],
                [gradients[n] for n in names],
                [self.exp_avg[n] for n in names],
                [self.exp_avg_sq[n] for n in names],
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                eps=self.eps,
                weight_decay=self.weight_decay if matrix else 0.0,
                step=self.steps,
                grad_scale=grad_scale,
                masters=[self.masters[n] for n in names] if mastered else None,
            )

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None
        for g in self._grads.values():
            g.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name: `exp_avg.NAME`, `exp_avg_sq.NAME`, `master.NAME`."""
        groups = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "master": self.masters}
        return {f"{group}.{name}": t for group, tensors in groups.items() for name, t in tensors.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take over the tensors of `tensors()`; parameters with a master follow it.

        Raises: EnginepostError when a tensor is missing or has another shape.
        """
        for name, mine in self.tensors().items():
            if name not in tensors or tensors[name].shape != mine.shape:
                found = list(tensors[name].shape) if name in tensors else "nothing"
                raise EnginepostError(f"optimizer state: {name}: expected shape {list(mine.shape)}, found {found}")
            mine.copy_(tensors[name])
        for name, master in self.masters.items():
            self.parameters[name].copy_(master)
        self.steps = steps
