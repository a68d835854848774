"""Method distill: the student learns a teacher's whole next-token distribution on recorded rows.

    loss = (1 - w) mean_t D(teacher_t, student_t) T^2 + w (cross entropy of the rows), w = sft_weight, T = temperature

over the trained tokens of a step; D is forward or reverse KL, or the generalised Jensen-Shannon divergence. The logits of neither
side are ever held whole (`kernels.linear_kl`). T^2 keeps the size of gradients when T changes (arXiv 1503.02531, section 2).

With `teacher_top_k` the teacher speaks once, before training: its k most likely tokens lie in a cache on disk (`train.teacher`), D
is that of these k outcomes and of "any other token", and no teacher is in memory while the student learns.
"""

from typing import Any

import torch
from torch import Tensor

from enginepost.device import fetch, sent
from enginepost.errors import EnginepostError
from enginepost.kernels.linear_kl import linear_kl
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.model import ModelSpec, load_model
from enginepost.model.layout import read_config
from enginepost.recipe_offline import DistillRecipe
from enginepost.train.methods.method import Metrics, Work, add_metrics, mean_metrics
from enginepost.train.methods.sft import Sft
from enginepost.train.rows import Rows
from enginepost.train.teacher import Shown, read_shown, shown_path, whole, write_shown


class Distill(Sft):
    """Distillation from a teacher model."""

    recipe: DistillRecipe

    def attach(self, model: Any) -> None:
        r, ours = self.recipe, model.spec.vocab_size
        theirs = ModelSpec.from_config(read_config(r.teacher)).vocab_size
        if theirs != ours:
            raise EnginepostError(
                f"teacher: {r.teacher}: its vocabulary has {theirs} tokens and the student's {ours}; distillation compares the "
                "probability of every token, so both must share one"
            )
        self.shown: dict[int, Shown] = {}  # id of a data set -> what the teacher says of it
        self.teacher: Any = None
        if r.teacher_top_k is None:
            self.teacher = self._load(model)
            return
        if r.teacher_top_k > theirs:
            raise EnginepostError(
                f"teacher_top_k: {r.teacher_top_k}: the vocabulary has {theirs} tokens; give at most that many"
            )
        for rows in (self.rows, self.validation):
            if rows is not None and id(rows.dataset) not in self.shown:
                self.shown[id(rows.dataset)] = self._cached(model, rows, r.teacher_top_k)
        self.teacher = None  # it was there to write the cache, if at all

    def _load(self, model: Any) -> Any:
        r = self.recipe
        return load_model(r.teacher, dtype=model.dtype, device=model.device, adapter=r.teacher_adapter).requires_grad_(
            False
        )

    def _cached(self, model: Any, rows: Rows, k: int) -> Shown:
        """From the cache on disk, which is made now unless it was made before."""
        r = self.recipe
        files = [r.teacher] if r.teacher_adapter is None else [r.teacher, r.teacher_adapter]
        path = shown_path(files, rows, model.dtype, k, r.temperature)
        if path.exists():
            print(f"the teacher's {k} most likely tokens: {path}", flush=True)
        else:
            self.teacher = self.teacher or self._load(model)
            write_shown(path, self.teacher, rows, self.planned(whole(rows)), k, r.temperature)
            print(
                f"the teacher's {k} most likely tokens of {len(rows.dataset)} sequences written to {path}", flush=True
            )
        return read_shown(path, rows)

    def loss(self, model: Any, work: Work, index: int) -> tuple[Tensor, Metrics]:
        r, batch, teacher = self.recipe, work.micro_batches[index], self.teacher
        kept = work.extra["trained"][index]
        said: dict[str, Any]  # of the teacher first, while nothing of the student's is kept yet
        if teacher is None:
            rows, members = work.extra["rows"], work.extra["members"][index]
            ids, logprobs = self.shown[id(rows.dataset)].of([int(rows.index[i]) for i in members])
            said = {"teacher_topk": (sent(ids, self.device), sent(logprobs, self.device))}
        else:
            with torch.no_grad():
                shown = teacher.hidden(batch.ids, batch.cu_seqlens, batch.positions)[kept]
            said = {
                "teacher_hidden": shown, "teacher_head": teacher.head_weight, "teacher_softcap": teacher.spec.final_softcap
            }  # fmt: skip
        hidden = model.hidden(batch.ids, batch.cu_seqlens, batch.positions)[kept]
        cap = model.spec.final_softcap
        each = linear_kl(
            hidden, model.head_weight, kind=r.divergence, beta=r.beta, temperature=r.temperature, softcap=cap, **said
        )
        divergence = each.sum(dtype=torch.float64) * r.temperature**2
        loss = (1 - r.sft_weight) * divergence / work.count
        metrics: Metrics = {"divergence": (divergence.detach(), len(kept))}
        if r.sft_weight:
            logprob = linear_logprob(hidden, model.head_table, batch.targets[kept], softcap=cap)[0]
            nll = -logprob.sum(dtype=torch.float64)
            loss = loss + r.sft_weight * nll / work.count
            metrics["nll_loss"] = (nll.detach(), len(kept))
        return loss, metrics

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float] | None:
        if self.validation is None:
            return None
        work = self.work(self.planned(self.validation), rows=self.validation)
        model.eval()
        losses, metrics = [], Metrics()
        for index in range(len(work.micro_batches)):
            loss, share = self.loss(model, work, index)
            losses.append(loss)
            add_metrics(metrics, share)
        model.train()
        return {"eval_loss": sum(fetch(losses)), **mean_metrics(metrics, "eval_")}

    def work(
        self, micro_batches: list[list[int]], epoch: float = 0.0, ends_epoch: bool = False, rows: Rows | None = None
    ) -> Work:
        work = super().work(micro_batches, epoch, ends_epoch, rows)
        work.extra.update(rows=self.rows if rows is None else rows, members=micro_batches)
        return work
