"""Laws of the loss ops: gradients, weights, and rows that do not count."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_losses import LOSSES, REDUCTIONS, TRANSFORMS, H, T, V, ce, inputs, kl, linear_ce

import trace_kernels as tk


@LOSSES
@REDUCTIONS
@TRANSFORMS
@pytest.mark.parametrize("weights", ["none", "known", "need_gradient"])
def test_gradcheck(loss, reduction, transform, weights):
    hidden, weight, target, token_weight = inputs()
    options = {"reduction": reduction, **transform}
    if weights == "need_gradient":
        arguments = (hidden, weight, token_weight.requires_grad_())
        assert torch.autograd.gradcheck(lambda h, w, tw: loss(h, w, target, tw, **options), arguments)
    else:
        token_weight = None if weights == "none" else token_weight
        assert torch.autograd.gradcheck(lambda h, w: loss(h, w, target, token_weight, **options), (hidden, weight))


@REDUCTIONS
@TRANSFORMS
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",), ("hidden", "weight")])
def test_gradcheck_with_bias(reduction, transform, frozen):
    hidden, weight, target, token_weight = inputs()
    hidden.requires_grad_("hidden" not in frozen)
    weight.requires_grad_("weight" not in frozen)
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)

    def loss(h, w, b):
        return tk.linear_cross_entropy(h, w, target, token_weight, bias=b, reduction=reduction, **transform)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@TRANSFORMS
def test_gradcheck_log_prob(transform):
    hidden, weight, target, _ = inputs()
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w, b: tk.linear_log_prob(h, w, target, bias=b, **transform), (hidden, weight, bias)
    )


def test_token_weight_gradient_is_the_tokens_loss():
    hidden, weight, target, token_weight = inputs()
    nll = tk.linear_cross_entropy(hidden, weight, target, reduction="none").detach()
    assert (nll[target == -100] == 0).all()
    for reduction in ("sum", "none"):
        tw = token_weight.clone().requires_grad_()
        tk.linear_cross_entropy(hidden, weight, target, tw, reduction=reduction).sum().backward()
        # Also where the weight is 0: the token's loss is known, so that the weight can move away from 0.
        torch.testing.assert_close(tw.grad, nll)
    tw = token_weight.clone().requires_grad_()
    mean = tk.linear_cross_entropy(hidden, weight, target, tw)
    mean.backward()
    counted = target != -100
    torch.testing.assert_close(tw.grad, counted * (nll - mean.detach()) / token_weight[counted].sum())
    tw.grad = None
    tk.linear_cross_entropy(hidden, weight, target, tw, normalizer=4).backward()
    torch.testing.assert_close(tw.grad, nll / 4)


@LOSSES
def test_zero_denominator_gives_zero(loss):
    hidden, weight, target, _ = inputs()
    one = torch.ones(T, dtype=torch.float64)
    cancel = one.clone()
    cancel[target != -100] = torch.tensor([1.0, -1.0, 2.0, 0.0, -2.0], dtype=torch.float64)
    ignored = torch.full_like(target, -100)
    for arguments, options in (
        ((ignored,), {}),
        ((ignored, one), {}),
        ((ignored, one.clone().requires_grad_()), {}),
        ((ignored,), {"normalizer": 3.0}),
        ((target, cancel), {}),
        ((target, cancel.clone().requires_grad_()), {}),
        ((target, one), {"normalizer": 0}),
        ((target, one), {"normalizer": torch.tensor(0)}),
        ((target, one * 0), {}),
    ):
        result = loss(hidden, weight, *arguments, **options)
        gradients = torch.autograd.grad(result, (hidden, weight))
        assert result.item() == 0
        assert all(not gradient.any() for gradient in gradients)


@LOSSES
@REDUCTIONS
def test_weight_zero_beats_infinity(loss, reduction):
    """A token of weight 0 contributes nothing whatever its row holds; the others are as if it were not there."""
    hidden, weight, target, token_weight = inputs()
    for poison in (math.nan, math.inf):
        for needs_gradient in (False, True):
            bad = hidden.detach().clone()
            bad[2] = poison
            bad.requires_grad_()
            tw = token_weight.clone().requires_grad_(needs_gradient)
            # cross_entropy's own gradient is asked for: the GEMM before it would multiply 0 by infinity.
            if loss is ce:
                wanted = F.linear(bad, weight).detach().requires_grad_()
                result = tk.cross_entropy(wanted, target, tw, reduction=reduction).sum()
                clean = ce(hidden, weight, target, token_weight, reduction=reduction).sum()
                gradients = torch.autograd.grad(result, wanted)
            else:
                result = loss(bad, weight, target, tw, reduction=reduction).sum()
                clean = loss(hidden, weight, target, token_weight, reduction=reduction).sum()
                gradients = torch.autograd.grad(result, (bad, weight))
                for got, expected in zip(gradients, torch.autograd.grad(clean, (hidden, weight)), strict=True):
                    torch.testing.assert_close(got, expected)
            torch.testing.assert_close(result, clean)
            assert all(torch.isfinite(gradient).all() for gradient in gradients)
            assert not gradients[0][2].any()


@LOSSES
def test_ignored_rows_may_hold_anything(loss):
    hidden, weight, target, token_weight = inputs()
    bad = hidden.detach().clone()
    bad[1] = math.nan
    token_weight = token_weight.clone()
    token_weight[1] = math.inf
    if loss is ce:
        logits = F.linear(bad, weight).detach().requires_grad_()
        result = tk.cross_entropy(logits, target, token_weight)
        assert torch.isfinite(torch.autograd.grad(result, logits)[0]).all()
    else:
        result = loss(bad.requires_grad_(), weight, target, token_weight)
        assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(result, (bad, weight)))
    torch.testing.assert_close(result, loss(hidden, weight, target, inputs()[3]))


@LOSSES
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_bad_values_stay_in_their_row(loss, poison):
    hidden, weight, target, _ = inputs()
    bad = hidden.detach().clone()
    bad[3, 0] = poison
    bad.requires_grad_()
    weight = weight.detach()
    clean = loss(hidden, weight, target, reduction="none")
    result = loss(bad, weight, target, reduction="none")
    others = torch.arange(T) != 3
    torch.testing.assert_close(result[others], clean[others], rtol=0, atol=0)
    assert not torch.isfinite(result[3])
    (gradient,) = torch.autograd.grad(result.sum(), bad)
    (expected,) = torch.autograd.grad(clean.sum(), hidden)
    torch.testing.assert_close(gradient[others], expected[others], rtol=0, atol=0)
    assert torch.isnan(gradient[3]).any()


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0], ids=["flat", "plain", "peaked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_log_prob_keeps_its_digits(spread, dtype):
    g = torch.Generator().manual_seed(1)
    hidden = (torch.randn(16, 128, generator=g) * spread).to(dtype)
    weight = (torch.randn(20011, 128, generator=g) / 128**0.5).to(dtype)
    target = torch.randint(20011, (16,), generator=g)
    target[::2] = (hidden.double() @ weight.double().T).argmax(-1)[::2]
    truth = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, target[:, None])[:, 0]
    logp = tk.linear_log_prob(hidden, weight, target)
    assert logp.dtype == torch.float32
    assert (logp.double() - truth).abs().max() <= 1e-4
    torch.testing.assert_close(tk.linear_cross_entropy(hidden, weight, target, reduction="none"), -logp)


@pytest.mark.parametrize("softcap", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_softcaps(softcap, dtype):
    """A cap far above all logits is none, one far below them makes all classes alike."""
    hidden, weight, target, _ = inputs(dtype)
    logits = F.linear(hidden, weight) if softcap > 1 else torch.zeros(T, V, dtype=dtype)
    expected = F.cross_entropy(logits, target)
    for result in (linear_ce(hidden, weight, target, softcap=softcap), ce(hidden, weight, target, softcap=softcap)):
        torch.testing.assert_close(result, expected)
    divergence = kl(hidden, weight, target, softcap=softcap)
    expected = kl(hidden, weight, target) if softcap > 1 else torch.zeros_like(divergence)
    torch.testing.assert_close(divergence, expected)


def test_kl_of_equal_models_is_zero_and_never_far_below():
    hidden, weight, target, _ = inputs(torch.bfloat16)
    hidden = hidden.detach().requires_grad_()
    result = tk.linear_kl(hidden, weight, hidden, weight, reduction="none")
    assert result.abs().max() < 1e-6
    assert torch.autograd.grad(result.sum(), hidden)[0].abs().max() < 1e-2
    assert kl(hidden, weight, target, reduction="none").min() >= 0


def test_reference_of_kl_gets_no_gradient():
    hidden, weight, _, _ = inputs()
    ref_hidden, ref_weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    tk.linear_kl(hidden * 2, weight, ref_hidden, ref_weight).backward()
    assert ref_hidden.grad is None
    assert ref_weight.grad is None
    assert hidden.grad.any()


def test_results_have_the_promised_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        hidden, weight, target, _ = inputs(dtype)
        bias = torch.zeros(V, dtype=dtype, requires_grad=True)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        for result in (
            tk.linear_log_prob(hidden, weight, target, bias=bias),
            tk.linear_cross_entropy(hidden, weight, target, bias=bias),
            tk.linear_cross_entropy(hidden, weight, target, bias=bias, reduction="none"),
            tk.cross_entropy(hidden, target % H),
            kl(hidden, weight, target),
        ):
            assert result.dtype == expected
        gradients = torch.autograd.grad(
            tk.linear_log_prob(hidden, weight, target, bias=bias).sum(), (hidden, weight, bias)
        )
        assert all(gradient.dtype == dtype for gradient in gradients)


def test_classes_that_are_ruled_out():
    """A logit of -inf is a class of probability 0: no NaN in the loss or in a gradient of any other class."""
    logits = torch.randn(3, V, dtype=torch.float64)
    logits[:, 4] = -math.inf
    target = torch.tensor([0, 1, 2])
    leaf = logits.clone().requires_grad_()
    loss = tk.cross_entropy(leaf, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    assert torch.isfinite(torch.autograd.grad(loss, leaf)[0]).all()
    # An identity head, so that the hidden states are the logits; finite, and 0 in float64 after exp.
    logits[:, 4] = -1e5
    eye, other = torch.eye(V, dtype=torch.float64), torch.randn(3, V, dtype=torch.float64)
    both = other.clone()
    both[:, 4] = -2e5
    without = [i for i in range(V) if i != 4]
    leaf = both.clone().requires_grad_()
    kl = tk.linear_kl(leaf, eye, logits, eye)
    small = torch.eye(V - 1, dtype=torch.float64)
    torch.testing.assert_close(kl, tk.linear_kl(both[:, without], small, logits[:, without], small))
    assert torch.isfinite(torch.autograd.grad(kl, leaf)[0]).all()
    # Infinite for both: only a bias or a mask in the head makes that, here one of the head's rows.
    head = eye.clone()
    head[4] = -math.inf
    positive = other.abs() + 1
    kl = tk.linear_kl(positive, head, positive + 0.5, head)
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [linear_ce, kl])
def test_upstream_infinity_of_a_dropped_row_stays_out(loss):
    hidden, weight, target, token_weight = inputs()
    upstream = torch.ones(T, dtype=torch.float64)
    upstream[2] = math.inf
    result = loss(hidden, weight, target, token_weight, reduction="none")
    gradients = torch.autograd.grad(result, (hidden, weight), upstream)
    upstream[2] = 1
    result = loss(hidden, weight, target, token_weight, reduction="none")
    torch.testing.assert_close(gradients, torch.autograd.grad(result, (hidden, weight), upstream))


def test_normalizer_is_a_constant():
    hidden, weight, target, token_weight = inputs()
    normalizer = torch.tensor(3.0, requires_grad=True)
    loss = tk.linear_cross_entropy(hidden, weight, target, token_weight.requires_grad_(), normalizer=normalizer)
    torch.testing.assert_close(loss * 3, tk.linear_cross_entropy(hidden, weight, target, token_weight, reduction="sum"))
    assert torch.autograd.grad(loss, normalizer, allow_unused=True) == (None,)


@pytest.mark.parametrize("number", [np.float32(3), np.float64(3), np.int64(3), np.uint8(3), Fraction(3)])
def test_normalizer_is_any_real_number(number):
    hidden, weight, target, _ = inputs()
    arguments = (hidden, weight, target)
    expected = tk.linear_cross_entropy(*arguments, normalizer=3.0)
    assert torch.equal(tk.linear_cross_entropy(*arguments, normalizer=number), expected)


@LOSSES
@REDUCTIONS
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_that_do_not_count_might_as_well_be_absent(loss, reduction, weighted):
    hidden, weight, target, token_weight = inputs()
    token_weight = token_weight if weighted else None
    counted = target != -100
    g = torch.Generator().manual_seed(5)
    ref_hidden, ref_weight = (torch.randn(n, 4, generator=g).to(hidden.dtype) for n in (T, V))
    result = loss(hidden, weight, target, token_weight, reduction=reduction)
    rest = (hidden[counted], weight, target[counted], None if token_weight is None else token_weight[counted])
    if loss is kl:
        alone = tk.linear_kl(rest[0], weight, ref_hidden[counted], ref_weight, rest[3], reduction=reduction)
    else:
        alone = loss(*rest, reduction=reduction)
    torch.testing.assert_close(result[counted] if reduction == "none" else result, alone)
    got = torch.autograd.grad(result.sum(), (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(alone.sum(), (hidden, weight)))
