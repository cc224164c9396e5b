"""Random documents and their routing profile."""

import datasets
import torch

from trace_unlearn.routing.profile import profile_routing

VOCAB = 80


def documents(count, seed, longest=12, mask_every=3):
    """Random documents of 2 to `longest` tokens; in every third a prompt bears no loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        labels = [-100, *ids[1:]]
        if number % mask_every == 0:
            labels[: length // 2 + 1] = [-100] * (length // 2 + 1)
        rows.append({"input_ids": ids, "labels": labels, "prompt": "", "answer": ""})
    return datasets.Dataset.from_list(rows)


def run(model, forget, retain, **options):
    return profile_routing(model, forget, retain, pad_token_id=0, progress=False, **options)
