"""What a method holds beside a step on its tokens -> the fields of `Setup` that say so.

    dpo, kto                  a bin of pairs holds two sequences; the reference: nothing (the adapter off), a frozen copy of an
                              adapter, or a model of its own, which with `precompute` is there only before the first step
    orpo, simpo, cpo          pairs, no reference
    reward, prm               a score head in the place of the language model's
    distill, gkd              the teacher, and the divergence of two heads in place of one head; with `teacher_top_k` only before
    grpo, rloo, ppo, gkd      the cache of a roll-out, reward models; ppo's value head reads float32 copies of the hidden states

Other models are counted from their config.json. How long prompts are is not known before the data is read: in a roll-out they are
as long as `max_length` leaves room for.
"""

import json
from pathlib import Path
from typing import Any

from enginepost.errors import EnginepostError
from enginepost.model.architectures import names
from enginepost.model.layout import backbone_config
from enginepost.model.spec import ModelSpec
from enginepost.plan.memory import Other, RollOut, Setup, adapter, weight_bytes
from enginepost.recipe import Recipe
from enginepost.recipe_offline import DistillRecipe, DpoRecipe, KtoRecipe, PrmRecipe, RewardRecipe, _Preference
from enginepost.recipe_online import GkdRecipe, OnlineRecipe, PpoRecipe

PAGE, MOST_SLOTS, CACHE_BYTES, STEP_TOKENS = 32, 64, 2 << 30, 8192  # of generate/cache.py and generate/decode.py
SCORED = 8192  # tokens of a pass of a reward model (model/scorer.py)


def beside(recipe: Recipe, setup: Setup) -> dict[str, Any]:
    """The fields of `Setup` that the method decides; `setup` is that of the model alone, on the recipe's tokens.

    Raises: EnginepostError or ConfigError for another model whose config cannot be read.
    """
    found: dict[str, Any] = {}
    if isinstance(recipe, _Preference):
        found |= {"each": 2, "tokens": 2 * setup.tokens, "shares": recipe.share_prompts}
    if isinstance(recipe, (_Preference, KtoRecipe, PrmRecipe, DistillRecipe, OnlineRecipe)):
        found["takes"] = True
    if isinstance(recipe, (RewardRecipe, PrmRecipe)):
        found["head"] = "score"
    if isinstance(recipe, (DpoRecipe, KtoRecipe)):
        before = recipe.precompute and isinstance(recipe, DpoRecipe)  # kto asks it again, for its KL
        found |= _reference(recipe, setup, recipe.reference, before)
    if isinstance(recipe, (DistillRecipe, GkdRecipe)):
        before = isinstance(recipe, DistillRecipe) and recipe.teacher_top_k is not None
        found["head"] = "kl"
        found["others"] = (_model("teacher", recipe.teacher, setup, recipe.teacher_adapter, before=before),)
    if isinstance(recipe, OnlineRecipe):
        found |= _online(recipe, setup, found.get("others", ()))
    return found


def _online(recipe: OnlineRecipe, setup: Setup, others: tuple[Other, ...]) -> dict[str, Any]:
    spec, drawn = setup.spec, recipe.rollout_prompts * recipe.num_generations
    judges = [r.model for r in recipe.rewards if r.model is not None]
    found: dict[str, Any] = {"wide": isinstance(recipe, PpoRecipe)}
    wants = recipe.beta > 0 or (isinstance(recipe, PpoRecipe) and recipe.target_kl is not None)
    if wants and not isinstance(recipe, GkdRecipe):
        said = _reference(recipe, setup, None, False)
        found["copies"], others = said.get("copies", 0.0), (*others, *said.get("others", ()))
    scored = tuple(_model("reward model", path, setup, None, tokens=SCORED) for path in judges)
    found["others"] = (*others, *scored)
    # At most: a bin holds one completion where all are as long as they may be.
    found["micro_batches"] = max(1, -(-drawn // (recipe.num_mini_batches * recipe.batch_size)))
    completion = recipe.max_completion_length
    prompt = max(1, min(recipe.max_length, spec.max_position) - completion)
    capacity, token = prompt + completion, 2 * len(spec.layers) * spec.kv_heads * spec.head_dim * setup.itemsize
    slots = max(1, min(MOST_SLOTS, drawn, CACHE_BYTES // (capacity * token)))
    group = min(slots, recipe.num_generations)
    prompts = -(-slots // group)
    stored = prompts * _pages(prompt) + slots * _pages(completion)
    reserved = (slots + (recipe.num_generations > 1)) * _pages(capacity)
    found["rollout"] = RollOut(slots, min(stored, reserved), reserved, min(prompts * prompt, STEP_TOKENS + prompt))
    return found


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE) * PAGE


def _reference(recipe: Recipe, setup: Setup, named: str | None, before: bool) -> dict[str, Any]:
    """Of train/reference.py: the policy with its adapter off costs nothing."""
    is_adapter = named is not None and (Path(named) / "adapter_config.json").exists()
    if recipe.lora is None or (named is not None and not is_adapter):
        directory = named if named is not None and not is_adapter else recipe.model
        return {
            "others": (_model("reference", directory, setup, named if is_adapter else None, kept=True, before=before),)
        }
    if named is not None or recipe.adapter is not None or setup.dora:
        return {"copies": 0.0 if before else 4.0 * sum(setup.adapter_sizes)}
    return {}


def _model(
    name: str, directory: str, setup: Setup, adapter_directory: str | None, *, tokens: int = 0, kept: bool = False,
    before: bool = False,
) -> Other:  # fmt: skip
    """A frozen model in the policy's dtype. kept: in 4 bits and where the policy's frozen weights are, if they are frozen."""
    from enginepost.plan.setup import config_of, stored_in_4_bits

    nbytes = 0.0
    if (
        not kept and (Path(directory) / "adapter_config.json").exists()
    ):  # a reward model: its base with the adapter on top
        directory, adapter_directory = str(adapter_config(directory).get("base_model_name_or_path")), directory
    if not Path(directory).exists() and directory.lower().rpartition("/")[2] not in names():
        raise EnginepostError(f"{name}: {directory}: no such directory; give a model or an adapter directory")
    config = config_of(directory)
    if any(str(name).endswith("Classification") for name in config.get("architectures") or []):
        config = backbone_config(config)
    spec = ModelSpec.from_config(config)
    if adapter_directory is not None:
        nbytes += 4.0 * sum(adapter_sizes(spec, adapter_config(adapter_directory)))
    as_policy = kept and not setup.full
    alone = Setup(
        spec, 1, itemsize=setup.itemsize, quantize=(setup.quantize if as_policy else None) or stored_in_4_bits(config),
        weights=setup.weights if as_policy else "resident", device=setup.device,
    )  # fmt: skip
    return Other(name, spec, nbytes + sum(weight_bytes(alone)), tokens, before)


def adapter_sizes(spec: ModelSpec, said: dict[str, Any]) -> tuple[int, ...]:
    """Elements of every tensor of the adapter with this adapter_config.json."""
    targets = said.get("target_modules") or "all-linear"
    return adapter(spec, targets, int(said.get("r", 8)), said.get("rank_pattern") or {}, bool(said.get("use_dora")))[1]


def adapter_config(directory: str) -> dict[str, Any]:
    """Of an adapter directory. Raises EnginepostError where it cannot be read."""
    path = Path(directory) / "adapter_config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EnginepostError(f"{path}: cannot read the adapter's config: {error}") from None
    return dict(said)
