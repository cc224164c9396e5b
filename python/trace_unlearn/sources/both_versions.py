"""Checkpoints that transformers 4 reads as transformers 5 wrote them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trace_unlearn import files


def write_for_both_versions(folder: str | os.PathLike[str]) -> None:
    """Adds to a folder that `save_pretrained` wrote what transformers 4 (4.45 to 4.57) calls by another name.

    Call it after model and tokenizer were saved, wherever a checkpoint is written for others. Transformers 4 takes its
    defaults, without a word, for what it does not find: a rotary base of 10000 for 500000, 128 experts for 8. What is
    there stays, transformers 5 reads the same as before, and a second call changes nothing.

    - config.json: `rope_theta`, `rope_scaling` and `partial_rotary_factor` beside `rope_parameters`; `torch_dtype`
      beside `dtype`; `num_experts` beside Qwen's `num_local_experts`.
    - tokenizer_config.json: a class that both know, `chat_template` beside its file, and `additional_special_tokens`
      in place of a list of `extra_special_tokens`.
    """
    folder = Path(folder)
    _add(folder / "config.json", _config)
    _add(folder / "tokenizer_config.json", lambda found: _tokenizer(found, folder / "chat_template.jinja"))


def _add(path: Path, both: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if path.is_file():
        found = files.read_json(path)
        if (changed := both(found)) != found:
            files.write_json(path, changed)


def _config(found: dict[str, Any]) -> dict[str, Any]:
    # Of models with several parts, such as text and images, each has its own.
    parts = {name: _config(part) for name, part in found.items() if name.endswith("_config") and isinstance(part, dict)}
    family = str(found.get("model_type"))
    added: dict[str, Any] = {}
    if "dtype" in found:
        added["torch_dtype"] = found["dtype"]
    if found.get("rope_parameters"):
        added |= _rotary(found["rope_parameters"])
        if family.startswith("gpt_neox"):
            older = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
            added = {older.get(name, name): value for name, value in added.items()}
    if family.startswith("qwen") and "num_local_experts" in found:
        added["num_experts"] = found["num_local_experts"]
    return {**added, **found, **parts}


def _rotary(parameters: dict[str, Any]) -> dict[str, Any]:
    """The same in the words of transformers 4; of layers of two kinds, the sliding ones have a base of their own."""
    if "full_attention" in parameters:
        sliding = parameters.get("sliding_attention") or {}
        local = {"rope_local_base_freq": sliding["rope_theta"]} if "rope_theta" in sliding else {}
        return _rotary(parameters["full_attention"]) | local
    if any(isinstance(value, dict) for value in parameters.values()):
        return {}  # such kinds of layers are unknown there
    own = ("rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in parameters.items() if name not in own}
    plain = scaling.get("rope_type", "default") == "default" and scaling.keys() <= {"rope_type"}
    return {name: parameters[name] for name in own if name in parameters} | {"rope_scaling": None if plain else scaling}


def _tokenizer(found: dict[str, Any], template: Path) -> dict[str, Any]:
    changed = dict(found)
    if found.get("tokenizer_class") == "TokenizersBackend":  # as transformers 5 names it, which reads either
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    if template.is_file():
        changed.setdefault("chat_template", template.read_text(encoding="utf-8"))
    return changed
