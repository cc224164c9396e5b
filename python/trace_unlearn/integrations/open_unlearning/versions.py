"""A checkout of open-unlearning on the transformers and datasets that are installed, from 4.45 to 5."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

from trace_unlearn.sources.both_versions import write_for_both_versions


class Bridged:
    """Before one of open-unlearning's trainers: what changed in transformers' Trainer since it was written.

    The tokenizer is called `processing_class` from 4.46 on, an evaluation strategy asks for a data set though
    open-unlearning's `evaluate` brings its own, and `compute_loss` is handed the number of labels of the whole step.
    """

    args: Any
    processing_class: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        renamed = "tokenizer" not in _arguments_of_trainer()
        if renamed and "tokenizer" in kwargs:
            kwargs["processing_class"] = kwargs.pop("tokenizer")
        without_data = kwargs.get("eval_dataset") is None
        if without_data and renamed:
            kwargs["eval_dataset"] = []
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if without_data:
            trainer.eval_dataset = None
        if _nests_labels(type(self)):
            # Its losses are means of a micro-batch: Trainer divides them by the number of micro-batches, which some
            # releases leave to the model where it takes the number of labels, which it never gets.
            trainer.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        compute = super().compute_loss  # type: ignore[misc]
        if "num_items_in_batch" in inspect.signature(compute).parameters:
            return compute(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        return compute(model, inputs, return_outputs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if self.args.should_save:
            write_for_both_versions(output_dir or self.args.output_dir)


def bridged(cls: type) -> type:
    """The same trainer, by the same name, for the installed transformers."""
    if issubclass(cls, Bridged):
        return cls
    return type(cls.__name__, (bridge(), cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def bridge() -> type[Bridged]:
    """`Bridged`, with the name `tokenizer`, which open-unlearning reads, where Trainer has it no more."""
    if "tokenizer" in _arguments_of_trainer():  # up to 4.45, where it is an attribute
        return Bridged
    return type("Bridged", (Bridged,), {"tokenizer": property(lambda self: self.processing_class)})


def _arguments_of_trainer() -> set[str]:
    return set(inspect.signature(inspect.unwrap(transformers.Trainer.__init__)).parameters)


def _nests_labels(cls: type) -> bool:
    return any(base.__name__ == "UnlearnTrainer" for base in cls.__mro__)


def prepare_checkout() -> None:
    """Lets the modules of the checkout, which must be importable, work on what is installed."""
    trainer: Any = importlib.import_module("trainer")
    model: Any = importlib.import_module("model")
    questions: Any = importlib.import_module("data.qa")
    evals: Any = importlib.import_module("evals")
    for cls in evals.EVALUATOR_REGISTRY.values():
        cls.evaluate = on_float_logits(cls.evaluate)
    for name, cls in trainer.TRAINER_REGISTRY.items():
        if cls is not transformers.Trainer:
            trainer.TRAINER_REGISTRY[name] = bridged(cls)
    trainer.TrainingArguments = _known_arguments(trainer.TrainingArguments)
    trainer.load_trainer_args = _warm_up_without_gpu(trainer.load_trainer_args)
    model.get_tokenizer = _lists_of_tokens(model.get_tokenizer)
    questions.QADataset.__init__ = _examples_as_lists(questions.QADataset.__init__)


def _known_arguments(build: Callable[..., Any]) -> Callable[..., Any]:
    known = inspect.signature(transformers.TrainingArguments.__init__).parameters

    def training_arguments(**given: Any) -> Any:
        gone = sorted(given.keys() - known.keys())
        if gone:
            print(f"open-unlearning: transformers {transformers.__version__} has no {', '.join(gone)}: left out")
        # YAML's null is spelt None in its configuration, and a string is no number of anything under DDP.
        return build(**{name: None if value == "None" else value for name, value in given.items() if name in known})

    return training_arguments


def _warm_up_without_gpu(load: Callable[..., Any]) -> Callable[..., Any]:
    """It divides by the number of GPUs."""

    @functools.wraps(load)
    def load_trainer_args(trainer_args: Any, dataset: Any) -> Any:
        given = dict(trainer_args)
        epochs = given.pop("warmup_epochs", None)
        if epochs and torch.cuda.device_count() == 0:
            documents = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
            return load({**given, "warmup_steps": int(epochs * len(dataset) // documents)}, dataset)
        return load(trainer_args, dataset)

    return load_trainer_args


def _lists_of_tokens(get_tokenizer: Callable[..., Any]) -> Callable[..., Any]:
    """A chat template gives a mapping from transformers 5 on."""

    @functools.wraps(get_tokenizer)
    def lists_of_tokens(*args: Any, **kwargs: Any) -> Any:
        tokenizer = get_tokenizer(*args, **kwargs)
        tokenizer.apply_chat_template = functools.partial(tokenizer.apply_chat_template, return_dict=False)
        return tokenizer

    return lists_of_tokens


def _examples_as_lists(initialise: Callable[..., None]) -> Callable[..., None]:
    """The examples before a question are added to a list, and a column of a data set is none from datasets 4 on."""

    @functools.wraps(initialise)
    def with_lists(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        if self.fs_data is not None:
            self.fs_data = {name: list(column) for name, column in self.fs_data.items()}

    return with_lists


def on_float_logits(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """Up to 4.45 logits are float32 whatever the model is; its measures hand them to NumPy, which has no bfloat16."""

    @functools.wraps(evaluate)
    def with_float_logits(*args: Any, **kwargs: Any) -> Any:
        with _float_logits():
            return evaluate(*args, **kwargs)

    return with_float_logits


@contextlib.contextmanager
def _float_logits() -> Iterator[None]:
    """Inside, those of every model: measures of membership load a reference model of their own."""

    def widen(module: torch.nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, transformers.PreTrainedModel) and isinstance(
            logits := getattr(output, "logits", None), torch.Tensor
        ):
            output.logits = logits.float()

    hook = torch.nn.modules.module.register_module_forward_hook(widen)
    try:
        yield
    finally:
        hook.remove()
