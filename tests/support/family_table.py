"""The table of families, docs/families.md: `python tests/support/family_table.py` writes it.

Every row is a family that test_families.py and test_fuse_routers.py run, and what they assert of it.
"""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import families
import transformers

from trace_unlearn.errors import UserError
from trace_unlearn.integrations import fuse_routers
from trace_unlearn.routing import adapters
from trace_unlearn.routing.recorder import moe_layers

PAGE = Path(__file__).parent.parent.parent / "docs" / "families.md"


def heading() -> str:
    return f"Made with transformers {transformers.__version__}."


def page() -> str:
    lines = [
        "# Families",
        "",
        "The Mixture-of-Experts families of transformers, found in its source, and what works with each. A test runs a",
        "tiny model of every one and compares what `RoutingRecorder` saw with the experts whose weights had a part in",
        "the output. *Observed* says where the choice is read: *indices*, that the layer is handed, or an adapter of",
        "its own. *Fused* says whether `fuse_routers` takes the family: same experts, weights and gradients as its own",
        "router. How a model may be loaded and placed: [counting_routes.md](counting_routes.md).",
        "",
        heading(),
        "",
        "| Family | Model | Observed | Fused |",
        "|---|---|---|---|",
    ]
    lines += [f"| {family.module} | {family.model_class} | {observed(family)} | {fused(family)} |" for family in rows()]
    broken = [f"- {module} with transformers {release}: {why}." for (release, module), why in families.BROKEN.items()]
    return "\n".join([*lines, "", "Not runnable in a release of transformers:", "", *broken, ""])


def rows() -> list[families.Family]:
    return families.families()


def observed(family: families.Family) -> str:
    try:
        layers = moe_layers(families.build(family))
    except UserError as error:
        return "no: " + _reason(str(error).partition(", and ")[2])
    found = {layer.adapter.attach.__name__.lstrip("_"): layer.adapter for layer in layers}
    (name,) = found
    if name == "indices":
        return "indices"
    note = inspect.getdoc(getattr(adapters, "_" + name))
    assert note is not None
    return f"adapter: {_reason(note)}"


def fused(family: families.Family) -> str:
    try:
        fuse_routers(families.build(family))
    except UserError as error:
        _, _, reason = str(error).partition("cannot be fused: ")
        return (
            "no: " + _reason(reason.partition(", and ")[2] or reason)
            if reason
            else "no: its routing cannot be observed"
        )
    return "yes"


def _reason(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text[0].lower() + text[1:]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
