"""Every objective against its published formula, written from logits in float64, values and gradients."""

import math

import pytest
import torch

from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.objectives import (
    OBJECTIVES,
    ForgetBatch,
    anchor,
    distance,
    steering_vector,
    weighted_mean,
)

F, S, V, H = 4, 5, 7, 6
COUNTED = {0: [0, 1, 3], 1: [], 2: [2], 3: [0, 1, 2, 3, 4]}  # document 1 bears no loss
N, D = 9, 3


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.zeros(F, S, dtype=torch.bool)
    for row, columns in COUNTED.items():
        mask[row, columns] = True
    return {
        "logits": (2 * normal(F, S, V)).requires_grad_(),
        "reference_logits": 2 * normal(F, S, V),
        "alternate_logits": (2 * normal(F, S, V)).requires_grad_(),
        "alternate_reference_logits": 2 * normal(F, S, V),
        "target": torch.randint(0, V, (F, S), generator=generator),
        "alternate_target": torch.randint(0, V, (F, S), generator=generator),
        "hidden": normal(F, S, H).requires_grad_(),
        "mask": mask,
    }


def log_probs(logits, target):
    return logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]


def batch_of(data, steering=2.0):
    mask = data["mask"]
    said = log_probs(data["logits"], data["target"])
    original = log_probs(data["reference_logits"], data["target"])
    kl = (data["reference_logits"].softmax(-1) * (data["reference_logits"].log_softmax(-1)
          - data["logits"].log_softmax(-1))).sum(-1)  # fmt: skip
    alternate = log_probs(data["alternate_logits"], data["alternate_target"])
    alternate_original = log_probs(data["alternate_reference_logits"], data["alternate_target"])
    return ForgetBatch(
        log_probs=said,
        mask=mask,
        reference=original.where(mask, 0.0).sum(-1),
        num_tokens=torch.tensor(N),
        num_documents=torch.tensor(D),
        alternate=alternate.sum(-1),  # all positions of an alternate document count here
        alternate_reference=alternate_original.sum(-1),
        divergence=kl,
        reference_log_probs=original,
        hidden=data["hidden"],
        steering=steering_vector(H, steering, 3).double(),
    )


def documents(data):
    for row, columns in COUNTED.items():
        if columns:
            yield row, columns


def token_terms(data, term):
    """The mean over counted tokens of term(z, y, z of the original model), from logits."""
    total = 0.0
    for row, columns in documents(data):
        for t in columns:
            z, y = data["logits"][row, t], int(data["target"][row, t])
            total = total + term(z, y, data["reference_logits"][row, t])
    return total / N


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def minus_nll(data, config):
    return token_terms(data, lambda z, y, r: z[y] - z.exp().sum().log())


def npo(data, config):
    total = 0.0
    for row, columns in documents(data):
        ratio = 1.0
        for t in columns:
            y = int(data["target"][row, t])
            ratio = ratio * data["logits"][row, t].softmax(-1)[y] / data["reference_logits"][row, t].softmax(-1)[y]
        total = total + 2 / config.beta * torch.log(1 + ratio**config.beta)  # eq. 3 of the paper
    return total / D


def simnpo(data, config):
    total = 0.0
    for row, columns in documents(data):
        nll = sum(-data["logits"][row, t].log_softmax(-1)[data["target"][row, t]] for t in columns)
        total = total - 2 / config.beta * torch.log(sigma(config.beta * (nll / len(columns) - config.delta)))
    return total / D


def dpo(data, config):
    total = 0.0
    for row, columns in documents(data):

        def gain(kind, columns, row=row):
            target = data[f"{kind}target"][row]
            return sum(
                data[f"{kind}logits"][row, t].softmax(-1)[target[t]].log()
                - data[f"{kind}reference_logits"][row, t].softmax(-1)[target[t]].log()
                for t in columns
            )

        margin = gain("alternate_", range(S)) - gain("", columns)
        total = total - 2 / config.beta * torch.log(sigma(config.beta * margin))
    return total / D


def wga(data, config):
    def term(z, y, r):
        p = z.softmax(-1)[y]
        return p.detach() ** config.beta * p.log()

    return token_terms(data, term)


def satimp(data, config):
    def term(z, y, r):
        p = z.softmax(-1)[y]
        return p.detach() ** config.beta * (1 - p.detach()) ** config.beta2 * p.log()

    return token_terms(data, term)


def ce_u(data, config):
    def term(z, y, r):
        q = z.detach().clone().index_fill(0, torch.tensor(y), -math.inf).softmax(-1)
        entropy = -torch.special.xlogy(q, q).sum()
        return -(q * z.log_softmax(-1)).sum() - entropy

    return token_terms(data, term)


def undial(data, config):
    def term(z, y, r):
        lowered = r.clone()
        lowered[y] -= config.beta
        q = lowered.softmax(-1)
        return -(q * z.log_softmax(-1)).sum() + (q * q.log()).sum()

    return token_terms(data, term)


def rmu(data, config):
    u = torch.rand(H, generator=torch.Generator().manual_seed(3)).double()
    total = 0.0
    for row, columns in documents(data):
        for t in columns:
            total = total + ((data["hidden"][row, t] - 2.0 * u / u.norm()) ** 2).mean()
    return total / N


CASES = [
    ("grad_diff", minus_nll, {}),
    ("grad_ascent", minus_nll, {}),
    ("npo", npo, {"beta": 0.3}),
    ("npo", npo, {}),
    ("simnpo", simnpo, {}),
    ("simnpo", simnpo, {"beta": 0.7, "delta": 1.5}),
    ("dpo", dpo, {"beta": 0.4}),
    ("wga", wga, {}),
    ("wga", wga, {"beta": 0.5}),
    ("satimp", satimp, {}),
    ("satimp", satimp, {"beta": 0.5, "beta2": 2.0}),
    ("ce_u", ce_u, {}),
    ("undial", undial, {}),
    ("undial", undial, {"beta": 0.5}),
    ("rmu", rmu, {}),
]


@pytest.mark.parametrize("name, formula, knobs", CASES, ids=[f"{name}-{knobs}" for name, _, knobs in CASES])
def test_formula(name, formula, knobs, data):
    config = TraceConfig(objective=name, **knobs)
    leaves = [data[leaf] for leaf in ("logits", "alternate_logits", "hidden")]
    found, expected = config.method.forget_loss(batch_of(data), config.knobs), formula(data, config)
    # steering_vector and distance are float32.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if name == "rmu" else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    gradients = [torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (found, expected)]
    assert any(gradient is not None for gradient in gradients[1])
    for ours, theirs in zip(*gradients, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if ours is None else ours, zero if theirs is None else theirs, check_dtype=False, **tolerance
        )


def test_all_objectives_are_covered():
    assert {name for name, _, _ in CASES} == OBJECTIVES.keys() - {"finetune"}


def test_published_strengths():
    betas = {name: TraceConfig(objective=name).beta for name in OBJECTIVES}
    assert {name: beta for name, beta in betas.items() if beta != 1.0} == {
        "npo": 0.1,
        "simnpo": 4.5,
        "satimp": 5.0,
        "dpo": 0.1,
        "undial": 10.0,
    }


def test_anchor_and_distance():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    losses = anchor(probabilities, torch.tensor([False, True, False]))
    assert losses.tolist() == pytest.approx([0.25 + 0.5625 + 0.0625, 0.0])
    assert distance(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]])).tolist() == [2.0]
    assert weighted_mean(torch.tensor([[1.0, math.inf]]), torch.tensor([[2.0, 0.0]]), 2.0).item() == 1.0


@pytest.mark.parametrize("objective", ["ce_u", "satimp", "wga", "undial"])
def test_certain_and_impossible_tokens_stay_finite(objective):
    said = torch.tensor([[0.0, -1e-9, -80.0, -200.0]], requires_grad=True)
    mask, config = torch.ones(1, 4, dtype=torch.bool), TraceConfig(objective=objective)
    reference = said.detach().clone()
    batch = ForgetBatch(said, mask, None, torch.tensor(4), torch.tensor(1), divergence=torch.zeros(1, 4),
                        reference_log_probs=reference)  # fmt: skip
    loss = config.method.forget_loss(batch, config.knobs)
    loss.backward()
    assert loss.isfinite()
    assert said.grad.isfinite().all()
