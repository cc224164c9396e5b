"""The interfaces of open-unlearning that its trainers stand on, so that ours are tested where no checkout is."""

from __future__ import annotations

import copy

import torch
from transformers import Trainer


class FinetuneTrainer(Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", trial=None):
        folder = self._get_output_dir(trial=trial)
        found = {}
        for evaluator in self.evaluators or ():
            found |= evaluator(model=self.model, tokenizer=self.tokenizer, folder=folder)
        self.log(found)
        return found


class UnlearnTrainer(FinetuneTrainer):
    pass


class GradAscent(UnlearnTrainer):
    def compute_loss(self, model, inputs, return_outputs=False):
        return -model(**inputs["forget"]).loss


class GradDiff(UnlearnTrainer):
    def __init__(self, gamma=1.0, alpha=1.0, retain_loss_type="NLL", *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma, self.alpha, self.retain_loss_type, self.ref_model = gamma, alpha, retain_loss_type, None
        if retain_loss_type == "KL":
            self.ref_model = self._prepare_ref_model(self.model)

    def _prepare_ref_model(self, model):
        return copy.deepcopy(model).eval()

    def compute_retain_loss(self, model, retain_inputs):
        return model(**retain_inputs).loss

    def compute_loss(self, model, inputs, return_outputs=False):
        forget = -model(**inputs["forget"]).loss
        return self.gamma * forget + self.alpha * self.compute_retain_loss(model, inputs["retain"])


class NPO(GradDiff):
    def __init__(self, beta=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta = beta
        if self.ref_model is None:
            self.ref_model = self._prepare_ref_model(self.model)


class RMU(GradDiff):
    pass


class ForgetRetain(torch.utils.data.Dataset):
    def __init__(self, forget, retain):
        self.forget, self.retain = forget, retain

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, index):
        drawn = torch.randint(0, len(self.retain), (1,)).item()
        return {"forget": self.forget[index], "retain": self.retain[drawn]}


class Collator:
    """Pads on one side; what equals the padding token is masked, wherever it stands."""

    def __init__(self, pad_token_id, side="right"):
        self.pad_token_id, self.side = pad_token_id, side

    def __call__(self, rows):
        if "input_ids" not in rows[0]:
            return {name: self([row[name] for row in rows]) for name in rows[0]}
        ids = self._padded([row["input_ids"] for row in rows], self.pad_token_id)
        batch = {"input_ids": ids, "attention_mask": ids != self.pad_token_id}
        if "labels" in rows[0]:
            batch["labels"] = self._padded([row["labels"] for row in rows], -100)
        return batch

    def _padded(self, rows, value):
        return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side=self.side)
