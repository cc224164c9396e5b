import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.objectives import OBJECTIVES, ForgetBatch, grad_diff, npo, weighted_nll


def forget_batch(rows=6, columns=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(rows, columns, generator=generator) * 4
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    mask[1] = False  # a document without a loss-bearing token
    reference = (-torch.rand(rows, generator=generator) * 8) * mask.any(-1)
    return ForgetBatch(
        log_probs,
        mask,
        reference,
        mask.sum(),
        mask.any(-1).sum(),
        alternate=-torch.rand(rows, generator=generator) * 8,
        alternate_reference=-torch.rand(rows, generator=generator) * 8,
        divergence=torch.rand(rows, columns, generator=generator),
        reference_log_probs=-torch.rand(rows, columns, generator=generator) * 4,
        hidden=torch.randn(rows, columns, 3, generator=generator),
        steering=torch.ones(3),
    )


def rows_of(batch, rows):
    whole = ("num_tokens", "num_documents", "steering")
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return ForgetBatch(**{name: value if name in whole else value[rows] for name, value in fields.items()})


FORGETTING = [name for name, objective in OBJECTIVES.items() if objective.forget_loss is not None]
ON_LOG_PROBS = [name for name in FORGETTING if not OBJECTIVES[name].on_hidden_states]


def test_grad_diff_is_minus_the_mean_nll():
    batch = forget_batch()
    nll = [-p for row, keep in zip(batch.log_probs.tolist(), batch.mask.tolist(), strict=True)
           for p, k in zip(row, keep, strict=True) if k]  # fmt: skip
    assert grad_diff(batch.log_probs, batch.mask, batch.num_tokens).item() == pytest.approx(-sum(nll) / len(nll))


def test_npo_is_its_formula():
    batch, beta = forget_batch(), 0.3
    losses = []
    for row, keep, reference in zip(batch.log_probs, batch.mask, batch.reference, strict=True):
        if keep.any():
            margin = row[keep].sum().item() - reference.item()
            losses.append(-2 / beta * math.log(1 / (1 + math.exp(beta * margin))))
    found = npo(batch.log_probs, batch.mask, batch.reference, batch.num_documents, beta)
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("objective", ON_LOG_PROBS)
def test_descent_lowers_forget_log_probs(objective):
    batch = forget_batch()
    log_probs = batch.log_probs.requires_grad_()
    OBJECTIVES[objective].forget_loss(batch, TraceConfig(objective=objective).knobs).backward()
    assert (log_probs.grad[batch.mask] > 0).all()
    assert (log_probs.grad[~batch.mask] == 0).all()


def test_npo_at_the_original_model_is_ascent_and_fades():
    mask = torch.ones(1, 3, dtype=torch.bool)
    for drop, expected in ((0.0, 1.0), (50.0, 2 / (1 + math.exp(0.1 * 50)))):
        log_probs = torch.full((1, 3), -1.0 - drop / 3, requires_grad=True)
        npo(log_probs, mask, torch.tensor([-3.0]), 1, beta=0.1).backward()
        assert log_probs.grad[0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_retain_loss_is_the_weighted_sum_over_the_tokens():
    log_probs, weight = torch.tensor([[-1.0, -2.0, -5.0]]), torch.tensor([[2.0, 0.5, 0.0]])
    assert weighted_nll(log_probs, weight, 3).item() == pytest.approx((2 + 1) / 3)


@given(cut=st.integers(0, 6), seed=st.integers(0, 20))
@pytest.mark.parametrize("objective", FORGETTING)
def test_shares_of_micro_batches_add_up(objective, cut, seed):
    batch = forget_batch(seed=seed)
    parts = [rows_of(batch, rows) for rows in (slice(0, cut), slice(cut, None))]
    loss, config = OBJECTIVES[objective].forget_loss, TraceConfig(objective=objective)
    torch.testing.assert_close(sum(loss(part, config) for part in parts), loss(batch, config))


@pytest.mark.parametrize("objective", ON_LOG_PROBS)
def test_nothing_to_count_is_zero_without_nan(objective):
    log_probs, mask = torch.full((6, 5), -float("inf")).requires_grad_(), torch.zeros(6, 5, dtype=torch.bool)
    zero = torch.tensor(0)
    batch = dataclasses.replace(forget_batch(), log_probs=log_probs, mask=mask, num_tokens=zero, num_documents=zero)
    for loss in (
        OBJECTIVES[objective].forget_loss(batch, TraceConfig(objective=objective).knobs),
        weighted_nll(log_probs, mask.float(), torch.tensor(0.0)),
    ):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert (gradient == 0).all()
