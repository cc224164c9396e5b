"""Loads checkpoints and their tokenizers; whatever is wrong with them becomes one clear message."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from trace_unlearn.errors import UserError
from trace_unlearn.files import read_json
from trace_unlearn.sources import hub

if TYPE_CHECKING:
    from transformers import (
        PreTrainedConfig,
    )  # which transformers 4 spells otherwise: the open-unlearning plugin runs there

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")


def check_inputs(name_or_path: str | os.PathLike[str], *, moe: bool = True, weights: bool = True) -> PreTrainedConfig:
    """Checks what can be known of a checkpoint without reading its weights.

    Args:
        name_or_path: a folder that save_pretrained wrote, or a name on the hub.
        moe: whether a dense model is refused.
        weights: whether the files of the weights must be there.

    Returns:
        The checkpoint's configuration.

    Raises:
        UserError: no such folder or name, no or damaged config.json, a missing weight file, a dense model.
    """
    name = os.fspath(name_or_path)
    folder = _local_folder(name)
    if folder is not None:
        _check_folder(folder, weights)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder or name), trust_remote_code=False)
    except Exception as error:  # a foreign file, a network
        raise UserError(_unloaded(name, folder, "its configuration", error)) from error
    if moe and not _has_experts(config.to_dict()):
        raise UserError(
            f"{name}: a dense model ({config.model_type}): its configuration names no experts; "
            "TRACE needs a Mixture-of-Experts model"
        )
    return config


def is_moe(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint's configuration names experts; its weights need not be there. Raises as `check_inputs`."""
    return _has_experts(check_inputs(name_or_path, moe=False, weights=False).to_dict())


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a batch goes: the device of the model's first layer.

    What accelerate offloads lies on no device between forwards; its hooks then take the batch from the CPU.
    """
    device = next(model.get_input_embeddings().parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Loads a causal language model in eval mode.

    Args:
        name_or_path: a folder that save_pretrained wrote, or a name on the hub.
        dtype: "auto" keeps the checkpoint's; else float32, bfloat16 or float16.
        device: where to put it; None takes the GPU when there is one.
        device_map: accelerate's placement over several devices ("auto"), in place of `device`.

    Raises:
        UserError: whatever keeps the model from being loaded whole: see `check_inputs`; weights that are missing from
            the files or have another shape than the configuration says; a device that is not there; too little memory.
    """
    name = os.fspath(name_or_path)
    if device is not None and device_map is not None:
        raise UserError("device and device_map: got both; give one of them")
    placed = {"device_map": device_map} if device_map is not None else {}
    target = None if placed else _device(device)
    kind = _dtype(dtype)
    check_inputs(name, moe=False)
    folder = _local_folder(name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder or name), dtype=kind, output_loading_info=True, trust_remote_code=False, **placed
        )
        model: PreTrainedModel = loaded[0]
        info: dict[str, Any] = loaded[1]
        if target is not None:
            model.to(target)  # type: ignore[arg-type]  # its stubs know modules only
    except torch.OutOfMemoryError as error:
        raise UserError(f"{name}: too little memory on {target or 'the devices'}: {_reason(error)}") from error
    except Exception as error:  # a foreign file, a network
        raise UserError(f"{name}: cannot load the model: {_reason(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{name}: its files lack {len(missing)} of the model's weights: {_some(missing)}")
    if info["unexpected_keys"]:
        logger.warning("%s: weights that the model does not have are ignored: %s", name, _some(info["unexpected_keys"]))
    model.train(False)
    return model


def check_placement(dtype: str | torch.dtype, device: str | torch.device | None) -> None:
    """UserError for a dtype or device that `load_model` would refuse."""
    _dtype(dtype)
    _device(device)


def load_tokenizer(
    name_or_path: str | os.PathLike[str], model: PreTrainedModel | PreTrainedConfig | None = None
) -> Tokenizer:
    """Loads a tokenizer and checks that it fits `model`.

    Without a padding token it gets its end-of-sequence token for one (or token 0): batches here are masked by lengths,
    so padding never needs an id of its own.

    Args:
        name_or_path: a folder that save_pretrained wrote, or a name on the hub.
        model: the model or its configuration; None skips the check.

    Raises:
        UserError: no such folder or name, no or damaged tokenizer files, or token ids that the model's embedding lacks.
    """
    name = os.fspath(name_or_path)
    folder = _local_folder(name)
    if folder is not None and not has_tokenizer(folder):
        raise UserError(f"{name}: no tokenizer there: none of {', '.join(TOKENIZER_FILES)} is in the folder")
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(folder or name), trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # a foreign file, a network
        raise UserError(_unloaded(name, folder, "the tokenizer", error)) from error
    if tokenizer.eos_token_id is None:
        logger.warning("%s: the tokenizer has no end-of-sequence token: answers have no end to learn", name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    rows = None if model is None else _embedding_rows(model)
    if rows is not None and largest >= rows:
        raise UserError(
            f"{name}: the tokenizer does not match the model: its token ids go up to {largest}, "
            f"and the embedding has {rows} rows (ids 0 to {rows - 1})"
        )
    if rows is not None and 2 * (largest + 1) < rows:
        logger.warning(
            "%s: the tokenizer has %d tokens and the embedding %d rows: is it the right tokenizer?",
            name,
            largest + 1,
            rows,
        )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def _local_folder(name: str) -> Path | None:
    """The folder that `name` means, None for a name to ask the hub for; UserError for what is neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name}: a file; a checkpoint is a folder that save_pretrained wrote")
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: no such folder")
    return hub.cached_model(name) if hub.away() else None


def _check_folder(folder: Path, weights: bool) -> None:
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = ": it holds an adapter; merge it into its base model and save that" if adapter else ""
        raise UserError(f"{folder}: no config.json there, so no checkpoint{hint}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: not a model's configuration (a JSON object is expected)")
    if not weights:
        return
    indexes = [*folder.glob("*.safetensors.index.json"), *folder.glob("pytorch_model*.bin.index.json")]
    shards = {shard for index in indexes for shard in _shards(index)}
    lacking = sorted(shard for shard in shards if not (folder / shard).is_file())
    if lacking:
        raise UserError(
            f"{folder}: the weights are incomplete: {len(lacking)} of {len(shards)} files are missing: {_some(lacking)}"
        )
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        raise UserError(f"{folder}: no weights there (*.safetensors or pytorch_model*.bin)")


def _shards(index: Path) -> set[str]:
    content = read_json(index)
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        raise UserError(f"{index}: not an index of weights (it has no weight_map)")
    return set(map(str, content["weight_map"].values()))


def _has_experts(config: Mapping[str, Any]) -> bool:
    """Whether any field, nested ones included, speaks of more than one expert."""
    for field, value in config.items():
        if isinstance(value, Mapping):
            if _has_experts(value):
                return True
        elif "expert" in str(field):  # some fields are maps with integer keys
            counts = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(count, int) and count > 1 for count in counts):
                return True
    return False


def _embedding_rows(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """The rows of the input embedding; from the configuration where the weights are sharded away."""
    if isinstance(model, PreTrainedModel):
        weight = getattr(model.get_input_embeddings(), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.shape[0]:
            return weight.shape[0]
        model = model.config
    rows = getattr(model.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype: got {name!r}; allowed are {', '.join(DTYPES)}")
    return name if name == "auto" else getattr(torch, name)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device: got {str(device)!r}; it is not there: {_reason(error)}") from error
    return chosen


def _unloaded(name: str, folder: Path | None, what: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"{name}: needs Python code of its own, which is not run here; allowed are the models of transformers"
    where = "" if folder is not None else "no such folder, and from the hub "
    return f"{name}: {where}cannot load {what}: {_reason(error)}"


def _reason(error: Exception) -> str:
    """The first sentence of a foreign error."""
    first = str(error).strip().partition("\n")[0]
    return first or type(error).__name__


def _some(names: Iterable[str], most: int = 4) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
