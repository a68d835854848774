"""The search finds a known optimum, resumes to the same candidates, scores what it says and refuses what it cannot do."""

import json
import pathlib

import pytest
import torch
import yaml

from enginepost.checkpoint import Checkpoint
from enginepost.merge import MergeError, evolve, merge
from enginepost.merge.evolution import _Merger
from enginepost.merge.search_space import read_space
from enginepost.model import load_model, save_model

SCORE = """
import pathlib, torch
from enginepost.checkpoint import Checkpoint
HOME = pathlib.Path(__file__).parent

def near(model, wanted=(0.3, 0.8)):
    '''Minus the squared distance from base + 0.3 (a - base) + 0.8 (b - base).'''
    base, a, b = (Checkpoint(HOME / name) for name in ("base", "a", "b"))
    total = 0.0
    for name, tensor in model.model.checkpoint_tensors().items():
        x, y, z = (c.tensor(name) for c in (base, a, b))
        target = x + wanted[0] * (y - x) + wanted[1] * (z - x)
        total += float((tensor - target).double().square().sum())
    return -total

def other(model):
    return near(model, (0.4, 0.8))
"""
ROWS = [f"{a} plus {b}" for a in range(6) for b in range(5)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: pathlib.Path) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("evolve")
    g = torch.Generator().manual_seed(3)
    for name in ("base", "a", "b"):
        model = load_model(tiny_model_dir, dtype=torch.float32)
        if name != "base":
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.02 * torch.randn(p.shape, generator=g)
        save_model(model, directory / name, source=tiny_model_dir)
    (directory / "score.py").write_text(SCORE)
    rows = [{"prompt": text, "completion": " fox"} for text in ROWS]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def search(home: pathlib.Path, tmp_path: pathlib.Path, **changes: object) -> pathlib.Path:
    content: dict[str, object] = {
        "base_model": str(home / "base"), "models": [str(home / "a"), str(home / "b")], "methods": "task_arithmetic",
        "parameters": {"weight": [0.0, 1.0]}, "fitness": {"python": f"{home}/score.py:near"}, "budget": 60, "seed": 1,
        "dtype": "float32",
    }  # fmt: skip
    content |= changes
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return path


def test_finds_the_known_optimum_and_writes_what_it_found(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = search(home, tmp_path, held_out=f"{home}/score.py:other")
    report = evolve(file, tmp_path / "out", threads=1)
    recipe = yaml.safe_load(report.recipe.read_text())
    weights = [m["parameters"]["weight"] for m in recipe["models"]]
    assert weights == pytest.approx([0.3, 0.8], abs=0.04)
    assert report.best > max(score for score, _ in report.baselines.values())
    assert report.held_out is not None and report.held_out < report.best
    # what is written is what was scored, bit for bit
    merge(report.recipe, tmp_path / "merged", seed=report.seed)
    written = Checkpoint(tmp_path / "merged")
    merger = _Merger(read_space(file), 1, 512e6)
    merger.merge(report.recipe.read_text())
    for name, tensor in merger.places.items():
        assert torch.equal(tensor, written.tensor(name)), name
    svg = (tmp_path / "out" / "progress.svg").read_text()
    assert svg.startswith("<svg") and svg.count("<circle") >= 60
    record = json.loads((tmp_path / "out" / "evolve.json").read_text())
    best = max(record["history"], key=lambda e: e["fitness"])
    assert best["fitness"] == report.best and best["held_out"] == report.held_out


def test_resuming_asks_the_same_candidates(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = search(
        home, tmp_path, methods=["ties", "dare_linear"], parameters={"weight": [0, 1], "density": [0.3, 1]}, layers=2
    )
    evolve(file, tmp_path / "straight", budget=14, threads=1)

    class Killed(Exception):
        pass

    def kill(done: int, *rest: object) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        evolve(file, tmp_path / "broken", budget=14, threads=1, progress=kill)
    evolve(file, tmp_path / "broken", budget=9, threads=1)
    evolve(file, tmp_path / "broken", budget=14, threads=2)
    straight, broken = (
        json.loads((tmp_path / d / "evolve.json").read_text())["history"] for d in ("straight", "broken")
    )
    assert straight == broken and len(straight) == 14
    assert {yaml.safe_load(e["recipe"])["merge_method"] for e in straight} == {"ties", "dare_linear"}
    assert all(len(m["parameters"]["density"]) == 2 for m in yaml.safe_load(straight[0]["recipe"])["models"])
    file.write_text(file.read_text().replace("layers: 2", "layers: 1"))
    with pytest.raises(MergeError, match="of another search"):
        evolve(file, tmp_path / "broken", threads=1)


def test_loss_on_rows_and_what_is_held_out(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The fitness is minus the mean loss per trained token of exactly the rows that are not held out."""
    import enginepost

    fitness = {"metric": "loss", "data": str(home / "rows.jsonl")}
    report = evolve(search(home, tmp_path, fitness=fitness, held_out=0.4, budget=2), tmp_path / "out", threads=1)
    assert (
        f"loss on {len(ROWS) * 6 // 10} rows of" in report.data
        and f"held out: {len(ROWS) * 4 // 10} other rows" in report.data
    )
    base = report.baselines[str(home / "base")]
    model = enginepost.load(home / "base", dtype="float32")
    sums = []
    for text in ROWS:
        prompt = model.encode_prompt(text)
        whole = [*prompt, *model.tokenizer.encode(" fox"), model.tokenizer.eos_id]
        sums.append(model.logprobs(whole)[len(prompt) - 1 :])
    every = torch.cat(sums)
    both = (18 * base[0] + 12 * (base[1] or 0)) / 30  # every row trains equally many tokens
    assert len({len(s) for s in sums}) == 1 and both == pytest.approx(float(every.mean()), abs=1e-5)


def test_exact_match_and_rows_that_both_files_have(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    import enginepost

    model = enginepost.load(home / "a", dtype="float32")
    said = model.generate([text for text in ROWS[:8]], max_new_tokens=4)
    rows = [
        {"prompt": p, "completion": s if i % 2 else "never this"}
        for i, (p, s) in enumerate(zip(ROWS, said, strict=False))
    ]
    (tmp_path / "fit.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "completion": "x"}) + "\n" for p in ROWS[6:12])
    )
    fitness = {"metric": "exact_match", "data": "fit.jsonl", "max_new_tokens": 4}
    report = evolve(
        search(home, tmp_path, fitness=fitness, held_out="held.jsonl", budget=1), tmp_path / "out", threads=1
    )
    assert report.baselines[str(home / "a")][0] == 0.5
    assert "held out: 4 rows" in report.data and "2 more were left out" in report.data


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": None}, "has no models"),
        ({"methods": ["tys"]}, "did you mean ties"),
        ({"parameters": {"weigth": [0, 1]}}, "did you mean weight"),
        ({"parameters": {"weight": [1, 0]}}, "low must be below high"),
        ({"parameters": {"weight": 0.5}}, "at least 2 are needed"),
        ({"fitness": {"metric": "accuracy", "data": "x.jsonl"}}, "loss or exact_match"),
        ({"fitness": {"python": "score.py"}}, "file.py:function is meant"),
        ({"held_out": 0.2}, "no rows to hold out"),
        ({"budget": 0}, "at least 1"),
        ({"steps": 9}, "has no key 'steps'"),
    ],
)
def test_refusals(changes: dict, says: str, home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(MergeError, match=says) as caught:
        evolve(search(home, tmp_path, **changes), tmp_path / "out")
    assert "search.yaml" in str(caught.value) and not (tmp_path / "out").exists()


def test_a_candidate_that_its_method_refuses_is_a_bad_one(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """della wants density + epsilon below 1: such candidates are recorded with the reason, and the search goes on."""
    file = search(
        home, tmp_path, methods="della", parameters={"weight": [0, 1], "density": [0.3, 1.0], "epsilon": 0.1}, budget=16
    )
    report = evolve(file, tmp_path / "out", threads=1)
    history = json.loads((tmp_path / "out" / "evolve.json").read_text())["history"]
    refused = [e for e in history if e["fitness"] is None]
    assert refused and all("epsilon" in e["error"] for e in refused) and report.best > -1e9


def test_the_example_is_read() -> None:
    space = read_space(pathlib.Path(__file__).parents[2] / "examples" / "recipes" / "merge_evolve.yaml")
    assert space.genes == 3 + 2 * 2 and space.held_out == 0.3


def test_the_command(home: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    from enginepost.cli import main

    file = search(home, tmp_path, budget=3)
    monkeypatch.setattr(
        "sys.argv", ["enginepost", "merge", "evolve", str(file), str(tmp_path / "out"), "--threads", "1"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "3/3  fitness" in out and "next: enginepost merge" in out
