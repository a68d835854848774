"""`merge`: a recipe file to model directories. What the command line calls.

Named documents of a recipe go to `OUT.parts/NAME`, where later documents find them; the last merge goes to OUT.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from enginepost.checkpoint import Checkpoint, CheckpointError, copy_side_files, fuse, write_bytes, write_json
from enginepost.checkpoint.atomic import make_directory, readable
from enginepost.device import choose
from enginepost.errors import EnginepostError
from enginepost.merge import card
from enginepost.merge.executor import Limits, Progress, execute, limits
from enginepost.merge.models import Model, in_4_bits, locate, open_model, set_layers, text_config
from enginepost.merge.output import JOURNAL, DiskError, Output, claim, clear, discard, partial_directory, read_journal
from enginepost.merge.plan import Task, make_tasks
from enginepost.merge.recipe import ModelRef, Recipe, read_recipes
from enginepost.merge.registry import METHODS, MergeError
from enginepost.merge.tokens import read_tokens
from enginepost.merge.vocabulary import Vocabulary, build, rearrange

RECORD = "merge_run.json"
_VERSION = 2  # of what the same recipe gives; part of the fingerprint
_PRECIOUS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass
class MergeReport:
    """What a merge did, or with dry_run would do.

    directory: the model. method, models, tensors: what was merged. read, written: bytes. resumed: tensors kept from an attempt that
    was killed. seconds: wall time. threads, chunk: as run. notes: what the user should know.
    """

    directory: Path
    method: str
    models: list[str]
    tensors: int
    read: int
    written: int
    threads: int
    chunk: int
    resumed: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list, repr=False)

    def text(self, dry_run: bool = False) -> str:
        """A few lines for people."""
        work = f"{self.method} of {', '.join(self.models)}"
        if not self.tensors:  # the notes say why
            return f"{self.directory}: {work}"
        work += f": {self.tensors} tensors, {readable(self.read)} in, {readable(self.written)} out"
        if not dry_run:
            kept = f", {self.resumed} tensors kept from an earlier attempt" if self.resumed else ""
            rate = (
                f" in {self.seconds:.1f} s ({self.written / max(self.seconds, 1e-9) / 1e6:.0f} MB/s)"
                if self.seconds
                else ""
            )
            return f"{self.directory}: {work}{rate}{kept}"
        lines = [f"would write {self.directory}: {work}, {self.threads} threads, chunks of {self.chunk} elements"]
        usual = {p.name: p.default for p in METHODS[self.method].parameters}
        for task in self.tasks[:: max(1, len(self.tasks) // 8)]:
            set_here = [
                f"{name} {value}"
                for name, value in task.parameters.items()
                if any(v != usual[name] for v in (value if isinstance(value, list) else [value]))
            ]
            dtype = str(task.dtype).removeprefix("torch.")
            lines.append(f"  {task.name} {list(task.shape)} {dtype}  {', '.join(set_here)}".rstrip())
        return "\n".join(lines)


def merge(
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    threads: int | None = None,
    memory: float = 512e6,
    shard_bytes: float = 5e9,
    dry_run: bool = False,
    dequantize: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[MergeReport]:
    """Merge models as a mergekit recipe says.

    Args:
        recipe: YAML file, of one or several documents.
        out: directory to make: a Hugging Face model. It must be new or empty.
        seed: of the random masks (dare, della).
        threads: tensors worked on at once; by default one a core, 8 at most.
        memory: bytes of private memory for the work; the memory-mapped inputs come on top, and are the system's to take back.
        shard_bytes: most bytes in a weights file.
        dry_run: check and plan, write nothing.
        dequantize: take inputs in bitsandbytes' 4 bits as the numbers that their codes stand for (a copy of each beside OUT, removed
            at the end); without it they are refused, for their rounding errors add up.
        device: "cuda", "cuda:1" or "auto" (a GPU whose kernels pass their tests): weighted sums and task vectors are made on the
            GPU, with the bits of the CPU; methods that work row by row or choose element by element stay on the CPU.
        progress: called after every tensor with (bytes done, bytes in all, tensor name).
    Returns:
        One report a document, in the order they were made.
    Raises:
        MergeError, CheckpointError: whatever will not do, before the first byte of output where it can be known.
        EnginepostError: a device that is not here.

    A merge that was interrupted goes on where it was when it is started again. The result is the same to the last bit for any number
    of threads, any memory and any interruption.
    """
    out = Path(os.path.abspath(out))
    where = choose(device)
    recipes = read_recipes(Path(recipe))
    final = _final(recipes, str(recipe))
    parts = out.with_name(out.name + ".parts")
    earlier: dict[str, Path] = {}
    reports = []
    for document in recipes:
        directory = out if document is final else parts / str(document.name)
        if dry_run and any(ref.path in earlier for ref in document.references()):
            document.notes.append(
                f"{directory} uses an earlier merge of this file, which a dry run does not make; it is not checked further."
            )
            reports.append(
                MergeReport(
                    directory,
                    document.method.name,
                    [str(r) for r in document.references()],
                    0,
                    0,
                    0,
                    0,
                    0,
                    notes=document.notes,
                )
            )
        else:
            one = _merge_one(
                document,
                directory,
                earlier,
                out,
                seed,
                threads,
                memory,
                shard_bytes,
                dry_run,
                dequantize,
                where,
                progress,
            )
            reports.append(one)
        if document.name:
            earlier[document.name] = directory
    return reports


def _final(recipes: list[Recipe], file: str) -> Recipe:
    """The document that goes to OUT: the unnamed one, or the only one that no other uses."""
    unnamed = [r for r in recipes if r.name is None]
    if unnamed:
        return unnamed[0]
    used = {ref.path for r in recipes for ref in r.references()}
    ends = [r for r in recipes if r.name not in used]
    if len(ends) != 1:
        raise MergeError(
            f"{file}: no other merge uses {' and '.join(str(r.name) for r in ends)}; leave out the name of the one for OUT."
        )
    return ends[0]


def _merge_one(
    recipe: Recipe, directory: Path, earlier: Mapping[str, Path], out: Path, seed: int, threads: int | None, memory: float,
    shard_bytes: float, dry_run: bool, dequantize: bool, device: torch.device, progress: Progress | None,
) -> MergeReport:  # fmt: skip
    started = time.perf_counter()
    places = {ref: locate(ref, recipe.file, earlier) for ref in recipe.references()}
    fingerprint = _fingerprint(recipe, places, seed, shard_bytes)
    if _made(directory, fingerprint):
        (directory / JOURNAL).unlink(
            missing_ok=True
        )  # there if the process was killed right after it had put OUT in place
        note = f"{directory} was there already: the same recipe, options and inputs. Nothing was done."
        return MergeReport(directory, recipe.method.name, [str(r) for r in places], 0, 0, 0, 0, 0, notes=[note])
    _check_output(directory, places, dry_run)
    if dequantize and not dry_run:
        copies = _dequantized(places, directory.with_name(f".{directory.name}.dequantized-{fingerprint[:12]}"), recipe)
        try:
            inner = {**places, **copies}
            return _merge_opened(
                recipe, inner, directory, started, fingerprint, seed, threads, memory, shard_bytes, dry_run, device, progress
            )  # fmt: skip
        finally:
            for copy, _ in copies.values():
                _remove(copy.parent)
    return _merge_opened(
        recipe, places, directory, started, fingerprint, seed, threads, memory, shard_bytes, dry_run, device, progress
    )


def _dequantized(
    places: Mapping[ModelRef, tuple[Path, Path | None]], home: Path, recipe: Recipe
) -> dict[ModelRef, tuple[Path, Path | None]]:
    """Copies of the inputs that are in 4 bits, as plain numbers."""
    from enginepost.checkpoint import dequantize

    copies: dict[ModelRef, tuple[Path, Path | None]] = {}
    for i, (ref, (place, adapter)) in enumerate(places.items()):
        if in_4_bits(place):
            copies[ref] = (home / str(i), adapter)
            if not (home / str(i)).exists():
                make_directory(home)
                dequantize(place, home / str(i))
            recipe.notes.append(f"{ref} is in 4 bits and was dequantised; its rounding errors are in the result.")
    return copies


def _merge_opened(
    recipe: Recipe, places: Mapping[ModelRef, tuple[Path, Path | None]], directory: Path, started: float, fingerprint: str,
    seed: int, threads: int | None, memory: float, shard_bytes: float, dry_run: bool, device: torch.device,
    progress: Progress | None,
) -> MergeReport:  # fmt: skip
    models = {ref: open_model(ref, place[0]) for ref, place in places.items()}
    _check_architectures(recipe, models)
    vocabulary = None
    if recipe.tokenizer is not None:
        vocabulary = build(recipe, recipe.tokenizer, models)
        recipe.notes += vocabulary.notes
    template = chat_template(recipe, models)
    partial = partial_directory(directory)
    lock = None if dry_run else claim(directory)
    try:
        if not dry_run and read_journal(partial, fingerprint) is None:
            clear(partial)
        models = {
            ref: _with_adapter(model, places[ref][1], partial, dry_run, i)
            for i, (ref, model) in enumerate(models.items())
        }
        rearranged: dict[ModelRef, Checkpoint] = {}
        if vocabulary is not None and recipe.tokenizer is not None and not dry_run:
            rearranged = rearrange(recipe, recipe.tokenizer, vocabulary, models, partial / "vocabulary")
        tasks = make_tasks(recipe, models, rearranged) if not (dry_run and vocabulary) else _dry_tasks(recipe, models)
        limit = limits(recipe, tasks, threads, memory, device)
        report = _report(recipe, directory, tasks, limit, places)
        if dry_run:
            return report
        _write(
            recipe,
            directory,
            models,
            places,
            tasks,
            limit,
            vocabulary,
            template,
            fingerprint,
            seed,
            shard_bytes,
            progress,
            report,
        )
    except EnginepostError as error:
        if (
            isinstance(error, CheckpointError) and read_journal(partial, fingerprint) is not None
        ):  # it failed to reach the disk
            if isinstance(error, DiskError):
                raise
            raise DiskError(f"{error} Finished tensors are kept: run the same merge again.") from None
        if not dry_run:
            discard(directory)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    report.seconds = time.perf_counter() - started
    return report


def _dry_tasks(recipe: Recipe, models: Mapping[ModelRef, Model]) -> list[Task]:
    """For a dry run with a tokenizer setting: rows will be matched, so vocabularies of other sizes are no error."""
    try:
        return make_tasks(recipe, models, {})
    except MergeError as error:
        if "vocabularies" not in str(error):
            raise
        recipe.notes.append("the vocabularies differ; rows will be matched by token before the merge.")
        return []


def _write(
    recipe: Recipe, directory: Path, models: Mapping[ModelRef, Model], places: Mapping[ModelRef, tuple[Path, Path | None]],
    tasks: list[Task], limit: Limits, vocabulary: Vocabulary | None, template: str | None, fingerprint: str, seed: int,
    shard_bytes: float, progress: Progress | None, report: MergeReport,
) -> None:  # fmt: skip
    output = Output(directory, {task.name: (task.dtype, task.shape) for task in tasks}, shard_bytes, fingerprint)
    try:
        report.resumed = len(output.done)
        execute(recipe, tasks, output, limit, seed=seed, progress=progress)
        output.close()
    finally:
        output.release()
    partial = output.partial
    donor = next(iter(models.values()))  # the base, or the first model listed
    copy_side_files((models[vocabulary.donor] if vocabulary else donor).directory, partial)
    if vocabulary is not None and vocabulary.tokenizer is not None:
        write_bytes(
            partial / "tokenizer.json", (json.dumps(vocabulary.tokenizer, indent=2, ensure_ascii=False) + "\n").encode()
        )
        (partial / "tokenizer.model").unlink(missing_ok=True)  # it lacks the added tokens
    if template is not None:
        _set_template(partial, template)
    write_json(partial / "config.json", output_config(recipe, donor, models, tasks, vocabulary))
    tree = card.family(recipe, directory.name, places)
    write_bytes(partial / "mergekit_config.yml", recipe.text.encode())
    write_bytes(partial / "README.md", card.card(recipe, directory.name, tree).encode())
    write_bytes(partial / "family_tree.svg", card.svg(tree).encode())
    record = {
        "fingerprint": fingerprint, "method": recipe.method.name, "seed": seed, "torch": torch.__version__,
        "threads": limit.threads, "models": {str(ref): str(places[ref][0]) for ref in places}, "notes": recipe.notes,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "xxh3_128": {task.name: output.done[task.name] for task in tasks},
    }  # fmt: skip
    write_json(partial / RECORD, record)
    for leftover in ("vocabulary", "adapters"):
        _remove(partial / leftover)
    output.publish()


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def _report(
    recipe: Recipe, directory: Path, tasks: list[Task], limit: Limits, places: Mapping[ModelRef, Any]
) -> MergeReport:
    read = sum(r.checkpoint.nbytes(r.name) for task in tasks for r in task.reads)
    written = sum(task.numel * task.dtype.itemsize for task in tasks)
    names = [str(ref) for ref in places]
    return MergeReport(
        directory,
        recipe.method.name,
        names,
        len(tasks),
        read,
        written,
        limit.threads,
        limit.chunk,
        notes=recipe.notes,
        tasks=tasks,
    )


def _fingerprint(
    recipe: Recipe, places: Mapping[ModelRef, tuple[Path, Path | None]], seed: int, shard_bytes: float
) -> str:
    """What makes two merges the same: recipe, options, and the inputs' files by size and time."""
    files = []
    for place in places.values():
        for directory in place:
            if directory is not None:
                listed = sorted(directory.iterdir()) if directory.is_dir() else [directory]
                for path in listed:
                    if path.is_file():
                        stat = path.stat()
                        files.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    from enginepost.kernels import backend

    content = [_VERSION, recipe.text, seed, shard_bytes, backend.info()["isa"], backend.info()["backend"], files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _made(directory: Path, fingerprint: str) -> bool:
    try:
        return bool(json.loads((directory / RECORD).read_text(encoding="utf-8"))["fingerprint"] == fingerprint)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_output(directory: Path, places: Mapping[ModelRef, tuple[Path, Path | None]], dry_run: bool) -> None:
    for ref, place in places.items():
        for input_directory in place:
            if input_directory is not None and directory.resolve() == input_directory.resolve():
                raise MergeError(
                    f"{directory}: is the input {ref}; a merge never writes over its inputs. Name a new directory."
                )
    if not dry_run and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise MergeError(f"{directory}: exists and is not an empty directory; remove it or name another.")


def _check_architectures(recipe: Recipe, models: Mapping[ModelRef, Model]) -> None:
    """The same architecture, and tokenizers that agree unless the recipe says how to join them."""
    first = next(iter(models.values()))
    for model in models.values():
        ours, theirs = first.config.get("model_type"), model.config.get("model_type")
        if ours != theirs:
            raise MergeError(
                f"{recipe.file}: {first.ref} is a {ours} model and {model.ref} a {theirs}; only equal architectures can be merged."
            )
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            a, b = text_config(first.config).get(key), text_config(model.config).get(key)
            if a != b and a is not None and b is not None:
                raise MergeError(
                    f"{recipe.file}: {key} is {a} in {first.ref} and {b} in {model.ref}: their heads do not correspond."
                )
        for key in ("rope_theta", "rope_scaling", "rms_norm_eps"):
            a, b = text_config(first.config).get(key), text_config(model.config).get(key)
            if a != b:
                recipe.notes.append(
                    f"{key} is {a} in {first.ref} and {b} in {model.ref}; the merged model has the base's."
                )
    if recipe.tokenizer is not None:
        return
    digests = {ref: tuple(_digest(model.directory / name) for name in _PRECIOUS) for ref, model in models.items()}
    known = {ref: digest for ref, digest in digests.items() if any(digest)}
    if len(set(known.values())) > 1:
        try:
            tables = {ref: read_tokens(models[ref]).ids for ref in known}
        except MergeError as error:
            recipe.notes.append(
                f"the tokenizer files differ and cannot be compared; rows are merged by number. {error}"
            )
            return
        base = next(iter(tables))
        for ref, table in tables.items():
            wrong = [token for token, i in table.items() if tables[base].get(token, i) != i]
            if wrong:
                raise MergeError(
                    f"{recipe.file}: the tokenizers of {base} and {ref} give {len(wrong)} tokens different ids (the first is "
                    f"{wrong[0]!r}), so rows of the embeddings do not correspond. "
                    "Add `tokenizer: {source: base}` (or union) to the recipe."
                )


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _with_adapter(model: Model, adapter: Path | None, partial: Path, dry_run: bool, i: int) -> Model:
    """The model with its adapter fused in, in a directory of the work's own."""
    if adapter is None or dry_run:
        return model
    directory = partial / "adapters" / str(i)
    if not directory.exists():
        make_directory(directory.parent)
        fuse(model.directory, adapter, directory)
    fused = open_model(model.ref, directory)
    fused.directory = model.directory
    return fused


def output_config(
    recipe: Recipe, donor: Model, models: Mapping[ModelRef, Model], tasks: list[Task], vocabulary: Vocabulary | None
) -> dict[str, Any]:
    """config.json of the result: the base's (or first model's), with what the merge changed."""
    config: dict[str, Any] = json.loads(json.dumps(donor.config))
    dtypes = Counter(str(task.dtype).removeprefix("torch.") for task in tasks if not task.copied)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    config["dtype" if "dtype" in config else "torch_dtype"] = dtypes.most_common(1)[0][0]
    spans = [
        (models[piece.sources[0].model], piece.sources[0].layers or (0, models[piece.sources[0].model].layers))
        for piece in recipe.slices
    ]
    layers = sum(end - begin for _, (begin, end) in spans)
    if len(recipe.modules) == 1 and layers != donor.layers:
        set_layers(config, layers)
    kinds = [text_config(model.config).get("layer_types") for model, _ in spans]
    if len(recipe.modules) == 1 and all(isinstance(k, list) for k in kinds):
        text["layer_types"] = [
            k[i] for k, (_, (begin, end)) in zip(kinds, spans, strict=True) for i in range(begin, end) if k
        ]
    if vocabulary is not None:
        text["vocab_size"] = vocabulary.size
    has_head = any(task.name.endswith("lm_head.weight") for task in tasks)
    if has_head and donor.tied:  # another model brought a head of its own
        for place in (config, text):
            if "tie_word_embeddings" in place:
                place["tie_word_embeddings"] = False
        config.setdefault("tie_word_embeddings", False)
    return config


def chat_template(recipe: Recipe, models: Mapping[ModelRef, Model]) -> str | None:
    """Jinja source as the recipe's chat_template says; None to keep the donor's."""
    from enginepost.data.chat import HOME, shipped
    from enginepost.data.tokenizer import Tokenizer

    name = recipe.chat_template
    if name is None:
        return None
    if name == "auto":
        found = []
        for model in models.values():
            if any((model.directory / file).exists() for file in ("tokenizer.json", "tokenizer.model")):
                source = Tokenizer.load(model.directory).chat_template
                found += [source.strip()] if source else []
        return Counter(found).most_common(1)[0][0] if found else None
    if name in shipped():
        return (HOME / f"{name}.jinja").read_text(encoding="utf-8")
    if "{" in name:
        return name
    raise MergeError(
        f"{recipe.file}: chat_template {name!r} is neither auto, nor jinja source, nor one of {', '.join(shipped())}."
    )


def _set_template(directory: Path, template: str) -> None:
    write_bytes(directory / "chat_template.jinja", template.encode())
    path = directory / "tokenizer_config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["chat_template"] = template
        write_json(path, config)
