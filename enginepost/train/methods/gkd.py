"""Method gkd: a teacher shows, token by token, what it would have said in the student's own completions.

    loss = mean over tokens of D(teacher, student) at the sampling temperature
    beta 0: KL(teacher || student)      1: KL(student || teacher)      between: generalised Jensen-Shannon (see kernels.linear_kl)

A share `lmbda` of the prompts is answered by the student, the others keep the answer of the data; which is keyed by (seed, roll-out,
prompt). The student's sampling has no gradient. Agarwal et al. 2024 (arXiv 2306.13649), algorithm 1.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginepost.errors import EnginepostError
from enginepost.generate import Completion
from enginepost.kernels.linear_kl import linear_kl
from enginepost.model import load_model
from enginepost.recipe_online import GkdRecipe
from enginepost.train.methods.method import Metrics
from enginepost.train.methods.online import Online
from enginepost.train.rollout import Rollout


class Gkd(Online):
    """On-policy distillation."""

    recipe: GkdRecipe

    def __init__(self, recipe: GkdRecipe) -> None:
        self.needs_answers = recipe.lmbda < 1
        super().__init__(recipe)

    def needs_reference(self) -> bool:
        return False

    def attach(self, model: Any) -> None:
        recipe = self.recipe
        self.teacher = load_model(
            recipe.teacher, dtype=model.dtype, device=model.device, adapter=recipe.teacher_adapter
        ).requires_grad_(False)
        theirs, ours = self.teacher.head_table.shape[0], model.head_table.shape[0]
        if theirs != ours:
            raise EnginepostError(
                f"teacher: {recipe.teacher}: its vocabulary has {theirs} tokens and the student's {ours}; distillation compares the "
                "probability of every token, so both must share one"
            )

    def draw(self, model: Any, r: int, attempt: int, index: list[int]) -> list[list[Completion]]:
        recipe = self.recipe
        own = [bool(np.random.default_rng([recipe.seed, r, i, 7]).random() < recipe.lmbda) for i in index]
        drawn = iter(super().draw(model, r, attempt, [i for i, o in zip(index, own, strict=True) if o]))
        return [next(drawn) if o else [self._given(i)] for i, o in zip(index, own, strict=True)]

    def _given(self, index: int) -> Completion:
        answer = self.prompts[index].answer
        assert answer is not None
        answer = answer[: self.recipe.max_completion_length]
        stopped = answer[-1] in self.tokenizer.stop_ids
        return Completion(list(answer), [0.0] * len(answer), stopped)

    def learn(self, model: Any, rollout: Rollout, scores: Tensor | None) -> None:
        """Nothing is precomputed: the teacher looks at each micro-batch as it comes."""

    def loss(self, model: Any, work: Any, index: int) -> tuple[Tensor, Metrics]:
        recipe, batch, teacher = self.recipe, work.micro_batches[index], self.teacher
        with torch.no_grad():  # first, while nothing of the student's is kept yet
            shown = teacher.hidden(batch.ids, batch.cu_seqlens, batch.positions).index_select(0, batch.predict)
        hidden = model.hidden(batch.ids, batch.cu_seqlens, batch.positions).index_select(0, batch.predict)
        kind = "forward" if recipe.beta == 0 else "reverse" if recipe.beta == 1 else "js"
        each = linear_kl(
            hidden, model.head_weight, teacher_hidden=shown, teacher_head=teacher.head_weight, kind=kind,
            beta=recipe.beta if kind == "js" else 0.5, temperature=recipe.temperature, softcap=model.spec.final_softcap,
            teacher_softcap=teacher.spec.final_softcap,
        )  # fmt: skip
        return each.sum(dtype=torch.float64) / work.count, {}
