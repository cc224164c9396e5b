"""Batches, and what the routers of a model themselves returned for them; independent of the recorder."""

import contextlib

import tiny
import torch

VOCAB = 80


def batch(B=3, S=7, pad="right", seed=0, labels=False):
    """A batch whose rows have S, S-1, ... tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (B, S), generator=generator)
    mask = torch.ones(B, S, dtype=torch.long)
    for row in range(B):
        mask[row, S - row :] = 0
    if pad == "left":
        mask = mask.flip(1)
    out = {"input_ids": input_ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if labels:
        out["labels"] = input_ids.clone()  # at padding too: the attention mask must rule it out
        out["labels"][:, :3] = -100
        out["labels"][0, 5] = -100
    return out


def counted(given):
    """Position by position, from the definition."""
    mask = given["attention_mask"].bool()
    if "labels" not in given:
        return mask
    out = torch.zeros_like(mask)
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1] - 1):
            out[b, t] = mask[b, t] and mask[b, t + 1] and given["labels"][b, t + 1] != -100
    return out


@contextlib.contextmanager
def router_outputs(model):
    """The indices that each router module returned, forward by forward, layer by layer; independent of the recorder."""
    seen, handles = [], []
    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            handles.append(module.register_forward_hook(lambda module, args, output: seen.append(output[2].clone())))
    assert handles
    yield seen
    for handle in handles:
        handle.remove()


def count(indices, mask, E=tiny.NUM_EXPERTS):
    """[L, E] from the routers' indices of one forward."""
    return torch.stack([torch.bincount(i[mask.flatten()].flatten(), minlength=E) for i in indices])
