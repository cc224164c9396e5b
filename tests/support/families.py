"""Tiny models of every MoE family that the installed transformers has, found by reading its source."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 80
NUM_EXPERTS = 8
TOP_K = 2

#: What makes a modeling file one of a MoE family: a module with routed experts, or one that chooses among them.
_MOE_CLASS = re.compile(r"(Experts|CDMoE|MoeMLP|MoE|Router|TopKGating|TopKGate|MoEGate)$")
_ROUTER_CLASS = re.compile(r"(Router|TopKGating|MoEV1Gate)$")

#: Files with such classes that are no text model. A new family must be run or be listed here.
NOT_TEXT = {
    "granite_docling": "a router of image densities",
    "vitpose_backbone": "vision; the data set chooses the expert",
}

#: What a release of transformers cannot run at all.
BROKEN = {("5.17", "doge"): "its MoE layer returns a tuple, which the block hands to dropout"}

#: Which class to build where the rule of `_model_class` does not find the only or best one.
_CLASSES = {
    "diffusion_gemma": ("DiffusionGemmaEncoderTextModel",),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerTextModel", "Qwen3OmniMoeTalkerModel"),
}


@dataclass(frozen=True)
class Family:
    """One model class to build: `module` is its transformers.models folder."""

    module: str
    model_class: str

    def __str__(self) -> str:
        return self.model_class


def _models_folder() -> Path:
    found = importlib.util.find_spec("transformers")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "models"


def classes_in(module: str) -> list[str]:
    source = (_models_folder() / module / f"modeling_{module}.py").read_text()
    return re.findall(r"^class (\w+)\(", source, re.MULTILINE)


def moe_modules() -> list[str]:
    paths = sorted(_models_folder().glob("*/modeling_*.py"))
    modules = [path.parent.name for path in paths if path.stem == f"modeling_{path.parent.name}"]
    return [module for module in modules if any(_MOE_CLASS.search(name) for name in classes_in(module))]


def _model_classes(module: str) -> tuple[str, ...]:
    if module in _CLASSES:
        return _CLASSES[module]
    names = classes_in(module)
    for ending in ("ForCausalLM", "TextModel", "ForConditionalGeneration", "Model"):
        fitting = [name for name in names if name.endswith(ending) and "PreTrained" not in name]
        if fitting:
            return (fitting[0],)
    raise AssertionError(f"{module}: no model class among {names}")


def families() -> list[Family]:
    release = ".".join(transformers.__version__.split(".")[:2])
    left_out = [*NOT_TEXT, *(module for version, module in BROKEN if version == release)]
    return [
        Family(module, name) for module in moe_modules() if module not in left_out for name in _model_classes(module)
    ]


#: Sizes by the names that configurations give them. Only names that the default configuration has are set.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "dense_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_groups": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "moe_hidden_size": 32,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "n_groups": 2,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 16,
    "tie_word_embeddings": False,
}
_LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has no groups
_GEMMA = {"per_layer_config": {}, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_MIXED = ["dense", "sparse", "sparse"]
#: By model class or module.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "beam": {"mlp_layer_types": _MIXED},
    "dbrx": {
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": NUM_EXPERTS, "moe_top_k": TOP_K, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_ocr2": {**_LATENT, "mlp_layer_types": _MIXED, "num_experts_per_tok": TOP_K},
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "doge": {"is_moe": True, "num_experts": 16},
    "diffusion_gemma": {**_GEMMA, "enable_moe_block": True},
    "dots3_note": {**_LATENT, "head_dim": 16, "mlp_layer_types": _MIXED, "per_layer_config": {}},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 16],
        "mlp_layer_types": _MIXED,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {**_GEMMA, "enable_moe_block": True, "vocab_size_per_layer_input": VOCAB},
    "glm4_moe_lite": _LATENT,
    "glm4v_moe": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "rope_type": "default",
            "mrope_section": [1, 1, 0],
        }
    },
    "glm5_next": {
        **_LATENT,
        "mlp_layer_types": _MIXED,
        "layer_types": slice(1, 4),  # of the default
        "indexer_types": ["full"] * 3,
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "glm_moe_dsa": _LATENT,
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_d_head": 16,
        "shared_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {**_LATENT, "zero_expert_num": 4},
    "mistral4": {**_LATENT, "head_dim": 16},
    "mistral_large4": _LATENT,
    "step3p7": {"mlp_layer_types": _MIXED},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "Qwen3OmniMoeTalkerModel": {"shared_expert_intermediate_size": 16},
    "switch_transformers": {
        "decoder_start_token_id": 0,
        "d_kv": 8,
        "d_ff": 16,
        "num_heads": 4,
        "num_decoder_layers": 2,
        "num_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 3,
    },
    "nllb_moe": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
}


def config(family: Family) -> PreTrainedConfig:
    kind = _load(family).config_class
    default = kind()
    known = {*vars(default), *getattr(kind, "attribute_map", {})}
    values = {name: value for name, value in SIZES.items() if name in known}
    own = OVERRIDES.get(family.model_class, OVERRIDES.get(family.module, {}))
    for name, value in vars(default).items():
        # Lists with one entry per layer are left to the configuration to derive.
        if isinstance(value, list) and len(value) == getattr(default, "num_hidden_layers", None):
            values[name] = None
    own = {name: getattr(default, name)[value] if isinstance(value, slice) else value for name, value in own.items()}
    return kind(**{**values, **own})


def build(family: Family, seed: int = 0) -> PreTrainedModel:
    """In eval mode, float32, with random weights that route different tokens to different experts."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = _load(family)(config(family)).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3:  # experts; not every family initialises its own
                parameter.data.normal_(std=0.1)
            elif parameter.dim() >= 2:
                parameter.data.mul_(4.0)
            elif name.endswith("bias"):
                parameter.data.normal_(std=0.05)
        for module in model.modules():
            if _ROUTER_CLASS.search(type(module).__name__):
                for parameter in module.parameters():
                    torch.nn.init.normal_(parameter, std=0.4)
            for name, buffer in module.named_buffers(recurse=False):
                if "bias" in name:
                    buffer.normal_(std=0.05)
                    if name == "balancing_biases":  # its last entry lets tokens skip the layer
                        buffer[-1] = 0.1
                elif name == "tid2eid":  # experts by the token's number
                    buffer.copy_(torch.rand(buffer.shape[0], NUM_EXPERTS).topk(buffer.shape[1]).indices)
    return model


def _load(family: Family) -> Any:
    module = importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    return getattr(module, family.model_class)


def inputs(family: Family, model: PreTrainedModel, pad: str = "right", B: int = 3, S: int = 7) -> dict[str, Any]:
    """A batch whose rows have S, S - 1, ... tokens, without labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (B, S), generator=generator)
    mask = (torch.arange(S) < S - torch.arange(B)[:, None]).long()
    if pad == "left":
        mask = mask.flip(1)
    given: dict[str, Any] = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        given["use_cache"] = False
    if family.model_class == "Qwen3OmniMoeTalkerModel":  # it embeds nothing itself
        given["inputs_embeds"] = model.codec_embedding(given.pop("input_ids"))
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, VOCAB, (B, S - 2), generator=generator)
        given["decoder_attention_mask"] = mask[:, :-2] if pad == "right" else mask[:, 2:]
    if family.module == "ernie4_5_vl_moe":
        given["moe_mm_token_type_ids"] = (torch.rand(B, S, generator=generator) < 0.4).long()
    return given
