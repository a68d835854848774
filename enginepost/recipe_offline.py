"""Recipes of the methods that learn from recorded preferences, scores or a teacher: their own keys beside the common ones."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from enginepost.recipe import Count, Path, Recipe

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
DPO_LOSSES = (
    "sigmoid", "conservative", "robust", "hinge", "ipo", "ipo_sum", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft",
)  # fmt: skip
SMOOTHED = ("conservative", "robust", "exo_pair", "aot", "aot_unpaired")
DIVERGENT = ("sigmoid", "conservative", "robust", "hinge", "ipo", "ipo_sum", "exo_pair", "discopop", "sigmoid_norm")


def _losses(value: Any) -> Any:
    """One name, a list of names, or {name: weight} -> {name: weight}."""
    named = {value: 1.0} if isinstance(value, str) else value
    if isinstance(named, list) and all(isinstance(n, str) for n in named):
        named = dict.fromkeys(named, 1.0)
    if not isinstance(named, dict) or not named:
        raise ValueError("expected a loss, a list of losses, or losses with weights such as {sigmoid: 0.8, sft: 0.2}")
    unknown = [n for n in named if n not in DPO_LOSSES]
    if unknown:
        raise ValueError(f"expected losses among {', '.join(DPO_LOSSES)}; {unknown[0]!r} is none of them")
    if any(isinstance(w, bool) or not isinstance(w, (int, float)) for w in named.values()):
        raise ValueError("expected a number as the weight of each loss")
    return {name: float(weight) for name, weight in named.items()}


class _Preference(Recipe):
    """Pairs of answers. max_length bounds a prompt with one answer; a bin holds two of that length."""

    UNUSED: ClassVar[frozenset[str]] = frozenset({"train_on", "format"})
    OWN_LEARNING_RATES: ClassVar[tuple[float, float]] = (5e-6, 5e-7)

    share_prompts: bool = True  # compute the prompt of a pair once


class DpoRecipe(_Preference):
    """Direct preference optimization and its relatives."""

    method: str = "dpo"
    beta: Positive = 0.1
    loss: Annotated[dict[str, float], BeforeValidator(_losses)] = {"sigmoid": 1.0}  # noqa: RUF012
    label_smoothing: Smoothing = 0.0
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    f_alpha: float = 0.5  # of alpha_divergence
    discopop_tau: Positive = 0.05
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None  # weight of tokens beyond the shorter answer (LD-DPO)
    wpo: bool = False  # weigh pairs by how likely the policy is to write them
    reference: Path | None = None  # a model or adapter directory; default: the weights that training begins with
    precompute: bool = False  # reference log-probabilities once, before training, into a cache on disk

    @model_validator(mode="after")
    def _fits(self) -> "DpoRecipe":
        named = ", ".join(self.loss)
        if self.label_smoothing and not set(self.loss) & set(SMOOTHED):
            raise ValueError(f"label_smoothing: loss {named} does not use it; {', '.join(SMOOTHED)} do")
        if not self.label_smoothing and (plain := sorted({"conservative", "robust"} & set(self.loss))):
            raise ValueError(f"label_smoothing: loss {plain[0]} without it is loss sigmoid; set it, to 0.1 say")
        if self.f_divergence != "reverse_kl" and not set(self.loss) & set(DIVERGENT):
            raise ValueError(f"f_divergence: loss {named} does not use it; {', '.join(DIVERGENT)} do")
        if "sft" in self.loss and len(self.loss) == 1:
            raise ValueError("loss: sft alone compares nothing; that is method sft on the chosen answers")
        return self


class OrpoRecipe(_Preference):
    """Odds-ratio preference optimization."""

    method: str = "orpo"
    beta: Positive = 0.1


class SimpoRecipe(_Preference):
    """Simple preference optimization: length-normalised, without a reference."""

    method: str = "simpo"
    beta: Positive = 2.0
    gamma: NotNegative = 0.5  # margin of the reward
    label_smoothing: Smoothing = 0.0
    sft_weight: NotNegative = 0.0  # of the cross entropy of the chosen answers (CPO-SimPO)


class CpoRecipe(_Preference):
    """Contrastive preference optimization."""

    method: str = "cpo"
    beta: Positive = 0.1
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: Smoothing = 0.0
    alpha: NotNegative = 1.0  # weight of the cross entropy of the chosen answers


class KtoRecipe(Recipe):
    """Kahneman-Tversky optimization of answers that are good or bad."""

    UNUSED: ClassVar[frozenset[str]] = frozenset({"train_on", "format"})
    OWN_LEARNING_RATES: ClassVar[tuple[float, float]] = (5e-6, 5e-7)

    method: str = "kto"
    beta: Positive = 0.1
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: NotNegative = 1.0
    undesirable_weight: NotNegative = 1.0
    reference: Path | None = None
    precompute: bool = False


class RewardRecipe(_Preference):
    """A reward model from pairs (Bradley-Terry)."""

    OWN_LEARNING_RATES: ClassVar[tuple[float, float]] = (1e-4, 1e-5)

    method: str = "reward"
    centring: NotNegative = 0.0  # weight of (r_chosen + r_rejected)^2, which keeps scores near zero


class PrmRecipe(Recipe):
    """A process reward model from step labels."""

    UNUSED: ClassVar[frozenset[str]] = frozenset({"train_on", "format"})
    OWN_LEARNING_RATES: ClassVar[tuple[float, float]] = (1e-4, 1e-5)

    method: str = "prm"
    step_separator: str = "\n"


class DistillRecipe(Recipe):
    """Distillation from a teacher on recorded rows."""

    method: str = "distill"
    teacher: Path  # a model directory with the student's vocabulary
    teacher_adapter: Path | None = None
    teacher_top_k: Count | None = None  # its k most likely tokens, once, into a cache on disk; default: all, live
    divergence: Literal["forward", "reverse", "js"] = "forward"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # the teacher's weight in the mixture of js
    temperature: Positive = 1.0
    sft_weight: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of the cross entropy of the rows themselves
