"""linear_kl: against full logits in float64, gradcheck, top-k teachers, block borders, memory, bad input."""

import math
import threading

import pytest
import torch

from bench.timing import peak_memory
from enginepost.kernels import linear_kl as module
from enginepost.kernels import linear_kl_blocks as blocks
from enginepost.kernels.backend import _core, core, to_dlpack, use_backend
from enginepost.kernels.linear_kl import linear_kl, reference

KINDS = [dict(kind="forward"), dict(kind="reverse"), dict(kind="js"), dict(kind="js", beta=0.2)]
OPTIONS = [{}, dict(temperature=2.5), dict(softcap=4.0, teacher_softcap=3.0), dict(temperature=0.7, softcap=2.0)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """64 columns to a block: every test crosses several."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(module, "GPU_BLOCK_ELEMENTS", 1)


def inputs(dtype=torch.float64, tokens=5, width=7, vocab=150, teacher_width=11, seed=0):
    torch.manual_seed(seed)
    hidden, head = 1.5 * torch.randn(tokens, width), torch.randn(vocab, width)
    teacher = dict(teacher_hidden=torch.randn(tokens, teacher_width), teacher_head=torch.randn(vocab, teacher_width))
    return hidden.to(dtype), head.to(dtype), {name: x.to(dtype) for name, x in teacher.items()}


def topk(teacher, k, options):
    """The teacher's k best, at the temperature and softcap asked."""
    u = teacher["teacher_hidden"].double() @ teacher["teacher_head"].double().T
    cap = options.get("teacher_softcap", 0.0)
    z = (cap * torch.tanh(u / cap) if cap else u) / options.get("temperature", 1.0)
    logprobs, ids = torch.log_softmax(z, -1).topk(k)
    return ids, logprobs


def with_gradients(function, hidden, head, weight, **arguments):
    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    kl = function(*leaves, **arguments)
    return [kl.detach(), *torch.autograd.grad((kl * weight.to(kl.dtype)).sum(), leaves)]


def teacher_of(teacher, k, options):
    return teacher if k is None else dict(teacher_topk=topk(teacher, k, options))


def double(arguments):
    def one(x):
        return (
            tuple(map(one, x))
            if isinstance(x, tuple)
            else x.double()
            if torch.is_tensor(x) and x.is_floating_point()
            else x
        )

    return {name: one(x) for name, x in arguments.items()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("k", [None, 1, 9, 150])
def test_equals_full_logits(kind, options, k):
    hidden, head, teacher = inputs()
    arguments = {**teacher_of(teacher, k, options), **kind, **options}
    weight = torch.tensor([1.0, -2.0, 0.0, 0.3, 5.0])
    ours = with_gradients(linear_kl, hidden, head, weight, **arguments)
    plain = with_gradients(reference, hidden, head, weight, **arguments)
    for name, a, b in zip(("kl", "dhidden", "dhead"), ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    assert (ours[0] > 0.001).all() and (ours[1][2] == 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("k", [None, 9])
def test_against_the_formula(kind, k):
    """Written out with torch's own kl_div, independent of the module's."""
    hidden, head, teacher = inputs()
    log_p = torch.log_softmax(hidden @ head.T, -1)
    log_q = torch.log_softmax(teacher["teacher_hidden"] @ teacher["teacher_head"].T, -1)
    if k is not None:
        ids = log_q.topk(k).indices

        def merge(x):
            some = x.exp().gather(1, ids)
            return torch.cat([some, 1 - some.sum(1, keepdim=True)], 1).log()

        log_p, log_q = merge(log_p), merge(log_q)

    def kl(a, b):
        return torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    beta = kind.get("beta", 0.5)
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    expected = {
        "forward": kl(log_q, log_p),
        "reverse": kl(log_p, log_q),
        "js": beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m),
    }[kind["kind"]]
    torch.testing.assert_close(linear_kl(hidden, head, **teacher_of(teacher, k, {}), **kind), expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("k", [None, 4])
def test_gradcheck(kind, k):
    options = dict(temperature=1.7, softcap=3.0)
    hidden, head, teacher = inputs(tokens=3, width=2, vocab=70)
    arguments = {**teacher_of(teacher, k, options), **kind, **options, "mask": torch.tensor([True, False, True])}
    assert torch.autograd.gradcheck(
        lambda hidden, head: linear_kl(hidden, head, **arguments), (hidden.requires_grad_(), head.requires_grad_())
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("k", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, dict(temperature=0.7, softcap=6.0, teacher_softcap=5.0)], ids=["", "capped"])
def test_against_float64(kind, k, dtype, options, backend, no_worse):
    if dtype == torch.float16 and not backend.gpu:
        pytest.skip("float16 is for GPUs")
    hidden, head, teacher = inputs(dtype, tokens=20, width=40, vocab=330)
    arguments, weight = {**teacher_of(teacher, k, options), **kind, **options}, torch.randn(20)
    exact = with_gradients(reference, hidden.double(), head.double(), weight, **double(arguments))
    plain = with_gradients(reference, hidden, head, weight, **arguments)
    there = {name: tuple(backend.to(*x)) if isinstance(x, tuple) else backend.to(x) for name, x in arguments.items()}
    ours = with_gradients(linear_kl, *backend.to(hidden, head, weight), **there)
    for name, mine, theirs, true in zip(("kl", "dhidden", "dhead"), ours, plain, exact, strict=True):
        no_worse(name, mine, theirs, true, floor=1e-6)


def blocks_of(u, t, ids, dchosen, dkl, s, du_dtype, cut):
    """All that the kernels make of logits u, t `[T, V]`, the vocabulary cut at `cut`: of forward, compare and gradient."""
    sums, pairs = u.new_empty(len(u), 5), u.new_empty(len(u), 2)
    chosen = None if ids is None else torch.full(ids.shape, -math.inf, dtype=u.dtype, device=u.device)
    du = torch.empty(u.shape, dtype=du_dtype, device=u.device)
    parts = [(0, cut), (cut, u.shape[1])]
    for v0, v1 in parts:
        blocks.scan(u[:, v0:v1].clone(), None if t is None else t[:, v0:v1].clone(), ids, chosen, sums, v0, s)
    state = torch.cat(
        [sums[:, :1], sums[:, 1:2].log(), sums[:, 2:3], sums[:, 3:4].log(), sums[:, 4:] / sums[:, 3:4]], 1
    )
    for v0, v1 in parts:
        if t is not None:
            blocks.compare(u[:, v0:v1].clone(), t[:, v0:v1].clone(), state[:, :4].contiguous(), pairs, v0, s)
        here = u[:, v0:v1].clone()
        into = here if du_dtype == u.dtype else torch.empty_like(here, dtype=du_dtype)
        theirs = None if t is None else t[:, v0:v1].clone()
        rows = state if t is not None else torch.cat([state[:, :2], dkl.unsqueeze(1)], 1)
        blocks.gradient(here, theirs, ids, dchosen, rows, dkl, into, v0, s)
        du[:, v0:v1] = into
    moments = sums[:, 1:2].log() if ids is not None else torch.cat([sums[:, [1, 3]].log(), sums[:, 4:]], 1)
    return [sums[:, :1], moments, du, *([chosen] if ids is not None else [sums[:, 2:3], pairs])]


def block_inputs(width, topk, seed=0):
    torch.manual_seed(seed)
    u, t = 3 * torch.randn(3, width), 3 * torch.randn(3, width)
    ids = torch.stack([torch.randperm(width)[: min(width, 40)] for _ in range(3)])
    ids[:, 1::7] = -1
    return u, None if topk else t, ids if topk else None, torch.randn(ids.shape) if topk else None, torch.randn(3)


@pytest.mark.parametrize("kind", ["forward", "reverse", "js", "top-k"])
@pytest.mark.parametrize("width, cut", [(2, 1), (70, 64), (2300, 3), (5000, 4900)])
@pytest.mark.parametrize("du_dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_every_width(backend, kind, width, cut, du_dtype, no_worse):
    """Rows that one warp and several warps share, tails, rows off 16 bytes, and largest logits in either block."""
    s = blocks.Settings("forward" if kind == "top-k" else kind, 0.3, 1.4, 7.0, 9.0)
    given = block_inputs(width, kind == "top-k")
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in given]
    with use_backend("reference"):  # torch
        exact = blocks_of(*wide, s, torch.float64, cut)
        plain = blocks_of(*given, s, du_dtype, cut)
    ours = blocks_of(*backend.to(*given), s, du_dtype, cut)
    for i, (mine, theirs, true) in enumerate(zip(ours, plain, exact, strict=True)):
        no_worse(str(i), mine, theirs, true, floor=1e-6)


@pytest.mark.parametrize("topk", [False, True])
def test_blocks_in_any_order_of_warps(topk, each_schedule):
    given = block_inputs(4100, topk)
    for kind in ("reverse", "js"):
        s = blocks.Settings(kind, 0.3, 1.4, 7.0, 9.0)
        each_schedule(lambda s=s: blocks_of(*given, s, torch.float32, 2100))


@pytest.mark.skipif(_core is None, reason="the native extension is not built")
@pytest.mark.parametrize("topk", [False, True])
def test_same_bits_at_any_thread_count(topk, each_thread_count):
    given = block_inputs(3000, topk)
    for kind in ("forward", "js"):
        s = blocks.Settings(kind, 0.3, 1.4, 7.0, 9.0)
        each_thread_count(lambda s=s: blocks_of(*given, s, torch.float32, 1000))


@pytest.mark.skipif(_core is None, reason="the native extension is not built")
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(t=None), "give teacher, or ids with chosen"),
        (dict(ids=torch.zeros(2, 3).long()), "give teacher, or ids with chosen"),
        (dict(t=None, ids=torch.zeros(2, 3).long(), chosen=torch.zeros(2, 2)), r"got \(2, 3\) and \(2, 2\)"),
        (dict(t=torch.zeros(2, 6)), r"u \(2, 5\) and teacher \(2, 6\) must be alike"),
        (dict(sums=torch.zeros(2, 6)), "sums must have 5 columns, got 6"),
        (dict(sums=torch.zeros(3, 5)), r"2 rows of 5, got \(3, 5\)"),
        (dict(u=torch.zeros(2, 5).bfloat16()), "u must be float32"),
        (dict(first=-1), "first must be"),
    ],
)
def test_the_native_blocks_name_what_is_wrong(change, message):
    given = (
        dict(u=torch.zeros(2, 5), t=torch.zeros(2, 5), ids=None, chosen=None, sums=torch.zeros(2, 5), first=0) | change
    )
    first = given.pop("first")
    with pytest.raises(ValueError, match=message):
        core().linear_kl_scan(
            *(None if x is None else to_dlpack(x) for x in given.values()), 0, 0.5, 1.0, 0.0, 0.0, first
        )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_teacher_that_is_the_student_costs_nothing(kind):
    hidden, head, _ = inputs(torch.float32)
    kl, dhidden, dhead = with_gradients(
        linear_kl, hidden, head, torch.ones(5), teacher_hidden=hidden, teacher_head=head, **kind
    )
    for x in (kl, dhidden, dhead):
        torch.testing.assert_close(x, torch.zeros_like(x), atol=5e-6, rtol=0)


@pytest.mark.parametrize("k", [None, 3])
def test_masked_rows_are_left_out(k):
    hidden, head, teacher = inputs()
    mask = torch.tensor([True, False, True, True, False])
    whole = with_gradients(linear_kl, hidden, head, mask, **teacher_of(teacher, k, {}))
    nan = hidden.clone()
    nan[~mask] = math.nan
    part = with_gradients(linear_kl, nan, head, torch.ones(5), **teacher_of(teacher, k, {}), mask=mask)
    torch.testing.assert_close(part[0], whole[0] * mask)
    for a, b in zip(part[1:], whole[1:], strict=True):
        torch.testing.assert_close(a, b)
    none = with_gradients(linear_kl, hidden, head, torch.ones(5), **teacher_of(teacher, k, {}), mask=mask & False)
    assert all((x == 0).all() for x in none)


def test_padding_of_top_k_is_no_outcome():
    hidden, head, teacher = inputs()
    ids, logprobs = topk(teacher, 4, {})
    pad = torch.tensor([[-1, -1]]).expand(5, 2)
    padded = (torch.cat([ids, pad], 1), torch.cat([logprobs, torch.full((5, 2), -math.inf)], 1))
    for kind in KINDS:
        short = with_gradients(linear_kl, hidden, head, torch.ones(5), teacher_topk=(ids, logprobs), **kind)
        long = with_gradients(linear_kl, hidden, head, torch.ones(5), teacher_topk=padded, **kind)
        for a, b in zip(short, long, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_certain_teacher_is_finite(kind):
    """Log-probabilities that sum to 1 or, rounded, to more."""
    hidden, head, _ = inputs(torch.float32)
    teacher = (torch.tensor([[3, 8]] * 5), torch.tensor([[0.0, -4.0]] * 5).bfloat16())
    results = with_gradients(linear_kl, hidden, head, torch.ones(5), teacher_topk=teacher, **kind)
    assert all(x.isfinite().all() for x in results) and (results[0] > 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_large_logits_stay_finite(kind, no_worse):
    """Logits of some hundreds: either side is certain, each of another token."""
    hidden, head, teacher = inputs(torch.float32)
    hidden = 100 * hidden
    exact = with_gradients(reference, hidden.double(), head.double(), torch.ones(5), **double(teacher), **kind)
    plain = with_gradients(reference, hidden, head, torch.ones(5), **teacher, **kind)
    ours = with_gradients(linear_kl, hidden, head, torch.ones(5), **teacher, **kind)
    for name, mine, theirs, true in zip(("kl", "dhidden", "dhead"), ours, plain, exact, strict=True):
        no_worse(name, mine, theirs, true, floor=1e-6)


def test_block_size_does_not_matter(monkeypatch):
    hidden, head, teacher = inputs()
    for kind in KINDS:
        small = with_gradients(linear_kl, hidden, head, torch.ones(5), **teacher, **kind)
        with monkeypatch.context() as patch:
            patch.setattr(module, "BLOCK_ELEMENTS", 1 << 20)
            large = with_gradients(linear_kl, hidden, head, torch.ones(5), **teacher, **kind)
        for a, b in zip(small, large, strict=True):
            torch.testing.assert_close(a, b)


def test_reference_backend(monkeypatch):
    hidden, head, teacher = inputs(torch.float32)
    monkeypatch.setenv("ENGINEPOST_BACKEND", "reference")
    assert torch.equal(linear_kl(hidden, head, **teacher), reference(hidden, head, **teacher))


def test_only_the_gradients_asked():
    hidden, head, teacher = inputs()
    both = with_gradients(linear_kl, hidden, head, torch.ones(5), **teacher)
    hidden.requires_grad_()
    teacher = {name: x.requires_grad_() for name, x in teacher.items()}
    linear_kl(hidden, head, **teacher).sum().backward()
    torch.testing.assert_close(hidden.grad, both[1])
    assert head.grad is None and all(x.grad is None for x in teacher.values())


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1 << 18)
    tokens, vocab = 512, 60000  # full logits: 123 MB a side
    hidden, head, teacher = inputs(torch.float32, tokens, 16, vocab, 16)
    hidden.requires_grad_()

    def call():
        thread = threading.Thread(target=lambda: linear_kl(hidden, head, **teacher, kind="js").sum().backward())
        thread.start()
        thread.join()

    call()
    assert peak_memory(call) < 40e6
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("k", [None, 4])
def test_opcheck(k):
    hidden, head, teacher = inputs()
    teacher = teacher_of(teacher, k, {})
    four = (teacher.get("teacher_hidden"), teacher.get("teacher_head"), *teacher.get("teacher_topk", (None, None)))
    options = ("js", 0.5, 1.3, 3.0, 0.0)
    torch.library.opcheck(
        torch.ops.enginepost.linear_kl, (hidden.requires_grad_(), head.requires_grad_(), *four, *options)
    )
    hidden, head = hidden.detach(), head.detach()
    kl, state = torch.ops.enginepost.linear_kl(hidden, head, *four, *options)
    torch.library.opcheck(
        torch.ops.enginepost.linear_kl_backward,
        (torch.ones_like(kl), hidden, head, *four, state, *options, True, False),
    )


Z = torch.zeros


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(student_head=Z(9, 4)), r"must share K, got \[3, 5\] and \[9, 4\]"),
        (dict(teacher_hidden=None), "a teacher is missing"),
        (dict(teacher_head=Z(9, 2)), r"must share K', got"),
        (dict(teacher_head=Z(8, 4)), "3 tokens and 9 vocabulary entries"),
        (dict(teacher_hidden=Z(2, 4)), "3 tokens and 9 vocabulary entries"),
        (dict(teacher_topk=(Z(3, 2).long(), Z(3, 2))), "not both"),
        (dict(teacher_hidden=None, teacher_head=None, teacher_topk=(Z(3, 2), Z(3, 2))), "int64 ids"),
        (dict(teacher_hidden=None, teacher_head=None, teacher_topk=(Z(3, 2).long(), Z(3, 1))), r"both \[3, k\]"),
        (
            dict(
                teacher_hidden=None,
                teacher_head=None,
                teacher_topk=(torch.tensor([[0, 1], [0, 9], [0, 1]]), Z(3, 2) - 1),
            ),
            r"vocabulary of 9 entries, got 9 at \[1, 1\]",
        ),
        (
            dict(teacher_hidden=None, teacher_head=None, teacher_topk=(Z(3, 1).long(), Z(3, 1) + 0.5)),
            "must not be above 0",
        ),
        (dict(mask=Z(3)), r"mask must be bool \[3\], got torch.float32"),
        (dict(kind="backward"), "kind must be one of forward, reverse, js"),
        (dict(beta=1.0), "beta must be"),
        (dict(temperature=0.0), "temperature must be"),
        (dict(softcap=-1.0), "softcaps must be"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(student_hidden=Z(3, 5), student_head=Z(9, 5), teacher_hidden=Z(3, 4), teacher_head=Z(9, 4))
    arguments |= change
    with pytest.raises(ValueError, match=message):
        linear_kl(arguments.pop("student_hidden"), arguments.pop("student_head"), **arguments)
