"""The weights of a run: from a model directory or a checkpoint to a model ready to train, and back.

A checkpoint of a LoRA run is a PEFT adapter directory, one of full fine-tuning a Hugging Face model directory; both also hold
`optimizer.safetensors`, and with bfloat16 weights that file holds the exact (float32) ones. `method.safetensors` holds what a method
keeps of its own (a value head, roll-outs).
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from enginepost.checkpoint import Checkpoint, copy_side_files, save_tensors
from enginepost.checkpoint.cache import quantized_copy
from enginepost.data import Tokenizer
from enginepost.data.chat import resolve
from enginepost.errors import EnginepostError
from enginepost.model import adapter_tensors, add_lora, load_adapter, load_model, save_adapter, save_model
from enginepost.recipe import Recipe
from enginepost.train.optimizer import AdamW


def device_of(recipe: Recipe) -> torch.device:
    """The device of a recipe in which the loop has settled it (`enginepost.device.choose`); "auto" is a CPU where nobody has."""
    return torch.device("cpu" if recipe.device == "auto" else recipe.device)


def load(recipe: Recipe, dtype: torch.dtype, checkpoint: pathlib.Path | None) -> Any:
    """The Transformer to train, on the recipe's device, with its adapter, at the weights of `checkpoint` where one is given."""
    device = device_of(recipe)
    if recipe.lora is None:
        model = load_model(checkpoint or recipe.model, dtype=dtype, device=device)
        if model.frozen:
            raise EnginepostError(
                f"{recipe.model}: its weights are in 4 bits and cannot train (`lora: null`); train an adapter, or the 16-bit model"
            )
    else:
        if recipe.quantize is not None:
            quantized_copy(recipe.model, recipe.quantize, say=print)
        model = load_model(recipe.model, dtype=dtype, device=device, quantize=recipe.quantize, weights=recipe.weights)
        if recipe.adapter is not None:
            load_adapter(model, recipe.adapter)
        else:
            add_lora(
                model,
                r=recipe.lora.r,
                alpha=recipe.lora.alpha,
                dropout=recipe.lora.dropout,
                target_modules=recipe.lora.targets,
                use_rslora=recipe.lora.rslora,
                use_dora=recipe.lora.dora,
                rank_pattern=recipe.lora.rank_pattern,
                alpha_pattern=recipe.lora.alpha_pattern,
                seed=recipe.seed,
            )
        if checkpoint is not None:
            _restore_adapter(model, checkpoint)
    model.checkpointing, model.mlp_chunk = recipe.checkpointing, recipe.mlp_chunk
    return model.train()


@torch.no_grad()
def _restore_adapter(model: Any, checkpoint: pathlib.Path) -> None:
    saved = Checkpoint(checkpoint / "adapter_model.safetensors")
    mine = adapter_tensors(model)
    if set(saved.names) != set(mine):
        odd = sorted(set(saved.names) ^ set(mine))[0]
        raise EnginepostError(f"{checkpoint}: the adapter's tensors are not those of the recipe; for one, {odd}")
    for name, tensor in mine.items():
        tensor.copy_(saved.tensor(name))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_optimizer(optimizer: AdamW, checkpoint: pathlib.Path, steps: int) -> None:
    saved = Checkpoint(checkpoint / "optimizer.safetensors")
    optimizer.load({name: saved.tensor(name) for name in saved.names}, steps)


def read_method(checkpoint: pathlib.Path) -> dict[str, Tensor]:
    """What the method keeps in a checkpoint: its own modules and other tensors. Empty where it keeps nothing."""
    path = checkpoint / "method.safetensors"
    if not path.exists():
        return {}
    saved = Checkpoint(path)
    return {name: saved.tensor(name) for name in saved.names}


@torch.no_grad()
def load_method(parameters: dict[str, nn.Parameter], checkpoint: pathlib.Path) -> None:
    """Set the parameters of the method's own modules to those of the checkpoint."""
    saved = read_method(checkpoint)
    for name, parameter in parameters.items():
        if name not in saved or saved[name].shape != parameter.shape:
            raise EnginepostError(f"{checkpoint}: method.safetensors has no {name} of shape {list(parameter.shape)}")
        parameter.copy_(saved[name])


def save(
    recipe: Recipe, model: Any, optimizer: AdamW, directory: pathlib.Path, method: Mapping[str, Tensor] | None = None
) -> None:
    """All tensors of a checkpoint into an existing directory; `method`: those that the method keeps."""
    _save_weights(recipe, model, directory)
    save_tensors(directory / "optimizer.safetensors", optimizer.tensors())
    if method:
        save_tensors(directory / "method.safetensors", {name: t.detach() for name, t in method.items()})


def save_result(recipe: Recipe, model: Any, directory: pathlib.Path) -> None:
    """What the run is for: a Hugging Face model directory, or a PEFT adapter directory. Either has the tokenizer beside it, and the
    chat template that the rows were rendered with, so that whoever uses it writes the prompts that it was trained on."""
    _save_weights(recipe, model, directory)
    copy_side_files(recipe.model, directory)
    if recipe.template is not None:
        source = resolve(recipe.template, Tokenizer.load(recipe.model))
        (directory / "chat_template.jinja").write_text(source, encoding="utf-8")


def _save_weights(recipe: Recipe, model: Any, directory: pathlib.Path) -> None:
    if recipe.lora is None:
        save_model(model, directory, source=recipe.model)
    else:
        save_adapter(model, directory, base_model=recipe.model)
