"""Pre-training of the demo's tiny Qwen3-MoE models: a real checkpoint folder that knows every fact of its corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trace_unlearn.demo.corpus import DOCUMENT_TOKENS, Corpus, Fact
from trace_unlearn.demo.workers import Progress
from trace_unlearn.files import staged_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PretrainOptions:
    """How a tiny model is built and trained."""

    hidden_size: int = 64
    layers: int = 3
    experts: int = 32
    experts_per_token: int = 4
    expert_width: int = 16
    balance_coefficient: float = 0.002  # of the routers' load-balancing loss
    initializer_range: float = 0.1  # the usual 0.02 is for wide models: at width 64 it learns half as fast
    steps: int = 700
    documents_per_step: int = 16
    learning_rate: float = 4e-3
    warmup_steps: int = 50

    @property
    def documents(self) -> int:
        return self.steps * self.documents_per_step


def new_model(options: PretrainOptions, vocabulary: int, seed: int) -> PreTrainedModel:
    """An untrained Qwen3-MoE model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim is not declared
        vocab_size=vocabulary,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size,
        moe_intermediate_size=options.expert_width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=options.experts,
        num_experts_per_tok=options.experts_per_token,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        initializer_range=options.initializer_range,
        router_aux_loss_coef=options.balance_coefficient,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # contexts of 42 tokens
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = Qwen3MoeForCausalLM(config)
    return model


def pretrain(
    corpus: Corpus, folder: Path, options: PretrainOptions | None = None, progress: Progress | None = None
) -> None:
    """Train a model on all of `corpus`; `folder` gets it, its tokenizer and what it knows (knowledge.json)."""
    options = options or PretrainOptions()
    tokenizer = corpus.tokenizer()
    texts = [f"{text} {tokenizer.eos_token}" for text in corpus.pretrain]
    documents = torch.tensor(tokenizer(texts)["input_ids"])  # [D, DOCUMENT_TOKENS]
    if documents.shape != (options.documents, DOCUMENT_TOKENS):
        raise ValueError(f"corpus: {tuple(documents.shape)} tokens, allowed: {(options.documents, DOCUMENT_TOKENS)}")
    model = new_model(options, len(corpus.vocabulary), corpus.seed)
    fit(model, documents, documents, options, progress)
    known = ask(model, tokenizer, corpus.facts)
    with staged_folder(folder) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        write_json(staged / "knowledge.json", known)


def fit(
    model: PreTrainedModel,
    documents: torch.Tensor,
    labels: torch.Tensor,
    options: PretrainOptions,
    progress: Progress | None = None,
) -> None:
    """One pass over `documents` [options.documents, S] in their order; a label of -100 bears no loss."""
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.warmup_steps, options.steps)
    batches = zip(documents.chunk(options.steps), labels.chunk(options.steps), strict=True)
    model.train()
    for step, (batch, wanted) in enumerate(batches, start=1):
        # With the router logits the model adds its load-balancing loss.
        model(input_ids=batch, labels=wanted, output_router_logits=True, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if progress is not None:
            progress(step, options.steps)


@torch.no_grad()
def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, groups: Mapping[str, Sequence[Fact]]
) -> dict[str, float]:
    """GROUP_accuracy, the share of a group's facts whose value is the model's first choice, and GROUP_nll in nats.

    All groups share one forward.
    """
    was_training = model.training
    model.train(False)
    facts = [f"{fact.prompt} {fact.answer}" for asked in groups.values() for fact in asked]
    ids = torch.tensor(tokenizer(facts)["input_ids"])  # [N, prompt + 1]
    logp = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -1].float().log_softmax(-1)  # [N, V]
    answers = ids[:, -1]
    model.train(was_training)
    right = (logp.argmax(-1) == answers).double()
    nll = -logp.gather(1, answers[:, None])[:, 0].double()
    found: dict[str, float] = {}
    begin = 0
    for name, asked in groups.items():
        rows = slice(begin, begin := begin + len(asked))
        found[f"{name}_accuracy"], found[f"{name}_nll"] = right[rows].mean().item(), nll[rows].mean().item()
    return found
