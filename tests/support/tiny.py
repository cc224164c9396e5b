"""Tiny random checkpoints and tokenizers, made on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

FUNCTION_WORDS = [
    "the",
    "capital",
    "color",
    "owner",
    "of",
    "is",
    "a",
    "who",
    "what",
    "where",
    ".",
    "?",
    "Question:",
    "Answer:",
]
WORDS = [f"w{i}" for i in range(50)] + FUNCTION_WORDS
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
NUM_EXPERTS = 8
TOP_K = 2

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MULTI_HEAD_LATENT = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,  # layer 0 is dense: MoE layer i is decoder layer i + 1
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
SOFTMAX = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}
CONFIGS = {
    "mixtral": (MixtralConfig, {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}),
    "qwen2_moe": (Qwen2MoeConfig, {**SOFTMAX, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": (Qwen3MoeConfig, {**SOFTMAX, "moe_intermediate_size": 16, "head_dim": 8}),
    "olmoe": (OlmoeConfig, {**SOFTMAX, "intermediate_size": 16}),
    "deepseek_v2": (
        DeepseekV2Config,
        {**MULTI_HEAD_LATENT, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    ),
    "deepseek_v3": (DeepseekV3Config, {**MULTI_HEAD_LATENT, "n_group": 2, "topk_group": 1, "q_lora_rank": 16}),
}
FAMILIES = tuple(CONFIGS)


def config(family: str, vocab_size: int, **changes: object) -> PreTrainedConfig:
    """The configuration of a tiny MoE of one of FAMILIES, or of a dense model ("llama")."""
    kind, own = (LlamaConfig, {}) if family == "llama" else CONFIGS[family]
    return kind(**{**COMMON, **own, "vocab_size": vocab_size, **changes})


def model(family: str, vocab_size: int = 80, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random float32 model in eval mode, its matrices scaled up so that routing and logits vary between tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = AutoModelForCausalLM.from_config(config(family, vocab_size, **changes))
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(4.0)
                if name.endswith("gate.weight"):
                    parameter.mul_(4.0)
            for name, buffer in built.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(std=0.05)
    return built.eval()


def tokenizer(
    words: list[str] | None = None, chat_template: str | None = None, **special: str | None
) -> PreTrainedTokenizerFast:
    """One token a word, split at white space; begins with the BOS token. A special token of None is absent."""
    tokens = {name: token for name, token in {**SPECIAL, **special}.items() if token is not None}
    vocabulary = {word: i for i, word in enumerate([*dict.fromkeys(tokens.values()), *(words or WORDS)])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens["unk_token"]))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _begin_with_bos(raw, vocabulary, tokens)
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=chat_template, **tokens)


def byte_tokenizer(corpus: list[str], vocab_size: int = 300, **special: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `corpus`: merges as real ones do, and any text survives a round trip."""
    tokens = {name: token for name, token in {**SPECIAL, **special}.items() if token is not None}
    tokens.pop("unk_token", None)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys(tokens.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    _begin_with_bos(raw, raw.get_vocab(), tokens)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **tokens)


def save_checkpoint(folder: Path, family: str, *, seed: int = 0, **changes: object) -> Path:
    """A checkpoint folder with model and word-level tokenizer, as save_pretrained writes it."""
    words = tokenizer()
    model(family, len(words), seed, **changes).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _begin_with_bos(raw: Tokenizer, vocabulary: dict[str, int], tokens: dict[str, str]) -> None:
    if "bos_token" in tokens:
        bos = tokens["bos_token"]
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
        )
