from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from train_runs import make_files


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """The folder of a tiny saved checkpoint of a family and seed, with changes to its config, made once a session."""
    made: dict[tuple, Path] = {}

    def build(family: str, seed: int = 0, **changes: object) -> Path:
        key = (family, seed, *sorted(changes.items()))
        if key not in made:
            made[key] = tiny.save_checkpoint(tmp_path_factory.mktemp(family), family, seed=seed, **changes)
        return made[key]

    return build


@pytest.fixture(scope="session")
def files(tmp_path_factory, checkpoint) -> dict[str, str]:
    """The options of `train` that name a checkpoint, both data files and a calibration for them."""
    return make_files(tmp_path_factory.mktemp("train"), checkpoint("qwen3_moe"))


@pytest.fixture(params=tiny.FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()
