"""The verb `run`: profile, calibrate, train, evaluate, attack and report from one configuration; resumable.

A step is skipped when what it makes is there and was made from the same inputs with the same options; steps.json in the
run folder records both. A step that was made otherwise is refused, never silently redone or mixed with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trace_unlearn.checks import meant
from trace_unlearn.errors import UserError
from trace_unlearn.files import at_home, digest_of, read_json, refuse_existing, to_json, write_json
from trace_unlearn.reporting.model_card import write_evaluated
from trace_unlearn.routing.statistics import DEFAULT_UNIT
from trace_unlearn.sources.model import is_moe
from trace_unlearn.sources.records import check_source
from trace_unlearn.values import flatten
from trace_unlearn.verbs import attack, calibrate, evaluate, profile, report, train
from trace_unlearn.verbs.lock import LOCK, alone

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

#: The verbs with a section, in turn. Of each module the run reads MAKES (its product in the run folder), PLACES (the
#: options that say where and not what: the run gives them), `sources` (what else it reads) and `check`.
SECTIONS: dict[str, ModuleType] = {
    "profile": profile,
    "calibrate": calibrate,
    "train": train,
    "evaluate": evaluate,
    "attack": attack,
}
OPTIONS: dict[str, type] = {
    "profile": profile.ProfileOptions,
    "calibrate": calibrate.CalibrateOptions,
    "train": train.TrainOptions,
    "evaluate": evaluate.EvaluateOptions,
    "attack": attack.AttackOptions,
}
RENAMED = {f"train.{name}": f"train.{now}" for name, now in train.RENAMED.items()}
RECORD = "steps.json"


@dataclass
class RunOptions:
    r"""Profiles, calibrates, unlearns, evaluates and reports: all verbs in turn, from one configuration file.

    A second call goes on where the first one stopped; what is finished is not done again. The sections profile,
    calibrate, train, evaluate and attack hold those verbs' own options.

    Args:
        model: a checkpoint folder or hub name of a Mixture-of-Experts language model.
        forget: the data to forget: a .jsonl, .json, .txt or .parquet file, or a hub name "owner/name[:config]".
        retain: the data whose behaviour must stay.
        output: the run folder.
        max_length: the most tokens of a document; longer texts are cut into windows.
        question_template: the prompt of question/answer records, with {question} in it; by default the tokenizer's chat
            template, or "Question: {question}\\nAnswer:" where it has none.
        forget_limit: use only that many forget documents.
        retain_limit: use only that many retain documents.
        dtype: of the model's weights: "auto" (as the checkpoint says), "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda"; by default a GPU where there is one.
        attacks: what to attack the unlearned model with: relearn, quantize, reroute; by default nothing.
        report: whether to write report.html.
        profile: options of profile.
        calibrate: options of calibrate.
        train: options of train.
        evaluate: options of evaluate; its retrained checkpoint is attacked too.
        attack: options of attack.
    """

    model: str
    forget: str
    retain: str
    output: str = "runs/trace"
    max_length: int = 512
    question_template: str | None = None
    forget_limit: int | None = None
    retain_limit: int | None = None
    dtype: str = "auto"
    device: str | None = None
    attacks: list[str] = field(default_factory=list)
    report: bool = True
    profile: dict[str, Any] = field(default_factory=dict)
    calibrate: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    attack: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: ArgumentParser, skip: Collection[str] = ()) -> None:
    """The flags: the run's own, and a group for every section."""
    parser.add_class_arguments(RunOptions, as_group=False, skip={*SECTIONS, *skip})
    for section, options_class in OPTIONS.items():
        parser.add_class_arguments(options_class, section, skip=_given(section), instantiate=False)


def known_names() -> list[str]:
    """The options that no field lists."""
    return [f"train.{name}" for name in train.known_names()]


def options_from(namespace: Namespace) -> RunOptions:
    """The options that the command line gave."""
    values = namespace.as_dict()
    for section in SECTIONS:
        values[section] = {} if values[section] is None else values[section]  # "train:" with nothing below it
        if not isinstance(values[section], dict):
            raise UserError(f"{section}: got {values[section]!r}, allowed are options of {section} by name")
    return RunOptions(**{item.name: values[item.name] for item in dataclasses.fields(RunOptions)})


def main(options: RunOptions, say: Callable[[str], None] = print) -> None:
    """Runs the verb."""
    options = at_home(options)
    output = Path(options.output)
    steps = _steps(options)
    for step in steps:
        step.check()
    if not output.is_dir():
        refuse_existing(output)
    _check_data(options, steps)
    say(f"run: {', then '.join(step.verb for step in steps)} -> {output}")
    fresh = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    try:
        _take_steps(output, steps, say)
    except UserError:
        if fresh:
            _remove_unused(output)
        raise


def _check_data(options: RunOptions, steps: Sequence[Step]) -> None:
    """UserError for what a late step would refuse in the data, which it reads with the tokenizer of the base model."""
    for step in steps:
        if not hasattr(step.module, "check_data"):
            continue
        try:
            step.module.check_data(step.options, options.model)
        except UserError as error:
            raise UserError(f"{step.verb}: {error}") from error


def _take_steps(output: Path, steps: Sequence[Step], say: Callable[[str], None]) -> None:
    with alone(output):
        record = read_json(output / RECORD) if (output / RECORD).is_file() else {}
        finished = {step.verb for step in steps if step.is_finished(output, record.get(step.verb))}
        for step in steps:
            if step.verb in finished:
                say(f"{step.verb}: done already, {output / step.product} is there")
                if step.verb == "train":
                    train.remove_leftover(step.options)
                continue
            # Recorded before it begins: the product appears in one step, and then belongs to this record.
            record[step.verb] = step.identity()
            write_json(output / RECORD, record)
            begun = time.monotonic()
            step.module.main(step.options)
            record[step.verb]["seconds"] = round(time.monotonic() - begun, 1)
            write_json(output / RECORD, record)
        # Last of all: what reads the model folder would take it for another one.
        write_evaluated(output / train.MAKES, output)
        for found in (read_json(output / evaluate.MAKES).get("verdicts") or {}).values():
            say(found["sentence"])


def _remove_unused(output: Path) -> None:
    """Removes a run folder in which nothing was made."""
    found = list(output.iterdir())
    if {path.name for path in found} <= {LOCK, RECORD}:
        for path in found:
            path.unlink()
        output.rmdir()


@dataclass(frozen=True)
class Step:
    """One verb of a run.

    Attributes:
        verb: its name.
        options: its options.
        inputs: digests of what it reads: data, model, and the steps before it.
    """

    verb: str
    options: Any
    inputs: Mapping[str, str]

    @property
    def module(self) -> ModuleType:
        return SECTIONS.get(self.verb, report)

    @property
    def product(self) -> str:
        made: str = self.module.MAKES
        return made

    def check(self) -> None:
        """UserError for a mistake in the options, which would otherwise show when the steps before it are done."""
        if hasattr(self.module, "check"):
            try:
                self.module.check(self.options)
            except UserError as error:
                raise UserError(f"{self.verb}: {error}") from error

    def identity(self) -> dict[str, Any]:
        """What the product follows from, as JSON holds it; where the run folder is does not matter."""
        choices = {
            item.name: getattr(self.options, item.name)
            for item in dataclasses.fields(self.options)
            if item.name not in self.module.PLACES
        }
        identity: dict[str, Any] = {
            "options": flatten(json.loads(to_json(choices))),
            "inputs": dict(self.inputs),
        }
        return identity

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def is_finished(self, output: Path, record: Mapping[str, Any] | None) -> bool:
        """Whether the product is there.

        Raises:
            UserError: it is, but was made from something else.
        """
        path = output / self.product
        if not path.exists():
            return False
        advice = f"remove {path} and what follows from it to make it anew, or give another --output"
        if record is None:
            raise UserError(f"{path}: is there, but no run made it; {advice}")
        identity = self.identity()
        for part in ("options", "inputs"):
            before, now = record.get(part, {}), identity[part]
            changed = [
                f"{name} (was {before.get(name)!r}, now {now.get(name)!r})" if part == "options" else name
                for name in sorted({*before, *now})
                if before.get(name) != now.get(name)
            ]
            if changed:
                what = "with other options" if part == "options" else "from other inputs"
                raise UserError(f"{path}: was made {what}: {', '.join(changed)}; {advice}")
        return True


def _given(verb: str) -> set[str]:
    """The options of a verb that the run itself gives: the places, and the run's own by the same names."""
    return {*SECTIONS[verb].PLACES, *_shared(verb)}


def _shared(verb: str) -> set[str]:
    mine = {item.name for item in dataclasses.fields(RunOptions)} - {*SECTIONS, "report"}
    return mine & {item.name for item in dataclasses.fields(OPTIONS[verb])}


def _steps(options: RunOptions) -> list[Step]:
    """All steps with their options, checked and digested before anything is done."""
    output = Path(options.output)
    method = options.train.get("method") or {}
    uniform = method.get("weighting") == "uniform"
    retrained = options.evaluate.get("retrained")
    given: dict[str, dict[str, Any]] = {
        "profile": {"output": str(output / "profile")},
        "calibrate": {"profile": str(output / "profile"), "output": str(output / "calibration")},
        "train": {
            "calibration": None if uniform else str(output / "calibration"),
            "profile": None if uniform else str(output / "profile"),
            "output": str(output / "model"),
        },
        "evaluate": {
            "models": [options.model, str(output / "model")],
            "base": options.model if is_moe(options.model) else None,
            "output": str(output),
        },
        "attack": {
            "models": [str(output / "model"), *([retrained] if retrained is not None else [])],
            "calibration": None if uniform else str(output / "calibration"),
            "output": str(output),
        },
    }
    if options.calibrate.get("unit", DEFAULT_UNIT) == "context":
        given["profile"]["unit"] = "context"
    for name in ("forget", "retain"):
        _check_source(getattr(options, name), name)
    inputs = {
        "model": digest_of(options.model, "model"),
        "forget": digest_of(options.forget, "forget"),
        "retain": digest_of(options.retain, "retain"),
    }
    steps: list[Step] = []
    for verb in given:
        if (uniform and verb in ("profile", "calibrate")) or (verb == "attack" and not options.attacks):
            continue
        shared = {name: getattr(options, name) for name in _shared(verb)}
        built = _build(verb, {**getattr(options, verb), **shared, **given[verb]})
        read = {} if verb == "calibrate" else dict(inputs)
        read |= _read_besides(verb, built)
        if steps:
            read[steps[-1].verb] = steps[-1].digest()
        steps.append(Step(verb, built, read))
    if options.report:
        steps.append(Step("report", report.ReportOptions(run=str(output)), {steps[-1].verb: steps[-1].digest()}))
    return steps


def _read_besides(verb: str, options: Any) -> dict[str, str]:
    """Digests of what the sections name besides the run's own data."""
    module = SECTIONS[verb]
    sources: dict[str, str] = module.sources(options) if hasattr(module, "sources") else {}
    for name, source in sources.items():
        if name != "retrained" and not name.startswith("suites."):  # a checkpoint, and what suites check
            _check_source(source, f"{verb}.{name}")
    return {name: digest_of(source, f"{verb}.{name}") for name, source in sources.items()}


def _check_source(source: str, name: str) -> None:
    try:
        check_source(source)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _build(verb: str, values: dict[str, Any]) -> Any:
    known = {item.name for item in dataclasses.fields(OPTIONS[verb])}
    if unknown := sorted(set(values) - known):
        hint = meant(f"{verb}.{unknown[0]}", (f"{verb}.{name}" for name in known - _given(verb)), RENAMED)
        raise UserError(f"{verb}: {unknown[0]!r} is none of its options{hint}")
    return OPTIONS[verb](**values)


def train_options(options: RunOptions) -> train.TrainOptions:
    """What the run gives to `train`, for whoever asks before there is a run."""
    shared = {name: getattr(options, name) for name in _shared("train")}
    built: train.TrainOptions = _build("train", {**options.train, **shared})
    return built
