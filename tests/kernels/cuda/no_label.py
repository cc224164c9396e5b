"""What backends make of a target that another process's slice of the vocabulary has."""

import torch

from trace_kernels.ops.linear_cross_entropy import reference
from trace_kernels.shared.losses import NO_LABEL


def no_label_problems(forward, backward_weight, dtype, T=9, H=16, V=2100, device="cpu"):
    """What is wrong with a backend's functions on such targets, against the reference and by the definition."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((T, H), (V, H)))
    target = torch.randint(V, (T,), generator=generator)
    target[1], target[2], target[6:] = NO_LABEL, -100, NO_LABEL
    weights = torch.linspace(0.5, 2, T)
    hidden, weight, target, weights = (tensor.to(device) for tensor in (hidden, weight, target, weights))
    arguments = (hidden, weight, None, target, None, -100, None, 1.3, True, False)
    logp, lse, dhidden, *_ = forward(*arguments)
    got = {"lse": lse, "dhidden": dhidden}
    expected = dict(zip(got, reference.forward(*arguments)[1:3], strict=True))
    rows = (hidden, weight, None, target, expected["lse"], weights, -100, None, 1.3)
    got["dweight"], expected["dweight"] = backward_weight(*rows)[0], reference.backward_weight(*rows)[0]
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
