"""`enginepost <verb>`: each verb is one call of the library. Imports wait until a verb runs, so that --help is instant."""

import contextlib
import sys
from typing import Annotated

import typer

from enginepost.cli_merge import app as merge_app
from enginepost.cli_merge import example
from enginepost.errors import EnginepostError

app = typer.Typer(
    name="enginepost",
    help="Fine-tune, align, merge and run language models on one's own machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(merge_app)  # without a name: its verbs are ours
DEVICE = typer.Option(help="cpu, cuda, cuda:1, or auto: a GPU whose kernels pass their tests, else the CPU.")


@app.command(
    epilog=example("enginepost train recipe.yaml", "enginepost train recipe.yaml learning_rate=1e-4 lora.r=32 --resume")
)
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.YAML", help="What to train, on what, how.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys to set, such as lora.r=8.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run directory.")
    ] = False,
) -> None:
    """Train a model as the method of a recipe says: fine-tuning, preferences, reinforcement learning, distillation."""
    from enginepost.recipe import parse_overrides
    from enginepost.train.loop import Interrupted, train

    try:
        train(recipe, resume=resume, **parse_overrides(overrides or []))
    except Interrupted as stop:
        typer.echo(str(stop))
        raise typer.Exit(128 + stop.signal) from None


@app.command(
    epilog=example(
        "enginepost plan recipe.yaml --gpu rtx4070",
        "enginepost plan recipe.yaml model=llama-3.1-8b quantize=nf4 --gpu 8GB --host 32GB",
    )
)
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.YAML", help="What would be trained, on what, how.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Recipe keys to set; model= takes a public name too."),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="A card by name or size (rtx4070, 8GB); default: this CPU.")] = None,
    memory: Annotated[str | None, typer.Option(help="To stay within, such as 12GB; default: what is there.")] = None,
    host: Annotated[str | None, typer.Option(help="Host memory beside the GPU, such as 64GB.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0.001, help="Rate of matrix products, where it is known.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Tell the memory and time of a recipe before it runs: peak by item, what fits, the cheapest change that makes it fit."""
    import json

    from rich.console import Console

    from enginepost.plan import plan
    from enginepost.recipe import parse_overrides

    made = plan(recipe, parse_overrides(overrides or []), on=gpu, memory=memory, host=host, tflops=tflops)
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=2))
    else:
        made.show(Console(highlight=False, soft_wrap=True))


@app.command(
    epilog=example(
        "enginepost init --like llama-3.1-8b models/random-8b",
        "enginepost init --like llama-3.2-1b models/small num_hidden_layers=2 --tokenizer models/SmolLM2-135M",
    )
)
def init(
    out: Annotated[str, typer.Argument(help="The directory to write; new or empty.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="config.json keys to set, such as num_hidden_layers=2."),
    ] = None,
    like: Annotated[str | None, typer.Option(help="A public architecture by name; an unknown name lists them.")] = None,
    config: Annotated[str | None, typer.Option(help="A config.json, or a model directory that has one.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A model directory whose tokenizer to copy.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option()] = 0,
    shard: Annotated[float, typer.Option(min=0.001, help="Most GB in a weights file.")] = 5,
) -> None:
    """Write a model with random weights in the shape of a public one, to try, test and measure without a download."""
    from enginepost.model.architectures import architecture, init_model
    from enginepost.model.layout import read_config
    from enginepost.recipe import parse_overrides

    if (like is None) == (config is None):
        raise EnginepostError("give either --like NAME or --config FILE, which say what the model looks like")
    base = architecture(like) if like is not None else read_config(config or "")
    count = init_model(
        out,
        {**base, **parse_overrides(overrides or [])},
        dtype=dtype,
        seed=seed,
        tokenizer=tokenizer,
        shard_bytes=shard * 1e9,
    )
    typer.echo(f"wrote {out}: {count:,} parameters, random, in {dtype}")


@app.command(
    epilog=example(
        'enginepost generate models/SmolLM2-135M-Instruct --prompt "What is six times seven?"',
        'enginepost generate MODEL --adapter runs/sft_lora/adapter --prompt "Hello" --temperature 0.7 --top-p 0.9',
    )
)
def generate(
    model: Annotated[str, typer.Argument(help="A Hugging Face model directory.")],
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="Give it again for more; - reads standard input.")
    ],
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter directory to use on top.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message, for models with a chat template.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 = greedy: always the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens that hold this share.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many of the likeliest tokens; 0 = all.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the model's chat template.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    quantize: Annotated[
        str | None,
        typer.Option(help="nf4, nf4-double or fp4: linear layers in 4 bits."),
    ] = None,
    device: Annotated[str, DEVICE] = "auto",
) -> None:
    """Let a model answer a prompt (in its chat template if it has one) or continue it (--raw)."""
    import enginepost

    texts = [sys.stdin.read() if p == "-" else p for p in prompt]
    language_model = enginepost.load(model, adapter=adapter, dtype=dtype, device=device, quantize=quantize)
    chat = language_model.tokenizer.chat_template is not None and not raw
    if system is not None and not chat:
        raise EnginepostError("--system needs a chat template: this model has none, or --raw was given")
    opening = [] if system is None else [{"role": "system", "content": system}]
    conversations = [[*opening, {"role": "user", "content": text}] for text in texts]
    answers = language_model.generate(
        None if chat else texts,
        messages=conversations if chat else None,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )
    for answer in answers:
        typer.echo(answer)


@app.command(
    epilog=example(
        "enginepost fuse models/SmolLM2-135M runs/sft_lora/adapter models/mine",
        "enginepost fuse MODEL runs/qlora/adapter OUT --base nf4",
    )
)
def fuse(
    model: Annotated[str, typer.Argument(help="The base: a Hugging Face model directory, 16-bit or 4-bit.")],
    adapter: Annotated[str, typer.Argument(help="A PEFT LoRA adapter directory.")],
    out: Annotated[str, typer.Argument(help="The directory to write; its weights are 16-bit.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="original (default), or nf4, nf4-double, fp4: the weights after their round trip through 4 bits, which a QLoRA "
            "adapter was trained on."
        ),
    ] = None,
) -> None:
    """Write the model with the adapter added into its weights, one tensor at a time."""
    from enginepost.checkpoint import fuse

    report = fuse(model, adapter, out, base=base)
    words = {"original": "the original weights", "4bit": "the 4-bit weights of the model, written out"}
    typer.echo(f"base: {words.get(report.base, f'the {report.base} round trip of the original weights')}")
    if report.trained_over is not None and report.base == "original":
        typer.secho(
            f"note: the adapter was trained over {report.trained_over} weights; --base {report.trained_over} adds it to those",
            fg="yellow",
        )
    typer.echo(f"wrote {out}; try: enginepost generate {out} --prompt ...")


@app.command(
    epilog=example(
        "enginepost quantize models/SmolLM2-135M models/SmolLM2-135M-4bit",
        "enginepost quantize MODEL OUT --double --skip down_proj",
    )
)
def quantize(
    model: Annotated[str, typer.Argument(help="A Hugging Face model directory.")],
    out: Annotated[str, typer.Argument(help="The directory to write.")],
    type: Annotated[str, typer.Option(help="nf4 or fp4.")] = "nf4",
    double: Annotated[
        bool, typer.Option("--double", help="Quantise the scales too: 4.13 bits instead of 4.5.")
    ] = False,
    blocksize: Annotated[int, typer.Option(help="Weights per scale: a power of two, 32 to 4096.")] = 64,
    skip: Annotated[
        list[str] | None, typer.Option(help="A module to leave as it is, such as down_proj; give it again for more.")
    ] = None,
) -> None:
    """Write the model with its linear layers in 4 bits, as bitsandbytes stores them, one tensor at a time."""
    from enginepost.checkpoint import quantize

    try:
        report = quantize(model, out, quant_type=type, double=double, blocksize=blocksize, skip=skip or ())
    except ValueError as error:
        raise EnginepostError(str(error)) from None
    typer.echo(
        f"wrote {out}: {report.quantized} of {report.tensors} tensors in 4 bits, {report.nbytes / 1e6:.1f} MB -> "
        f"{report.quantized_nbytes / 1e6:.1f} MB; try: enginepost generate {out} --prompt ..."
    )


@app.command(
    epilog=example(
        "enginepost score runs/reward/model answers.jsonl",
        "enginepost score runs/reward/adapter pairs.jsonl --out scores.jsonl",
    )
)
def score(
    model: Annotated[
        str, typer.Argument(help="A reward model: what method reward or prm wrote, or one from elsewhere.")
    ],
    paths: Annotated[
        list[str], typer.Argument(metavar="FILES...", help="Conversations, pairs, or solutions with steps.")
    ],
    out: Annotated[str | None, typer.Option(help="A jsonl file to write; default standard output.")] = None,
    template: Annotated[str | None, typer.Option(help="A chat template by name, or a file.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens of a row.")] = 4096,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, DEVICE] = "auto",
) -> None:
    """Score answers with a reward model, packed; of pairs also say how often the chosen answer wins."""
    import json
    import pathlib

    import torch

    from enginepost.device import choose
    from enginepost.score import score

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in dtypes:
        raise EnginepostError(f"--dtype {dtype}: expected bfloat16 or float32")
    found = score(model, paths, template=template, max_length=max_length, dtype=dtypes[dtype], device=choose(device))
    lines = "".join(json.dumps(row) + "\n" for row in found.rows)
    if out is None:
        typer.echo(lines, nl=False)
    else:
        try:
            pathlib.Path(out).write_text(lines, encoding="utf-8")
        except OSError as error:
            raise EnginepostError(f"cannot write {out}: {error.strerror}") from None
    if found.accuracy is not None:
        typer.echo(f"agrees with {found.accuracy:.1%} of {found.labelled} labels", err=True)


@app.command(
    epilog=example("enginepost kernels", "enginepost kernels --bench", "ENGINEPOST_CPU=portable enginepost kernels")
)
def kernels(
    bench: Annotated[bool, typer.Option("--bench", help="Time every family beside plain PyTorch instead.")] = False,
) -> None:
    """List the kernel families and test them against their references, with every instruction set of this machine and on its GPU."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from enginepost.kernels import backend, selftest

    info = backend.info()
    console = Console(highlight=False)
    console.print(
        f"backend [bold]{info['backend']}[/bold], instruction set [bold]{info['isa']}[/bold] "
        f"(this machine runs: {', '.join(info['isas']) or 'none'}), {info['threads']} threads, torch {torch.__version__}"
    )
    if not info["native"]:
        raise EnginepostError("the native extension is not built, so there is nothing to test; `make setup` builds it")
    if bench:
        table = Table("family", "dtype", "shape", box=None, pad_edge=False)
        for column in ("ms", "rate", "", "peer ms", "ratio"):
            table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
        table.add_column("peer")
        with console.status("timing") if console.is_terminal else contextlib.nullcontext():
            for s in selftest.speeds():
                table.add_row(
                    s.family, s.dtype, s.shape, f"{s.milliseconds:.3g}", f"{s.rate:.3g}", s.unit,
                    f"{s.peer_milliseconds:.3g}", f"{s.ratio:.2f}x", s.peer,
                )  # fmt: skip
        Console(highlight=False, width=max(console.width, 150)).print(table)
        return
    verdicts, places = list(selftest.run()), list(info["isas"])
    if torch.cuda.is_available():
        gpu = torch.device("cuda", torch.cuda.current_device())
        console.print(
            f"{gpu}: {torch.cuda.get_device_name(gpu)}" + ("" if info["cuda"] else ", no kernels for it in this build")
        )
        if info["cuda"]:
            places.append(str(gpu))
            verdicts += selftest.run_on(gpu)
    table = Table("family", *places, "what it computes", box=None, pad_edge=False)
    for family, does in selftest.DOES.items():
        cells = []
        for isa in places:
            bad = [v for v in verdicts if (v.family, v.isa) == (family, isa) and not v.passed]
            cells.append(f"[red]FAILED {', '.join(v.dtype for v in bad)}[/red]" if bad else "[green]ok[/green]")
        table.add_row(family, *cells, does)
    console.print(table)
    failed = [v for v in verdicts if not v.passed]
    if failed:
        raise EnginepostError(
            "results differ from the reference: "
            + "; ".join(f"{v.family} on {v.isa}, {v.dtype}, by {v.error:.2g} of the largest" for v in failed)
        )


@data_app.command(
    epilog=example(
        "enginepost data preview recipe.yaml", "enginepost data preview rows.jsonl --model models/SmolLM2-135M-Instruct"
    )
)
def preview(
    paths: Annotated[list[str], typer.Argument(metavar="RECIPE.YAML | FILES...", help="A recipe, or data files.")],
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer and chat template to use; a recipe names its own.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 3,
    method: Annotated[str | None, typer.Option(help="sft or pretrain.")] = None,
    format: Annotated[
        str | None, typer.Option(help="auto, text, prompt_completion, alpaca, sharegpt or messages.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="A chat template by name, or a file.")] = None,
    train_on: Annotated[str | None, typer.Option(help="assistant, all or last.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a bin.")] = None,
    overlong: Annotated[str | None, typer.Option(help="error, drop or truncate.")] = None,
) -> None:
    """Show what a run would train on: rows with the trained tokens coloured, counts, lengths, truncations."""
    from enginepost.data.preview import show, show_prompts
    from enginepost.recipe import load_recipe
    from enginepost.recipe_online import OnlineRecipe

    options = {
        "model": model,
        "method": method,
        "format": format,
        "template": template,
        "train_on": train_on,
        "max_length": max_length,
        "overlong": overlong,
    }
    given = {key: value for key, value in options.items() if value is not None}
    if len(paths) == 1 and paths[0].endswith((".yaml", ".yml")):
        recipe = load_recipe(paths[0], given)
    elif model is None:
        raise EnginepostError(
            "data files need --model DIRECTORY, whose tokenizer turns them into tokens; or give a recipe"
        )
    else:
        recipe = load_recipe({"data": paths, **given})
    if isinstance(recipe, OnlineRecipe):
        room = recipe.max_length - recipe.max_completion_length
        show_prompts(
            recipe.data, recipe.model, template=recipe.template, max_tokens=room, overlong=recipe.overlong, rows=rows
        )
        return
    show(
        recipe.data,
        recipe.model,
        method=recipe.method,
        format=recipe.format,
        template=recipe.template,
        train_on=recipe.train_on,
        max_length=recipe.max_length,
        overlong=recipe.overlong,
        rows=rows,
    )


def main() -> None:
    """Entry point: a user error is a message and exit code 1, never a traceback."""
    if sys.argv[1:3] == ["merge", "evolve"]:  # the one verb of two words whose first is a verb itself
        sys.argv[1:3] = ["merge-evolve"]
    try:
        app()
    except EnginepostError as error:
        typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(str(error), err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("\nstopped", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
