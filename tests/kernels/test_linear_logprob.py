"""linear_logprob: the reference by gradcheck, the kernels against float64 with the error of plain PyTorch as the measure."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from enginepost.kernels.backend import _core, info
from enginepost.kernels.linear_logprob import linear_logprob, reference

needs_native = pytest.mark.skipif(_core is None, reason="the native extension is not built")
# Tokens, width, vocabulary: tiles, blocks (252), groups of rows (256) and splits of the vocabulary (4032), and their edges.
SHAPES = [
    (1, 1, 1),
    (5, 7, 3),
    (16, 6, 252),
    (37, 59, 1001),
    (33, 64, 4032),
    (300, 31, 4033),
    (257, 24, 8100),
    (3, 260, 505),
]


def problem(tokens, width, vocab, dtypes=(torch.float32, torch.float32), size=1.0, skip=3):
    torch.manual_seed(tokens + width + vocab)
    hidden = (torch.randn(tokens, width) * size).to(dtypes[0])
    weight = (torch.randn(vocab, width) / width**0.5).to(dtypes[1])
    targets = torch.randint(vocab, (tokens,))
    targets[1::skip] = -100
    return hidden, weight, targets, torch.randn(tokens), torch.randn(tokens)


def run(function, hidden, weight, targets, weigh_logprob, weigh_entropy, *, dtype=None, frozen, entropy, softcap):
    """Results and gradients of a weighted sum, by name, in float64."""
    hidden = hidden.detach().to(dtype or hidden.dtype).requires_grad_()
    weight = weight.detach().to(dtype or weight.dtype).requires_grad_(not frozen)
    logprob, lse, spread = function(hidden, weight, targets, softcap=softcap, entropy=entropy)
    loss = (logprob * weigh_logprob.to(logprob.dtype)).sum()
    if entropy:
        loss = loss + (spread * weigh_entropy.to(spread.dtype)).sum()
    loss.backward()
    named = {"logprob": logprob, "lse": lse, "entropy": spread, "dhidden": hidden.grad}
    if not frozen:
        named["dweight"] = weight.grad
    return {name: value.detach().double() for name, value in named.items() if value is not None}


def assert_as_good(arguments, **options):
    """Ours is not further from float64 than twice plain PyTorch at the same dtypes."""
    exact = run(reference, *arguments, dtype=torch.float64, **options)
    plain = run(reference, *arguments, **options)
    ours = run(linear_logprob, *arguments, **options)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        worst = lambda y, name=name: (y - exact[name]).abs().max().item() if y.numel() else 0.0  # noqa: E731
        floor = 2e-7 * (1 + exact[name].abs().max().item())  # a float32 rounding: plain may be exact by luck
        assert worst(value) <= 2 * worst(plain[name]) + 2 * floor, (name, worst(value), worst(plain[name]))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_reference_gradients(frozen, entropy, softcap):
    hidden, weight, targets, *_ = problem(5, 4, 7)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_(not frozen)

    def outputs(hidden, weight):
        logprob, _, spread = linear_logprob(
            hidden, weight, targets, softcap=softcap, entropy=entropy
        )  # float64: reference
        return (logprob, spread) if entropy else logprob

    assert torch.autograd.gradcheck(outputs, (hidden, weight))


def test_reference_against_torch():
    hidden, weight, targets, *_ = problem(9, 8, 20)
    logprob, lse, spread = reference(hidden, weight, targets, entropy=True)
    logits = hidden @ weight.T
    kept = targets != -100
    torch.testing.assert_close(-logprob, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(lse, torch.where(kept, logits.logsumexp(1), torch.zeros(())))
    torch.testing.assert_close(spread[kept], torch.distributions.Categorical(logits=logits).entropy()[kept])
    assert (~kept).any() and not spread[~kept].any()


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "frozen, entropy, softcap", [(True, False, 0.0), (True, True, 3.0), (False, False, 3.0), (False, True, 0.0)]
)
def test_against_float64(shape, frozen, entropy, softcap):
    assert_as_good(problem(*shape, size=2.0), frozen=frozen, entropy=entropy, softcap=softcap)


@needs_native
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("frozen", [True, False])
def test_bfloat16(dtypes, frozen):
    for shape in ((37, 59, 1001), (70, 30, 4100)):
        assert_as_good(problem(*shape, dtypes), frozen=frozen, entropy=not frozen, softcap=0.0)


@needs_native
def test_entropy_that_no_loss_uses_costs_no_second_pass(monkeypatch):
    hidden, weight, targets, weigh, _ = problem(20, 12, 300)
    hidden.requires_grad_()

    def forbidden(*_):
        raise AssertionError("the logits were made again")

    logprob, _, spread = linear_logprob(hidden, weight, targets, entropy=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.enginepost, "linear_logprob_backward", forbidden)
        (logprob * weigh).sum().backward(retain_graph=True)
    assert hidden.grad is not None and spread.any()
    alone = hidden.grad.clone()
    (logprob * weigh).sum().backward()
    torch.testing.assert_close(hidden.grad, 2 * alone)


@needs_native
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_huge_logits(softcap):
    hidden, weight, targets, weigh, other = problem(20, 32, 600, size=1e4)
    for frozen in (True, False):
        ours = run(linear_logprob, hidden, weight, targets, weigh, other, frozen=frozen, entropy=True, softcap=softcap)
        exact = run(
            reference,
            hidden,
            weight,
            targets,
            weigh,
            other,
            dtype=torch.float64,
            frozen=frozen,
            entropy=True,
            softcap=softcap,
        )
        for name, value in ours.items():
            scale = exact[name].abs().max().item() + 1e-3
            assert value.isfinite().all() and (value - exact[name]).abs().max() <= 1e-3 * scale, name


@needs_native
def test_a_target_with_all_the_mass():
    hidden, weight = torch.full((3, 4), 100.0), torch.zeros(9, 4)
    weight[2] = 100.0
    logprob, lse, spread = linear_logprob(hidden, weight, torch.tensor([2, 2, 0]), entropy=True)
    assert logprob.tolist() == [0.0, 0.0, -40000.0] and lse.tolist() == [40000.0] * 3 and spread.tolist() == [0.0] * 3


@needs_native
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("tokens", [0, 40])
def test_nothing_to_do(frozen, tokens):
    hidden, weight = torch.randn(tokens, 6, requires_grad=True), torch.randn(30, 6, requires_grad=not frozen)
    targets = torch.full((tokens,), -100)
    results = linear_logprob(hidden, weight, targets, entropy=True)
    assert all(r.shape == (tokens,) and r.dtype == torch.float32 and not r.any() for r in results)
    (results[0].sum() + results[2].sum()).backward()
    assert hidden.grad is not None and hidden.grad.shape == (tokens, 6) and not hidden.grad.any()
    assert frozen or (weight.grad is not None and weight.grad.shape == (30, 6) and not weight.grad.any())


@needs_native
def test_skipped_rows_are_not_read():
    hidden, weight, targets, weigh, other = problem(60, 20, 500)
    poisoned = hidden.clone()
    poisoned[targets == -100] = float("nan")
    for frozen in (True, False):
        options = dict(frozen=frozen, entropy=True, softcap=0.0)
        clean = run(linear_logprob, hidden, weight, targets, weigh, other, **options)
        dirty = run(linear_logprob, poisoned, weight, targets, weigh, other, **options)
        assert all(torch.equal(clean[name], dirty[name]) for name in clean)
        assert all(not clean[name][targets == -100].any() for name in ("logprob", "lse", "entropy", "dhidden"))


@needs_native
def test_nan_stays_visible():
    hidden, weight, targets, *_ = problem(6, 8, 700, skip=100)
    hidden[3, 2] = float("nan")
    logprob = linear_logprob(hidden, weight, targets)[0]
    assert logprob.isnan().tolist() == [False, False, False, True, False, False]


@needs_native
def test_same_bits_at_any_thread_count_and_in_any_company():
    arguments = problem(300, 40, 4500, (torch.bfloat16, torch.bfloat16), skip=7)
    hidden, weight, targets, weigh, other = arguments
    before = torch.get_num_threads()
    try:
        for frozen in (True, False):
            options = dict(frozen=frozen, entropy=not frozen, softcap=0.0)
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(run(linear_logprob, *arguments, **options))
            assert all(torch.equal(results[0][name], r[name]) for r in results[1:] for name in r)
            order = torch.tensor([7, 290, 4, 123])
            few = run(linear_logprob, hidden[order], weight, targets[order], weigh[order], other[order], **options)
            for name in ("logprob", "lse", "entropy", "dhidden"):
                assert torch.equal(few[name], results[0][name][order]), name
    finally:
        torch.set_num_threads(before)


@needs_native
def test_strided_inputs_and_no_grad():
    hidden, weight, targets, *_ = problem(30, 24, 400)
    expected = linear_logprob(hidden, weight, targets, entropy=True)
    wide_hidden, wide_weight = torch.randn(30, 50), torch.randn(400, 29)
    wide_hidden[:, 3:27], wide_weight[:, :24] = hidden, weight
    spaced_targets = torch.stack([targets, targets], 1)[:, 0]
    for h, w in ((wide_hidden[:, 3:27], wide_weight[:, :24]), (hidden.T.contiguous().T, weight.T.contiguous().T)):
        results = linear_logprob(h, w, spaced_targets, entropy=True)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    with torch.no_grad():
        results = linear_logprob(hidden.requires_grad_(), weight, targets, entropy=True)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(results, expected, strict=True))


@needs_native
@pytest.mark.parametrize("frozen, entropy", [(True, False), (False, False), (False, True)])
def test_opcheck(frozen, entropy):
    hidden, weight, targets, weigh, other = problem(12, 8, 50)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    torch.library.opcheck(torch.ops.enginepost.linear_logprob, (hidden, weight, targets, 2.0, entropy, frozen))
    with torch.no_grad():
        _, lse, spread, _ = torch.ops.enginepost.linear_logprob(hidden, weight, targets, 2.0, entropy, False)
        backward = (weigh, other if entropy else None, hidden, weight, targets, lse, spread, 2.0, True, not frozen)
        torch.library.opcheck(torch.ops.enginepost.linear_logprob_backward, backward)


@needs_native
def test_memory_stays_far_below_the_logits():
    from bench.timing import peak_memory

    tokens, width, vocab = 512, 32, 60000  # the logits would take 123 MB
    hidden, weight, targets, weigh, _ = problem(tokens, width, vocab, skip=100)

    def step(frozen):  # in a thread of its own, whose workspace is new
        thread = threading.Thread(target=lambda: gradients(frozen))
        thread.start()
        thread.join()

    def gradients(frozen):
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
        (linear_logprob(h, w, targets)[0] * weigh).sum().backward()

    for frozen in (True, False):
        step(frozen)  # loads what torch loads once
        assert peak_memory(lambda frozen=frozen: step(frozen)) < 20 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(targets=torch.tensor([0, 5, 1])), r"targets\[1\] = 5 .*vocabulary of 5"),
        (dict(targets=torch.tensor([0, 1, -1])), r"targets\[2\] = -1 "),
        (dict(targets=torch.tensor([0, 1])), "targets must be int64"),
        (dict(targets=torch.tensor([0, 1, 2], dtype=torch.int32)), "targets must be int64"),
        (dict(weight=torch.zeros(5, 3)), "share K"),
        (dict(hidden=torch.zeros(3)), "share K"),
        (dict(softcap=-1.0), "softcap"),
        (dict(softcap=float("nan")), "softcap"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message, dtype):
    arguments = (
        dict(hidden=torch.zeros(3, 4), weight=torch.zeros(5, 4), targets=torch.tensor([0, 1, -100]), softcap=0.0)
        | change
    )
    hidden, weight = arguments["hidden"].to(dtype), arguments["weight"].to(dtype)
    with pytest.raises(ValueError, match=message):
        linear_logprob(hidden, weight, arguments["targets"], softcap=arguments["softcap"])


@needs_native
@pytest.mark.parametrize(
    "name, value, message",
    [
        (2, torch.zeros(3), "int64"),
        (3, torch.zeros(2), "logprob must be contiguous"),
        (6, torch.zeros(3, 5), "direction must have the shape of hidden"),
        (6, torch.zeros(1, 4).expand(3, 4), "rows of direction overlap"),
        (1, torch.zeros(0, 4), "empty"),
        (0, torch.zeros(3, 4, dtype=torch.float64), "hidden must be float32 or bfloat16"),
    ],
)
def test_native_forward_checks_its_arguments(name, value, message):
    from enginepost.kernels.backend import core, to_dlpack

    arguments = [torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.zeros(3),
                 torch.zeros(3), torch.zeros(3, 4)]  # fmt: skip
    arguments[name] = value
    with pytest.raises(ValueError, match=message):
        core().linear_logprob_forward(*map(to_dlpack, arguments), 0.0)


@needs_native
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa):
    if os.environ.get("ENGINEPOST_CPU") or isa == info()["isa"] or isa not in info()["isas"]:
        pytest.skip(f"{isa} is what the tests above have run on, or not for this machine")
    # A process of its own, because the choice is made once: the tests above that reach every path of the kernels.
    wanted = "against_float64 or bfloat16 or bits or huge"
    code = f"import sys, pytest; sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', {__file__!r}, '-k', {wanted!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ENGINEPOST_CPU": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


class Pages:
    """A head that is handed out a part at a time, as one in a file is."""

    def __init__(self, weight):
        self.weight, self.shape, self.dtype, self.wholes = weight, weight.shape, weight.dtype, 0

    def rows(self, ids):
        return self.weight[ids]

    def parts(self, rows):
        page = torch.empty_like(self.weight[:rows])
        for part in self.weight.split(rows):
            yield page[: len(part)].copy_(part)
            page.fill_(torch.nan)  # nothing looks at a part any more when the next is asked for

    def whole(self):
        self.wholes += 1
        return self.weight


@needs_native
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("shape", [(37, 59, 1001), (33, 64, 4032), (300, 31, 4033), (257, 24, 8100), (5, 9, 20_001)])
def test_a_head_in_parts_gives_the_same_bits(shape, softcap, blocks, monkeypatch):
    monkeypatch.setattr("enginepost.kernels.linear_logprob.PARTS", blocks)
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)):
        hidden, weight, targets, weigh, weigh_entropy = problem(*shape, dtypes=dtypes)
        for entropy in (False, True):
            found = []
            for head in (weight, Pages(weight)):
                leaf = hidden.detach().requires_grad_()
                results = linear_logprob(leaf, head, targets, softcap=softcap, entropy=entropy)
                (results[0] * weigh).sum().backward()
                with torch.no_grad():
                    bare = linear_logprob(hidden, head, targets, softcap=softcap, entropy=entropy)
                found.append([*(r.detach() for r in results), leaf.grad, *bare])
            assert head.wholes == 0
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        leaves = [hidden.detach().requires_grad_() for _ in range(2)]
        for leaf, head in zip(leaves, (weight, Pages(weight)), strict=True):
            logprob, _, spread = linear_logprob(leaf, head, targets, softcap=softcap, entropy=True)
            (logprob * weigh + spread * weigh_entropy).sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)


@needs_native
def test_parts_that_are_none_are_refused():
    hidden, weight, targets, *_ = problem(5, 8, 9000)
    state, vector = torch.empty(4, 5), torch.empty(5)

    def call(rows, first, state=state):
        _core.linear_logprob_forward_part(
            hidden, weight[:rows], targets, None, state, vector, vector, None, None, 0.0, first, 9000
        )

    for rows, first, message in [
        (4000, 0, "a part before the last has 4000 rows, not a multiple of 4032"),
        (4032, 10, "parts begin at multiples of 4032"),
        (4032, 8064, r"rows \[8064, \+4032\) are not a part of 9000"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(rows, first)
    with pytest.raises(ValueError, match=r"state must be contiguous \(4, 5\)"):
        call(4032, 0, torch.empty(4, 6))
