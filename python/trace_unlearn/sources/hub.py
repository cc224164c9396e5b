"""Names on the hub. Where it does not answer, what is cached is used, and what is not fails at once.

The libraries ask again and again for every file: a minute passes for a mistyped name, and minutes for a cached model.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from huggingface_hub import constants, get_session, snapshot_download

from trace_unlearn.errors import UserError

logger = logging.getLogger(__name__)


def away() -> bool:
    """Whether the hub does not answer, or must not be asked (HF_HUB_OFFLINE)."""
    if huggingface_hub.is_offline_mode():
        return True
    try:
        _ask()
    except Exception as error:  # of the HTTP library that huggingface_hub is built on
        _say(f"{constants.ENDPOINT} does not answer ({error}): only what is cached is used")
        return True
    return False


def cached_model(name: str) -> Path:
    """The snapshot of a model that was downloaded before; UserError where there is none."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # of huggingface_hub, for which the name may be malformed, too
        raise UserError(
            f"{name}: no such folder, the hub ({constants.ENDPOINT}) cannot be asked, and nothing is cached of it"
        ) from error


def load_dataset(name: str, config: str | None, split: str) -> Any:
    """`datasets.load_dataset`; where the hub is away, from what it prepared before or from a downloaded snapshot."""
    with cached_if_away() as cached:
        try:
            return datasets.load_dataset(name, config, split=split)
        except Exception as error:
            if not cached:
                raise
            try:
                folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
            except Exception:  # there is none
                raise error from None
            return datasets.load_dataset(folder, config, split=split)


@contextlib.contextmanager
def cached_if_away() -> Iterator[bool]:
    """Inside, `datasets` does not ask the hub if it is away; gives whether it is."""
    before, cached = datasets.config.HF_HUB_OFFLINE, away()
    datasets.config.HF_HUB_OFFLINE = before or cached
    try:
        yield cached
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@functools.cache  # an answer; a failure raises, and is not kept
def _ask() -> None:
    get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)


@functools.cache
def _say(what: str) -> None:
    logger.warning(what)
