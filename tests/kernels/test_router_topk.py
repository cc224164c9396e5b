"""Laws of `router_topk`: an independent formula, gradients, ties, non-finite rows, bad input, compile."""

import ctypes
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import trace_kernels as tk
from trace_kernels.ops.router_topk.cases import FAMILIES, OP
from trace_kernels.ops.router_topk.rule import in_float32
from trace_kernels.runtime import light_op, validate
from trace_kernels.runtime.backends import BackendError, all_ops
from trace_kernels.runtime.native import native

BACKENDS = [backend.name for backend in all_ops()["router_topk"] if backend.unavailable() is None]
CPU = [name for name in BACKENDS if name in ("reference", "cpu")]


def score(function, row):
    if function == "softmax":
        top = max(row)
        total = sum(math.exp(z - top) for z in row)
        return [math.exp(z - top) / total for z in row]
    return {
        "sigmoid": lambda: [1 / (1 + math.exp(-z)) for z in row],
        "sqrtsoftplus": lambda: [math.sqrt(math.log1p(math.exp(z))) for z in row],
        "softmax_topk": lambda: row,
    }[function]()


def route(
    row,
    k,
    bias,
    *,
    score_function,
    renormalize,
    scale,
    eps,
    num_groups,
    topk_groups,
    group_score,
    masked_group_value,
    given=None,
):
    """One token in Python floats, straight from the docstring's formula."""
    scores = score(score_function, row)
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    if not any(bias) and num_groups == 1:
        choice = row
    if num_groups > 1:
        size = len(row) // num_groups
        groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(num_groups)]
        best = {"max": 1, "sum_top2": 2, "sum_topk": k // topk_groups}[group_score]
        value = [sum(group[:best]) for group in groups]
        kept = sorted(range(num_groups), key=lambda g: (-value[g], g))[:topk_groups]
        choice = [c if e // size in kept else masked_group_value for e, c in enumerate(choice)]
    indices = given or sorted(range(len(row)), key=lambda e: (-choice[e], e))[:k]
    chosen = [scores[e] for e in indices]
    if score_function == "softmax_topk":
        chosen = score("softmax", chosen)
    total = sum(chosen) + eps if renormalize else 1.0
    return indices, [scale * s / total for s in chosen]


@st.composite
def calls(draw):
    num_groups = draw(st.sampled_from([1, 1, 2, 3]))
    E = num_groups * draw(st.integers(2, 7))
    T = draw(st.integers(0, 5))
    # Multiples of 1/4 tie often and are exact in every dtype.
    logits = draw(st.lists(st.lists(st.integers(-32, 32), min_size=E, max_size=E), min_size=T, max_size=T))
    biased = draw(st.booleans())
    bias = draw(st.lists(st.integers(-8, 8), min_size=E, max_size=E)) if biased else [0] * E
    k, topk_groups = draw(st.integers(1, E)), draw(st.integers(1, num_groups))
    group_scores = ["max", "sum_top2"]
    if num_groups == 1 or 1 <= k // topk_groups <= E // num_groups:
        group_scores.append("sum_topk")
    options = {
        "score_function": draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus", "softmax_topk"])),
        "renormalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5, -0.5])),
        "eps": draw(st.sampled_from([0.0, 1e-20, 0.25])),
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "group_score": draw(st.sampled_from(group_scores)),
        "masked_group_value": draw(st.sampled_from([0.0, float("-inf")])),
    }
    given = [draw(st.permutations(range(E)))[:k] for _ in range(T)] if draw(st.booleans()) else None
    return [[z / 4 for z in row] for row in logits], E, k, [b / 4 for b in bias], options, given


@pytest.mark.parametrize("backend, dtype", [("reference", torch.float64), *((name, torch.float32) for name in CPU)])
@settings(max_examples=150, deadline=None)
@given(call=calls())
def test_independent_formula(backend, dtype, call):
    rows, E, k, bias, options, given = call
    logits = torch.tensor(rows, dtype=dtype).reshape(len(rows), E)
    weights, indices = tk.router_topk(
        logits, k, selection_bias=torch.tensor(bias, dtype=dtype) if any(bias) else None, **options, backend=backend,
        indices=None if given is None else torch.tensor(given, dtype=torch.int64).reshape(len(rows), k),
    )  # fmt: skip
    assert weights.shape == indices.shape == (len(rows), k)
    for t, row in enumerate(rows):
        expected = route(row, k, bias, **options, given=None if given is None else list(given[t]))
        if indices[t].tolist() != expected[0]:
            # In float32 two sums s + b that differ by rounding may swap, in the choice and in the groups' scores.
            assert given is None
            assert dtype == torch.float32 or any(bias) or options["num_groups"] > 1
            assert len(set(indices[t].tolist())) == k
            continue
        torch.testing.assert_close(
            weights[t].double(), torch.tensor(expected[1], dtype=torch.float64), rtol=3e-6, atol=1e-7
        )


@pytest.mark.parametrize("backend", CPU)
def test_ties_take_the_lowest_index(backend):
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, -0.0, 0.0, -0.0, 0.0], [-1.0, -1.0, 3.0, -1.0, -1.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, indices = tk.router_topk(logits.to(dtype), 4, backend=backend)
        assert indices.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [2, 0, 1, 3]]
    # Tied groups too: all have the score 2, the first two are kept, and of the masked ones the lowest index follows.
    _, indices = tk.router_topk(
        torch.full((1, 8), 1.0), 6, num_groups=4, topk_groups=2, group_score="sum_top2", backend=backend
    )
    assert indices.tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_are_not_finite_get_valid_distinct_indices(backend, family):
    inf, nan = float("inf"), float("nan")
    logits = torch.zeros(5, 16)
    logits[0] = nan
    logits[1, 3] = nan
    logits[2, 9] = inf
    logits[3] = -inf
    logits[4, 12] = -nan
    _, indices = tk.router_topk(logits, 6, **FAMILIES[family], backend=backend)
    assert all(len(set(row)) == 6 and min(row) >= 0 and max(row) < 16 for row in indices.tolist())
    if FAMILIES[family].get("num_groups", 1) == 1:
        assert indices[:, 0].tolist() == [0, 3, 9, 0, 12]


@pytest.mark.parametrize("backend", CPU)
def test_a_row_does_not_depend_on_its_neighbours_or_threads(backend):
    logits = torch.randn(4000, 60, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        counts, score = torch.zeros(60, dtype=torch.int64), torch.zeros(4000)
        results.append((*tk.router_topk(logits, 6, renormalize=False, counts=counts, table=torch.linspace(-1, 1, 60),
                                        token_score=score, backend=backend), counts, score))  # fmt: skip
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = tk.router_topk(logits[1234:1235], 6, renormalize=False, backend=backend)
    assert torch.equal(alone[0], results[0][0][1234:1235])


def test_counts_and_scores_are_those_of_record_routing():
    generator = torch.Generator().manual_seed(0)
    logits, table = torch.randn(50, 32, generator=generator), torch.randn(32, generator=generator)
    mask = torch.rand(50, generator=generator) < 0.5
    for backend in CPU:
        ours, theirs = ((torch.arange(32), torch.ones(50)) for _ in range(2))
        _, indices = tk.router_topk(logits, 4, token_mask=mask, counts=ours[0], table=table, token_score=ours[1])
        tk.record_routing_(indices, theirs[0], token_mask=mask, table=table, token_score=theirs[1], backend=backend)
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1])


GRADIENTS = {
    **FAMILIES,
    "softmax_eps": {"eps": 0.1},
    "sigmoid_eps": {"score_function": "sigmoid", "eps": 0.1},
    "sigmoid_raw": {"score_function": "sigmoid", "renormalize": False},
    "sqrtsoftplus_raw": {"score_function": "sqrtsoftplus", "renormalize": False},
    "softmax_topk_eps": {"score_function": "softmax_topk", "eps": 0.1},
    "softmax_topk_raw": {"score_function": "softmax_topk", "renormalize": False, "scale": 2.0},
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_in_float64(name):
    logits = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    options = {**GRADIENTS[name], "weights_dtype": torch.float64}
    if options.get("num_groups", 1) > 1 or "deepseek_v4" in name:
        options["selection_bias"] = torch.linspace(-0.2, 0.2, 12)
    given = torch.rand(5, 12, generator=torch.Generator().manual_seed(2)).argsort(dim=1)[:, :4]
    for indices in (None, given):
        options["indices"] = indices
        assert torch.autograd.gradcheck(lambda z: tk.router_topk(z, 4, **options, backend="reference")[0], (logits,))


def gradient_errors(backend, logits, upstream, function, **options):
    """Of the op and of plain torch, in float32, against plain torch in float64; [T, E]."""
    k = upstream.shape[1]
    indices = tk.router_topk(logits, k, **options, backend="reference")[1]

    def gradient(function, dtype):
        leaf = logits.to(dtype).requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, upstream.to(dtype))[0].double()

    def eager(leaf):
        chosen = function(leaf).gather(1, indices)
        return chosen / chosen.sum(-1, keepdim=True)

    truth = gradient(eager, torch.float64)
    ours = gradient(lambda leaf: tk.router_topk(leaf, k, **options, backend=backend)[0], torch.float32)
    return ours - truth, gradient(eager, torch.float32) - truth


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("k", [6, 8, 20])
def test_gradient_of_peaked_rows_is_about_as_exact_as_eagers(backend, k):
    generator = torch.Generator().manual_seed(k)
    logits = 16 * torch.randn(999, 64, generator=generator)
    upstream = torch.randn(999, k, generator=generator)
    ours, eager = gradient_errors(backend, logits, upstream, lambda leaf: leaf.softmax(-1))
    assert ours.norm() < 2 * eager.norm()


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("k", [4, 6, 20])
@pytest.mark.parametrize("large", [1e2, 1e4])
def test_gradient_is_as_exact_where_a_bias_puts_a_small_score_first(backend, k, large):
    generator = torch.Generator().manual_seed(k)
    logits, upstream = torch.randn(499, 32, generator=generator) / 2, torch.randn(499, k, generator=generator)
    logits[:, 0] = -math.log(large)
    upstream[:, 0] *= large
    options = {"score_function": "sigmoid", "selection_bias": 10.0 * (torch.arange(32) == 0)}
    errors = gradient_errors(backend, logits, upstream, torch.sigmoid, **options)
    ours, eager = (error[:, 1:].norm() for error in errors)
    assert ours < 2 * eager


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("k", [2, 6, 20])
def test_scores_whose_sum_is_tiny(backend, k):
    generator = torch.Generator().manual_seed(k)
    logits, upstream = (torch.randn(50, size, generator=generator) for size in (32, k))
    # The scale over the sum is beyond float32. The bias keeps the one large score from the choice.
    tiny = logits / 4
    tiny[:, 0] = 84.0
    calls = [
        (tiny, {"selection_bias": -5.0 * (torch.arange(32) == 0), "scale": 1e6}),
        (logits - 40, {"score_function": "sigmoid", "scale": 1e25}),
        (logits - 80, {"score_function": "sqrtsoftplus", "scale": 1e25}),
    ]
    for z, options in calls:
        results = []
        for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
            leaf = z.to(dtype).requires_grad_()
            weights, _ = tk.router_topk(leaf, k, **options, backend=name)
            gradient = torch.autograd.grad(weights, leaf, upstream.to(dtype))[0]
            results.append([x.detach().double() / options.get("scale", 1.0) for x in (weights, gradient)])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_eps_is_rounded_to_float32():
    ties = [2.0**-149 * steps for steps in (0.5, 1.5, 2.5)] + [1 + 2.0**-24, 1 + 3 * 2.0**-24, 2.0**128 - 2.0**103]
    values = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.ldexp(values, torch.arange(20000) % 280 - 152)
    for value in [0.0, 5e-324, 6e-46, 8e-46, 2.0**-126 * (1 - 2.0**-25), 1e39, *ties, *values.tolist()]:
        assert in_float32(value) == ctypes.c_float(value).value, value


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("eps", [1e-30, 1e-40, 8e-46, 6e-46, 1e-50, 5e-324])
def test_gradient_with_a_tiny_eps(backend, eps):
    for dtype in (torch.float32, torch.float64)[: 1 + (backend == "reference")]:
        logits = torch.randn(40, 8, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
        upstream = torch.randn(40, 2, dtype=dtype, generator=torch.Generator().manual_seed(1))
        unused = [torch.full((40, 2), math.nan) for _ in range(100)]  # whoever reads memory that is not set gets these
        del unused
        gradients = [
            torch.autograd.grad(tk.router_topk(logits, 2, eps=e, backend=backend)[0], logits, upstream)[0]
            for e in (eps, 0.0)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled module")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_instruction_set_chooses_the_same(isa, monkeypatch):
    if isa not in native().available_isas():
        pytest.skip(f"no {isa} here")
    monkeypatch.setenv("TRACE_KERNELS_ISA", isa)
    generator = torch.Generator().manual_seed(0)
    for E, k in ((3, 2), (16, 8), (60, 8), (64, 16), (65, 17), (130, 1), (256, 8)):
        for levels in (3, 40, 10**6):  # few: the bound lets more pass than a vector or the array of a rank holds
            for dtype in (torch.float32, torch.bfloat16):
                logits = torch.randint(-levels, levels, (11, E), generator=generator).to(dtype) / levels
                logits[4, E // 2] = math.nan
                got, expected = (tk.router_topk(logits, k, backend=name) for name in ("cpu", "reference"))
                assert torch.equal(got[1], expected[1])
                torch.testing.assert_close(got[0], expected[0], equal_nan=True)


@pytest.mark.parametrize("case", [case for case in OP.cases if not case.benchmark], ids=lambda case: case.name)
def test_opcheck(case, monkeypatch):
    if "not_finite" in case.name:
        pytest.skip("opcheck compares without equal_nan")
    call = case.call()
    recorded = []
    from trace_kernels.ops.router_topk import op

    original = op._router_topk
    monkeypatch.setattr(light_op, "bypasses", lambda *tensors: False)
    monkeypatch.setattr(op, "_router_topk", lambda *args: recorded.append(args) or original(*args))
    logits = call.args[0].detach().requires_grad_() if call.differentiable else call.args[0]
    tk.router_topk(logits, call.args[1], **call.kwargs)
    torch.library.opcheck(original, recorded[0])


@pytest.mark.parametrize(
    "options", [{}, {"renormalize": False}, {"masked_group_value": float("-inf"), "num_groups": 2}]
)
def test_compiles_with_the_default_backend(options):
    torch._dynamo.reset()
    logits = torch.randn(6, 16, requires_grad=True)

    def step(z, counts, score):
        weights, indices = tk.router_topk(z * 2, 4, counts=counts, table=torch.ones(16), token_score=score, **options)
        return weights * 3, indices

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        counts, score = torch.zeros(16, dtype=torch.int64), torch.zeros(6)
        weights, indices = function(logits, counts, score)
        (gradient,) = torch.autograd.grad(weights.square().sum(), logits)
        results.append((weights.detach(), indices, gradient, counts, score))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compiles_with_dynamic_sizes():
    torch._dynamo.reset()
    function = torch.compile(tk.router_topk, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (6, 11, 3):
        logits = torch.randn(T, 16)
        assert torch.equal(function(logits, 4)[1], tk.router_topk(logits, 4)[1])


Z = torch.zeros(5, 8)
WRONG = [torch.tensor([[0, 1]] * 3 + [[0, expert]] + [[2, 3]]) for expert in (8, -1, 0)]
BAD = [
    ({"logits": [[1.0]]}, TypeError, "logits: got list, allowed is a torch.Tensor"),
    ({"logits": Z.long()}, TypeError, "logits: got dtype int64, allowed: float16, bfloat16, float32, float64"),
    ({"logits": Z[0]}, ValueError, r"logits: got shape \[8\], allowed is \[T, E\]"),
    ({"k": 0}, ValueError, r"k: got 0, allowed is 1 to 8 \(E, the number of experts\)"),
    ({"k": 9}, ValueError, "k: got 9, allowed is 1 to 8"),
    ({"k": 2.0}, TypeError, "k: got float, allowed is an int"),
    ({"k": True}, TypeError, "k: got bool"),
    ({"score_function": "relu"}, ValueError, "score_function: got 'relu', allowed: 'softmax', 'sigmoid'"),
    ({"scale": float("nan")}, ValueError, "scale: got nan, allowed is a finite number"),
    ({"scale": "2"}, TypeError, "scale: got str, allowed is a number"),
    ({"eps": -1e-9}, ValueError, "eps: got -1e-09, allowed is a finite number, 0 or larger"),
    ({"selection_bias": torch.zeros(7)}, ValueError, r"selection_bias: got shape \[7\], allowed is \[E\] = \[8\]"),
    ({"selection_bias": torch.zeros(8).long()}, TypeError, "selection_bias: got dtype int64"),
    ({"selection_bias": torch.zeros(8, device="meta")}, ValueError, "selection_bias: is on meta, allowed is cpu"),
    ({"num_groups": 3}, ValueError, "num_groups: got 3, allowed is a divisor of the 8 experts"),
    ({"num_groups": 0}, ValueError, "num_groups: got 0, allowed is 1 to 8"),
    ({"num_groups": 8, "group_score": "sum_top2"}, ValueError, "num_groups: got 8, allowed for 'sum_top2'"),
    ({"num_groups": 2, "topk_groups": 3}, ValueError, r"topk_groups: got 3, allowed is 1 to 2 \(num_groups\)"),
    ({"group_score": "mean"}, ValueError, "group_score: got 'mean', allowed: 'max', 'sum_top2'"),
    ({"masked_group_value": -1.0}, ValueError, "masked_group_value: got -1.0, allowed: 0.0, -inf"),
    ({"token_mask": torch.ones(5)}, TypeError, "token_mask: got dtype float32, allowed: bool"),
    ({"token_mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"token_mask: got shape \[4\]"),
    ({"counts": torch.zeros(8)}, TypeError, "counts: got dtype float32, allowed: int64"),
    ({"counts": torch.zeros(9, dtype=torch.int64)}, ValueError, r"counts: got shape \[9\]"),
    ({"table": torch.zeros(8)}, ValueError, "token_score: got None"),
    ({"token_score": torch.zeros(5)}, ValueError, "table: got None"),
    ({"table": torch.zeros(8).double(), "token_score": torch.zeros(5)}, TypeError, "table: got dtype float64"),
    ({"table": torch.full((8,), math.nan), "token_score": torch.zeros(5)}, ValueError, "table: 8 of 8 entries are NaN"),
    ({"table": torch.zeros(8), "token_score": torch.zeros(6)}, ValueError, r"token_score: got shape \[6\]"),
    ({"num_groups": 2, "group_score": "sum_topk", "k": 5}, ValueError, "k: got 5 with topk_groups=1, allowed for 'sum"),
    ({"num_groups": 4, "topk_groups": 3, "group_score": "sum_topk"}, ValueError, "k: got 2 with topk_groups=3"),
    ({"indices": torch.zeros(5, 3).long()}, ValueError, r"indices: got shape \[5, 3\], allowed is \[T, k\] = \[5, 2\]"),
    ({"indices": torch.zeros(5, 2)}, TypeError, "indices: got dtype float32, allowed: uint8"),
    ({"indices": torch.zeros(5, 2, device="meta").long()}, ValueError, "indices: is on meta, allowed is cpu"),
    (
        {"indices": WRONG[0]},
        ValueError,
        "indices: got 8 in row 3, slot 1, allowed are different experts in",
    ),
    ({"indices": WRONG[1]}, ValueError, "indices: got -1 in row 3, slot 1"),
    ({"indices": WRONG[2]}, ValueError, "indices: got 0 in row 3, slot"),
    ({"indices": WRONG[0], "backend": "reference"}, ValueError, "indices: got 8 in row 3, slot 1"),
    ({"indices": WRONG[2], "backend": "reference"}, ValueError, "indices: got 0 in row 3, slot"),
    ({"weights_dtype": torch.int64}, ValueError, "weights_dtype: got torch.int64, allowed: torch.float16"),
    ({"backend": "fast"}, BackendError, "backend: got 'fast', allowed are 'auto'"),
    ({"backend": "cpu", "logits": Z.double()}, BackendError, "backend 'cpu' of router_topk refuses this call"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message.split(",")[0] for _, _, message in BAD])
def test_bad_input(change, error, message):
    arguments = {"logits": Z, "k": 2, **change}
    with pytest.raises(error, match=message):
        tk.router_topk(**arguments)


@pytest.mark.parametrize("backend", CPU)
def test_the_experts_given_change_nothing_else(backend):
    """An earlier forward's experts give its weights, counts and scores again; other logits, those of these experts."""
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(40, 24, generator=generator) for _ in range(2))
    options = {**FAMILIES["deepseek_v3"], "selection_bias": torch.randn(24, generator=generator), "backend": backend}

    def recorded(z, **more):
        counts, score = torch.zeros(24, dtype=torch.int64), torch.zeros(40)
        weights, indices = tk.router_topk(
            z, 5, counts=counts, table=torch.linspace(-1, 1, 24), token_score=score, **options, **more
        )
        return weights, indices, counts, score

    first = recorded(logits)
    for one, again in zip(first, recorded(logits, indices=first[1].to(torch.uint8)), strict=True):
        torch.testing.assert_close(again, one)
    weights, indices, counts, score = recorded(other, indices=first[1])
    assert torch.equal(indices, first[1])
    assert torch.equal(counts, first[2])
    torch.testing.assert_close(score, first[3])
    chosen = other.sigmoid().gather(1, indices)
    torch.testing.assert_close(weights, 2.5 * chosen / chosen.sum(1, keepdim=True))
    assert indices.data_ptr() != first[1].data_ptr()


def test_a_wrong_expert_gives_nan_where_values_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(validate, "check_values_on", lambda device: False)
    counts, score = torch.zeros(8, dtype=torch.int64), torch.zeros(5)
    for wrong in WRONG:
        weights, indices = tk.router_topk(
            Z, 2, indices=wrong, counts=counts.zero_(), table=torch.ones(8), token_score=score.zero_(),
            score_function="sigmoid", renormalize=False, backend="reference",
        )  # fmt: skip
        assert torch.equal(indices, wrong)
        assert weights[3].isnan().tolist() == [wrong[3, 1] == 0, True]
        assert not weights[[0, 1, 2, 4]].isnan().any()
        right = 2 - weights[3].isnan().sum().item()
        assert counts.sum() == 8 + right
        assert score.tolist() == [2, 2, 2, right, 2]


def test_sum_topk_is_megatrons_group_limited_choice():
    scores = torch.rand(50, 32, generator=torch.Generator().manual_seed(1))
    groups, topk_groups, k = 8, 3, 7
    group_scores = scores.view(50, groups, -1).topk(k // topk_groups, dim=-1)[0].sum(dim=-1)
    kept = torch.zeros_like(group_scores).scatter_(1, group_scores.topk(topk_groups, dim=-1)[1], 1)
    masked = scores.masked_fill(~kept.repeat_interleave(32 // groups, dim=1).bool(), float("-inf"))
    expected = masked.topk(k, dim=-1)[1]
    _, indices = tk.router_topk(
        torch.logit(scores.double()).float(), k, score_function="sigmoid", num_groups=groups, topk_groups=topk_groups,
        group_score="sum_topk", masked_group_value=float("-inf"),
    )  # fmt: skip
    assert torch.equal(indices.sort().values, expected.sort().values)


def test_bad_input_changes_nothing():
    counts, score = torch.zeros(8, dtype=torch.int64), torch.zeros(5)
    with pytest.raises(ValueError, match="table"):
        tk.router_topk(Z, 2, counts=counts, table=torch.full((8,), math.inf), token_score=score)
    assert not counts.any()
    assert not score.any()
