"""linear_logprob against torch's matmul with the loss on float32 logits: forward + backward, time and added memory.

SFT's peer is `cross_entropy((hidden @ weight^T).float())`, DPO's is log_softmax and gather of the same logits. The rate counts the
products that a loss needs, 4 T K V FLOP with a frozen head and 6 with a trained one, for both sides alike; ours makes the logits
of a trained head twice (8 T K V). The roof is torch's faster product of the two dtypes.

The peer is given its best: on a CPU where torch's bfloat16 product is slower than widening both operands and multiplying float32
(AVX2: 5 to 50 times slower), that is what it does, and its name says so.

linear_kl (forward KL from a teacher of the same width, both heads frozen) stands beside kl_div on two log_softmaxes; 6 T K V FLOP
are counted, the student's product, its gradient and the teacher's product.
"""

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import Options, Row, compare, roof, timing
from enginepost.kernels.linear_kl import linear_kl
from enginepost.kernels.linear_logprob import linear_logprob

# (tokens, width, vocabulary, dtype, trained head): SmolLM2-135M's head, then Qwen2.5-0.5B's.
CASES = [
    (1024, 576, 49152, torch.bfloat16, False),
    (1024, 576, 49152, torch.bfloat16, True),
    (1024, 576, 49152, torch.float32, False),
    (1024, 576, 49152, torch.float32, True),
    (2048, 896, 151936, torch.bfloat16, False),
]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets)[0]


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.float() @ weight.float().T if roof.widening_wins() else (hidden @ weight.T).float()


def by_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy(logits(hidden, weight), targets, reduction="none")


def by_log_softmax(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits(hidden, weight), dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def sft(logprob: Tensor) -> Tensor:
    return -logprob.mean()


def dpo(logprob: Tensor) -> Tensor:
    """Of one pair: the first half of the tokens is the chosen answer, the reference policy's log-ratio is 0."""
    chosen, rejected = logprob.chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen.sum() - rejected.sum()))


def step(
    logprobs: Callable[[Tensor, Tensor, Tensor], Tensor], loss: Callable[[Tensor], Tensor], hidden: Tensor, weight: Tensor,
    targets: Tensor,
) -> Callable[[], None]:  # fmt: skip
    def call() -> None:
        hidden.grad = weight.grad = None
        loss(logprobs(hidden, weight, targets)).backward()

    return call


def in_new_thread(call: Callable[[], None]) -> None:
    """So that memory counts the workspace of the kernels, which a thread keeps from call to call."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def kl_by_log_softmax(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    student = torch.log_softmax(logits(hidden, weight), dim=-1)
    wanted = torch.log_softmax(logits(teacher, teacher_weight), dim=-1)
    return torch.nn.functional.kl_div(student, wanted, reduction="none", log_target=True).sum(-1)


def kl_by_ours(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    return linear_kl(hidden, weight, teacher_hidden=teacher, teacher_head=teacher_weight)


def kl_rows(options: Options, best: float) -> Iterator[Row]:
    tokens, width, vocab, dtype, _ = CASES[0]
    torch.manual_seed(0)
    hidden, teacher = (torch.randn(tokens, width).to(dtype) for _ in range(2))
    weight, teacher_weight = ((torch.randn(vocab, width) / width**0.5).to(dtype) for _ in range(2))
    hidden.requires_grad_()

    def step(kl: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            hidden.grad = None
            kl(hidden, weight, teacher, teacher_weight).mean().backward()

        return call

    multiplied = "float32" if roof.widening_wins() else "bfloat16"
    calls = {"ours": step(kl_by_ours), f"torch {multiplied} matmul+log_softmax+kl_div": step(kl_by_log_softmax)}
    case = f"KL {str(dtype)[6:]} T={tokens} K={width} V={vocab} frozen"
    yield compare(case, calls, work=6 * tokens * width * vocab, unit="GFLOP/s", options=options, roof=best)
    yield memory(case, calls)


def memory(case: str, calls: dict[str, Callable[[], None]]) -> Row:
    used = {label: timing.peak_memory(lambda call=call: in_new_thread(call)) for label, call in calls.items()}
    mine, (peer_name, theirs) = used["ours"], list(used.items())[1]
    return Row(case, "added memory", "MB", mine / 1e6, peer_name, theirs / 1e6)


def run(options: Options) -> Iterator[Row]:
    best = max(roof.gemm(torch.float32), roof.gemm(torch.bfloat16))
    for tokens, width, vocab, dtype, trained in CASES:
        torch.manual_seed(0)
        hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
        weight = (torch.randn(vocab, width) / width**0.5).to(dtype).requires_grad_(trained)
        targets = torch.randint(vocab, (tokens,))
        head = "trained" if trained else "frozen"
        multiplied = "float32" if dtype == torch.float32 or roof.widening_wins() else "bfloat16"
        for name, loss, peer in (("SFT", sft, by_cross_entropy), ("DPO", dpo, by_log_softmax)):
            case = f"{name} {str(dtype)[6:]} T={tokens} K={width} V={vocab} {head}"
            calls = {
                "ours": step(ours, loss, hidden, weight, targets),
                f"torch {multiplied} matmul+{peer.__name__[3:]}": step(peer, loss, hidden, weight, targets),
            }
            work = (6 if trained else 4) * tokens * width * vocab
            yield compare(case, calls, work=work, unit="GFLOP/s", options=options, roof=best)
            yield memory(case, calls)
            hidden.grad = weight.grad = None
    yield from kl_rows(options, best)
