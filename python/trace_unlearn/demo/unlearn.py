"""The demo's work on one model, as tasks for a worker: pre-train, profile and calibrate it; unlearn with one arm.

Every product appears whole or not at all, and is left alone when it is there: a demo that was killed goes on.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_unlearn.demo.compare import CONTROL, FORGET_NLL, STRONG, TRACE, UNIFORM
from trace_unlearn.demo.corpus import make_corpus
from trace_unlearn.demo.pretrain import PretrainOptions, ask, pretrain
from trace_unlearn.demo.workers import Progress
from trace_unlearn.files import read_json

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from trace_unlearn.calibration.calibrate import Calibration
    from trace_unlearn.training.config import TraceConfig
    from trace_unlearn.training.trainer import TraceTrainer

ARMS = (UNIFORM, TRACE, CONTROL)  # the control: TRACE's weights, each on a random document
DATA = ("forget.jsonl", "retain.jsonl")
LEARNING_RATES = {"grad_diff": 1.2e-4, "npo": 1.5e-4, "wga": 1.2e-4, "ce_u": 1.2e-4}


@dataclass(frozen=True)
class Recipe:
    """All numbers of the demo.

    Attributes:
        unit: whose routing a weight looks at; see `calibrate`.
        every_step_from_nll: from this NLL of F on every step is recorded; None for never.
        strength: of the arm `STRONG`: its retain weight as a multiple of the others'.
    """

    pretrain: PretrainOptions = field(default_factory=PretrainOptions)
    forget_documents: int = 96
    retain_documents: int = 384
    experts_per_layer: int = 4
    unlearn_steps: int = 250
    forget_per_step: int = 8
    retain_per_forget: int = 4
    retain_weight: float = 8.0
    npo_beta: float = 0.1
    evaluate_every: int = 4
    every_step_from_nll: float | None = 0.1
    stop_at_forget_nll: float = FORGET_NLL[1] + 0.1
    strength: float = 4.0
    unit: str = "document"


def prepare(folder: Path, seed: int, recipe: Recipe, progress: Progress) -> None:
    """Make data/, checkpoint/, profile/ and calibration/ of the model `seed` in `folder`."""
    be_quiet()
    from trace_unlearn.calibration.calibrate import calibrate
    from trace_unlearn.routing.profile import RoutingStatistics, profile_routing
    from trace_unlearn.sources.data import load_tokens
    from trace_unlearn.sources.model import load_model, load_tokenizer

    corpus = make_corpus(
        seed,
        pretrain_documents=recipe.pretrain.documents,
        forget_documents=recipe.forget_documents,
        retain_documents=recipe.retain_documents,
    )
    if not (folder / "data").is_dir():
        corpus.save(folder / "data")
    if not (folder / "checkpoint").is_dir():
        pretrain(corpus, folder / "checkpoint", recipe.pretrain, progress)
    if not (folder / "profile").is_dir():
        tokenizer = load_tokenizer(folder / "checkpoint")
        forget, retain = (load_tokens(folder / "data" / name, tokenizer, progress=False) for name in DATA)
        model = load_model(folder / "checkpoint", device="cpu")
        assert isinstance(tokenizer.pad_token_id, int)
        stats = profile_routing(
            model, forget, retain, batch_size=32, pad_token_id=tokenizer.pad_token_id, progress=False
        )
        stats.save(folder / "profile")
    if not (folder / "calibration").is_dir():
        stats = RoutingStatistics.load(folder / "profile")
        calibrate(stats, experts_per_layer=recipe.experts_per_layer, unit=recipe.unit).save(folder / "calibration")


def unlearn(folder: Path, seed: int, objective: str, arm: str, recipe: Recipe, progress: Progress) -> None:
    """Make OBJECTIVE/ARM/ in `folder`: the unlearned checkpoint, and in its trace.json what it knew every few steps."""
    be_quiet()
    from trace_unlearn.calibration.calibrate import Calibration
    from trace_unlearn.sources.data import load_tokens
    from trace_unlearn.sources.model import load_model, load_tokenizer
    from trace_unlearn.training.config import TraceConfig

    output = folder / objective / arm
    if output.is_dir():
        return
    tokenizer = load_tokenizer(folder / "checkpoint")
    forget, retain = (load_tokens(folder / "data" / name, tokenizer, progress=False) for name in DATA)
    calibration = Calibration.load(folder / "calibration")
    facts = make_corpus(seed, pretrain_documents=0, forget_documents=0, retain_documents=0).facts
    config = TraceConfig(
        objective=objective,
        alpha=recipe.retain_weight * (recipe.strength if arm == STRONG else 1),
        beta=recipe.npo_beta if objective == "npo" else None,
        weighting="uniform" if arm in (UNIFORM, STRONG) else "reference",
        retain_per_forget=recipe.retain_per_forget,
    )
    curve: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="trace-demo-") as work:
        trainer = make_trainer(
            work,
            load_model(folder / "checkpoint", device="cpu"),
            tokenizer,
            forget,
            retain,
            config=config,
            calibration=calibration.shuffled(seed) if arm == CONTROL else calibration,
            recipe=recipe,
            learning_rate=LEARNING_RATES[objective],
            seed=seed,
            callback=recorder(curve, lambda model: ask(model, tokenizer, facts), recipe, progress),
        )
        trainer.train()
        trainer.save_unlearned(output, {"arm": arm, "curve": curve})


def make_trainer(
    work: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: datasets.Dataset,
    retain: datasets.Dataset,
    *,
    config: TraceConfig,
    calibration: Calibration | None,
    recipe: Recipe,
    learning_rate: float,
    seed: int,
    callback: TrainerCallback,
    log: bool = False,
) -> TraceTrainer:
    """The trainer of one arm; `work` is a scratch folder. With `log`, a loss that is no number is an error."""
    from transformers import PrinterCallback, TrainingArguments

    from trace_unlearn.training.trainer import TraceTrainer

    trainer = TraceTrainer(
        model,
        TrainingArguments(
            work,
            max_steps=recipe.unlearn_steps,
            per_device_train_batch_size=recipe.forget_per_step,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="steps" if log else "no",
            logging_steps=recipe.evaluate_every,
            report_to=[],
            disable_tqdm=True,
        ),
        config=config,
        forget=forget,
        retain=retain,
        calibration=calibration,
        processing_class=tokenizer,
        joint_forward=True,  # these models are small: time, not memory, is what they take
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)  # prints the logs where there is no bar of the Trainer's own
    return trainer


def be_quiet() -> None:
    """Nothing here comes from a hub, and the bars that show it are the parent's."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def recorder(
    curve: list[dict[str, float]],
    read_out: Callable[[PreTrainedModel], dict[str, float]],
    recipe: Recipe,
    progress: Progress,
) -> TrainerCallback:
    """Appends what the model knows to `curve` every few steps or every one, and stops when F is forgotten."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._record(state, control, kwargs["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress(state.global_step, recipe.unlearn_steps)
            closely = recipe.every_step_from_nll is not None and curve[-1]["F_nll"] > recipe.every_step_from_nll
            if closely or state.global_step % recipe.evaluate_every == 0:
                self._record(state, control, kwargs["model"])

        def _record(self, state: Any, control: Any, model: Any) -> None:
            point = {"step": state.global_step, **read_out(model)}
            curve.append(point)
            if point["F_nll"] > recipe.stop_at_forget_nll:
                control.should_training_stop = True

    return Recorder()


def read_curve(folder: Path, objective: str, arm: str) -> list[dict[str, float]]:
    """What `unlearn` recorded."""
    curve: list[dict[str, float]] = read_json(folder / objective / arm / "trace.json")["curve"]
    return curve
