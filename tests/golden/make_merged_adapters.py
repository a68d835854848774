"""Writes merged_adapters.safetensors and .json: LoRA adapters merged by PEFT's add_weighted_adapter.

    .venv-peers/bin/python tests/golden/make_merged_adapters.py

Three adapters on two linear layers: a and b have rank 4, c rank 6 and only the second layer. For each case there is what PEFT adds
to every weight (`CASE.MODULE.delta`), and for the random methods the masks it drew, in the order drawn.
"""

import json
import pathlib

import peft
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

HERE = pathlib.Path(__file__).parent
CASES = {
    "linear": {"adapters": ["a", "b"], "weights": [0.7, 0.4], "method": "linear"},
    "linear_negative": {"adapters": ["a", "b"], "weights": [1.0, -0.5], "method": "linear"},
    "cat": {"adapters": ["a", "b", "c"], "weights": [0.7, -0.4, 1.2], "method": "cat"},
    "svd": {"adapters": ["a", "b", "c"], "weights": [0.7, 0.4, 1.2], "method": "svd"},
    "svd_rank": {"adapters": ["a", "b", "c"], "weights": [0.7, 0.4, 1.2], "method": "svd", "rank": 3},
    "ties": {"adapters": ["a", "b"], "weights": [0.7, 0.4], "method": "ties", "density": 0.5},
    "ties_frequency": {
        "adapters": ["a", "b"],
        "weights": [1.0, 1.0],
        "method": "ties",
        "density": 0.7,
        "sign": "frequency",
    },
    "ties_svd": {"adapters": ["a", "b", "c"], "weights": [0.7, 0.4, 1.0], "method": "ties_svd", "density": 0.5},
    "dare_linear": {"adapters": ["a", "b"], "weights": [0.7, 0.4], "method": "dare_linear", "density": 0.5},
    "dare_ties": {"adapters": ["a", "b"], "weights": [0.7, 0.4], "method": "dare_ties", "density": 0.5},
    "dare_linear_svd": {"adapters": ["a", "c"], "weights": [0.7, 0.4], "method": "dare_linear_svd", "density": 0.6},
    "dare_ties_svd": {
        "adapters": ["a", "b", "c"],
        "weights": [0.7, 0.4, 0.9],
        "method": "dare_ties_svd",
        "density": 0.6,
    },
}
SETTINGS = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["first", "second"]},
    "b": {"r": 4, "lora_alpha": 4, "target_modules": ["first", "second"], "use_rslora": True},
    "c": {"r": 6, "lora_alpha": 3, "target_modules": ["second"]},
}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 12, bias=False), nn.Linear(12, 9, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def main() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Two(), LoraConfig(**SETTINGS["a"]), adapter_name="a")
    for name in ("b", "c"):
        model.add_adapter(name, LoraConfig(**SETTINGS[name]))
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            kind, adapter = rest.split(".")[:2]
            tensors[f"{adapter}.{path}.{kind}"] = parameter.detach().clone()
    real = torch.bernoulli
    for key, case in CASES.items():
        masks: list[torch.Tensor] = []

        def recorded(p: torch.Tensor, masks: list[torch.Tensor] = masks) -> torch.Tensor:
            masks.append(real(p))
            return masks[-1]

        torch.bernoulli = recorded
        model.base_model.add_weighted_adapter(
            case["adapters"], case["weights"], key, combination_type=case["method"], svd_rank=case.get("rank"),
            density=case.get("density"), majority_sign_method=case.get("sign", "total"),
        )  # fmt: skip
        torch.bernoulli = real
        for path in ("first", "second"):
            layer = getattr(model.base_model.model, path)
            if key in layer.lora_A:
                tensors[f"{key}.{path}.delta"] = layer.get_delta_weight(key).detach().clone()
        case["masks"] = len(masks)
        tensors |= {f"{key}.mask{i}": mask.to(torch.uint8) for i, mask in enumerate(masks)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "merged_adapters.safetensors")
    content = {"peft": peft.__version__, "settings": SETTINGS, "cases": CASES}
    (HERE / "merged_adapters.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
