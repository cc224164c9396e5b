"""A Trainer whose checkpoints are whole or do not count, and which can resume models with stacked experts."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from trace_unlearn.errors import UserError
from trace_unlearn.files import read_json, write_json
from trace_unlearn.sources.folder import copy_rest, shard_size
from trace_unlearn.sources.model import has_tokenizer
from trace_unlearn.training import checkpoints

GENERATION = "generation_config.json"


class WholeCheckpoints(Trainer):
    """What differs from transformers' Trainer in saving and resuming; `TraceTrainer` documents it for users."""

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, **options: Any) -> None:
        self._run_folder, self._checkpoint_limit = Path(str(args.output_dir)), args.save_total_limit
        self._use_cache = getattr(model.config, "use_cache", True)  # which Trainer turns off
        super().__init__(model, args, **options)

    def checkpoint_folder(self, step: int | None) -> Path:
        return self._run_folder / f"checkpoint-{step}"

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        if resume_from_checkpoint is True:
            with self.args.main_process_first(desc="looking for checkpoints"):
                found = checkpoints.last_complete(self._run_folder, remove_partial=self.args.should_save)
            resume_from_checkpoint = None if found is None else str(found)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer's own removal leaves halves
        self._checkpoint_limit = limit
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.args.save_total_limit = limit

    def gathered_state(self) -> dict[str, torch.Tensor] | None:
        """The weights of a sharded model, on the main process; None for any other model. All processes call it."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return None
        tied = self._tied()
        gathered = self.accelerator.get_state_dict(self.model_wrapped)
        return {name: value for name, value in (gathered or {}).items() if name not in tied}

    def save_whole(
        self,
        folder: Path,
        state: dict[str, torch.Tensor] | None,
        source: Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes model and tokenizer. Adapters are merged, unless the weights come as a gathered `state`.

        `source`, the folder that the model came from, gives the tokenizer and all other files, and how large the files
        of the weights are; `dtype` what the weights are converted to, in place.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "merge_and_unload") and state is None:
            model = model.merge_and_unload()
        model.config.use_cache = self._use_cache
        if dtype is not None:
            state = _converted(model, state, dtype)
        size = None if source is None else shard_size(source)
        with _plain_generation(model) if source is not None else contextlib.nullcontext():
            model.save_pretrained(folder, state_dict=state, **({} if size is None else {"max_shard_size": size}))
        if source is not None:
            (folder / GENERATION).unlink(missing_ok=True)
            copy_rest(source, folder)
        if dtype is not None and (config := folder / "config.json").exists():  # adapters as they are have none
            _name_dtype(config, dtype)
        if self.processing_class is not None and (source is None or not has_tokenizer(source)):
            self.processing_class.save_pretrained(folder)

    def check_finite(self) -> None:
        """UserError, on all processes, where training has diverged."""
        model: Any = self.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Of a sharded one the part that is here.
        local = [getattr(p, "ds_tensor", getattr(p, "_local_tensor", p)) for p in trained]
        broken = sum(not bool(torch.isfinite(tensor.detach()).all()) for tensor in local)
        everywhere = self.accelerator.reduce(torch.tensor(float(broken), device=self.accelerator.device), "sum")
        if everywhere.item():
            raise UserError(
                f"training: weights are not finite after step {self.state.global_step}; lower the learning rate or "
                "gamma, or clip the gradient (max_grad_norm)"
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = self.checkpoint_folder(self.state.global_step)
        if self.args.should_save:
            checkpoints.remove(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.mark_complete(folder)
            checkpoints.rotate(folder.parent, self._checkpoint_limit, keep=self.state.best_model_checkpoint)

    def _tied(self) -> Any:
        return getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", None) or {}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # save_pretrained splits stacked experts up by default, and Trainer, which reads a checkpoint back by the names
        # in memory, would miss them with a mere warning.
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel):
            super()._save(output_dir, state_dict)
            return
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)  # type: ignore[method-assign]
        try:
            with _plain_generation(model):
                super()._save(output_dir, state_dict)
        finally:
            del model.__dict__["save_pretrained"]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = [name for name in load_result.missing_keys if name not in self._tied()]
        if missing or load_result.unexpected_keys:
            raise UserError(
                f"{self.args.output_dir}: the checkpoint is not one of this model: it lacks {len(missing)} parameters "
                f"{missing[:3]} and has {len(load_result.unexpected_keys)} others {load_result.unexpected_keys[:3]}"
            )


@contextlib.contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Saves no generation options: transformers refuses to save some that it loads, at the end of a run."""
    before = getattr(model, "generation_config", None)
    if before is not None:
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if before is not None:
            model.generation_config = before


def _converted(model: Any, state: dict[str, torch.Tensor] | None, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """Floating-point weights in `dtype`, of a model in place; but those that the family keeps in float32 stay so."""
    kept = {name for part in model.modules() for name in getattr(part, "_keep_in_fp32_modules_strict", None) or ()}
    if dtype == torch.float16:
        kept |= {name for part in model.modules() for name in getattr(part, "_keep_in_fp32_modules", None) or ()}
    exact = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in sorted(kept)) or r"$^")

    def wanted(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and not exact.search(name) else tensor

    if state is not None:
        return {name: wanted(name, tensor) for name, tensor in state.items()}
    stored = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored:
            tensor.data = wanted(name, tensor.data)
    return None


def _name_dtype(path: Path, dtype: torch.dtype) -> None:
    """Makes config.json say what the weights are; a sharded model says what it was trained in."""
    config = read_json(path)
    for name in ("dtype", "torch_dtype"):
        if name in config:
            config[name] = str(dtype).removeprefix("torch.")
    write_json(path, config)
