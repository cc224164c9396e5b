"""The study's tasks for a worker: make one model, unlearn it with one arm; a product is there whole or not at all."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import trace_kernels as tk
from studies.method_study.cells import ORACLE, SHUFFLED, UNIFORM, Arm
from studies.method_study.worlds import SIZES, Sizes, World, is_finite, make_world, save_documents
from trace_unlearn.calibration.weights import Calibration
from trace_unlearn.demo.pretrain import fit, new_model
from trace_unlearn.demo.unlearn import LEARNING_RATES, be_quiet, make_trainer, recorder
from trace_unlearn.demo.workers import Progress, Task
from trace_unlearn.errors import UserError
from trace_unlearn.files import read_json, staged_folder, write_json
from trace_unlearn.routing.statistics import RoutingStatistics


def model_folder(output: Path, corpus: str, seed: int) -> Path:
    return output / corpus / f"model-{seed}"


def arm_file(output: Path, seed: int, arm: Arm) -> Path:
    return model_folder(output, arm.corpus, seed) / "arms" / f"{arm.name}.json"


def arm_tasks(output: Path, cells: Iterable[tuple[int, Arm]], sizes_of: Callable[[Arm], Sizes]) -> list[Task]:
    """What of the (seed, arm) is missing in the output folder, in this order, with the models that it needs."""
    tasks: list[Task] = []
    made: set[str] = set()
    for seed, arm in cells:
        if arm_file(output, seed, arm).is_file():
            continue
        sizes = sizes_of(arm)
        name = f"{arm.corpus} {seed}"
        if name not in made and not (model_folder(output, arm.corpus, seed) / "checkpoint").is_dir():
            made.add(name)
            cost = (0.06 if arm.corpus == "manuals" else 0.03) * sizes.pretrain.steps
            tasks.append(Task(name, make_model, (output, arm.corpus, seed, sizes), cost=cost))
        arguments = (output, seed, arm, sizes)
        tasks.append(Task(f"{name}, {arm.name}", run_arm, arguments, after=(name,), cost=expected_seconds(arm)))
    return tasks


def expected_seconds(arm: Arm) -> float:
    """On a free core; only the progress bar looks at it."""
    slower = (arm.retain_weight / 8) ** 0.3 / arm.pace
    return 6 * slower * (4 if arm.corpus == "manuals" else 1)


def make_model(output: Path, corpus: str, seed: int, sizes: Sizes, progress: Progress) -> None:
    """The pre-trained model and what it knows."""
    be_quiet()
    checkpoint = model_folder(output, corpus, seed) / "checkpoint"
    if checkpoint.is_dir():
        return
    world = make_world(corpus, seed, sizes, output / corpus)
    documents, labels = world.pretrain_tensors()
    model = new_model(sizes.pretrain, len(world.tokenizer), seed)
    fit(model, documents, labels, sizes.pretrain, progress)
    with staged_folder(checkpoint) as staged:
        model.save_pretrained(staged)
        world.tokenizer.save_pretrained(staged)
        write_json(staged / "knowledge.json", world.read_out(model))


def run_arm(output: Path, seed: int, arm: Arm, sizes: Sizes, progress: Progress) -> None:
    """Writes the arm's file: its curve and what its calibration came to."""
    be_quiet()
    from trace_unlearn.sources.data import load_tokens
    from trace_unlearn.sources.model import load_model
    from trace_unlearn.training.config import TraceConfig
    from trace_unlearn.training.trainable import train_only

    path = arm_file(output, seed, arm)
    if path.is_file():
        return
    folder = model_folder(output, arm.corpus, seed)
    world = make_world(arm.corpus, seed, sizes, output / arm.corpus)
    data, near = _data(folder, world, arm.adjacent)
    forget, retain = (load_tokens(data / f"{n}.jsonl", world.tokenizer, progress=False) for n in ("forget", "retain"))
    model = load_model(folder / "checkpoint", device="cpu")
    calibration = None
    if arm.weights != UNIFORM:
        calibration = _calibration(_statistics(folder, model, forget, retain, world, arm), arm, near)
        if arm.weights == SHUFFLED:
            calibration = calibration.shuffled(seed)
    if arm.trained == "experts":
        train_only(model, [r"\.experts\."])
    start = read_json(folder / "checkpoint" / "knowledge.json")["F_nll"]
    recipe = dataclasses.replace(sizes.recipe, stop_at_forget_nll=start + sizes.forget_rise + 0.2)
    config = TraceConfig(
        objective=arm.objective,
        alpha=arm.retain_weight,
        beta=recipe.npo_beta if arm.objective == "npo" else None,
        weighting="uniform" if arm.weights == UNIFORM else arm.routing,
        retain_per_forget=recipe.retain_per_forget,
    )
    curve: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="method-study-") as work:
        trainer = make_trainer(
            work,
            model,
            world.tokenizer,
            forget,
            retain,
            config=config,
            calibration=calibration,
            recipe=recipe,
            learning_rate=LEARNING_RATES[arm.objective] * sizes.pace * arm.pace,
            seed=seed,
            callback=recorder(curve, world.read_out, recipe, progress),
            log=True,  # which is where the trainer sees that a loss is no number
        )
        diverged = ""
        try:
            trainer.train()
        except UserError as error:  # the loss is no number any more: a finding about this arm, not a reason to stop
            diverged = str(error)
    record: dict[str, Any] = {
        "seed": seed,
        "arm": arm,
        "curve": [_rounded(point) for point in curve if is_finite(point)],
        "diverged": diverged,
    }
    if calibration is not None:
        record["calibration"] = {
            "experts": len(calibration.selected),
            "error_before": float((calibration.r - calibration.f).abs().mean()),
            "error": calibration.mean_error,
            "ess": calibration.ess,
            "largest_weight": calibration.largest_weight,
            "adjacent_weight": adjacent_weight(calibration, near),
        }
    write_json(path, record)


def _rounded(point: dict[str, float]) -> dict[str, float]:
    return {key: value if isinstance(value, int) else round(value, 5) for key, value in point.items()}


def _data(folder: Path, world: World, adjacent: float) -> tuple[Path, list[int]]:
    retain, near = world.retain(adjacent)
    data = folder / f"data-{adjacent}"
    if not data.is_dir():
        _make_once(data, lambda: save_documents(data, {"forget": world.forget, "retain": retain}))
    return data, near


def _make_once(folder: Path, make: Any) -> None:
    """Two workers may want the same folder; the first one to finish has made it."""
    try:
        make()
    except (OSError, UserError):
        if not folder.is_dir():
            raise


def _statistics(folder: Path, model: Any, forget: Any, retain: Any, world: World, arm: Arm) -> RoutingStatistics:
    from trace_unlearn.routing.profile import profile_routing
    from trace_unlearn.sources.data import load_tokens

    profile = folder / f"routes-{arm.adjacent}-{arm.forget_from}"
    if not profile.is_dir():
        if arm.forget_from == "other":
            data = folder / "data-other"
            if not data.is_dir():
                _make_once(data, lambda: save_documents(data, {"forget": world.other_domain()}))
            forget = load_tokens(data / "forget.jsonl", world.tokenizer, progress=False)
        pad = world.tokenizer.pad_token_id
        assert isinstance(pad, int)
        stats = profile_routing(  # of contexts: what it records serves every unit
            model, forget, retain, batch_size=32, pad_token_id=pad, progress=False, unit="context"
        )
        _make_once(profile, lambda: stats.save(profile))
    return RoutingStatistics.load(profile)


def _calibration(stats: RoutingStatistics, arm: Arm, near: Sequence[int]) -> Calibration:
    from trace_unlearn.calibration.calibrate import calibrate

    def of(unit: str, min_ess: float) -> Calibration:
        return calibrate(
            stats, rule=arm.rule, min_ess=min_ess, experts_per_layer=arm.experts, rank=arm.selection, unit=unit
        )

    if arm.weights == ORACLE:
        return oracle(of(arm.unit, arm.min_ess), near, arm.min_ess)
    if arm.as_heavy_as:
        wanted = adjacent_weight(of(arm.as_heavy_as, arm.min_ess), near)
        assert wanted is not None
        return as_heavy(lambda min_ess: of(arm.unit, min_ess), near, wanted, arm.min_ess)
    return of(arm.unit, arm.min_ess)


def adjacent_weight(calibration: Calibration, near: Sequence[int]) -> float | None:
    """The mean over the documents `near` of the mean weight of their tokens."""
    means = [float(calibration.weights_of(document).mean()) for document in near]
    return sum(means) / len(means) if means else None


def oracle(calibration: Calibration, near: Sequence[int], ess: float) -> Calibration:
    """`calibration` with one weight for the tokens of the documents `near` and one for all others, of mean 1.

    With a share s of the tokens near, weights a and b have an ESS of 1 / (s a^2 + (1 - s) b^2), so
    a = 1 + sqrt((1 / ess - 1) (1 - s) / s).
    """
    lengths = calibration.retain_offsets.diff()
    is_near = torch.zeros(len(lengths), dtype=torch.bool)
    is_near[list(near)] = True
    is_near = is_near.repeat_interleave(lengths)
    share = float(is_near.double().mean())
    high = 1 + math.sqrt((1 / ess - 1) * (1 - share) / share)
    weight = torch.where(is_near, high, (1 - share * high) / (1 - share)).float()
    w = weight.double()
    error = (tk.hit_moments(calibration.hits, w, len(calibration.f)) / float(w.sum()) - calibration.f).abs()
    return dataclasses.replace(
        calibration,
        token_weight=weight,
        ess=float(w.sum() ** 2 / (len(w) * (w**2).sum())),
        mean_error=float(error.mean()),
        largest_weight=high,
    )


def as_heavy(of: Callable[[float], Calibration], near: Sequence[int], wanted: float, min_ess: float) -> Calibration:
    """`of(ess)` with the ESS from `min_ess` on at which the documents `near` weigh `wanted`, by bisection."""
    low, high = min_ess, 0.999
    for _ in range(10):
        middle = (low + high) / 2
        weight = adjacent_weight(of(middle), near)
        assert weight is not None
        low, high = (middle, high) if weight > wanted else (low, middle)
    return of(low)


def default_sizes(quick: bool) -> dict[str, Sizes]:
    if not quick:
        return SIZES
    return {
        corpus: dataclasses.replace(
            sizes,
            pretrain=dataclasses.replace(sizes.pretrain, steps=450),
            recipe=dataclasses.replace(sizes.recipe, unlearn_steps=100, evaluate_every=8),
        )
        for corpus, sizes in SIZES.items()
    }
