"""Preference runs: shared prompts, accumulation, the reference policy, resume."""

import json
import math
import pathlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from whole_runs import assert_same_run, interrupt_after, metrics

from enginepost.errors import EnginepostError
from enginepost.model import adapter_off, create_model, save_model
from enginepost.recipe import load_recipe
from enginepost.train import methods, weights
from enginepost.train.answers import hidden_states, token_logprobs
from enginepost.train.loop import Interrupted, accumulate, train
from enginepost.train.methods.answers import check_start

WORDS = "the quick brown fox jumps over a lazy dog what is six times seven forty two one token at time".split()
MakeRecipe = Callable[..., dict[str, Any]]


@pytest.fixture
def pairs(tmp_path: pathlib.Path) -> pathlib.Path:
    rng = random.Random(3)

    def text(least: int = 1) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, 9)))

    with open(tmp_path / "pairs.jsonl", "w") as f:
        for i in range(16):
            opening = [{"role": "user", "content": text()}]
            record = {
                "prompt": opening,
                **{k: [{"role": "assistant", "content": text(2)}] for k in ("chosen", "rejected")},
            }
            if i % 4 == 0:
                record["prompt"] = [
                    *opening,
                    {"role": "assistant", "content": text()},
                    {"role": "user", "content": text()},
                ]
            f.write(json.dumps(record) + "\n")
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def dpo(recipe: MakeRecipe, pairs: pathlib.Path) -> MakeRecipe:
    return lambda **keys: recipe(**{"data": str(pairs), "method": "dpo", "max_length": 128, "batch_size": 1, **keys})


def stirred(recipe: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose adapter does something (B is not zero)."""
    model = weights.load(recipe, dtype, None)
    with torch.no_grad():
        for name, p in weights.trainable(model).items():
            if name.endswith(".B"):
                p.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    return model


def run_of(method: Any, model: Any, cut: list[list[int]]) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    model.zero_grad()
    loss, found = accumulate(model, method, method.work(method.rows, cut))
    return loss, found, {n: p.grad.clone() for n, p in weights.trainable(model).items() if p.grad is not None}


SIZED: dict[str, dict[str, Any]] = {
    "dpo": {"method": "dpo", "loss": {"sigmoid": 0.7, "ipo": 0.1, "sft": 0.2}},
    "wpo ld": {"method": "dpo", "wpo": True, "ld_alpha": 0.5},
    "orpo": {"method": "orpo"},
    "simpo": {"method": "simpo", "sft_weight": 0.1},
    "cpo": {"method": "cpo"},
}  # fmt: skip


@pytest.mark.parametrize("name", SIZED)
def test_sharing_prompts_and_cutting_steps_change_nothing(dpo: MakeRecipe, name: str) -> None:
    """Loss, metrics and every gradient: prompts once or twice, 8 x 1 or 1 x 8, with and without recomputation."""
    shared = methods.create(load_recipe(dpo(**SIZED[name])))
    apart = methods.create(load_recipe(dpo(**SIZED[name], share_prompts=False)))
    model = stirred(shared.recipe)
    model.checkpointing = False
    for method in (shared, apart):
        method.attach(model)
    whole = [list(range(8))]
    loss, found, gradients = run_of(apart, model, whole)
    assert len(gradients) == len(weights.trainable(model)) and all(g.abs().max() > 0 for g in gradients.values())
    assert shared.rows.lengths.sum() < apart.rows.lengths.sum() * 0.85
    others = {"shared": run_of(shared, model, whole), "shared 8x1": run_of(shared, model, [[i] for i in range(8)])}
    model.checkpointing = True
    others["shared, recomputed"] = run_of(shared, model, [[0, 1, 2], [3, 4, 5, 6, 7]])
    for cut, (other, theirs, grads) in others.items():
        assert other == pytest.approx(loss, rel=2e-6), cut
        assert theirs == pytest.approx(found, rel=1e-5, abs=1e-6), cut
        for key, g in gradients.items():
            assert (grads[key] - g).norm() / g.norm() < 5e-6, f"{cut} {key}"


def test_the_prompt_is_in_the_stream_once(dpo: MakeRecipe) -> None:
    method = methods.create(load_recipe(dpo()))
    rows, found = method.rows, method.rows.preferences
    batch = rows.batch([1, 2])
    for number, record in enumerate(batch.members):
        chosen, rejected = found.dataset[2 * record], found.dataset[2 * record + 1]
        prompt = int(rows.shared[record])
        assert prompt == min(int(chosen.labels.argmax()), int(rejected.labels.argmax())) > 0
        a, b, c = batch.cu_seqlens[2 * number : 2 * number + 3].tolist()
        assert batch.ids[a:b].tolist() == chosen.ids.tolist()
        assert batch.ids[b:c].tolist() == rejected.ids[prompt:].tolist()
        assert batch.positions[b:c].tolist() == list(range(prompt, len(rejected.ids)))
    answers = [
        s.ids[s.labels].tolist() for r in batch.members for s in (found.dataset[2 * r], found.dataset[2 * r + 1])
    ]
    assert [x.tolist() for x in batch.targets.split(batch.lengths)] == answers


@pytest.mark.parametrize("name", ["adapter off", "adapter kept", "another adapter", "another model", "full"])
def test_reference_policies(dpo: MakeRecipe, tmp_path: pathlib.Path, name: str) -> None:
    """Each reference gives the log-probabilities of what it stands for, before and after the policy has moved."""
    first = train(dpo(output=str(tmp_path / "first"), max_steps=2, learning_rate=1e-2)) + "/adapter"
    keys: dict[str, Any] = {
        "adapter off": {}, "adapter kept": {"adapter": first, "lora": ...}, "another adapter": {"reference": first},
        "another model": {"lora": {"r": 2}, "reference": first}, "full": {"lora": None},
    }[name]  # fmt: skip
    settings = dpo(**keys)
    if settings["lora"] is ...:
        del settings["lora"]
    r = load_recipe(settings)
    method = methods.create(r)
    model = weights.load(r, torch.float32, None)
    method.attach(model)
    if "reference" not in keys:
        method.begin(model)
    batch = method.rows.batch([0, 3])
    stands_for = weights.load(load_recipe(dpo()), torch.float32, None)
    if name in ("adapter kept", "another adapter", "another model"):
        stands_for = weights.load(load_recipe(_continued(dpo, first)), torch.float32, None)
        expected = token_logprobs(stands_for.eval(), batch)[0]
    else:
        with adapter_off(stands_for):
            expected = token_logprobs(stands_for.eval(), batch)[0]
    sums = torch.stack([x.double().sum() for x in expected.split(batch.lengths)])
    with torch.no_grad():
        for p in weights.trainable(model).values():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    before = {n: p.detach().clone() for n, p in weights.trainable(model).items()}
    found = method.reference_logps(model, method.rows, batch)
    assert torch.allclose(found, sums, atol=1e-5)
    assert not torch.allclose(token_logprobs(model, batch)[0], expected, atol=1e-3)
    assert all(torch.equal(p, before[n]) for n, p in weights.trainable(model).items()) and model.training


def _continued(dpo: MakeRecipe, adapter: str) -> dict[str, Any]:
    settings = dpo(adapter=adapter)
    del settings["lora"]
    return settings


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "lora",
    [None, {"r": 4, "alpha": 8, "dropout": 0.2}, {"r": 4, "alpha": 8, "dora": True}],
    ids=["full", "lora", "dora"],
)
def test_first_loss_is_ln_2(dpo: MakeRecipe, dtype: str, lora: Any) -> None:
    lines = metrics(train(dpo(max_steps=2, dtype=dtype, lora=lora)))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-6) and lines[0]["rewards/accuracies"] == 0
    assert lines[1]["rewards/margins"] != 0
    names = {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "entropy",
    }
    assert names <= lines[0].keys()


def test_first_loss_is_ln_2_in_bfloat16_at_a_real_width(dpo: MakeRecipe, tmp_path: pathlib.Path) -> None:
    """Wide enough for products that are summed in several runs."""
    config = json.loads(pathlib.Path(dpo()["model"], "config.json").read_text())
    config |= {
        "hidden_size": 576,
        "intermediate_size": 768,
        "head_dim": 64,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    save_model(create_model(config), tmp_path / "wide", source=dpo()["model"])
    keys = {
        "model": str(tmp_path / "wide"),
        "dtype": "bf16",
        "max_steps": 1,
        "batch_size": 4,
        "gradient_accumulation": 1,
    }
    assert metrics(train(dpo(**keys)))[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_reference_that_is_not_the_policy_is_noticed(dpo: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from enginepost.train.methods import preference

    original = preference.Dpo.reference_logps
    monkeypatch.setattr(
        preference.Dpo,
        "reference_logps",
        lambda *a: original(*a) + torch.tensor([2e-4, 0.0] * 8)[: 2 * len(a[3].members)],
    )
    with pytest.raises(EnginepostError, match=r"the loss of sigmoid on .*pairs\.jsonl:\d+.* must be 0\.6931472"):
        train(dpo())
    with pytest.raises(EnginepostError, match="and must be"):
        check_start(float("nan"), 0.6931, "sigmoid", torch.float32)


def test_precomputed_reference_is_that_of_the_live_one(
    dpo: MakeRecipe, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ENGINEPOST_CACHE", str(tmp_path / "cache"))
    live = metrics(train(dpo(output=str(tmp_path / "live"), validation=0.25)))
    made = metrics(train(dpo(output=str(tmp_path / "made"), validation=0.25, precompute=True)))
    again = metrics(train(dpo(output=str(tmp_path / "again"), validation=0.25, precompute=True, beta=0.2)))
    out = capsys.readouterr().out
    assert out.count("written to") == 1 and len(list((tmp_path / "cache" / "reference").iterdir())) == 1
    assert [m["loss"] for m in made if "loss" in m] == pytest.approx([m["loss"] for m in live if "loss" in m], rel=1e-5)
    assert [m["eval_loss"] for m in made if "eval_loss" in m] == pytest.approx(
        [m["eval_loss"] for m in live if "eval_loss" in m], rel=1e-5
    )
    assert again[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    train(dpo(output=str(tmp_path / "other"), precompute=True, max_steps=1, dtype="bf16"))
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 2


@pytest.mark.parametrize(
    "keys",
    [{"lora": {"r": 4, "alpha": 8, "dropout": 0.3}, "dtype": "bf16"}, {"lora": None}, {"method": "orpo", "validation": 0.25}],
    ids=["lora", "full", "orpo"],
)  # fmt: skip
def test_interrupted_and_resumed_has_the_same_bits(
    dpo: MakeRecipe, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    whole = train(dpo(**keys, output=str(tmp_path / "whole")))
    cut = dpo(**keys, output=str(tmp_path / "cut"))
    with monkeypatch.context() as m:
        interrupt_after(m, 3)
        with pytest.raises(Interrupted, match="after step 3"):
            train(cut)
    train(cut, resume=True)

    assert_same_run(whole, cut["output"])


def test_dpo_learns_the_preference(dpo: MakeRecipe, tmp_path: pathlib.Path) -> None:
    """Chosen answers name a number, rejected ones a fox: margins grow on rows that were not trained on."""
    rng = random.Random(1)
    with open(tmp_path / "easy.jsonl", "w") as f:
        for _ in range(24):
            prompt = " ".join(rng.choices(WORDS[:9], k=4))
            f.write(json.dumps({"prompt": prompt, "chosen": " forty two", "rejected": " a fox"}) + "\n")
    run = train(
        dpo(data=str(tmp_path / "easy.jsonl"), max_steps=20, learning_rate=5e-3, validation=0.25, template=None)
    )
    lines = metrics(run)
    last = [m for m in lines if "eval_loss" in m][-1]
    assert last["eval_rewards/accuracies"] == 1.0 and last["eval_rewards/margins"] > 0.5
    assert last["eval_loss"] < 0.5


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"loss": "sigmoyd"}, r"loss: expected losses among sigmoid, .*; 'sigmoyd' is none of them"),
        ({"loss": {"sigmoid": "much"}}, "loss: expected a number as the weight of each loss"),
        ({"loss": "robust"}, "label_smoothing: loss robust without it is loss sigmoid"),
        ({"label_smoothing": 0.1}, "label_smoothing: loss sigmoid does not use it"),
        ({"loss": "aot", "f_divergence": "js_divergence"}, "f_divergence: loss aot does not use it"),
        ({"loss": "sft"}, "sft alone compares nothing"),
        ({"beta": 0}, "beta: expected a number above 0"),
        ({"gamma": 0.5}, r"gamma: method dpo does not use this key \(simpo"),
        ({"train_on": "all"}, r"train_on: method dpo does not use this key \(sft, pretrain"),
        ({"method": "sft", "beta": 0.5}, r"beta: method sft does not use this key \(dpo"),
        ({"reference": "/nowhere/at/all"}, "reference: /nowhere/at/all: no such directory"),
    ],
)
def test_mistakes_in_the_recipe(dpo: MakeRecipe, keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(EnginepostError, match=expected):
        train(dpo(**keys))


def test_names_of_losses_are_those_of_the_objective() -> None:
    from enginepost import recipe_offline
    from enginepost.train.objectives import preference

    assert set(recipe_offline.DPO_LOSSES) == set(preference.DPO_LOSSES)


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_mean_logits_are_those_of_the_whole_head(dpo: MakeRecipe, method: str) -> None:
    """TRL's definition: the mean over the vocabulary at each position that predicts a trained token, then over these positions."""
    made = methods.create(load_recipe(dpo(method=method)))
    model = weights.load(made.recipe, torch.float32, None)
    made.attach(model)
    work = made.work(made.rows, [[0, 3], [1, 2, 4]])
    _, metrics = accumulate(model, made, work)
    sums, counts = torch.zeros(2), torch.zeros(2)
    for batch in work.micro_batches:
        z = model.logits(hidden_states(model, batch))[batch.predict].mean(-1).split(batch.lengths)
        for side in range(2):
            sums[side] += sum(x.sum() for x in z[side::2])
            counts[side] += sum(batch.lengths[side::2])
    found = [metrics["logits/chosen"], metrics["logits/rejected"]]
    assert found == pytest.approx((sums / counts).tolist(), rel=1e-4, abs=1e-7)
