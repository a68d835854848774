"""Online methods in the loop: what they learn, bit-exact resume, cuts into micro-batches that change nothing, bad input."""

import itertools
import json
import pathlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from whole_runs import assert_same_run, interrupt_after, metrics, weights_of

import enginepost.train.loop as loop
from enginepost.checkpoint import Checkpoint
from enginepost.errors import EnginepostError
from enginepost.model import load_model
from enginepost.recipe import load_recipe
from enginepost.train import methods, rewards
from enginepost.train.loop import Interrupted, accumulate, train
from enginepost.train.rewards import RewardError

WORDS = "the quick brown fox jumps over a lazy dog what is six times seven forty two one token at time".split()
MakeRecipe = Callable[..., dict[str, Any]]


def shortness(completions: list[Any], **_: Any) -> list[float]:
    """Between 0 and 1, more for fewer characters: something that even random weights can learn."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [1.0 / (1.0 + len(t) / 8) for t in texts]


def has_even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(np.mean([i % 2 == 0 for i in c])) for c in completion_ids]


def has_low_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(np.mean([i < 32 for i in c])) for c in completion_ids]


@pytest.fixture
def prompts(tmp_path: pathlib.Path) -> pathlib.Path:
    rng = random.Random(1)
    rows = [{"prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 6))), "answer": i} for i in range(10)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path: pathlib.Path, tiny_model_dir: pathlib.Path, prompts: pathlib.Path) -> MakeRecipe:
    def make(method: str, **keys: Any) -> dict[str, Any]:
        return {
            "model": str(tiny_model_dir), "data": str(prompts), "output": str(tmp_path / "run"), "method": method,
            "max_length": 64, "max_completion_length": 10, "batch_size": 2, "rollout_prompts": 3, "num_generations": 4,
            "max_steps": 5, "learning_rate": 3e-3, "dtype": "fp32", "lora": {"r": 4, "alpha": 8}, "save_every": 100,
            "rewards": [has_even_ids], **keys,
        }  # fmt: skip

    return make


def teacher_keys(recipe: MakeRecipe, tmp_path: pathlib.Path, **keys: Any) -> dict[str, Any]:
    """A gkd recipe on rows with answers; the teacher is another random model of the same vocabulary."""
    from enginepost.model import create_model, save_model

    settings = recipe("gkd", **keys)
    del settings["rewards"]
    student = load_model(settings["model"], dtype=torch.float32)
    teacher = create_model({**student.config, "hidden_size": 48}, dtype=torch.float32, seed=5)
    if not (tmp_path / "teacher").exists():
        save_model(teacher, tmp_path / "teacher", source=settings["model"])
    rows = [{"prompt": p, "completion": " forty two"} for p in WORDS[:10]]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**settings, "teacher": str(tmp_path / "teacher"), "data": str(tmp_path / "answers.jsonl")}


FLAVOURS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {}),
    "grpo, kl, twice in two": ("grpo", {"beta": 0.1, "num_iterations": 2, "num_mini_batches": 2}),
    "dr_grpo, entropy": ("grpo", {"loss": "dr_grpo", "entropy_coef": 0.01, "overlong_buffer": 4}),
    "dapo": ("grpo", {"loss": "dapo", "rewards": [has_even_ids, shortness]}),
    "gspo": ("grpo", {"loss": "gspo", "num_mini_batches": 2, "multi_objective_aggregation": "normalize_then_sum"}),
    "cispo, full": ("grpo", {"loss": "cispo", "lora": None, "beta": 0.1, "num_iterations": 2}),
    "rloo": ("rloo", {"temperature": 0.8, "missing_eos_penalty": 0.5, "num_mini_batches": 2}),
    "ppo": ("ppo", {"target_kl": 0.05, "kl_horizon": 100, "num_iterations": 3}),
    "ppo, kl in the loss, bf16": ("ppo", {"kl_in": "loss", "kl_estimator": "k3", "dtype": "bf16", "num_iterations": 2}),
    "gkd": ("gkd", {"num_mini_batches": 2}),
}


def settings_of(recipe: MakeRecipe, tmp_path: pathlib.Path, flavour: str, **keys: Any) -> dict[str, Any]:
    method, own = FLAVOURS[flavour]
    return teacher_keys(recipe, tmp_path, **own, **keys) if method == "gkd" else recipe(method, **own, **keys)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(
    recipe: MakeRecipe, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    """Stopped in the middle of a roll-out (where it has several steps) and resumed; the metrics are the same too."""
    whole = train(settings_of(recipe, tmp_path, flavour, output=str(tmp_path / "whole")))
    settings = settings_of(recipe, tmp_path, flavour)
    with monkeypatch.context() as m:
        interrupt_after(m, 2)
        with pytest.raises(Interrupted):
            train(settings)
    train(settings, resume=True)
    assert_same_run(whole, settings["output"])


def gradients(settings: dict[str, Any], step: int) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and gradients of the last of `step` steps, no update made."""
    recipe = load_recipe(settings)
    method = methods.create(recipe)
    torch.manual_seed(0)
    model = loop.weights.load(recipe, torch.float32, None)
    method.attach(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in loop.weights.trainable(model).items():  # away from B = 0, where policy and reference are one
            p.add_(0.05 * torch.randn(p.shape, generator=generator) * (1 if name.endswith("B") else 0))
    for number in range(1, step + 1):
        work = method.step(model, number)
        if number == 1 and method.rollout and "old" in method.rollout.tokens:
            method.rollout.tokens["old"] -= 0.3 * torch.randn(len(method.rollout.tokens["old"]), generator=generator)
    loss, metrics = accumulate(model, method, work, step=step)
    found = {**loop.weights.trainable(model), **method.module_tensors()}
    return loss, metrics, {n: p.grad.clone() for n, p in found.items() if p.grad is not None}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_how_a_step_is_cut_changes_nothing(recipe: MakeRecipe, tmp_path: pathlib.Path, flavour: str) -> None:
    """One micro-batch, many, one completion in each: the same loss, metrics and gradients to rounding."""
    if "bf16" in flavour:
        pytest.skip("rounding of bfloat16 depends on the cut")
    cuts: list[dict[str, Any]] = [{"batch_size": 99}, {"batch_size": 1}, {"batch_size": 1, "packing": False}]
    step = 2 if flavour != "dapo" else 1
    found = [gradients(settings_of(recipe, tmp_path, flavour, checkpointing=False, **cut), step) for cut in cuts]
    for loss, measured, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        assert measured == pytest.approx(found[0][1], abs=1e-5)
        scale = max(float(g.abs().max()) for g in found[0][2].values())
        assert scale > 0 and grads.keys() == found[0][2].keys()
        assert all((g - found[0][2][n]).abs().max() < 1e-4 * scale for n, g in grads.items())


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("dapo", "gspo", "cispo, full")]


@pytest.mark.parametrize("flavour", ["grpo", "rloo", "ppo", *SLOW])
def test_the_reward_rises(recipe: MakeRecipe, tmp_path: pathlib.Path, flavour: str) -> None:
    """A tenth of the vocabulary is rewarded, and the policy comes to prefer it."""
    method, own = FLAVOURS[flavour]
    keys = {**own, "rewards": [has_low_ids], "schedule": "constant", "beta": 0.0, "lora": None, "checkpointing": False}
    keys |= {
        "rollout_prompts": 4,
        "num_generations": 6,
        "missing_eos_penalty": 0.0,
        "learning_rate": 0.01,
        "target_kl": None,
    }
    if method != "ppo":
        del keys["target_kl"]
    per_rollout = own.get("num_iterations", 1) * own.get("num_mini_batches", 1)
    run = train(recipe(method, **{**keys, "max_steps": 16 * per_rollout}))
    reward = [m["reward"] for m in metrics(run)]
    assert reward[-1] > reward[0] + 0.15, reward


def test_gkd_comes_closer_to_the_teacher(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    for beta in (0.0, 0.5, 1.0):
        keys = {
            "beta": beta,
            "max_steps": 12,
            "learning_rate": 1e-2,
            "output": str(tmp_path / f"run{beta}"),
            "lora": None,
        }
        loss = [m["loss"] for m in metrics(train(teacher_keys(recipe, tmp_path, **keys)))]
        assert np.mean(loss[-3:]) < 0.8 * np.mean(loss[:3]), (beta, loss)


def test_the_first_step_is_on_policy(recipe: MakeRecipe) -> None:
    """At the first step of a roll-out nothing is clipped, sampling and training agree, and under LoRA the KL is zero."""
    run = train(recipe("grpo", beta=0.1, num_iterations=2, num_mini_batches=1, max_steps=2, learning_rate=0.05))
    first, second = metrics(run)
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-4
    assert first["clip_ratio/region_mean"] == 0 < second["clip_ratio/region_mean"]
    assert first["sampling/sampling_logp_difference/mean"] < 1e-5
    names = {
        "loss", "entropy", "kl", "reward", "reward_std", "frac_reward_zero_std", "rewards/has_even_ids/mean",
        "rewards/has_even_ids/std", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
        "completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio",
    }  # fmt: skip
    assert names <= set(first)


def test_ppo_keeps_a_value_head_and_a_coefficient(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    run = pathlib.Path(train(recipe("ppo", target_kl=1e-9, kl_horizon=24, num_iterations=1, save_every=2)))
    head = Checkpoint(run / "adapter" / "value_head.safetensors")
    assert (
        sorted(head.names) == ["v_head.summary.bias", "v_head.summary.weight"]
        and head.tensor(head.names[0]).abs().sum() > 0
    )
    kept = Checkpoint(run / "checkpoint-4" / "method.safetensors")
    assert {"value_head.weight", "value_head.bias"} <= set(kept.names)
    logged = metrics(run)
    assert logged[0]["kl_coef"] == 0.05
    for before, after in itertools.pairwise(logged):  # 12 completions of 24: half of an error that is clipped at 0.2
        moved = 0.1 if before["objective/kl"] > 1e-8 else -0.1
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + moved))
    assert {"policy_loss", "value_loss", "value_clip_ratio", "approx_kl", "explained_variance", "objective/kl"} <= set(
        metrics(run)[0]
    )


def test_an_adapter_that_goes_on_is_its_own_reference(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    first = train(recipe("grpo", output=str(tmp_path / "first"), learning_rate=0.05, max_steps=3))
    settings = recipe(
        "grpo", adapter=f"{first}/adapter", output=str(tmp_path / "second"), beta=0.1, max_steps=2, learning_rate=0.05
    )
    del settings["lora"]
    a, b = metrics(train(settings))
    assert a["kl"] == pytest.approx(0, abs=1e-6) and b["kl"] > 1e-5


def test_validation_prompts_are_answered(recipe: MakeRecipe) -> None:
    run = train(recipe("grpo", validation=0.3, max_steps=4, eval_every=2))
    evaluations = [m for m in metrics(run) if "eval_reward" in m]
    assert [m["step"] for m in evaluations] == [2, 4] and 0 <= evaluations[0]["eval_reward"] <= 1
    assert "eval_completions/mean_length" in evaluations[0] and "eval_rewards/has_even_ids/mean" in evaluations[0]


def test_columns_reach_the_reward_and_none_is_no_opinion(recipe: MakeRecipe) -> None:
    seen = []

    def judge(prompts: list[Any], completions: list[str], answer: list[int]) -> list[float | None]:
        seen.append((prompts, completions, answer))
        return [None if a % 2 else 1.0 for a in answer]

    run = train(recipe("grpo", rewards=judge, max_steps=1))
    prompts, completions, answer = seen[0]
    assert len(prompts) == len(completions) == len(answer) == 12 and all(isinstance(c, str) for c in completions)
    assert prompts[:4] == [prompts[0]] * 4
    assert metrics(run)[0]["reward"] == 1.0 and metrics(run)[0]["loss"] == pytest.approx(0)


def test_conversations_are_given_as_messages(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    turns = [{"role": "user", "content": "what is six times seven?"}, {"role": "assistant", "content": "forty two"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    seen = []

    def judge(prompts: list[Any], completions: list[Any], completion: list[str], **_: Any) -> list[float]:
        seen.append((prompts, completions, completion))
        return [float(i) for i in range(len(prompts))]

    train(recipe("rloo", rewards=[judge], data=str(tmp_path / "chat.jsonl"), max_steps=1, rollout_prompts=2))
    prompts, completions, completion = seen[0]
    assert prompts[0] == turns[:1] and completion[0] == "forty two"
    assert completions[0][0]["role"] == "assistant" and len({c[0]["content"] for c in completions}) > 2


def test_a_function_of_a_file_is_found_and_named(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    (tmp_path / "beside_the_judge.py").write_text("FINE = -1.0\n")
    (tmp_path / "judge.py").write_text(
        "from beside_the_judge import FINE\ndef short(completions, **_):\n    return [FINE * len(c) for c in completions]\n"
    )
    settings = recipe(
        "grpo", rewards=[{"function": f"{tmp_path}/judge.py:short", "weight": 0.5}, has_even_ids], max_steps=1
    )
    line = metrics(train(settings))[0]
    assert line["reward"] == pytest.approx(0.5 * line["rewards/short/mean"] + line["rewards/has_even_ids/mean"])
    saved = load_recipe(pathlib.Path(settings["output"]) / "recipe.yaml")
    assert saved.model_dump()["rewards"][0]["function"] == f"{tmp_path}/judge.py:short"
    assert saved.model_dump()["rewards"][1]["function"].endswith("test_online.py:has_even_ids")


def bad(value: Any) -> Callable[..., Any]:
    def judge(completions: list[Any], answer: list[int], **_: Any) -> Any:
        return value(completions, answer)

    return judge


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda c, a: [0.0] * (len(c) - 1), r"judge returned 11 rewards for 12 completions \(of .*prompts\.jsonl:\d+ and on\)"),
        (lambda c, a: [float("nan") if x == max(a) else 0.0 for x in a], r"judge returned nan for .*prompts\.jsonl:\d+"),
        (lambda c, a: [float("inf")] * len(a), r"judge returned inf for .*prompts\.jsonl:\d+"),
        (lambda c, a: ["good"] * len(a), r"judge returned 'good' for .*prompts\.jsonl:\d+, which is no number"),
        (lambda c, a: 3.0, r"judge returned 3\.0, expected a list of 12 numbers"),
        (lambda c, a: [1 // (max(a) - x) for x in a], r"judge raised ZeroDivisionError: .*; the prompt was .*prompts\.jsonl:\d+: '"),
        (lambda c, a: [None] * len(a), r"no reward has an opinion"),
    ],
)  # fmt: skip
def test_bad_rewards_name_the_function_and_the_prompt(recipe: MakeRecipe, value: Any, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        train(recipe("grpo", rewards=bad(value)))


@pytest.mark.parametrize(
    ("method", "keys", "words"),
    [
        ("grpo", {"rewards": []}, "needs at least one, such as"),
        ("grpo", {"rewards": "judge.py"}, r"expected file\.py:function or package\.module:function"),
        ("grpo", {"rewards": [{"weight": 1.0}]}, "expected either function or model"),
        ("grpo", {"rewards": "nowhere.py:judge"}, r"there is no file nowhere\.py"),
        ("grpo", {"rewards": "no_such_package.judges:judge"}, "importing no_such_package.judges raised ModuleNotFoundError"),
        ("grpo", {"rewards": "enginepost.errors:judge"}, "enginepost.errors has no function judge"),
        ("grpo", {"num_generations": 1}, "num_generations must be at least 2"),
        ("rloo", {"loss": "dapo"}, "method rloo does not use this key"),
        ("grpo", {"gamma": 1.0}, r"method grpo does not use this key \((simpo, )?ppo do"),
        ("grpo", {"gradient_accumulation": 2}, "method grpo does not use this key"),
        ("grpo", {"loss": "grop"}, r"expected grpo, dr_grpo, .* \(did you mean grpo\?\)"),
        ("grpo", {"max_completion_length": 64}, "leaves none for the prompt"),
        ("grpo", {"max_length": 12}, r"prompts are longer than the 2 tokens that max_length leaves .*prompts\.jsonl:\d+"),
        ("grpo", {"overlong": "truncate"}, "a prompt cannot be cut"),
        ("grpo", {"lora": {"dropout": 0.1}}, r"lora\.dropout: 0\.1: method grpo compares"),
        ("gkd", {"rewards": []}, "method gkd does not use this key"),
        ("rloo", {"num_mini_batches": 13}, "13 steps cannot share the 12 completions of a roll-out"),
    ],
)  # fmt: skip
def test_bad_recipes(recipe: MakeRecipe, method: str, keys: dict[str, Any], words: str) -> None:
    settings = recipe(method, **keys)
    if method == "gkd":
        settings["teacher"] = settings["model"]
    with pytest.raises(EnginepostError, match=words):
        train(settings)


def test_prompts_can_be_looked_at(recipe: MakeRecipe, prompts: pathlib.Path) -> None:
    import io

    from rich.console import Console

    from enginepost.data.preview import show_prompts

    out = io.StringIO()
    show_prompts(prompts, recipe("grpo")["model"], max_tokens=54, rows=2, console=Console(file=out, width=400))
    assert "10 prompts of" in out.getvalue() and "columns: answer" in out.getvalue()
    assert json.loads(prompts.read_text().splitlines()[1])["prompt"] in out.getvalue()


def test_bad_prompts(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    cases = [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "prompt should be a text or a list of messages"),
        ({"text": "a document"}, "a record of raw text has no prompt"),
        ({"prompt": [{"role": "assistant", "content": "hi"}]}, "ends with a turn of the assistant"),
        ([1], "a record is a JSON object"),
    ]
    for record, words in cases:
        (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps(record) + "\n")
        with pytest.raises(EnginepostError, match=rf"bad\.jsonl:2: .*{words}"):
            train(recipe("grpo", data=str(tmp_path / "bad.jsonl")))
    settings = teacher_keys(recipe, tmp_path, lmbda=0.5)
    with pytest.raises(EnginepostError, match=r"bad\.jsonl:1: the record has no answer"):
        train({**settings, "data": str(tmp_path / "bad.jsonl")})


def test_a_teacher_of_another_vocabulary(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    from enginepost.model import create_model, save_model

    settings = teacher_keys(recipe, tmp_path)
    config = {**load_model(settings["model"], dtype=torch.float32).config, "vocab_size": 500}
    save_model(create_model(config, dtype=torch.float32), tmp_path / "other", source=settings["model"])
    with pytest.raises(EnginepostError, match="its vocabulary has 500 tokens and the student's"):
        train({**settings, "teacher": str(tmp_path / "other")})


def test_resume_refuses_another_reward(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """A function is known by its file and name; one without a name of its own (a lambda) has to be given again, and can be."""
    with monkeypatch.context() as m:
        interrupt_after(m, 2)
        with pytest.raises(Interrupted):
            train(recipe("grpo", rewards=[lambda completions: [0.5] * len(completions)], output=f"{tmp_path}/lambda"))
        interrupt_after(m, 2)
        with pytest.raises(Interrupted):
            train(recipe("grpo"))
    train(
        recipe(
            "grpo", rewards=[lambda completions: [0.5] * len(completions)], output=f"{tmp_path}/lambda", max_steps=5
        ),
        resume=True,
    )
    with pytest.raises(EnginepostError, match=r"changed recipe(.|\n)*rewards"):
        train(recipe("grpo", rewards=[shortness]), resume=True)


def test_what_was_cut_off_can_be_masked_or_fined(recipe: MakeRecipe) -> None:
    """Completions 1 and 4 were cut off: masked, they are in no micro-batch but still among those that a mean is taken over; fined,
    they lose what the recipe says; an overlong one loses up to 1."""
    for keys in ({"mask_truncated_completions": True}, {"missing_eos_penalty": 0.5}, {"overlong_buffer": 5}):
        method = methods.create(load_recipe(recipe("grpo", **keys)))
        model = loop.weights.load(method.recipe, torch.float32, None)
        method.attach(model)
        rollout = method.make(model, 0)
        rollout.stopped = torch.tensor([i not in (1, 4) for i in range(12)])
        rollout.completions[2:4], rollout.completions[5] = 7, 5
        reward = method.shaped(rollout, torch.ones(12, 1, dtype=torch.float64))  # type: ignore[attr-defined]
        if "missing_eos_penalty" in keys:
            assert reward.tolist() == [0.5 if i in (1, 4) else 1.0 for i in range(12)]
        elif "overlong_buffer" in keys:
            assert reward[[2, 3, 5]].tolist() == pytest.approx([0.6, 0.6, 1.0]) and reward[0] == 0.0
        else:
            rollout = method.make(model, 0)
            rollout.keep = torch.tensor([i not in (1, 4) for i in range(12)])
            method.rollout = rollout
            work = method.step(model, 1)
            members = torch.cat([b.members for b in work.micro_batches]).tolist()
            assert sorted(members) == [0, 2, 3, *range(5, 12)]
            assert work.completions == 12 and work.count == int(rollout.completions[rollout.keep].sum())


def test_dynamic_sampling_replaces_groups_of_equal_rewards(recipe: MakeRecipe) -> None:
    """Prompts with an odd answer get the same reward whatever is said. A roll-out is made of the others, from further draws; when no
    prompt is left that teaches anything, the first draw stays and the run says so."""

    def judge(completion_ids: list[list[int]], answer: list[int], **_: Any) -> list[float]:
        return [0.5 if a % 2 else float(np.mean(c)) for c, a in zip(completion_ids, answer, strict=True)]

    def flat(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1.0 for _ in completion_ids]

    for function, informative in ((judge, True), (flat, False)):
        method = methods.create(load_recipe(recipe("grpo", loss="dapo", rewards=[function], rollout_prompts=4)))
        model = loop.weights.load(method.recipe, torch.float32, None)
        method.attach(model)
        for r in range(3):
            rollout = method.make(model, r)
            groups = rollout.prompts.view(-1, 4)
            assert len(groups) == 4 and (groups == groups[:, :1]).all()
            drawn = [method.prompts[i].columns["answer"] for i in groups[:, 0].tolist()]  # type: ignore[attr-defined]
            advantages = rollout.tokens["advantages"]
            if informative:
                assert all(a % 2 == 0 for a in drawn) and 0 < rollout.metrics["frac_reward_zero_std"] < 1
                assert rollout.metrics["resamples"] >= 1 and advantages.abs().min() > 0
            else:
                assert rollout.metrics["frac_reward_zero_std"] == 1.0 and rollout.metrics["resamples"] == 4
                assert advantages.abs().max() == 0


def test_a_step_of_which_all_was_cut_off_learns_nothing(recipe: MakeRecipe) -> None:
    """The tiny model never stops, so with masking nothing is left: the weights stay, and the run says so in its metrics."""
    run = train(recipe("grpo", mask_truncated_completions=True, max_steps=2, max_completion_length=1))
    assert all(m["completions/clipped_ratio"] == 1.0 and m["loss"] == 0.0 for m in metrics(run))
    assert all(t.abs().max() == 0 for n, t in weights_of(run).items() if "lora_B" in n)


def reward_model(directory: pathlib.Path, source: str, labels: int = 1, vocab_size: int | None = None) -> pathlib.Path:
    from enginepost.model import create_model
    from enginepost.model.scorer import new_head, save_scorer

    config = {**load_model(source, dtype=torch.float32).config, "hidden_size": 48}
    config["vocab_size"] = vocab_size or config["vocab_size"]
    model = create_model(config, dtype=torch.float32, seed=8)
    kind = "sequence" if labels == 1 else "token"
    save_scorer(
        model, new_head(model, labels, bias=labels > 1, seed=0), directory, kind=kind, source=source, pad_id=0
    )  # fmt: skip
    return directory


def test_a_reward_model_is_a_reward(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    """Its scores are those that it gives prompt and completion by itself; with a weight, beside a function."""
    from enginepost.data import Tokenizer
    from enginepost.model.scorer import load_scorer

    settings = recipe("rloo", max_steps=1, beta=0.0)
    path = reward_model(tmp_path / "judge", settings["model"])
    settings["rewards"] = [{"model": str(path), "weight": 2.0}, has_even_ids]
    method = methods.create(load_recipe(settings))
    model = loop.weights.load(method.recipe, torch.float32, None)
    method.attach(model)
    rollout = method.make(model, 0)
    scorer = load_scorer(path, torch.float32)
    ends = rollout.lengths.cumsum(0).tolist()
    whole = [rollout.ids[e - n : e].tolist() for e, n in zip(ends, rollout.lengths.tolist(), strict=True)]
    wanted = torch.tensor(scorer.score(whole), dtype=torch.float64)
    even = torch.tensor(has_even_ids(rollout.completion_ids()), dtype=torch.float64)
    assert rollout.metrics["rewards/judge/mean"] == pytest.approx(wanted.mean().item(), abs=1e-5)
    assert rollout.metrics["reward"] == pytest.approx((2 * wanted + even).mean().item(), abs=1e-5)
    turn = Tokenizer.load(settings["model"])
    assert turn.decode(rewards.after_an_answer(turn, None)) == "\n"  # what ChatML writes after <|im_end|>


def test_a_reward_model_that_does_not_fit(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    source = recipe("grpo")["model"]
    other = reward_model(tmp_path / "other", source, vocab_size=500)
    with pytest.raises(
        RewardError, match=r"other: the reward model has a vocabulary of 500 tokens and the policy one of"
    ):
        train(recipe("grpo", rewards=[{"model": str(other)}]))
    steps = reward_model(tmp_path / "steps", source, labels=2)
    with pytest.raises(RewardError, match="expected a sequence-classification checkpoint with one label, found token"):
        train(recipe("grpo", rewards=[{"model": str(steps)}]))
    with pytest.raises(EnginepostError, match="which gives tokens, not scores"):
        train(recipe("grpo", rewards=[{"model": source}]))
