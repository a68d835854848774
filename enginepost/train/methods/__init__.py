"""Training methods: what differs between them, behind the one face that the loop knows (`Method`).

method.py      the face: steps, the loss of a micro-batch, evaluation, what a checkpoint keeps beside weights and optimizer
sft.py         pretrain and sft: cross entropy of the trained tokens
answers.py     what methods that compare or grade answers have in common
preference.py  dpo, orpo, simpo, cpo: pairs of answers
kto.py         kto: answers that are good or bad
reward.py      reward, prm: scores of answers, of steps
distill.py     distill: a teacher's distribution on recorded rows
online.py      roll-outs made inside the loop, which the next three learn from
policy.py      grpo (and dr_grpo, dapo, gspo, cispo) and rloo: completions compared with the others of their prompt
ppo.py         ppo: a value head, generalized advantage estimation, an adaptive KL
gkd.py         gkd: distillation on the student's own completions
"""

import importlib

from enginepost.recipe import Recipe
from enginepost.train.methods.method import Method

# Method -> module and class, imported when a recipe names it.
CLASSES = {
    "sft": ("sft", "Sft"),
    "pretrain": ("sft", "Sft"),
    "dpo": ("preference", "Dpo"),
    "orpo": ("preference", "Orpo"),
    "simpo": ("preference", "Contrastive"),
    "cpo": ("preference", "Contrastive"),
    "kto": ("kto", "Kto"),
    "reward": ("reward", "Reward"),
    "prm": ("reward", "Prm"),
    "distill": ("distill", "Distill"),
    "grpo": ("policy", "Grpo"),
    "rloo": ("policy", "Rloo"),
    "ppo": ("ppo", "Ppo"),
    "gkd": ("gkd", "Gkd"),
}


def create(recipe: Recipe) -> Method:
    """The method of a recipe, its rows read. Raises EnginepostError for anything wrong with the data."""
    module, name = CLASSES[recipe.method]
    found = getattr(importlib.import_module(f"enginepost.train.methods.{module}"), name)(recipe)
    assert isinstance(found, Method)
    return found
