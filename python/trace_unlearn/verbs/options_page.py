"""The page docs/options.md: every option of every verb, from the options classes.

python -m trace_unlearn.verbs.options_page > docs/options.md
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import docstring_parser

from trace_unlearn.training.config import TraceConfig
from trace_unlearn.values import markdown_table
from trace_unlearn.verbs.cli import VERBS
from trace_unlearn.verbs.train_options import DEFAULTS

HEAD = """\
# Options

Every option of every verb: as a flag (`--max_length 512`, `--method.objective npo`), in a file of the verb's own
(`--config file.yaml`), or in that verb's section of the file that `run` and `plan` read. This page is written from the
code: `python -m trace_unlearn.verbs.options_page > docs/options.md`.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for name, verb in VERBS.items():
        options = getattr(importlib.import_module(f"trace_unlearn.{verb.module}"), verb.options)
        parts.append(f"## {name}\n\n{_opening(options)}\n\n{_table(options)}")
        if name == "train":
            parts.append(f"### method\n\n{_opening(TraceConfig)}\n\n{_table(TraceConfig, skip=('anchor_experts',))}")
            defaults = [[f"`{field}`", f"`{_shown(value)}`"] for field, value in DEFAULTS.items()]
            parts.append(
                "### training\n\nAny field of [transformers.TrainingArguments]"
                "(https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments) by its "
                "own name. These have defaults here:\n\n" + markdown_table(["field", "default"], defaults)
            )
    return "\n".join(parts)


def _opening(options: type) -> str:
    return " ".join((docstring_parser.parse(options.__doc__ or "").short_description or "").split())


def _table(options: Any, skip: tuple[str, ...] = ()) -> str:
    says = {item.arg_name: item.description or "" for item in docstring_parser.parse(options.__doc__ or "").params}
    rows = [
        [f"`{field.name}`", _default(field), " ".join(says[field.name].split())]
        for field in dataclasses.fields(options)
        if field.name not in skip
    ]
    return markdown_table(["option", "default", "what it is"], rows)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_shown(field.default)}`"
    if field.default_factory is dataclasses.MISSING:
        return "needed"
    value = field.default_factory()
    return "below" if dataclasses.is_dataclass(value) or field.name == "training" else f"`{_shown(value)}`"


def _shown(value: object) -> str:
    """As YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace("'", "")


if __name__ == "__main__":
    print(page(), end="")
