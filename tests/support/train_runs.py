"""Small runs of the verb `train`: its inputs, and what it wrote."""

import dataclasses
import json
import random
from pathlib import Path

import tiny
from safetensors.torch import load_file

from trace_unlearn.calibration.calibrate import calibrate
from trace_unlearn.routing.profile import profile_routing
from trace_unlearn.sources.data import load_tokens
from trace_unlearn.sources.model import load_model, load_tokenizer
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.verbs.train import TrainOptions


def write_facts(path, count, seed):
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        words = " ".join(draw.choice(tiny.WORDS) for _ in range(draw.randint(4, 9)))
        lines.append(json.dumps({"question": f"what is {words} ?", "answer": f"the {draw.choice(tiny.WORDS)} ."}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def make_files(folder, checkpoint):
    """Both data files for a checkpoint, and a calibration for them."""
    options = {
        "model": str(checkpoint),
        "forget": write_facts(folder / "forget.jsonl", 12, 1),
        "retain": write_facts(folder / "retain.jsonl", 30, 2),
    }
    tokenizer, model = load_tokenizer(options["model"]), load_model(options["model"], device="cpu")
    data = [load_tokens(options[name], tokenizer, progress=False) for name in ("forget", "retain")]
    stats = profile_routing(model, *data, pad_token_id=tokenizer.pad_token_id, progress=False)
    for rule in ("balance", "ratio"):
        calibrate(stats, experts_per_layer=2, rule=rule).save(folder / rule)
    stats.save(folder / "profile")
    return {**options, "calibration": str(folder / "balance")}


def options(files, output, **changes):
    """Each change by its last name: an option of `train`, a knob of the method, or what TrainingArguments call it."""
    training = {"disable_tqdm": True, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1}
    training |= changes.pop("training", {})
    method = {"retain_per_forget": 2}
    given = {**files, "output": str(output), "device": "cpu"}
    own, knobs = ({field.name for field in dataclasses.fields(kind)} for kind in (TrainOptions, TraceConfig))
    for name, value in changes.items():
        (given if name in own else method if name in knobs else training)[name] = value
    return TrainOptions(**given, method=TraceConfig(**method), training=training)


def record(output):
    return json.loads((Path(output) / "trace.json").read_text())


def losses(output):
    return [entry["loss"] for entry in record(output)["log"] if "loss" in entry]


def weights(output):
    return load_file(Path(output) / "model.safetensors")
