"""The study's tasks for a worker: make one model, unlearn it with one arm; a product is there whole or not at all."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from studies.method_study.cells import SHUFFLED, UNIFORM, Arm
from studies.method_study.worlds import FORGET_RISE, SIZES, Sizes, World, is_finite, make_world, save_documents
from trace_unlearn.demo.pretrain import fit, new_model
from trace_unlearn.demo.unlearn import LEARNING_RATES, be_quiet, make_trainer, recorder
from trace_unlearn.demo.workers import Progress
from trace_unlearn.errors import UserError
from trace_unlearn.files import read_json, staged_folder, write_json


def model_folder(output: Path, corpus: str, seed: int) -> Path:
    return output / corpus / f"model-{seed}"


def arm_file(output: Path, seed: int, arm: Arm) -> Path:
    return model_folder(output, arm.corpus, seed) / "arms" / f"{arm.name}.json"


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

    path = arm_file(output, seed, arm)
    if path.is_file():
        return
    folder = model_folder(output, arm.corpus, seed)
    world = make_world(arm.corpus, seed, sizes, output / arm.corpus)
    data, near = _data(folder, world, arm.adjacent)
    forget, retain = (load_tokens(data / f"{n}.jsonl", world.tokenizer, progress=False) for n in ("forget", "retain"))
    model = load_model(folder / "checkpoint", device="cpu")
    calibration = _calibration(folder, model, forget, retain, world, arm)
    if arm.weights == SHUFFLED:
        calibration = calibration.shuffled(seed)
    start = read_json(folder / "checkpoint" / "knowledge.json")["F_nll"]
    recipe = dataclasses.replace(sizes.recipe, stop_at_forget_nll=start + FORGET_RISE[arm.corpus][1] + 0.2)
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
    if arm.weights != UNIFORM:
        weight_of = [float(calibration.weights_of(d).mean()) for d in near]
        record["calibration"] = {
            "experts": len(calibration.selected),
            "error_before": float((calibration.r - calibration.f).abs().mean()),
            "error": calibration.mean_error,
            "ess": calibration.ess,
            "largest_weight": calibration.largest_weight,
            "adjacent_weight": sum(weight_of) / len(weight_of) if weight_of else None,
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


def _calibration(folder: Path, model: Any, forget: Any, retain: Any, world: World, arm: Arm) -> Any:
    from trace_unlearn.calibration.calibrate import calibrate
    from trace_unlearn.routing.profile import RoutingStatistics, profile_routing

    profile = folder / f"profile-{arm.adjacent}"
    if not profile.is_dir():
        pad = world.tokenizer.pad_token_id
        assert isinstance(pad, int)
        stats = profile_routing(model, forget, retain, batch_size=32, pad_token_id=pad, progress=False)
        _make_once(profile, lambda: stats.save(profile))
    stats = RoutingStatistics.load(profile)
    return calibrate(stats, rule=arm.rule, min_ess=arm.min_ess, experts_per_layer=arm.experts, rank=arm.selection)


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
