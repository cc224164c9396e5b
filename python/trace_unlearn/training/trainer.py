"""TraceTrainer: unlearning with a token-weighted retain loss, on transformers' Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from trace_unlearn.calibration.weights import Calibration
from trace_unlearn.errors import UserError
from trace_unlearn.files import PathLike, staged_folder, write_json, write_text
from trace_unlearn.sources.data import loss_bearing
from trace_unlearn.training.card import training_card
from trace_unlearn.training.checkpoints import is_complete
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.early_stop import EarlyStop
from trace_unlearn.training.experts import check_masks
from trace_unlearn.training.forward import Forward, ReferenceRows, Seen
from trace_unlearn.training.inputs import check_arguments, held_out, pad_token_id, used_sets, weighted, with_unit
from trace_unlearn.training.live_weights import LiveWeights
from trace_unlearn.training.log_window import LogWindow
from trace_unlearn.training.objectives import distance, weighted_mean, weighted_nll
from trace_unlearn.training.original import Original
from trace_unlearn.training.pairs import PairCollator, PairDataset, PositionSampler, split_batch
from trace_unlearn.training.saving import WholeCheckpoints

TRACE = "trace.json"  # in the finished folder: configuration, facts and log


@dataclasses.dataclass(frozen=True)
class StepTotals:
    """What the losses of one optimisation step divide by, summed over its micro-batches and all processes; 0-d each."""

    forget_tokens: torch.Tensor
    forget_documents: torch.Tensor
    retain_tokens: torch.Tensor

    def share(self, bearing: torch.Tensor, is_forget: torch.Tensor, is_retain: torch.Tensor) -> torch.Tensor:
        """How much of the step a micro-batch is: its share of the counted tokens. All of them add up to 1."""
        tokens = bearing[is_forget].sum() + bearing[is_retain].sum()
        return tokens / (self.forget_tokens + self.retain_tokens).clamp(min=1)


class TraceTrainer(WholeCheckpoints):
    r"""Makes a model forget one set of documents and keep another.

    .. math:: L = \gamma\, L_\text{forget} + \frac{\alpha}{N} \sum_t w_t\,\text{nll}_t

    A transformers Trainer: what is ordinary (optimiser, schedule, precision, clipping, logging, saving, distribution)
    is set in `args` as always. What differs:

    - Batch sizes count forget documents; each brings `config.retain_per_forget` retain documents along. These have
      forwards and backwards of their own, a batch size each, so that no more activations are alive than those of a
      batch. The loss comes from hidden states without logits.
    - The loss of a step is the same however the step is split into micro-batches and processes: what it divides by is
      summed over the whole step. An epoch is one pass over the forget set.
    - N is the number of the step's counted retain tokens, never the sum of their weights: these have mean 1 over the
      retain set, so the loss is that set's weighted one on average, and a document weighs what it was given, also
      where it is alone in its step.
    - Which documents a step sees depends on `args.data_seed` (or `args.seed`) and its number only.
    - `train(resume_from_checkpoint=True)` goes on from the last complete checkpoint, removes a half-written one, and
      starts from the beginning when there is none.
    - A router's auxiliary loss is off: with it, forgetting would also unbalance the experts.
    - Logged: forget_loss and retain_loss (as in L), forget_nll and retain_nll (unweighted means a token), and the mean,
      the maximum and the effective share (ESS) of the retain weights.

    Args:
        model: a causal LM with MoE layers (any causal LM for weighting="uniform"), or a peft model around one.
        args: TrainingArguments.
        config: TraceConfig.
        forget, retain: tokenised datasets, see `data.load_tokens`. A column token_weight of retain is used with
            weighting="reference" when no `calibration` is given. What the objective does not use may be None.
        alternate: for "dpo": for each forget document the one to prefer, in the same order.
        retain_eval: tokenised retain documents that are not in retain: what is kept is measured on them, where the
            configuration stops by it or chooses the best checkpoint. By default some of retain are held out.
        calibration: the Calibration of this retain set; needed for weighting="live".
        joint_forward: forget and retain documents of a micro-batch in one forward: faster, with the activations of all
            of them alive at once. Always so where the model is sharded (FSDP, DeepSpeed).
        processing_class: the tokenizer; saved with the checkpoints.
        callbacks, optimizers: as in Trainer.

    Raises:
        UserError: options and data that do not fit each other; the message names them.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                                      num_attention_heads=2, num_key_value_heads=2))
        >>> forget, retain = (
        ...     datasets.Dataset.from_dict({"input_ids": [ids], "labels": [ids]}) for ids in ([1, 2, 3], [4, 5, 6])
        ... )
        >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True)
        >>> config = TraceConfig(objective="npo", weighting="uniform")  # a dense model has no routing to weigh by
        >>> trainer = TraceTrainer(model, args, config=config, forget=forget, retain=retain)
        >>> trainer.remove_callback(PrinterCallback)
        >>> trainer.train(resume_from_checkpoint=True).global_step
        2
    """

    loss_is_scaled_for_ga = True  # by the totals of the whole step

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        config: TraceConfig | None = None,
        forget: datasets.Dataset | None = None,
        retain: datasets.Dataset | None = None,
        alternate: datasets.Dataset | None = None,
        retain_eval: datasets.Dataset | None = None,
        calibration: Calibration | None = None,
        joint_forward: bool = False,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **options: Any,
    ) -> None:
        self.trace_config = config = with_unit(config or TraceConfig(), calibration)
        check_arguments(args, config)
        self.calibration, self._joint_forward = calibration, joint_forward
        forget, retain, alternate = used_sets(config, forget=forget, retain=retain, alternate=alternate)
        if retain is not None:
            retain = weighted(retain, config, calibration)
        retain, measured = held_out(retain, retain_eval, config)
        self._forward = Forward(model, config, frugal=not joint_forward)
        self._forward.freeze_unused()
        weighed_live = config.routes_weigh and config.weighting == "live"
        self._live = LiveWeights(model, calibration) if weighed_live and calibration else None
        args.remove_unused_columns = False  # a row is a forget document with its retain documents
        args.logging_nan_inf_filter = False  # a diverged run must not look like a flat one
        if args.n_gpu > 1:
            args._n_gpu = 1  # several GPUs: one process each (torchrun, accelerate launch), not nn.DataParallel
        self.pairs = PairDataset(
            forget,
            retain,
            alternate=alternate,
            retain_per_forget=config.retain_per_forget,
            step_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        self._sampler = PositionSampler(self.pairs)
        collator = PairCollator(pad_token_id(processing_class, model))
        self._early_stop = EarlyStop(config, forget, measured, collator.pad_token_id)
        self._original = Original(model, config, self._forward, forget, retain, alternate, collator.pad_token_id, args)
        super().__init__(
            model,
            args,
            data_collator=collator,
            train_dataset=self.pairs,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), _Beginnings(self)],
            **options,
        )
        check_masks(model, args.weight_decay, self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self.model_accepts_loss_kwargs = True  # with what get_batch_samples returns: no division by the accumulation
        self._log_window = LogWindow(args.device)
        if args.gradient_checkpointing and not model.get_input_embeddings().weight.requires_grad:
            # Else reentrant checkpointing sees no input that needs a gradient and silently trains nothing.
            model.enable_input_require_grads()  # type: ignore[no-untyped-call]

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        return self._sampler

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        nothing = contextlib.nullcontext()
        with self._live or nothing, self._forward.routers or nothing:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            if self.trace_config.pace:
                self._measure()  # after the last step: whether it was enough
        if self.trace_config.best_forget_nll is not None:
            self._take_best()
        return output

    def begin_training(self) -> None:
        """Called when the model is wrapped and a checkpoint, if any, is loaded."""
        step = self.state.global_step
        self._original.prepare(self.accelerator, self.model_wrapped, resumed=step > 0)
        self._early_stop.resume(self.state.log_history)
        if step == 0:
            self._measure()
            self._early_stop.check_original()

    def begin_step(self) -> None:
        """Sets the learning rate of a paced run: what the schedule says, times what the measures ask for."""
        if self.trace_config.pace and self.optimizer is not None and self.lr_scheduler is not None:
            factor = self._early_stop.factor(self.state.max_steps)
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = factor * rate

    def end_step(self) -> None:
        """Stops where the configuration says so."""
        self.log_at_checkpoints()
        step = self.state.global_step
        if self._early_stop.due(step):
            self._measure()
            if self._early_stop.reached(step):
                self.control.should_training_stop = True
                self.control.should_save |= self.trace_config.best_forget_nll is not None

    def log_at_checkpoints(self) -> None:
        """No log entry spans a checkpoint: a run that goes on from there logs what it would have logged."""
        self.control.should_log |= self.control.should_save

    def _measure(self) -> None:
        """Logs what early stopping and the choice of a checkpoint go by, unless this step has been measured."""
        step, forward = self.state.global_step, self._forward.log_probs
        if not self._early_stop.measured(step):
            found = self._early_stop.measure(step, self.accelerator, forward, self.model_wrapped, self.args)
            due, self.control.should_log = self.control.should_log, False
            self.log(found)
            self.control.should_log = due  # logging took it for done

    def _take_best(self) -> None:
        """Loads the model of the best checkpoint, unless it is that of the last step."""
        step = self.state.best_global_step
        folder = self.checkpoint_folder(step)
        if step == self.state.global_step:
            return
        if step is None or not is_complete(folder):
            raise UserError(f"{folder}: the best checkpoint is missing, it was removed; start again in an empty folder")
        self.state.best_model_checkpoint = str(folder)  # the run folder may have been moved
        self._load_best_model()

    def begin_epoch(self) -> None:
        self._sampler.set_epoch(int(self.state.epoch or 0))

    def get_batch_samples(  # type: ignore[override]  # what comes second reaches compute_loss, and nothing else
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], StepTotals]:
        step = self.state.global_step
        if step >= self.state.max_steps or self._early_stop.reached(step):
            # Resumed when done: Trainer's loop looks only after a step.
            self.control.should_training_stop = True
            num_batches = 0
        batches = list(itertools.islice(epoch_iterator, num_batches))
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        for batch in batches:
            bearing = loss_bearing(batch["labels"], batch["attention_mask"]).to(device)
            forget, retain = (bearing[batch[f"{name}_index"].to(device) >= 0] for name in ("forget", "retain"))
            totals += torch.stack([forget.sum(), forget.any(-1).sum(), retain.sum()])
        totals = self.accelerator.reduce(totals, "sum")
        return batches, StepTotals(*totals.float().unbind())

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A forward and a backward for each part of a micro-batch: activations of one part are alive at a time."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # where each would gather all weights once more
        joint = self._joint_forward or sharded
        parts = [inputs] if joint else split_batch(inputs, self.args.train_batch_size)
        losses = []
        for number, part in enumerate(parts, 1):
            waiting = self.accelerator.no_sync(model) if number < len(parts) else contextlib.nullcontext()
            with waiting:
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if not isinstance(num_items_in_batch, StepTotals):  # evaluation, on plain documents
            outputs = model(**inputs, **self._forward.router_options())
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        config, totals = self.trace_config, num_items_in_batch
        bearing = loss_bearing(inputs["labels"], inputs["attention_mask"])
        is_forget, is_retain = inputs["forget_index"] >= 0, inputs["retain_index"] >= 0
        reference = self._original.rows(model, inputs, bearing)
        divergence_only = config.method.uses_retain and config.retain_loss == "kl"
        coefficient = self._coefficient(inputs, bearing, is_forget, is_retain, totals)
        seen = self._forward.seen(model, inputs, is_retain & divergence_only, reference, coefficient)
        loss = torch.zeros((), dtype=torch.float32, device=bearing.device)
        share = totals.share(bearing, is_forget, is_retain)
        values: dict[str, torch.Tensor] = {}
        if config.method.forget_loss is not None and is_forget.any():
            forget = self._original.forget_batch(seen, inputs, bearing, totals.forget_tokens, totals.forget_documents)
            values["forget_loss"] = config.method.forget_loss(forget, config.knobs)
            loss = loss + config.gamma * values["forget_loss"]
            if seen.log_probs is not None:
                values["forget_nll"] = weighted_nll(forget.log_probs, forget.mask.float(), totals.forget_tokens)
            if seen.anchor is not None:
                anchors = seen.anchor[is_forget]
                values["anchor_loss"] = weighted_mean(anchors, forget.mask.float(), totals.forget_tokens)
                loss = loss + config.anchor * values["anchor_loss"]
        if config.method.uses_retain and is_retain.any():
            mask, weight = bearing[is_retain], self._retain_weight(inputs, bearing)[is_retain]
            values["retain_loss"] = weighted_mean(
                self._retain_losses(seen, reference, is_retain, mask), weight, totals.retain_tokens
            )
            loss = loss + config.alpha * values["retain_loss"]
            if seen.log_probs is not None:
                values["retain_nll"] = weighted_nll(seen.log_probs[is_retain], mask.float(), totals.retain_tokens)
            self._log_window.add_weights(weight, mask.sum())
        if seen.known is not None:
            loss = loss + (seen.known - seen.known.detach())  # 0: the loss's gradient, whose value is in it already
        self._log_window.add(values, share)
        # Gradients are averaged over the processes, while the shares of the loss are to be added up.
        loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _coefficient(
        self,
        inputs: dict[str, torch.Tensor],
        bearing: torch.Tensor,
        is_forget: torch.Tensor,
        is_retain: torch.Tensor,
        totals: StepTotals,
    ) -> torch.Tensor | None:
        """[B, S] float32: what the loss is of each token's NLL; None where the model's forward decides that."""
        config = self.trace_config
        if not config.method.is_mean or self._live is not None:
            return None
        found = torch.zeros(bearing.shape, dtype=torch.float32, device=bearing.device)
        if config.method.forget_loss is not None:
            found -= bearing * is_forget[:, None] * (config.gamma / totals.forget_tokens.clamp(min=1))
        if config.method.uses_retain and config.retain_loss == "nll":
            weight = _stored_weight(inputs, bearing) * is_retain[:, None]
            found += weight * (config.alpha / totals.retain_tokens.clamp(min=1))
        return found

    def _retain_losses(
        self, seen: Seen, reference: ReferenceRows | None, is_retain: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """[R, S] float32: a loss a retain token, before it is weighted."""
        if seen.hidden is not None:
            assert reference is not None
            found = distance(seen.hidden[is_retain][mask], reference.hidden.to(seen.hidden.device))
            return torch.zeros_like(mask, dtype=found.dtype).masked_scatter(mask, found)
        assert seen.log_probs is not None
        if self.trace_config.retain_loss == "nll":
            return -seen.log_probs[is_retain]
        assert seen.divergence is not None
        return seen.divergence[is_retain]

    def _retain_weight(self, inputs: dict[str, torch.Tensor], bearing: torch.Tensor) -> torch.Tensor:
        """[B, S] float32, 0 where no loss is borne; rows of forget documents do not matter."""
        if self._live is not None:
            return self._live.weights(bearing, inputs["attention_mask"]).to(bearing.device).where(bearing, 0.0)
        return _stored_weight(inputs, bearing)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            if "learning_rate" in logs:
                logs["learning_rate"] *= self._early_stop.factor(self.state.max_steps)
            logs.update(self._log_window.close(self.accelerator))
            if not math.isfinite(logs["loss"]):
                raise UserError(
                    f"training: the loss is {logs['loss']} at step {self.state.global_step}; lower the learning rate "
                    "or gamma, or clip the gradient (max_grad_norm)"
                )
        super().log(logs, start_time)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.check_finite()
        if self.trace_config.best_forget_nll is not None:
            self._measure()
            if self._early_stop.is_best(self.state.global_step, self.state.best_global_step):
                self.state.best_global_step = self.state.global_step
        super()._save_checkpoint(model, trial)

    def save_unlearned(
        self,
        output: PathLike,
        facts: Mapping[str, Any] | None = None,
        *,
        source: PathLike | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes the final checkpoint in one step: model, tokenizer, trace.json (config, `facts`, log) and model card.

        Adapters are merged into the model, so nothing can be trained afterwards; from a sharded model (FSDP,
        DeepSpeed) they are written as they are. Call it on all processes.

        Args:
            output: the folder to write; must not exist.
            facts: what else goes into trace.json and the card.
            source: the folder that the model was loaded from. Its other files come along: tokenizer, chat template,
                generation options, code, licence; its card as README.base.md; and its weights' split into files.
            dtype: what the weights are written in, such as the checkpoint's where a copy in float32 was trained. They
                are converted in place.
        """
        self.check_finite()
        state = self.gathered_state()
        if self.args.should_save:
            with staged_folder(output) as folder:
                self.save_whole(folder, state, None if source is None else Path(source), dtype)
                record = {**(facts or {}), "config": self.trace_config, "steps": self.state.global_step}
                if self.trace_config.best_forget_nll is not None and self.state.best_global_step:
                    best = self._early_stop.choice(self.state.best_global_step)
                    record |= {"steps": best["step"], "best": {**best, "trained_steps": self.state.global_step}}
                # Without Trainer's summary at the end: after a resume its mean loss leaves the steps before out.
                log = [entry for entry in self.state.log_history if "train_runtime" not in entry]
                write_json(folder / TRACE, {**record, "log": log})
                write_text(folder / "README.md", training_card(record))
        self.accelerator.wait_for_everyone()


class _Beginnings(TrainerCallback):
    def __init__(self, trainer: TraceTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.begin_training()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.end_step()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.begin_step()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.begin_epoch()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.log_at_checkpoints()


def _stored_weight(batch: Mapping[str, torch.Tensor], bearing: torch.Tensor) -> torch.Tensor:
    """[B, S] float32: the column token_weight, or 1, where loss is borne; else 0."""
    weight = batch.get("token_weight")
    return bearing.float() if weight is None else weight.to(bearing.device).where(bearing, 0.0)
