"""The verb `attack`: what comes back of the forgotten after relearning, quantising, and forcing other experts."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from trace_unlearn import files
from trace_unlearn.calibration.weights import Calibration
from trace_unlearn.checks import check_integers, check_numbers
from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.attacks import avoiding, avoiding_chosen, quantize_, relearn
from trace_unlearn.evaluation.attacks.standing import standing
from trace_unlearn.evaluation.measure import measure_suites
from trace_unlearn.evaluation.scores import NAMES, conditions
from trace_unlearn.evaluation.suites import Suite, open_suites
from trace_unlearn.sources.data import check_disjoint, check_positions, check_template, fingerprint, load_tokens
from trace_unlearn.sources.model import check_inputs, check_placement, load_model, load_tokenizer
from trace_unlearn.training.experts import chosen_experts
from trace_unlearn.training.pace import rate_of_width
from trace_unlearn.training.trainable import LoraOptions, add_lora
from trace_unlearn.values import table_of
from trace_unlearn.verbs.evaluate import suite_sources
from trace_unlearn.verbs.lock import alone
from trace_unlearn.versions import versions

# Linear layers of attention, as the families call them: what relearn adapts.
ATTENTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "qkv_proj",
)

MAKES = "attacks.json"
PLACES = ("models", "forget", "retain", "output", "calibration")
ATTACKS = ("relearn", "quantize", "reroute")
WORK = "attacks.work"  # in the output folder, until all is done: one file for each attack on each model
# What does not touch the result.
_FREE = ("output", "device", "device_map")


@dataclasses.dataclass
class AttackOptions:
    """Attacks unlearned checkpoints, measures what they know then, and writes attacks.json.

    Interrupted, the same command goes on: attacks that are finished are not done again.

    Attributes:
        models: the checkpoint to attack, or several as [A, B]: folders or hub names. Give one that was trained without
            the forget data beside yours: what it relearns was not hidden in it.
        forget: the data that was to be forgotten: a .jsonl, .json, .txt or .parquet file, or a hub name
            owner/name[:config].
        retain: the data to keep, likewise.
        output: the folder to write attacks.json into.
        attacks: relearn (train on some of the forget data, and measure the rest), quantize (round the weights) and
            reroute (keep tokens from the experts they choose).
        suites: benchmarks to measure too under relearn (at its end) and quantize; as in evaluate.
        calibration: the folder that calibrate wrote; with it reroute also bans the forget-critical experts.
        relearn_on: other data to train on, such as texts near the forgotten ones; by default a part of forget, and the
            other part is measured.
        relearn_rows: how many rows to train on; by default a tenth of them.
        relearn_steps: steps of training.
        relearn_every: steps between two measurements.
        relearn_learning_rate: of AdamW; by default 0.02 / hidden size (0.2 with relearn_lora_rank), as train begins: at
            a rate too small for it a model looks robust.
        relearn_batch_size: rows per step.
        relearn_lora_rank: train adapters of this rank, for models whose weights are too large to train in float32.
        bits: of the quantised weights.
        group_size: weights that share a scale.
        max_length: the most tokens of a row.
        question_template: the prompt of question/answer records, as in `profile`.
        split: of hub data.
        forget_limit: use only that many forget rows.
        retain_limit: use only that many retain rows.
        batch_size: rows of one forward when measuring.
        dtype: auto (as the checkpoint), float32, bfloat16 or float16; relearn without adapters is always in float32.
        device: where to run, such as cpu or cuda:1; none takes the GPU when there is one.
        device_map: accelerate's placement over several devices, such as auto, in place of device; not for relearn.
        seed: of relearn.
    """

    models: list[str] | str
    forget: str
    retain: str
    output: str
    attacks: list[str] = dataclasses.field(default_factory=lambda: list(ATTACKS))
    suites: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    calibration: str | None = None
    relearn_on: str | None = None
    relearn_rows: int | None = None
    relearn_steps: int = 50
    relearn_every: int = 10
    relearn_learning_rate: float | None = None
    relearn_batch_size: int = 4
    relearn_lora_rank: int = 0
    bits: list[int] = dataclasses.field(default_factory=lambda: [8, 4])
    group_size: int = 128
    max_length: int = 512
    question_template: str | None = None
    split: str = "train"
    forget_limit: int | None = None
    retain_limit: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """All that is known before a model is loaded."""

    options: AttackOptions
    tokenizer: Tokenizer
    sets: dict[str, datasets.Dataset]  # forget and retain
    relearned: dict[str, datasets.Dataset]  # shown: what is trained on; forget: what is not, to be measured
    critical: tuple[tuple[int, int], ...]  # (decoder layer, expert)
    suites: dict[str, Suite]


def main(options: AttackOptions, say: Callable[[str], None] = print) -> None:
    """Runs the verb."""
    output = Path(options.output)
    target, work = output / "attacks.json", output / WORK
    files.refuse_existing(target)
    models = check(options)
    say(f"attack: {', '.join(options.attacks)} on {', '.join(models)} -> {target}")
    inputs = _read(options, models)
    facts = _facts(inputs, models)
    work.mkdir(parents=True, exist_ok=True)
    with alone(work):
        found = {
            name: _attack(name, inputs, work / f"{number}", {**facts, "model": digest}, say)
            for number, (name, digest) in enumerate(facts["models"].items())
        }
    files.write_json(target, {"models": found, "choices": {"options": options, **facts, "versions": versions()}})
    shutil.rmtree(work, ignore_errors=True)
    say(summary(found))
    say(f"attack: wrote {target}")


def attack(models: list[str] | str, forget: str, retain: str, output: str, **options: Any) -> dict[str, Any]:
    """What comes back of the forgotten after relearning, quantising, and forcing other experts.

    Each attack takes a fresh copy of a checkpoint, which is why checkpoints are named here, and not given as models.
    Interrupted, the same call goes on.

    Args:
        models: the checkpoint to attack, or several: folders or hub names.
        forget: the data that was to be forgotten, as a file or hub name.
        retain: the data to keep, likewise.
        output: the folder for attacks.json.
        options: further fields of `AttackOptions`, such as attacks=["quantize"].

    Returns:
        What attacks.json holds: "models" with the results of each checkpoint, and "choices".

    Raises:
        UserError: a mistake in what is given.
    """
    known = {field.name for field in dataclasses.fields(AttackOptions)}
    if unknown := sorted(set(options) - known):
        raise UserError(f"attack: {unknown[0]!r} is none of its options: {', '.join(sorted(known))}")
    main(AttackOptions(models, forget, retain, output, **options), say=lambda message: None)
    found: dict[str, Any] = files.read_json(Path(output) / "attacks.json")
    return found


def summary(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The forget and retain measures under each attack as a table for people."""
    shown = ("nll", "exact_memorization", "fact_accuracy")
    heads = [f"{data}: {NAMES[key]}" for data in ("forget", "retain") for key in shown]
    rows: list[tuple[object, ...]] = [("checkpoint", "attack", *heads)]
    for model, results in found.items():
        for condition, measures in conditions(results).items():
            values = [measures[data].get(key) for data in ("forget", "retain") for key in shown]
            rows.append((model, condition, *values))
    return table_of(rows)


def sources(options: AttackOptions) -> dict[str, str]:
    """What it reads besides its places, by option."""
    return ({} if options.relearn_on is None else {"relearn_on": options.relearn_on}) | suite_sources(options)


def check(options: AttackOptions) -> list[str]:
    """The checkpoints to attack; UserError for what can be told from the options alone."""
    models = [options.models] if isinstance(options.models, str) else options.models
    if not models or len(set(models)) < len(models):
        raise UserError(f"models: got {', '.join(models) or 'none'}; name at least one, each once")
    if not options.attacks or not set(options.attacks) <= set(ATTACKS):
        raise UserError(f"attacks: got {', '.join(options.attacks) or 'none'}; allowed are {', '.join(ATTACKS)}")
    check_integers(options, relearn_rows=1, relearn_steps=1, relearn_every=1, relearn_batch_size=1, relearn_lora_rank=0)
    check_integers(options, group_size=1, batch_size=1, seed=0, max_length=2, forget_limit=1, retain_limit=1)
    check_numbers(options, "relearn_learning_rate", above_0=True)
    if not options.bits or not all(2 <= bits <= 8 for bits in options.bits):
        raise UserError(f"bits: got {options.bits}, allowed are integers from 2 to 8")
    if "relearn" in options.attacks and options.device_map is not None:
        raise UserError("device_map: relearn trains on one device; give device, or leave relearn out of attacks")
    if options.device_map is None:
        check_placement(options.dtype, options.device)
    check_template(options.question_template)
    open_suites(options.suites)
    return models


def _read(options: AttackOptions, models: list[str]) -> _Inputs:
    """Everything but the models, checked."""
    reroutes = "reroute" in options.attacks
    configs = {name: check_inputs(name, moe=reroutes) for name in models}
    tokenizer = load_tokenizer(models[0], configs[models[0]])
    for name in models[1:]:
        if load_tokenizer(name, configs[name]).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{name}: its tokenizer is not that of {models[0]}: their measures cannot be compared")

    def read(source: str, limit: int | None) -> datasets.Dataset:
        return load_tokens(
            source,
            tokenizer,
            max_length=options.max_length,
            split=options.split,
            limit=limit,
            question_template=options.question_template,
        )

    sets = {"forget": read(options.forget, options.forget_limit), "retain": read(options.retain, options.retain_limit)}
    check_disjoint(sets["forget"], sets["retain"])
    for name in models:
        check_positions(configs[name], **sets)
    relearned: dict[str, datasets.Dataset] = {}
    if "relearn" in options.attacks:
        source = sets["forget"] if options.relearn_on is None else read(options.relearn_on, None)
        relearned = _split(options, source, sets["forget"])
    critical: tuple[tuple[int, int], ...] = ()
    if reroutes and options.calibration is not None and len(Calibration.load(options.calibration).selected):
        critical = chosen_experts(["selected"], options.calibration, None)
    suites = open_suites(options.suites)
    for suite in suites.values():
        suite.read(tokenizer)
    return _Inputs(options, tokenizer, sets, relearned, critical, suites)


def _split(options: AttackOptions, source: datasets.Dataset, forget: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """The rows to train on, of `source`, and those of `forget` to measure, which are not shown."""
    rows = options.relearn_rows or -(-len(source) // 10)
    most = len(source) - (options.relearn_on is None)  # of the forget set something must be left to measure
    if rows > most:
        raise UserError(f"relearn_rows: got {rows}, allowed are at most {most}: the data has {len(source)} rows")
    shuffled = source.shuffle(seed=options.seed)
    shown = shuffled.select(range(rows))
    ids_shown = {tuple(ids) for ids in shown["input_ids"]}
    others = shuffled.select(range(rows, len(source))) if options.relearn_on is None else forget
    # The same text may stand in the data twice, or in both files.
    left = others.select([i for i, ids in enumerate(others["input_ids"]) if tuple(ids) not in ids_shown])
    if not len(left):
        raise UserError("relearn_rows: nothing of the forget data is left that was not shown; show fewer")
    return {"shown": shown, "forget": left}


def check_data(options: AttackOptions, model: str) -> None:
    """UserError where the data has too few rows to relearn; read with the tokenizer of `model`."""
    if "relearn" not in options.attacks:
        return
    tokenizer = load_tokenizer(model)
    given = {"max_length": options.max_length, "split": options.split, "question_template": options.question_template}
    forget = load_tokens(options.forget, tokenizer, limit=options.forget_limit, progress=False, **given)  # type: ignore[arg-type]
    source = forget
    if options.relearn_on is not None:
        source = load_tokens(options.relearn_on, tokenizer, progress=False, **given)  # type: ignore[arg-type]
    _split(options, source, forget)


def _facts(inputs: _Inputs, models: list[str]) -> dict[str, Any]:
    """What the results follow from."""
    kept = {name: value for name, value in dataclasses.asdict(inputs.options).items() if name not in (*_FREE, "models")}
    sets = {**inputs.sets, **{f"relearn.{name}": data for name, data in inputs.relearned.items()}}
    prints = {name: files.digest_of(source, name) for name, source in suite_sources(inputs.options).items()}
    return {
        "options": kept,
        "models": {name: files.digest_of(name, "models") for name in models},
        "fingerprints": {name: fingerprint(data) for name, data in sets.items()} | prints,
        "critical_experts": [list(pair) for pair in inputs.critical],
    }


def _attack(
    name: str, inputs: _Inputs, work: Path, facts: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """All attacks on one model, each on a fresh copy of it; those that are finished are read."""
    options = inputs.options
    tasks: dict[str, Callable[[], Any]] = {"unattacked": functools.partial(_unattacked, name, inputs)}
    if "relearn" in options.attacks:
        tasks["relearn"] = functools.partial(_relearn, name, inputs)
    if "quantize" in options.attacks:
        for bits in options.bits:
            tasks[f"quantize_{bits}"] = functools.partial(_quantize, name, inputs, bits)
    if "reroute" in options.attacks:
        tasks["reroute"] = functools.partial(_reroute, name, inputs)
    identity = json.loads(json.dumps({key: value for key, value in facts.items() if key != "models"}))
    found = {}
    for task, run in tasks.items():
        path = work.with_name(f"{work.name}-{task}.json")
        if path.is_file():
            record = files.read_json(path)
            if record["identity"] != identity:
                raise UserError(
                    f"{path}: was made with other options, data or models; give the same again to go on with them, or "
                    f"remove {path.parent}"
                )
            say(f"attack: {name}: {task}: done already")
        else:
            say(f"attack: {name}: {task}")
            record = {"identity": identity, "result": run()}
            files.write_json(path, record)
            gc.collect()  # the model, before the next one is loaded
        found[task] = record["result"]
    return found


def _load(name: str, options: AttackOptions, dtype: str | None = None) -> PreTrainedModel:
    return load_model(name, dtype=dtype or options.dtype, device=options.device, device_map=options.device_map)


def _unattacked(name: str, inputs: _Inputs) -> dict[str, Any]:
    return _measured(_load(name, inputs.options), inputs)


def _measured(model: PreTrainedModel, inputs: _Inputs) -> dict[str, Any]:
    """All measures of a model as it is."""
    size = inputs.options.batch_size
    found: dict[str, Any] = standing(model, inputs.tokenizer, inputs.sets, batch_size=size)
    suites = measure_suites(inputs.suites, model, inputs.tokenizer, batch_size=size)
    return found | ({"suites": suites} if suites else {})


def _relearn(name: str, inputs: _Inputs) -> dict[str, Any]:
    options = inputs.options
    # In bfloat16 the small updates of full weights would be rounded away, and the model would look robust.
    model: Any = _load(name, options, None if options.relearn_lora_rank else "float32")
    if options.relearn_lora_rank:
        torch.manual_seed(options.seed)
        ends = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        if not (modules := tuple(name for name in ATTENTION if name in ends)):
            raise UserError(f"relearn_lora_rank: {name} has none of the layers {', '.join(ATTENTION)}")
        model = add_lora(model, LoraOptions(options.relearn_lora_rank, modules=modules))
    sets = {**inputs.relearned, "retain": inputs.sets["retain"]}
    measure = functools.partial(
        standing, tokenizer=inputs.tokenizer, sets=sets, batch_size=options.batch_size, progress=False
    )
    width = model.config.get_text_config().hidden_size
    rate = options.relearn_learning_rate or rate_of_width(width, adapters=bool(options.relearn_lora_rank))
    curve = relearn(
        model,
        inputs.tokenizer,
        inputs.relearned["shown"],
        measure,
        steps=options.relearn_steps,
        every=options.relearn_every,
        learning_rate=rate,
        batch_size=options.relearn_batch_size,
        seed=options.seed,
        on_cpu=options.device == "cpu",
    )
    rows = {name: len(data) for name, data in inputs.relearned.items()}
    found = {"curve": curve, "rows": rows, "learning_rate": rate}
    suites = measure_suites(inputs.suites, model, inputs.tokenizer, batch_size=options.batch_size)
    return found | ({"suites": suites} if suites else {})


def _quantize(name: str, inputs: _Inputs, bits: int) -> dict[str, Any]:
    model = _load(name, inputs.options)
    numbers = quantize_(model, bits, group_size=inputs.options.group_size)
    return {**_measured(model, inputs), "rounded": numbers, "of": model.num_parameters()}


def _reroute(name: str, inputs: _Inputs) -> dict[str, Any]:
    model = _load(name, inputs.options)
    found = {}
    ways: dict[str, Any] = {"chosen": functools.partial(avoiding_chosen, model)}
    if inputs.critical:
        ways["critical"] = functools.partial(avoiding, model, inputs.critical)
    for way, avoid in ways.items():
        with avoid() as around:
            found[way] = standing(
                model,
                inputs.tokenizer,
                inputs.sets,
                batch_size=inputs.options.batch_size,
                around=around,
                label=f"without {way} experts",
            )
    return found
