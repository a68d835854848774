"""The C API under random arguments, in a process of its own: every call ends in a status."""

import pathlib
import subprocess
import sys

import pytest
import torch

from enginepost.kernels.backend import core, to_dlpack

HERE = pathlib.Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="finds the library in /proc")
def test_random_calls_end_in_a_status():
    command = [sys.executable, HERE / "fuzz.py", "--rounds", "150", "--seed", "7"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr.replace("\r", "\n")[-2000:]
    assert "ep_attention_forward: " in run.stdout and "ep_rope: " in run.stdout


def test_a_result_may_not_lie_over_the_integers_that_say_where_to_read():
    hidden, weight, targets = torch.randn(4, 8), torch.randn(9, 8), torch.tensor([0, 8, -100, 3])
    over = targets.view(torch.float32)[:4]
    tensors = [to_dlpack(t) for t in (hidden, weight, targets, torch.empty(4), over)]
    with pytest.raises(ValueError, match="linear_logprob_forward: lse lies over targets in memory"):
        core().linear_logprob_forward(*tensors, None, None, 0.0)
    q, cu = torch.randn(4, 2, 8), torch.zeros(64, dtype=torch.int32)
    cu[1] = 4
    out = cu.view(torch.float32).view(4, 2, 8)
    tensors = [to_dlpack(t) for t in (q, q, q, cu[:2])]
    with pytest.raises(ValueError, match="attention_forward: out lies over cu_seqlens in memory"):
        core().attention_forward(*tensors, None, None, to_dlpack(out), to_dlpack(torch.empty(2, 4)), True, 0, 0.0, 1.0)
