"""Multiple-choice benchmarks such as WMDP and MMLU, through EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from trace_unlearn.errors import UserError, needs
from trace_unlearn.evaluation.suites.suite import Suite, check_number, text, texts
from trace_unlearn.sources.hub import cached_if_away
from trace_unlearn.sources.records import Record, read_records

LETTERS = "ABCDEFGHIJ"


@dataclasses.dataclass
class Harness(Suite):
    """Tasks of lm-evaluation-harness (the extra `lm-eval`).

    Attributes:
        tasks: its names, such as wmdp_bio, wmdp_cyber and mmlu; groups are aggregated as it defines.
        questions: own multiple-choice data by name, as {"wmdp_bio": "wmdp-bio.jsonl"}: files or hub names with the
            fields question, choices (a list of texts) and answer (the right one's number from 0), as cais/wmdp and
            cais/mmlu have them; asked as those tasks ask. A name may replace one of the library's tasks.
        include: a folder with task definitions of one's own, in the library's YAML.
        split: of hub data in `questions`.
        few_shot: solved examples before each question; by default what the task says, none for `questions`.
        limit: only the first questions of each task.
    """

    tasks: list[str] = dataclasses.field(default_factory=list)
    questions: dict[str, str] = dataclasses.field(default_factory=dict)
    include: str | None = None
    split: str = "test"
    few_shot: int | None = None
    limit: int | None = None

    def check(self) -> None:
        if not isinstance(self.tasks, list) or not all(isinstance(name, str) for name in self.tasks):
            raise UserError(f"tasks: got {self.tasks!r}, allowed is a list of names")
        if not isinstance(self.questions, dict) or not all(isinstance(name, str) for name in self.questions.values()):
            raise UserError(f"questions: got {self.questions!r}, allowed are files or hub names by name")
        if not self.tasks and not self.questions:
            raise UserError("tasks and questions: got neither; name at least one task")
        if self.include is not None and not Path(self.include).is_dir():
            raise UserError(f"include: {self.include} is not a folder")
        check_number("few_shot", self.few_shot, 0)
        check_number("limit", self.limit, 1)
        if both := set(self.tasks) & set(self.questions):
            raise UserError(f"tasks and questions: both name {both.pop()!r}")
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(needs("lm-eval", "lm-eval"))

    def sources(self) -> dict[str, str]:
        include = {} if self.include is None else {"include": self.include}
        return include | {f"questions.{name}": source for name, source in self.questions.items()}

    def read(self, tokenizer: Tokenizer) -> None:
        self.manager = self._manager()
        self.documents = {name: self._documents(source) for name, source in self.questions.items()}
        if self.tasks:
            known = self.manager.all_tasks
            if unknown := [name for name in self.tasks if name not in known]:
                raise UserError(f"suites.lm_eval: {unknown[0]!r} is none of lm-eval's {len(known):,} tasks and groups")

    def _documents(self, source: str) -> list[dict[str, Any]]:
        found = []
        for record, _ in zip(read_records(source, split=self.split), range(self.limit or 1 << 62), strict=False):
            choices, answer = texts(record, "choices"), _number(record)
            if len(choices) > len(LETTERS):
                raise UserError(f"{record.where}: {len(choices)} choices, allowed are up to {len(LETTERS)}")
            if not 0 <= answer < len(choices):
                raise UserError(f"{record.where}: answer: got {answer}, allowed are 0 to {len(choices) - 1}")
            listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False))
            asked = f"{text(record, 'question').strip()}\n{listed}Answer:"
            found.append({"asked": asked, "letters": list(LETTERS[: len(choices)]), "answer": answer})
        if not found:
            raise UserError(f"{source}: holds no question")
        return found

    def _manager(self) -> Any:
        """The library's index of tasks; without its own, which take long to read, where they are not needed."""
        from lm_eval.tasks import TaskManager

        with _quiet():
            own = TaskManager(include_path=self.include, include_defaults=False)
            return own if set(self.tasks) <= set(own.all_tasks) else TaskManager(include_path=self.include)

    def measure(
        self, model: PreTrainedModel, tokenizer: Tokenizer, *, batch_size: int = 8, progress: bool = True
    ) -> dict[str, Any]:
        """For each task and group its metrics by name, acc for one; the parts of groups under `parts`."""
        import lm_eval

        from trace_unlearn.evaluation.suites.fused_lm import FusedLM

        with tempfile.TemporaryDirectory() as folder, _quiet(), cached_if_away():
            tasks: list[Any] = [*self.tasks, *(self._own_task(name, Path(folder)) for name in self.documents)]
            try:
                results = lm_eval.simple_evaluate(
                    model=FusedLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                    tasks=tasks,
                    num_fewshot=self.few_shot,
                    limit=self.limit,
                    task_manager=self.manager,
                    log_samples=False,
                    bootstrap_iters=0,
                )
            except Exception as error:  # a foreign library on foreign data, often from the hub
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UserError(
                    f"suites.lm_eval: lm-eval cannot run {', '.join(map(_name, tasks))}: {reason}"
                ) from error
        found = {name: _metrics(values) for name, values in results["results"].items()}
        asked = {*self.tasks, *self.documents}
        parts = {name: values for name, values in found.items() if name not in asked}
        scores: dict[str, Any] = {name: values for name, values in found.items() if name in asked}
        return scores | ({"parts": parts} if parts else {})

    def _own_task(self, name: str, folder: Path) -> dict[str, Any]:
        path = folder / f"{len(list(folder.iterdir()))}.json"
        path.write_text("\n".join(json.dumps(document) for document in self.documents[name]), encoding="utf-8")
        return {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "num_fewshot": 0,
            "output_type": "multiple_choice",
            "doc_to_text": "{{asked}}",
            "doc_to_choice": "{{letters}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }


def _number(record: Record) -> int:
    value = record.value.get("answer") if isinstance(record.value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{record.where}: needs the field 'answer' with the number of the right choice, from 0")
    return value


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Without the library's filter in the names: "acc,none" is acc."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "stderr" not in name and name not in ("sample_len",)
    }


def _name(task: Any) -> str:
    return str(task["task"] if isinstance(task, dict) else task)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's log of what it does."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
