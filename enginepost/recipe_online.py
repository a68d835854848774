"""Recipe keys of the methods that learn from what the model itself writes: grpo, rloo, ppo, gkd.

A roll-out is `rollout_prompts` prompts with `num_generations` completions each. It is gone through `num_iterations` times, each time
in `num_mini_batches` optimizer steps. How a step is cut into micro-batches follows from `batch_size` and `max_length`, which hold
prompt and completion, and changes nothing.
"""

import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_serializer, model_validator

from enginepost.recipe import Count, Path, Recipe, _Strict


class Reward(_Strict):
    """One reward: a Python function, or a reward model.

    function: "file.py:name", "package.module:name", or the function itself; model: the directory of a sequence-classification
    checkpoint with one label.
    """

    function: Any = None
    model: Path | None = None
    weight: float = 1.0

    @model_validator(mode="after")
    def _one(self) -> "Reward":
        if (self.function is None) == (self.model is None):
            raise ValueError("expected either function or model in each reward")
        if self.function is not None and not callable(self.function):
            file, colon, name = str(self.function).rpartition(":")
            if not (isinstance(self.function, str) and colon and file and name):
                raise ValueError(f"expected file.py:function or package.module:function, got {self.function!r}")
        return self

    @field_serializer("function")
    def _written(self, function: Any) -> str | None:
        return function_name(function) if callable(function) else function


def function_name(function: Callable[..., Any]) -> str:
    """How a recipe names a function: "file.py:name" of its source, so that `--resume` can tell whether it is the same."""
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        file = None
    return f"{file or getattr(function, '__module__', 'python')}:{getattr(function, '__qualname__', type(function).__name__)}"


def _rewards(value: Any) -> Any:
    """One reward or a list; a text or a function stands for {"function": it}."""
    items = value if isinstance(value, list) else [value]
    return [{"function": os.fspath(i)} if isinstance(i, (str, os.PathLike)) else
            {"function": i} if callable(i) else i for i in items]  # fmt: skip


Rewards = Annotated[list[Reward], BeforeValidator(_rewards)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class OnlineRecipe(Recipe):
    """Keys of all four."""

    UNUSED: ClassVar[frozenset[str]] = frozenset({"gradient_accumulation", "train_on", "format"})
    OWN_LEARNING_RATES: ClassVar[tuple[float, float]] = (1e-5, 1e-6)

    # roll-outs
    rollout_prompts: Count = 8
    num_generations: Count = 8  # completions of each prompt, its group
    num_iterations: Count = 1  # times that a roll-out is learned from
    num_mini_batches: Count = 1  # optimizer steps of one time
    max_completion_length: Count = 256
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    # rewards
    rewards: Rewards = Field(default_factory=list)
    missing_eos_penalty: NotNegative = 0.0  # taken from the reward of a completion that was cut off
    mask_truncated_completions: bool = False  # or it is not learned from at all
    overlong_buffer: Count | None = None  # DAPO: the reward falls by up to 1 over the last so many tokens
    # objective
    beta: NotNegative = 0.0  # weight of the KL to the reference
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    entropy_coef: NotNegative = 0.0

    @model_validator(mode="after")
    def _enough(self) -> "OnlineRecipe":
        drawn = self.rollout_prompts * self.num_generations
        if self.num_mini_batches > drawn:
            raise ValueError(
                f"num_mini_batches: {self.num_mini_batches} steps cannot share the {drawn} completions of a roll-out"
            )
        return self


class GrpoRecipe(OnlineRecipe):
    """GRPO and its kin. What `loss` names has the settings of its paper, unless a key says otherwise."""

    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"
    epsilon: Annotated[float, Field(gt=0, lt=1)] | None = None  # type: ignore[assignment]  # 0.2; gspo 3e-4
    epsilon_high: Positive | None = (
        None  # as epsilon; dapo 0.28, gspo 4e-4; cispo 5 (there the ratio itself is clipped)
    )
    delta: Positive | None = None  # two-sided clipping: the ratio is at most this
    scale_rewards: Literal["group", "batch", "none"] | None = None  # group; dr_grpo none
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    dynamic_sampling: bool | None = None  # groups with equal rewards are replaced; dapo true
    max_resamples: Count = 4  # roll-outs drawn at most beyond the first to replace them

    @model_validator(mode="after")
    def _papers(self) -> "GrpoRecipe":
        defaults: dict[str, dict[str, Any]] = {
            "dr_grpo": {"scale_rewards": "none"},
            "dapo": {"epsilon_high": 0.28, "dynamic_sampling": True},
            "gspo": {"epsilon": 3e-4, "epsilon_high": 4e-4},
            "cispo": {"epsilon_high": 5.0},
        }
        found = {"epsilon": 0.2, "scale_rewards": "group", "dynamic_sampling": False} | defaults.get(self.loss, {})
        for key, value in found.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        if self.epsilon_high is None:
            object.__setattr__(self, "epsilon_high", self.epsilon)
        if self.num_generations < 2:
            raise ValueError(
                "num_generations must be at least 2: a completion is compared with the others of its prompt"
            )
        return self


class RlooRecipe(OnlineRecipe):
    """REINFORCE with a leave-one-out baseline; the KL is part of the reward."""

    num_generations: Count = 4
    beta: NotNegative = 0.05
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    normalize_advantages: bool = False

    @model_validator(mode="after")
    def _group(self) -> "RlooRecipe":
        if self.num_generations < 2:
            raise ValueError("num_generations must be at least 2: the baseline is the mean of the others")
        return self


class PpoRecipe(OnlineRecipe):
    """Proximal policy optimization with a value head on the policy."""

    num_generations: Count = 1
    num_iterations: Count = 4
    beta: NotNegative = 0.05  # where the coefficient of the KL begins; it stays there without target_kl
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_in: Literal["reward", "loss"] = "reward"
    target_kl: Positive | None = None  # nats a completion that the adaptive controller steers to
    kl_horizon: Positive = 10_000  # completions over which it corrects a relative error
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    value_coef: NotNegative = 0.1
    value_clip: Positive | None = 0.2
    whiten_rewards: bool = False
    whiten_advantages: bool = True


class GkdRecipe(OnlineRecipe):
    """On-policy distillation (arXiv 2306.13649): the student's own completions under the teacher's eyes."""

    UNUSED: ClassVar[frozenset[str]] = OnlineRecipe.UNUSED | {
        "rewards", "missing_eos_penalty", "mask_truncated_completions", "overlong_buffer", "kl_estimator", "epsilon",
        "entropy_coef", "validation",
    }  # fmt: skip
    OWN_LEARNING_RATES: ClassVar[tuple[float, float]] = (2e-4, 1e-5)

    teacher: Path  # a model directory with the student's vocabulary
    teacher_adapter: Path | None = None
    num_generations: Count = 1
    temperature: Positive = 0.9  # of sampling, and of both distributions
    lmbda: Annotated[float, Field(ge=0, le=1)] = (
        0.5  # share of prompts that the student answers; the others keep the data's answer
    )
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5  # 0: forward KL, 1: reverse KL, between: generalised Jensen-Shannon
