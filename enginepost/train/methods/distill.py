"""Method distill: the student learns a teacher's whole next-token distribution on recorded rows.

    loss = (1 - w) mean_t D(teacher_t, student_t) T^2 + w (cross entropy of the rows), w = sft_weight, T = temperature

over the trained tokens of a step; D is forward or reverse KL, or the generalised Jensen-Shannon divergence. The logits of neither
side are ever held whole (`kernels.linear_kl`). T^2 keeps the size of gradients when T changes (arXiv 1503.02531, section 2).
"""

from typing import Any

import torch
from torch import Tensor

from enginepost.errors import EnginepostError
from enginepost.kernels.linear_kl import linear_kl
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.model import load_model
from enginepost.recipe_offline import DistillRecipe
from enginepost.train.methods.method import Metrics, Work, add_metrics, mean_metrics
from enginepost.train.methods.sft import Sft
from enginepost.train.rows import Rows


class Distill(Sft):
    """Distillation from a teacher model."""

    recipe: DistillRecipe

    def attach(self, model: Any) -> None:
        r = self.recipe
        self.teacher = load_model(r.teacher, dtype=model.dtype, adapter=r.teacher_adapter).requires_grad_(False)
        theirs, ours = self.teacher.spec.vocab_size, model.spec.vocab_size
        if theirs != ours:
            raise EnginepostError(
                f"teacher: {r.teacher}: its vocabulary has {theirs} tokens and the student's {ours}; distillation compares the "
                "probability of every token, so both must share one"
            )

    def loss(self, model: Any, work: Work, index: int) -> tuple[Tensor, Metrics]:
        r, batch, teacher = self.recipe, work.micro_batches[index], self.teacher
        kept = (batch.targets != -100).nonzero().squeeze(1)
        hidden = model.hidden(batch.ids, batch.cu_seqlens, batch.positions)[kept]
        with torch.no_grad():
            shown = teacher.hidden(batch.ids, batch.cu_seqlens, batch.positions)[kept]
        cap = model.spec.final_softcap
        each = linear_kl(
            hidden, model.head_weight, teacher_hidden=shown, teacher_head=teacher.head_weight, kind=r.divergence, beta=r.beta,
            temperature=r.temperature, softcap=cap, teacher_softcap=teacher.spec.final_softcap,
        )  # fmt: skip
        divergence = each.sum(dtype=torch.float64) * r.temperature**2
        loss = (1 - r.sft_weight) * divergence / work.count
        metrics: Metrics = {"divergence": (divergence.item(), len(kept))}
        if r.sft_weight:
            logprob = linear_logprob(hidden, model.head_weight, batch.targets[kept], softcap=cap)[0]
            nll = -logprob.sum(dtype=torch.float64)
            loss = loss + r.sft_weight * nll / work.count
            metrics["nll_loss"] = (nll.item(), len(kept))
        return loss, metrics

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float] | None:
        if self.validation is None:
            return None
        work = self.work(self.planned(self.validation), rows=self.validation)
        model.eval()
        total, metrics = 0.0, Metrics()
        for index in range(len(work.micro_batches)):
            loss, share = self.loss(model, work, index)
            total += loss.item()
            add_metrics(metrics, share)
        model.train()
        return {"eval_loss": total, **mean_metrics(metrics, "eval_")}

    def work(
        self, micro_batches: list[list[int]], epoch: float = 0.0, ends_epoch: bool = False, rows: Rows | None = None
    ) -> Work:
        return super().work(micro_batches, epoch, ends_epoch, rows)
