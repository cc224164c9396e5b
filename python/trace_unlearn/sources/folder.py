"""What a checkpoint's folder holds besides its weights, and a new checkpoint has too: code, licence, tokenizer."""

from __future__ import annotations

import fnmatch
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download

from trace_unlearn.errors import UserError
from trace_unlearn.sources import hub

logger = logging.getLogger(__name__)

WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.gguf",
    "*.ot",
    "*.index.json",
)
OWN = ("config.json",)  # a new checkpoint has its own
RENAMED = {"README.md": "README.base.md", "trace.json": "trace.base.json"}  # likewise, but this is kept beside it


def copy_rest(source: Path, folder: Path) -> None:
    """Copies what `source`, a checkpoint, holds besides weights and configuration into the checkpoint `folder`.

    Files of the same name are replaced: what came with the model stays as it was. The model card becomes
    README.base.md. Hidden files and folders stay behind.

    >>> import tempfile; old, new = (Path(tempfile.mkdtemp()) for _ in range(2))
    >>> for name in ("LICENSE", "README.md", "config.json", "model.safetensors"):
    ...     _ = (old / name).write_text("theirs")
    >>> copy_rest(old, new)
    >>> sorted(path.name for path in new.iterdir())
    ['LICENSE', 'README.base.md']
    """
    for path in _rest(source):
        relative = path.relative_to(source)
        target = folder / RENAMED.get(str(relative), relative)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # what a link points to: the hub's cache is made of links
        except OSError as error:
            raise UserError(f"{path}: cannot copy it to {target}: {error.strerror or error}") from error


def _rest(source: Path) -> Iterator[Path]:
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if any(part.startswith((".", "checkpoint-")) for part in relative.parts) or not path.is_file():
            continue
        if str(relative) not in OWN and not any(fnmatch.fnmatch(path.name, pattern) for pattern in WEIGHTS):
            yield path


def refuse_inside(output: str | os.PathLike[str], model: str | os.PathLike[str]) -> None:
    """UserError where `output` lies in the folder of a checkpoint: it would be copied into what is made from that."""
    folder = Path(model).expanduser()
    if folder.is_dir() and Path(output).expanduser().resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"output: {output} lies in the folder of the model, {model}, whose files go into the unlearned checkpoint; "
            "name a place outside it"
        )


def shard_size(source: Path) -> int | None:
    """The size in bytes of the largest file of weights where there are several; None for one file."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        sizes = [path.stat().st_size for path in source.glob(pattern)]
        if sizes:
            return max(sizes) if len(sizes) > 1 else None
    return None


def folder_of(name_or_path: str | os.PathLike[str]) -> Path | None:
    """The folder that a checkpoint was loaded from; of a hub name its snapshot, with all that is not weights.

    None where there is none, and a warning where the hub's small files cannot be had.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(name_or_path)
    try:
        return Path(snapshot_download(name, ignore_patterns=list(WEIGHTS), local_files_only=hub.away()))
    except Exception as error:  # of the hub's client; the weights are there already
        logger.warning("%s: its licence and other files cannot be copied: %s", name, str(error).partition("\n")[0])
        return None
