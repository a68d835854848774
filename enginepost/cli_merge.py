"""The verbs of merging: merge, merge evolve, merge-moe, merge-adapters, extract. Each is one call of `enginepost.merge`."""

import contextlib
from collections.abc import Sequence
from typing import Annotated

import typer

from enginepost.errors import EnginepostError

app = typer.Typer()


def example(*lines: str) -> str:
    """The epilog of a command: its example, one line each."""
    return "\n\n".join(("[bold]Example[/bold]", *lines))


def _tell(notes: Sequence[str], text: str) -> None:
    for note in notes:
        typer.secho(f"note: {note}", fg="yellow")
    typer.echo(text)


@app.command(
    epilog=example(
        "enginepost merge examples/recipes/merge_dare_ties.yaml models/merged",
        "enginepost merge recipe.yaml models/merged --dry-run",
    )
)
def merge(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.YAML", help="A mergekit recipe.")],
    out: Annotated[str, typer.Argument(help="The directory to write; new or empty.")],
    seed: Annotated[int, typer.Option(help="Of the random masks of dare and della.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Tensors in work at once; default: one a core, 8 at most.")
    ] = None,
    memory: Annotated[float, typer.Option(min=1, help="Private memory for the work, in MB.")] = 512,
    shard: Annotated[float, typer.Option(min=0.001, help="Most GB in a weights file.")] = 5,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")
    ] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Take 4-bit inputs as the numbers that their codes stand for.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1 or auto: weighted sums and task vectors on the GPU, same bits.")
    ] = "cpu",
) -> None:
    """Merge models as a mergekit recipe says; run it again after an interruption and it goes on where it was."""
    from enginepost.merge.executor import Bar
    from enginepost.merge.run import merge

    with contextlib.nullcontext() if dry_run else Bar() as bar:
        reports = merge(
            recipe,
            out,
            seed=seed,
            threads=threads,
            memory=memory * 1e6,
            shard_bytes=shard * 1e9,
            dry_run=dry_run,
            dequantize=dequantize,
            device=device,
            progress=bar,
        )
    for report in reports:
        _tell(report.notes, report.text(dry_run))


@app.command(
    "merge-evolve",
    epilog=example(
        "enginepost merge evolve examples/recipes/merge_evolve.yaml runs/evolve",
        "enginepost merge evolve search.yaml runs/evolve --budget 200      # goes on where it was",
    ),
)
def merge_evolve(
    search: Annotated[str, typer.Argument(metavar="SEARCH.YAML", help="Models, methods, ranges, and how to score.")],
    out: Annotated[str, typer.Argument(help="The directory of the record; that of the same search is resumed.")],
    budget: Annotated[int | None, typer.Option(min=1, help="Candidates to try, instead of the file's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the search and of random masks, instead of the file's.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Tensors in work at once.")] = None,
    memory: Annotated[
        float, typer.Option(min=1, help="Private memory for merging, in MB; the model comes on top.")
    ] = 512,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1 or auto: where the model lies, is merged into and is scored.")
    ] = "auto",
) -> None:
    """Search for the best merge by CMA-ES: weights, densities, gradients over the layers, method. Also: enginepost merge evolve."""
    from enginepost.merge import evolve

    def tell(done: int, of: int, fitness: float, best: float) -> None:
        typer.echo(f"{done}/{of}  fitness {fitness:.5g}  best {best:.5g}")

    report = evolve(
        search, out, budget=budget, seed=seed, threads=threads, memory=memory * 1e6, device=device, progress=tell
    )
    typer.echo(report.text())


@app.command("merge-moe", epilog=example("enginepost merge-moe examples/recipes/merge_moe.yaml models/mixture"))
def merge_moe(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.YAML", help="A mergekit-moe recipe.")],
    out: Annotated[str, typer.Argument(help="The directory to write; new or empty.")],
    seed: Annotated[int, typer.Option(help="Of random gates and noise.")] = 0,
    shard: Annotated[float, typer.Option(min=0.001, help="Most GB in a weights file.")] = 5,
) -> None:
    """Make a mixture of experts (Mixtral, Qwen MoE) from dense models of one architecture."""
    from enginepost.merge import assemble

    report = assemble(recipe, out, seed=seed, shard_bytes=shard * 1e9)
    _tell(report.notes, report.text())


@app.command(
    "merge-adapters",
    epilog=example(
        "enginepost merge-adapters runs/both runs/code/adapter runs/chat/adapter --weight 0.6 --weight 0.4",
        "enginepost merge-adapters OUT A B --method ties_svd --density 0.5 --rank 32",
    ),
)
def merge_adapters(
    out: Annotated[str, typer.Argument(help="The adapter directory to write; new or empty.")],
    adapters: Annotated[list[str], typer.Argument(help="PEFT LoRA adapters of one base model.")],
    method: Annotated[
        str,
        typer.Option(
            help="svd, cat, linear, ties, dare_linear, dare_ties, ties_svd, dare_linear_svd or dare_ties_svd."
        ),
    ] = "svd",
    weight: Annotated[
        list[float] | None, typer.Option(help="Of each adapter, in their order; give it once for each. Default: 1.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of elements that ties and dare keep.")] = 1.0,
    sign: Annotated[str, typer.Option(help="How ties elects: by total value, or by frequency.")] = "total",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the result, for svd; default: the highest of theirs.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random masks of dare.")] = 0,
) -> None:
    """Merge LoRA adapters with one another into a new one, as PEFT's add_weighted_adapter does."""
    from enginepost.merge import merge_adapters

    report = merge_adapters(
        adapters, out, method=method, weights=weight, density=density, sign=sign, rank=rank, seed=seed
    )
    _tell(report.notes, report.text())


@app.command(
    epilog=example(
        "enginepost extract models/base models/tuned runs/extracted --rank 32",
        "enginepost extract models/base models/tuned runs/extracted --energy 0.9",
    )
)
def extract(
    base: Annotated[str, typer.Argument(help="The model that was tuned: a Hugging Face directory.")],
    tuned: Annotated[str, typer.Argument(help="What it became.")],
    out: Annotated[str, typer.Argument(help="The adapter directory to write; new or empty.")],
    rank: Annotated[int, typer.Option(min=1, help="Of every module.")] = 16,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the least rank that holds this share of the squared change, 0 to 1.")
    ] = None,
    max_rank: Annotated[int, typer.Option(min=1, help="With --energy: no rank is higher.")] = 256,
    whole: Annotated[
        bool, typer.Option("--whole", help="Keep norms, embeddings and head that changed in the adapter, whole.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the adapter: float32, float16 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the random projections.")] = 0,
) -> None:
    """Write what a fine-tune learned as a LoRA adapter (PEFT) for its base, and how much of it the adapter holds."""
    import torch

    from enginepost.merge import extract

    if dtype not in ("float32", "float16", "bfloat16"):
        raise EnginepostError(f"--dtype {dtype}: expected float32, float16 or bfloat16")
    report = extract(
        base,
        tuned,
        out,
        rank=rank,
        energy=energy,
        max_rank=max_rank,
        whole=whole,
        dtype=getattr(torch, dtype),
        seed=seed,
    )
    typer.echo(report.text())
