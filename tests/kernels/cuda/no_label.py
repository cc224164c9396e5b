"""What backends make of a target that another process's slice of the vocabulary has."""

import torch

from trace_kernels.ops.linear_cross_entropy import reference
from trace_kernels.shared.linear import Call, Gradient
from trace_kernels.shared.losses import NO_LABEL


def no_label_problems(forward, backward, dtype, T=9, H=16, V=2100, device="cpu"):
    """What is wrong with a backend's functions on such targets, against the reference and by the definition."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((T, H), (V, H)))
    target = torch.randint(V, (T,), generator=generator)
    target[1], target[2], target[6:] = NO_LABEL, -100, NO_LABEL
    weights = torch.linspace(0.5, 2, T)
    hidden, weight, target, weights = (tensor.to(device) for tensor in (hidden, weight, target, weights))
    call = Call(hidden, weight, None, target, None, -100, None, 1.3)
    logp, lse, dhidden, *_ = forward(call, True, False)
    got = {"lse": lse, "dhidden": dhidden}
    expected = dict(zip(got, reference.forward(call, True, False)[1:3], strict=True))
    call = call._replace(target=target[:, None], row_weight=weights)
    gradient = Gradient(-torch.ones_like(lse), None, -torch.expm1(logp)[:, None])
    for results, function in ((got, backward), (expected, reference.backward)):
        results["dweight"] = function(call, expected["lse"], gradient, False, True)[1]
    problems = [] if torch.equal(logp == -torch.inf, target == NO_LABEL) else [f"logp is {logp.tolist()}"]
    for name, truth in expected.items():
        error = (got[name].double() - truth.double()).abs().max().item() / truth.abs().max().item()
        if not error <= (1e-5 if name == "lse" else 1.6e-2):
            problems.append(f"{name}: relative error {error:.3g}")
    # By the definition: the gradient of -logsumexp.
    leaf = hidden.double().requires_grad_()
    (-torch.logsumexp(1.3 * leaf @ weight.double().T, dim=1)).sum().backward()
    rows = target == NO_LABEL
    error = (dhidden[rows].double() - leaf.grad[rows]).abs().max().item() / leaf.grad.abs().max().item()
    return problems if error <= 1.6e-2 else [*problems, f"dhidden is not that of -logsumexp: {error:.3g}"]
