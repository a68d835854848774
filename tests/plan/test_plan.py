"""What `enginepost plan` tells: budgets, cards, limits, switches; in under a second and without torch."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from enginepost.errors import EnginepostError
from enginepost.plan import Plan, plan
from enginepost.plan.choose import MARGIN, choices, fits
from enginepost.plan.machine import GPUS, available, card, gpu, size
from enginepost.plan.memory import step_peak
from enginepost.plan.report import SWITCHES
from enginepost.plan.setup import config_of, setup_of
from enginepost.recipe import load_recipe

QLORA = {"model": "llama-3.1-8b", "data": "rows.jsonl", "quantize": "nf4", "lora": {"r": 32}, "max_length": 2048}


def planned(on: str | None = "24GB", **keys: Any) -> Plan:
    return plan({**QLORA, **keys}, on=on)


def test_amounts_of_memory() -> None:
    assert [size(t) for t in ("12GB", "12gb", "12", "1.5 g", "512MB", "8GiB")] == [
        12e9,
        12e9,
        12e9,
        1.5e9,
        512e6,
        2**33,
    ]
    for wrong in ("much", "-1GB", "0", "12 parsecs", ""):
        with pytest.raises(EnginepostError, match="is not an amount of memory"):
            size(wrong)


def test_cards_by_name_and_by_size() -> None:
    assert gpu("NVIDIA GeForce RTX 4090") == gpu("rtx4090")
    assert gpu("rtx4070").memory == pytest.approx(12 * 2**30, rel=0.05)
    assert gpu("8GB").memory == 8e9 and gpu("8GB").flops in {0.5e12 * card[2] for card in GPUS.values() if card[0] == 8}
    with pytest.raises(EnginepostError, match="did you mean rtx4090"):
        gpu("rtx4091")


def test_items_of_an_8b_qlora_are_what_arithmetic_says() -> None:
    """Llama 3.1 8B: 6,979,321,856 weights in the linear layers of the blocks, 1,050,939,392 outside them."""
    peak = planned().peak
    assert peak.items["weights"] == 6_979_321_856 // 2 + 4 * 6_979_321_856 // 64 + 2 * 1_050_939_392
    rank = 32 * (2 * 4096 + 2 * (4096 + 1024) + 2 * 4096 + 2 * (4096 + 14336) + 4096 + 14336) * 32
    assert peak.items["adapters"] == 4 * rank and peak.items["optimizer"] == 8 * rank
    assert peak.items["inputs"] == 2 * 2048 * 4096 * 32


@pytest.mark.parametrize("cap", ["8GB", "12GB", "24GB"])
def test_the_longest_context_fits_and_a_longer_one_does_not(cap: str) -> None:
    made = planned(cap, weights="host")
    assert made.longest_context and made.largest_batch is not None
    assert fits(step_peak(dataclasses.replace(made.setup, tokens=made.longest_context)), made.machine)
    assert not fits(step_peak(dataclasses.replace(made.setup, tokens=int(made.longest_context * 1.01))), made.machine)
    assert made.largest_batch == pytest.approx(made.longest_context // 2048, abs=1)


def test_memory_grows_with_what_costs_memory() -> None:
    base = planned().peak.total
    for keys in ({"max_length": 4096}, {"batch_size": 2}, {"lora": {"r": 64}}, {"checkpointing": False}, {"quantize": None},
                 {"dtype": "fp32"}, {"lora": {"r": 32, "dora": True}}, {"lora": {"r": 32, "dropout": 0.1}}):  # fmt: skip
        assert planned(**keys).peak.total > base, keys
    for keys in ({"weights": "host"}, {"weights": "disk"}, {"quantize": "nf4-double"}, {"max_length": 1024},
                 {"lora": {"r": 32, "targets": ["q_proj"]}}):  # fmt: skip
        assert planned(**keys).peak.total < base, keys


def test_what_does_not_fit_gets_the_cheapest_change_that_does() -> None:
    made = planned("8GB", max_length=4096)
    assert made.fits is False and made.change is not None and made.change.same_bits
    changed = planned("8GB", max_length=4096, **made.change.changes)
    assert changed.fits and changed.peak == made.change.peak
    assert made.seconds <= made.change.seconds
    text = "\n".join(made.lines())
    assert "does not fit in 8.00 GB" in text and "cheapest change that fits: weights=host" in text
    assert planned("80GB").change is None


def test_switches_that_keep_the_results_come_first_and_then_the_fastest() -> None:
    made = planned("24GB", quantize=None, batch_size=8)
    found = choices(made.setup, made.machine, batch_size=8, max_length=2048, keys=SWITCHES[:4], context=2048)
    assert len(found) == 3 * 3 * 4 * 3
    keeps = [c.same_bits for c in found]
    assert keeps == sorted(keeps, reverse=True) and not any(c.same_bits for c in found if "quantize" in c.changes)
    seconds = [c.seconds for c in found if c.same_bits]
    assert seconds == pytest.approx(sorted(seconds))
    assert made.fits is False and made.change == next(c for c in found if fits(c.peak, made.machine))


def test_nothing_fits() -> None:
    made = planned("1GB")
    assert made.fits is False and made.change is None and made.longest_context == 0
    assert "no switch makes it fit" in "\n".join(made.lines())
    full = plan({"model": "llama-3.1-8b", "data": "d", "lora": None}, on="24GB")
    assert "train an adapter instead" in "\n".join(full.lines())


def test_states_on_the_host_leave_the_card() -> None:
    keys: dict[str, Any] = {"lora": None, "quantize": None, "optimizer": "adamw8bit"}
    card, host = (planned("80GB", **keys, optimizer_states=where).peak for where in ("device", "host"))
    weights = 8_030_261_248
    assert card.items["masters"] == host.host["masters"] == 4 * weights
    assert card.items["optimizer"] == host.host["optimizer"] > 2 * weights
    assert card.total - host.total == pytest.approx(card.items["masters"] + card.items["optimizer"])
    assert planned("80GB", **keys, optimizer_states="host").seconds > planned("80GB", **keys).seconds


def test_host_memory_is_a_limit_too() -> None:
    recipe = {**QLORA, "weights": "host", "model": "llama-3.1-70b", "quantize": "nf4-double", "lora": {"r": 8}}
    assert plan(recipe, on="24GB", host="64GB").fits
    assert not plan(recipe, on="24GB", host="32GB").fits


def test_this_machine_and_the_recipes_own_budget() -> None:
    tiny = {"model": "smollm2-135m", "data": "d", "max_length": 512}
    here = plan(tiny)
    assert here.machine.device == "cpu" and here.machine.memory is not None
    assert here.machine.memory == pytest.approx(available(), rel=0.5)
    assert plan({**tiny, "memory": "3GB"}).machine.memory == 3e9
    assert plan(tiny, memory="2GB").machine.memory == 2e9
    assert plan(tiny, tflops=1.0).seconds < plan(tiny, tflops=0.01).seconds


def test_adapters_and_4_bit_models_on_disk_are_read(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").mkdir()
    said = {"r": 16, "target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 64}, "use_dora": True}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(said))
    recipe = load_recipe({"model": "m", "data": "d", "adapter": str(tmp_path / "a")})
    setup = setup_of(recipe, config_of("llama-3.1-8b"))
    assert sum(setup.adapter_sizes) == (64 + 31 * 16) * (4096 + 4096) + 32 * 4096
    assert setup.ranks == {"qkv": ((64, 4096),)} and setup.dora
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
              "bnb_4bit_use_double_quant": True}  # fmt: skip
    config = {**config_of("llama-3.1-8b"), "quantization_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert setup_of(load_recipe({"model": "m", "data": "d"}), config_of(str(tmp_path))).quantize == "nf4-double"
    with pytest.raises(EnginepostError, match="cannot read the adapter's config"):
        setup_of(load_recipe({"model": "m", "data": "d", "adapter": str(tmp_path / "none")}), config_of("llama-3.1-8b"))
    with pytest.raises(
        EnginepostError, match=r"llama-3\.1-8 is not a directory; expected .*; did you mean llama-3\.1-8b"
    ):
        plan({**QLORA, "model": "llama-3.1-8"})


def test_what_does_not_fit_is_said() -> None:
    big = {**QLORA, "model": "llama-3.1-70b", "quantize": "nf4-double", "weights": "host", "lora": {"r": 8}}
    for size_of_card, words in (
        ("12GB", r"does not fit in 16\.00 GB of host memory, of which it needs 44\.\d\d$"),
        (
            "11.5GB",
            r"does not fit in 11\.50 GB, with 6 % for what is allocated beside it, nor in 16\.00 GB of host memory",
        ),
        ("6GB", r"does not fit in 6\.00 GB, nor in 16"),
    ):
        lines = plan(big, on=size_of_card, host="16GB").lines()
        assert any(re.match(words, line) for line in lines), lines


def test_under_a_second_without_torch(tmp_path: pathlib.Path) -> None:
    (tmp_path / "r.yaml").write_text("model: llama-3.1-70b\ndata: rows.jsonl\nbatch_size: 4\n")
    code = """
import sys, time
start = time.process_time()
sys.argv = ["enginepost", "plan", sys.argv[1], "--gpu", "rtx4090", "--json"]
try:
    from enginepost.cli import main
    main()
finally:
    assert "torch" not in sys.modules
    print(time.process_time() - start, file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.yaml")], capture_output=True, text=True)
    made = json.loads(run.stdout)
    assert made["fits"] is False and made["device_peak"] == sum(made["device_items"].values())
    assert float(run.stderr) < 1.0, "seconds of one core"


def test_the_margin_is_part_of_what_fits() -> None:
    made = planned("24GB")
    exact = dataclasses.replace(made.machine, memory=made.peak.total * MARGIN["cuda"] * 1.0001)
    assert fits(made.peak, exact)
    assert not fits(made.peak, dataclasses.replace(exact, memory=made.peak.total))


@pytest.mark.parametrize(
    ("name", "gib", "like"),
    [
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16, "rtx4070tisuper"), ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"), ("NVIDIA A100 80GB PCIe", 80, "a100-80gb"), ("NVIDIA A10", 24, "a10"),
        ("NVIDIA L40S", 48, "l40s"), ("NVIDIA RTX 6000 Ada Generation", 48, "rtx6000ada"), ("NVIDIA H100 80GB HBM3", 80, "h100"),
        ("a card of tomorrow", 31, "rtx5090"),
    ],
)  # fmt: skip
def test_a_card_is_known_by_its_drivers_name(name: str, gib: float, like: str) -> None:
    found = card(name, gib * 2**30, 7e9, 5e9)
    assert (found.name, found.device, found.memory) == (name, "cuda", 5e9)
    assert found.bandwidth == GPUS[like][1] * 1e9 and card(name, gib * 2**30, 4e9, 5e9).memory == 4e9
