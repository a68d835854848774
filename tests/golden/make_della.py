"""Golden file of DELLA where magnitudes are equal, as in 16-bit fine-tunes: the probabilities of mergekit 0.1.5.

Run in an environment with mergekit (bench/peers-merge.txt):
    python tests/golden/make_della.py
Writes della.safetensors: base and tuned bfloat16 [8, 768], a small step apart, so that a third of the differences is zero and a row$
has about fifty magnitudes; and mergekit's probability of every element, worked out in float32 and in bfloat16.
"""

import pathlib

import torch
from mergekit.merge_methods import merge_tensors
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
DENSITY, EPSILON = 0.6, 0.25


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(8, 768, generator=generator)).bfloat16()
    tuned = (base + 1e-4 * torch.randn(8, 768, generator=generator)).bfloat16()
    tensors = {"base": base, "tuned": tuned}
    drawn: list[torch.Tensor] = []
    bernoulli = torch.bernoulli

    def recording(probabilities: torch.Tensor) -> torch.Tensor:
        drawn.append(probabilities)
        return bernoulli(probabilities)

    torch.bernoulli = recording
    for dtype in (torch.float32, torch.bfloat16):
        drawn.clear()
        parameters = {"weight": [1.0], "density": [DENSITY], "epsilon": [EPSILON]}
        merge_tensors([base.to(dtype), tuned.to(dtype)], "della", base_index=0, parameters=parameters, dtype=dtype)
        [probabilities] = drawn
        tensors[f"probability.{str(dtype).removeprefix('torch.')}"] = probabilities.float().contiguous()
    save_file(tensors, HERE / "della.safetensors")
    delta = (tuned.float() - base.float()).abs()
    print(f"zero: {(delta == 0).float().mean():.3f}; distinct in a row: {[len(row.unique()) for row in delta]}")


if __name__ == "__main__":
    main()
