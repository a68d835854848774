"""Golden files of the 4-bit formats, made with bitsandbytes and transformers: `python tests/golden/make_nf4.py`.

nf4.safetensors: for each case its input `x`, and what bitsandbytes makes of it: packed, absmax and the dequantised numbers; the
nested state by bitsandbytes' default backend (its CPU library looks 8-bit codes up in a coarse table; see kernels/nf4.py).
bnb/: a tiny Llama as transformers writes it (source.safetensors) and as it writes it quantised (model.safetensors, config.json),
and the numbers its layers have then (*.dequantized.safetensors).
adamw8.safetensors: eight steps of bitsandbytes' AdamW8bit. Needs torch 2.13, bitsandbytes 0.50.2, transformers 5.24, accelerate.
"""

import json
import shutil
import tempfile
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
DEFAULT = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)


def blockwise(x: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize_blockwise of the default backend."""
    return torch.ops.bitsandbytes.quantize_blockwise.default.redispatch(DEFAULT, x, code, blocksize)


def formats() -> None:
    tensors: dict[str, torch.Tensor] = {}
    torch.manual_seed(0)
    signed, unsigned = bnb.create_dynamic_map(), bnb.create_dynamic_map(signed=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (1, 67, 3000):
            x = (torch.randn(size) * torch.rand(size) ** 3).to(dtype)
            x[70:200] = 0
            tensors[f"x.{str(dtype)[6:]}.{size}"] = x
            for kind in ("nf4", "fp4"):
                for blocksize in (32, 64, 256):
                    name = f"{kind}.{blocksize}.{str(dtype)[6:]}.{size}"
                    packed, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type=kind)
                    tensors[f"{name}.packed"], tensors[f"{name}.absmax"] = packed.flatten(), state.absmax
                    tensors[f"{name}.out"] = bnb.dequantize_4bit(packed, state).flatten()
                    offset = state.absmax.mean()
                    codes, nested = blockwise(state.absmax - offset, signed, 256)
                    tensors |= {f"{name}.offset": offset, f"{name}.nested": codes, f"{name}.nested_absmax": nested}
    for name, code in (("signed", signed), ("unsigned", unsigned)):
        middle = (code[:-1] + code[1:]) / 2
        up, down = (torch.nextafter(middle, torch.tensor(to)) for to in (2.0, -2.0))
        special = torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-30, -1e-30, 1e-40, float("nan")])
        x = torch.cat([middle, up, down, code, special, torch.linspace(-1, 1, 1000)])
        x = torch.cat([x, torch.zeros(-len(x) % 4096)])
        x[~torch.isfinite(x)] = 0.25  # NaN would take its whole block along
        q, absmax = blockwise(x, code, 4096)
        tensors |= {f"{name}.code": code, f"{name}.x": x, f"{name}.q": q, f"{name}.absmax": absmax}
    save_file({name: t.contiguous() for name, t in tensors.items()}, HERE / "nf4.safetensors")


def checkpoint() -> None:
    out = HERE / "bnb"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
        source = Path(directory)
        shutil.copy(source / "model.safetensors", out / "source.safetensors")
        (out / "source.json").write_text((source / "config.json").read_text())
        for double in (False, True):
            model = AutoModelForCausalLM.from_pretrained(
                directory,
                quantization_config=BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4" if double else "fp4",
                    bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.bfloat16,
                ),
                dtype=torch.bfloat16, device_map="cpu",
            )  # fmt: skip
            name = "double" if double else "plain"
            model.save_pretrained(out / name)
            for extra in (out / name).glob("generation_config.json"):
                extra.unlink()
            dense = {
                n: bnb.dequantize_4bit(m.weight.data, m.weight.quant_state)
                for n, m in model.named_modules()
                if type(m).__name__ == "Linear4bit"
            }
            save_file(dense, out / f"{name}.dequantized.safetensors")
            print(name, json.loads((out / name / "config.json").read_text())["quantization_config"])
            print(len(load_file(out / name / "model.safetensors")), "tensors")


def adamw8() -> None:
    """bitsandbytes' AdamW8bit on its CPU library, eight steps."""
    torch.manual_seed(0)
    start, gradients = torch.randn(4096), torch.randn(8, 4096) * torch.rand(4096) ** 3
    parameter = torch.nn.Parameter(start.clone())
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    tensors = {"start": start, "gradients": gradients}
    for g in gradients:
        parameter.grad = g.clone()
        optimizer.step()
        tensors.setdefault("first", parameter.detach().clone())
    save_file(tensors | {"end": parameter.detach().clone()}, HERE / "adamw8.safetensors")


if __name__ == "__main__":
    adamw8()
    formats()
    checkpoint()
