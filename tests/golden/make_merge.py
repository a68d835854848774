"""Golden files of merging: what mergekit 0.1.5 computes, in float32, for every method and its options.

Run in an environment with mergekit (bench/peers-merge.txt):
    python tests/golden/make_merge.py
Writes merge.json (the cases) and merge.safetensors (inputs, results, and the random masks and probabilities it drew).
"""

import json
import pathlib

import torch
from mergekit.merge_methods import merge_tensors
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
SHAPES = {"matrix": (24, 17), "vector": (33,), "cube": (3, 4, 5)}
CASES = [
    # method, number of models without the base, with base, parameters
    ("linear", 3, False, {"weight": [0.3, 0.5, 0.4]}),
    ("linear", 3, False, {"weight": [0.3, 0.5, -0.4], "normalize": False}),
    *[("slerp", 1, True, {"t": t}) for t in (0.0, 0.3, 1.0)],
    ("nuslerp", 2, False, {"weight": [0.3, 0.9]}),
    ("nuslerp", 2, True, {"weight": [0.3, 0.9]}),
    ("nuslerp", 2, True, {"weight": [0.5, -0.5]}),
    ("nuslerp", 2, False, {"weight": [0.3, 0.9], "nuslerp_flatten": False}),
    ("nuslerp", 2, True, {"weight": [0.3, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", 3, False, {"weight": [0.3, 0.5, 0.4]}),
    ("multislerp", 3, True, {"weight": [0.3, 0.5, 0.4]}),
    ("multislerp", 3, True, {"weight": [0.3, 0.5, 0.4], "normalize_weights": False}),
    ("karcher", 3, False, {}),
    ("karcher", 2, False, {"max_iter": 2}),
    ("task_arithmetic", 3, True, {"weight": [0.3, 0.5, -0.4]}),
    ("task_arithmetic", 2, True, {"weight": [0.3, 0.5], "normalize": True, "lambda": 0.7}),
    ("ties", 3, True, {"weight": [0.3, 0.5, 0.4], "density": [0.5, 0.7, 0.3]}),
    ("ties", 3, True, {"weight": [0.3, 0.5, 0.4], "density": [0.5, 1.0, 0.0], "normalize": False, "rescale": True}),
    ("ties", 2, True, {"weight": [0.3, -0.5], "density": 0.01, "lambda": 1.3}),
    ("dare_ties", 3, True, {"weight": [0.3, 0.5, 0.4], "density": [0.5, 0.7, 0.3]}),
    ("dare_linear", 2, True, {"weight": [0.3, 0.5], "density": 0.4, "normalize": True}),
    ("dare_linear", 2, True, {"weight": [0.3, 0.5], "density": [1.0, 0.4], "rescale": False}),
    ("breadcrumbs", 2, True, {"weight": [0.3, 0.5], "density": 0.6, "gamma": [0.05, 0.1]}),
    ("breadcrumbs", 2, True, {"weight": [0.3, 0.5], "density": 0.97, "gamma": 0.2}),
    ("breadcrumbs_ties", 3, True, {"weight": [0.3, 0.5, 0.6], "density": 0.6}),
    ("della", 3, True, {"weight": [0.3, 0.5, 0.6], "density": [0.5, 0.4, 0.7]}),
    ("della_linear", 2, True, {"weight": [0.3, 0.5], "density": 0.6, "epsilon": 0.3}),
    ("model_stock", 3, True, {}),
    ("model_stock", 2, True, {"filter_wise": True}),
    ("sce", 3, True, {}),
    ("sce", 3, True, {"select_topk": 0.3}),
    ("nearswap", 1, True, {"t": 0.05}),
    ("arcee_fusion", 1, True, {}),
    ("ram", 3, True, {"epsilon": 0.02}),
    ("ramplus_tl", 3, True, {"epsilon": 0.05, "r": 0.3, "alpha": 0.5}),
    ("passthrough", 1, False, {"scale": 0.7}),
    ("passthrough", 1, False, {}),
]


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for shape_name, shape in SHAPES.items():
        base = torch.randn(shape, generator=generator)
        tensors[f"{shape_name}.base"] = base
        for i in range(3):  # heavy-tailed task vectors: a product of two normals
            step = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator)
            tensors[f"{shape_name}.{i}"] = base + 0.3 * step
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []
    bernoulli = torch.bernoulli

    def recording(probabilities: torch.Tensor) -> torch.Tensor:
        mask = bernoulli(probabilities)
        drawn.append((probabilities, mask))
        return mask

    torch.bernoulli = recording
    cases = []
    torch.manual_seed(0)
    for method, count, with_base, parameters in CASES:
        for shape_name in SHAPES:
            if method.startswith("della") and shape_name == "cube":
                continue  # mergekit ranks along dimension 1, whatever the rank; ours along the last
            models = [tensors[f"{shape_name}.{i}"] for i in range(count)]
            base = [tensors[f"{shape_name}.base"]] if with_base else []
            drawn.clear()
            result = merge_tensors(
                [*base, *models],
                method,
                base_index=0 if with_base else None,
                parameters=parameters,
                dtype=torch.float32,
            )
            key = f"case{len(cases)}"
            tensors[key] = result.contiguous()
            for i, (probabilities, mask) in enumerate(drawn):
                tensors[f"{key}.mask{i}"] = mask.to(torch.uint8)
                if method.startswith("della"):
                    tensors[f"{key}.probability{i}"] = probabilities.contiguous()
            cases.append(
                {"key": key, "method": method, "shape": shape_name, "models": count, "base": with_base,
                 "parameters": parameters, "masks": len(drawn)}
            )  # fmt: skip
    (HERE / "merge.json").write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, HERE / "merge.safetensors")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
