"""Data that the tests of evaluation measure models on, and the plain computation of its loss."""

import json

import tiny
import torch

from trace_unlearn.sources.data import load_tokens

WORDS = tiny.tokenizer()
TEXTS = ["w1 w2 w3 w4 w5", "the capital of w6 is w7 .", "w8", "w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20"]
QUESTIONS = [
    {"question": "what is the capital of w1 ?", "answer": "w2"},
    {"question": "who is the owner of w3 ?", "answer": "w4 w5 w6"},
    {"prompt": "w7", "completion": " w8 w9"},
]


def dataset(folder, records, name="data.json", **options):
    (folder / name).write_text(json.dumps(records))
    return load_tokens(folder / name, WORDS, progress=False, **options)


def plain_nll(model, data):
    """One row at a time, float64, from the model's own logits."""
    total, count = 0.0, 0
    for row in data:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for t, label in enumerate(row["labels"][1:]):
            if label != -100:
                total -= logits[t, label].item()
                count += 1
    return total / count, count
