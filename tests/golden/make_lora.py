"""Makes lora.safetensors: outputs and gradients of PEFT's LoRA and DoRA linear layers, float32.

    .venv-peers/bin/python tests/golden/make_lora.py

Per case NAME: `NAME.x`, `.weight`, `.bias`, `.A`, `.B`, `.magnitude`, `.dy`, then `.y` and the gradients `.dx`, `.dA`, `.dB`,
`.dmagnitude`. The metadata holds each case's scaling. The dropout case also stores PEFT's mask, so that its formula can be compared.
"""

import json
import pathlib

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

# name: out, in, r, alpha, rslora, dora, bias, dropout
CASES = {
    "lora": (11, 8, 3, 6, False, False, True, 0.0),
    "rslora": (6, 8, 4, 4, True, False, False, 0.0),
    "dora": (11, 8, 3, 6, False, True, True, 0.0),
    "dora, dropout": (7, 8, 2, 3, False, True, True, 0.5),
    "lora, dropout": (7, 8, 2, 3, False, False, True, 0.5),
}


class Model(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class KnownMask(torch.nn.Module):
    """Stands where PEFT puts its dropout, with a mask that the file can hold."""

    def __init__(self, mask: torch.Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask / (1 - self.p)


def main() -> None:
    torch.manual_seed(0)
    tensors, scalings = {}, {}
    for name, (outputs, inputs, r, alpha, rslora, dora, bias, dropout) in CASES.items():
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["layer"], use_rslora=rslora, use_dora=dora)
        model = get_peft_model(Model(inputs, outputs, bias), config)
        layer = model.base_model.model.layer
        mask = torch.rand(5, inputs) >= dropout
        if dropout:
            layer.lora_dropout["default"] = KnownMask(mask, dropout)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.nn.init.normal_(b)
        case = {"weight": layer.base_layer.weight, "A": a, "B": b, "mask": mask.to(torch.uint8)}
        if bias:
            case["bias"] = layer.base_layer.bias
        if dora:
            magnitude = layer.lora_magnitude_vector["default"].weight
            torch.nn.init.uniform_(magnitude, 0.5, 2.0)
            case["magnitude"] = magnitude
        x, dy = torch.randn(5, inputs, requires_grad=True), torch.randn(5, outputs)
        model.train()
        y = model(x)
        y.backward(dy)
        case |= {"x": x, "dy": dy, "y": y, "dx": x.grad, "dA": a.grad, "dB": b.grad}
        if dora:
            case["dmagnitude"] = magnitude.grad
        tensors |= {f"{name}.{key}": t.detach().clone().contiguous() for key, t in case.items()}
        scalings[name] = [layer.scaling["default"], dropout]
    path = pathlib.Path(__file__).with_name("lora.safetensors")
    save_file(tensors, path, metadata={"scaling and dropout": json.dumps(scalings)})


if __name__ == "__main__":
    main()
