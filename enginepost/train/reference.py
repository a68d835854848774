"""The reference policy of preference methods: what the policy was before training, or what the recipe names.

    LoRA, no key `reference`       the same weights with the adapter off: one model in memory (DoRA: as the adapter began)
    LoRA that continues `adapter`  the same weights with a frozen copy of the adapter as it was
    full fine-tuning               a second copy of the model
    `reference: DIRECTORY`         that adapter on the base, or that model

Log-probabilities under it can be made once (`precompute: true`) into a cache on disk, whose name is a hash of the reference's files,
of the tokens and labels of the rows (hence of the template) and of the dtype.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from enginepost.checkpoint import Checkpoint, save_tensors
from enginepost.checkpoint.cache import cache_directory
from enginepost.device import sent
from enginepost.errors import EnginepostError
from enginepost.kernels.lora import LoraPart, row_norm
from enginepost.model import load_adapter, load_model
from enginepost.model.lora import linear_modules, updates
from enginepost.model.transformer import Linear
from enginepost.recipe import Recipe


class Reference:
    """A policy that does not train. `policy()` is a context in which `model` is it."""

    def __init__(self, recipe: Recipe, model: Any, named: str | None) -> None:
        """`model`: the policy. Raises EnginepostError when the named reference is not a directory or has another vocabulary."""
        self.files: list[str] = [recipe.model]
        self.other: Any = None  # a model of its own
        self.adapter: dict[str, Tensor] | None = None  # tensors of a second adapter, in the place of the policy's
        if named is not None and not pathlib.Path(named).is_dir():
            raise EnginepostError(f"reference: {named}: no such directory; give a model or an adapter directory")
        is_adapter = named is not None and (pathlib.Path(named) / "adapter_config.json").exists()
        if recipe.lora is None or (named is not None and not is_adapter):
            self.other = _load(recipe, model, named if named is not None and not is_adapter else recipe.model)
            self.files = [named] if named is not None and not is_adapter else [recipe.model]
            if is_adapter and named is not None:
                load_adapter(self.other, named)
                self.files.append(named)
        elif named is not None or recipe.adapter is not None:
            source = named or recipe.adapter
            assert source is not None
            self.files.append(source)
            self.other = _load(recipe, model, recipe.model) if not _same_shape(model, source) else None
            if self.other is not None:
                load_adapter(self.other, source)
            else:
                self.adapter = _read_adapter(model, source)
        elif recipe.lora.dora or any(u.magnitude is not None for u in updates(model).values()):
            self.adapter = _untrained(model)
        if self.other is not None:
            self.other.requires_grad_(False)
            if self.other.spec.vocab_size != model.spec.vocab_size:
                raise EnginepostError(
                    f"reference: {named} has a vocabulary of {self.other.spec.vocab_size}, the model one of {model.spec.vocab_size}"
                )

    @contextlib.contextmanager
    def policy(self, model: Any) -> Iterator[Any]:
        """Within, without gradients and dropout, the yielded model computes what the reference computes."""
        was_training = model.training
        with torch.no_grad():
            if self.other is not None:
                yield self.other.eval()
                return
            model.eval()
            try:
                if self.adapter is None:
                    with _muted(model):
                        yield model
                else:
                    with _swapped(model, self.adapter):
                        yield model
            finally:
                model.train(was_training)


def _load(recipe: Recipe, model: Any, directory: str) -> Any:
    """A frozen model, kept as the recipe keeps the policy's frozen weights."""
    residency = recipe.weights if recipe.lora is not None else "resident"
    return load_model(directory, dtype=model.dtype, device=model.device, quantize=recipe.quantize, weights=residency)


def _parameters(model: Any) -> dict[str, nn.Parameter]:
    return {f"{path}.{name}": p for path, update in updates(model).items() for name, p in update.named_parameters()}


def _same_shape(model: Any, directory: str) -> bool:
    """Could the adapter in `directory` stand in the place of the model's own, with the same scales?"""
    from enginepost.checkpoint import read_adapter

    found, mine = read_adapter(directory), updates(model)
    return found.parts.keys() == mine.keys() and all(
        (part.r, found.scaling(path), part.magnitude is None)
        == (mine[path].r, mine[path].scaling, mine[path].magnitude is None)
        for path, part in found.parts.items()
    )


def _read_adapter(model: Any, directory: str) -> dict[str, Tensor]:
    from enginepost.checkpoint import read_adapter

    tensors: dict[str, Tensor] = {}
    for path, part in read_adapter(directory).parts.items():
        tensors[f"{path}.A"], tensors[f"{path}.B"] = part.A.float().clone(), part.B.float().clone()
        if part.magnitude is not None:
            tensors[f"{path}.magnitude"] = part.magnitude.float().clone()
    tensors = {name: sent(t, model.device) for name, t in tensors.items()}
    assert tensors.keys() == _parameters(model).keys()
    return tensors


@contextlib.contextmanager
def _muted(model: Any) -> Iterator[None]:
    """The updates count nothing, but go through the same products as the policy's: in bfloat16 a layer without updates rounds
    otherwise, and before the first step policy and reference have to be the same to the bit."""
    kept = {m: m.parts for m in model.modules() if isinstance(m, Linear) and m.parts}
    for linear, parts in kept.items():
        linear.parts = tuple(dataclasses.replace(part, scaling=0.0) for part in parts)
    try:
        yield
    finally:
        for linear, parts in kept.items():
            linear.parts = parts


@torch.no_grad()
def _untrained(model: Any) -> dict[str, Tensor]:
    """The adapter as DoRA begins: B zero, each magnitude the norm of its row."""
    tensors: dict[str, Tensor] = {}
    for target in linear_modules(model.spec):
        linear = model.get_submodule(target.linear)
        if target.suffix not in linear.lora:
            continue
        update = linear.lora[target.suffix]
        A, B = update.A.detach().clone(), torch.zeros_like(update.B)
        tensors[f"{target.path}.A"], tensors[f"{target.path}.B"] = A, B
        if update.magnitude is not None:
            model.enter(target.block)
            part = LoraPart(A, B, update.scaling, target.start)
            tensors[f"{target.path}.magnitude"] = row_norm(linear.weight, part).to(update.magnitude.dtype)
    return tensors


@contextlib.contextmanager
def _swapped(model: Any, tensors: dict[str, Tensor]) -> Iterator[None]:
    """The adapter's parameters hold `tensors`; the memory of both is exchanged, so nothing is copied and the bits come back."""
    own = _parameters(model)
    kept = {name: p.data for name, p in own.items()}
    for name, p in own.items():
        p.data = tensors[name]
    try:
        yield
    finally:
        for name, p in own.items():
            p.data = kept[name]


def cache_path(files: list[str], data: str, dtype: torch.dtype, kind: str = "reference") -> pathlib.Path:
    """Where what the model in the directories `files` says of the rows with hash `data` is kept: under $ENGINEPOST_CACHE, default
    ~/.cache/enginepost."""
    digest = hashlib.blake2b(f"{data}:{dtype}".encode(), digest_size=16)
    for directory in files:
        for path in sorted(pathlib.Path(directory).glob("*.safetensors")) + [
            p for n in ("config.json", "adapter_config.json") if (p := pathlib.Path(directory) / n).exists()
        ]:
            digest.update(path.name.encode())
            with open(path, "rb") as f:
                while block := f.read(1 << 22):
                    digest.update(block)
    return cache_directory() / kind / f"{digest.hexdigest()}.safetensors"


def read_cache(path: pathlib.Path, shape: tuple[int, ...]) -> Tensor | None:
    """The log-probabilities kept at `path`, float64; None where there are none of that shape."""
    if not path.exists():
        return None
    checkpoint = Checkpoint(path)
    if "logps" not in checkpoint or tuple(checkpoint.shape("logps")) != shape:
        return None
    return checkpoint.tensor("logps").clone()


def write_cache(path: pathlib.Path, logps: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"logps": logps})
    except OSError as error:
        raise EnginepostError(
            f"cannot write the cache {path}: {error.strerror or error}; set ENGINEPOST_CACHE to a directory with room, or "
            "precompute: false"
        ) from None
