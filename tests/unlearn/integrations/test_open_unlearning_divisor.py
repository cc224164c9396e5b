"""What the retain loss of the trainers for open-unlearning divides by; needs no checkout of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

from trace_unlearn.integrations import fuse_loss
from trace_unlearn.integrations.open_unlearning import losses
from trace_unlearn.integrations.open_unlearning.documents import document_key, rows_of


@pytest.mark.parametrize("kind", ["NLL", "KL"])
@pytest.mark.parametrize("documents", [1, 2])
def test_the_retain_loss_divides_by_tokens_and_not_by_weights(kind, documents):
    """A batch of documents whose weights are all 2.5 has 2.5 times the loss, also where it holds one only."""
    model = tiny.model("qwen3_moe", 60)
    ids = torch.randint(3, 60, (documents, 9), generator=torch.Generator().manual_seed(0))
    trainer = losses._Retain.__new__(losses._Retain)
    trainer.model, trainer.retain_loss_type, trainer.pad_token_id = model, kind, 0
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    fuse_loss(model)
    if kind == "KL":
        trainer.ref_model = tiny.model("qwen3_moe", 60)
        for parameter in trainer.ref_model.parameters():
            parameter.data.mul_(1.2)
        fuse_loss(trainer.ref_model)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def loss(weight):
        trainer._weights = {document_key(*row, 0): torch.full((8,), weight) for row in rows_of(batch)}
        with torch.no_grad():
            return trainer.compute_retain_loss(model, batch).item()

    even, none = loss(1.0), loss(0.0)  # with KL the last position, which bears no loss, keeps the weight 1
    assert (none == 0) == (kind == "NLL")
    assert even > none
    for weight in (2.5, 0.5):
        assert loss(weight) - none == pytest.approx(weight * (even - none), rel=1e-4)
