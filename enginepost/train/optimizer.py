"""AdamW over named parameters, with everything that accumulates in float32.

Parameters in float32 (LoRA always, full fine-tuning with dtype fp32) accumulate their gradients in `.grad` as usual. A bfloat16
parameter keeps a float32 master copy, which is what the optimizer moves, and a float32 gradient: after each backward a hook adds
the bfloat16 gradient to it and frees the latter. Weight decay applies to matrices only (not to norm weights, biases, magnitudes).

With `in_backward` each parameter is moved as soon as its gradient is complete, within the backward pass, and the gradient is freed:
gradients of about one block exist at a time, and there are no float32 copies of them. A step then has one backward pass and no
clipping, since the global norm is known only when every parameter has moved. The results are the bits of an ordinary step.

With `host` moments and masters are in host memory, and the update is made there: each gradient is copied to the host, its
parameter back. On a CPU that is where they are anyway, and nothing is copied. No test has run it on a GPU.

Bytes a parameter, moments in 8 bits from 4096 elements on: float32 weights 4 + 4 (gradient) + 8 or 2 (moments); bfloat16 weights
2 + 4 (master) + 4 (gradient) + 8 or 2; `in_backward` takes the gradient away.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from enginepost.errors import EnginepostError
from enginepost.kernels.adamw import Moment, Moment8, adamw_step, global_norm, zero_moments


class NotFinite(EnginepostError):
    """A gradient is not finite, and parameters behind it in the backward pass have been moved already."""


class AdamW:
    """State of the optimizer. `steps` counts the updates made.

    Args: bits: of the moments, 32 or 8 (`enginepost.kernels.adamw.Moment8`); in_backward, host: see above.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], eps: float, weight_decay: float,
        bits: int = 32, in_backward: bool = False, host: bool = False,
    ) -> None:  # fmt: skip
        self.parameters = dict(parameters)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.in_backward, self.host = in_backward, host
        self.steps = 0
        moments = {n: zero_moments(p.detach(), bits, host=host) for n, p in self.parameters.items()}
        self.exp_avg = {n: m for n, (m, _) in moments.items()}
        self.exp_avg_sq = {n: v for n, (_, v) in moments.items()}
        self.masters = {
            n: p.detach().to("cpu" if host else p.device, torch.float32)
            for n, p in self.parameters.items()
            if p.dtype != torch.float32
        }
        self._grads: dict[str, Tensor] = {}
        self._lr: float | None = None  # while a step with in_backward is under way
        self._norms: list[float] = []
        if in_backward:
            for name, p in self.parameters.items():
                p.register_post_accumulate_grad_hook(self._move(name))
            return
        self._grads = {n: torch.zeros_like(self.parameters[n], dtype=torch.float32) for n in self.masters}
        for name in self.masters:
            self.parameters[name].register_post_accumulate_grad_hook(self._accumulate(name))

    def _accumulate(self, name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            if p.grad is not None:
                self._grads[name].add_(p.grad)
                p.grad = None

        return hook

    def _move(self, name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            gradient, p.grad = p.grad, None
            if gradient is None:
                return
            assert self._lr is not None, "zero_grad(lr=...) comes before the backward pass"
            norm = global_norm([gradient])
            if not math.isfinite(norm):
                raise NotFinite(f"the norm of the gradient of {name} became {norm}")
            self._norms.append(norm)
            self._update({name: gradient}, self._lr, self.steps + 1, 1.0)

        return hook

    def gradients(self) -> dict[str, Tensor]:
        """Float32 gradients accumulated since `zero_grad`, of every parameter that has one."""
        plain = {n: p.grad for n, p in self.parameters.items() if n not in self.masters and p.grad is not None}
        return {**self._grads, **plain}

    def grad_norm(self) -> float:
        return math.hypot(*self._norms) if self.in_backward else global_norm(list(self.gradients().values()))

    def zero_grad(self, *, lr: float | None = None) -> None:
        """Begin a step. lr: with `in_backward`, of the update that the one backward pass to follow makes."""
        for p in self.parameters.values():
            p.grad = None
        for g in self._grads.values():
            g.zero_()
        self._norms.clear()
        self._lr = lr

    def step(self, *, lr: float, grad_scale: float = 1.0) -> None:
        """One update from the accumulated gradients, times `grad_scale` (the clip); with `in_backward` it has been made."""
        self.steps += 1
        if self.in_backward:
            self._lr = None
        else:
            self._update(self.gradients(), lr, self.steps, grad_scale)

    def _update(self, gradients: Mapping[str, Tensor], lr: float, step: int, grad_scale: float) -> None:
        groups: dict[tuple[bool, bool], list[str]] = {}
        for name in gradients:
            groups.setdefault((self.parameters[name].ndim >= 2, name in self.masters), []).append(name)
        # With `host` one tensor after the other, so that copies of one exist at a time; on a CPU these are no copies.
        portions = (
            (kind, part) for kind, names in groups.items() for part in ([[n] for n in names] if self.host else [names])
        )
        for (matrix, mastered), names in portions:
            there = [self.parameters[n].detach() for n in names]
            here = [p.cpu() for p in there] if self.host else there
            adamw_step(
                here,
                [gradients[n].cpu() if self.host else gradients[n] for n in names],
                [self.exp_avg[n] for n in names],
                [self.exp_avg_sq[n] for n in names],
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                eps=self.eps,
                weight_decay=self.weight_decay if matrix else 0.0,
                step=step,
                grad_scale=grad_scale,
                masters=[self.masters[n] for n in names] if mastered else None,
            )
            for p, moved in zip(there, here, strict=True):
                if moved is not p:
                    p.copy_(moved)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs: `exp_avg.NAME`, `exp_avg_sq.NAME`, `master.NAME`; of moments in 8 bits the codes go by
        these names and the scales by `exp_avg_scale.NAME`, `exp_avg_sq_scale.NAME`."""
        found: dict[str, Tensor] = {}
        groups: dict[str, dict[str, Moment]] = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        for group, moments in groups.items():
            for name, moment in moments.items():
                if isinstance(moment, Moment8):
                    found[f"{group}.{name}"] = moment.codes
                    found[f"{group}_scale.{name}"] = moment.scale
                else:
                    found[f"{group}.{name}"] = moment
        return found | {f"master.{name}": t for name, t in self.masters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take over the tensors of `tensors()`; parameters with a master follow it.

        Raises: EnginepostError when a tensor is missing or has another shape or dtype.
        """
        for name, mine in self.tensors().items():
            theirs = tensors.get(name)
            if theirs is None or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                found = "nothing" if theirs is None else f"{theirs.dtype} {list(theirs.shape)}"
                raise EnginepostError(
                    f"optimizer state: {name}: expected {mine.dtype} of shape {list(mine.shape)}, found {found}"
                )
            mine.copy_(theirs)
        for name, master in self.masters.items():
            self.parameters[name].copy_(master)
        self.steps = steps
