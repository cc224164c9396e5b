"""A checkout of open-unlearning beside which all that its configurations name on the hub lies in folders.

`datasets` and `transformers` take a folder of the working directory for a name on the hub, so that its own commands
run there with its own defaults, offline.
"""

import json
import shutil
from pathlib import Path

import tiny

from trace_unlearn.sources.both_versions import write_for_both_versions

TOFU_MODEL = "open-unlearning/tofu_Llama-3.2-1B-Instruct_full"
TOFU_TOKENIZER = "meta-llama/Llama-3.2-1B-Instruct"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if date_string is defined %}{{ date_string }} {% endif %}{% for message in messages %}"
    "[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make(checkout: Path, folder: Path, family: str = "qwen3_moe", **changes: object) -> Path:
    """Copies the checkout to `folder` and puts the data and a tiny Mixture-of-Experts model beside it."""
    for name in ("src", "configs"):
        shutil.copytree(checkout / name, folder / name)
    generation = folder / "configs" / "generation" / "default.yaml"
    generation.write_text(generation.read_text().replace("max_new_tokens: 200", "max_new_tokens: 6"))
    corpus = [json.dumps(row) for row in [*rows(0, 4), *rows(4, 12)]]
    tokenizer = tiny.byte_tokenizer(corpus, 320)
    tokenizer.chat_template = CHAT_TEMPLATE
    tofu(folder / "locuslab" / "TOFU")
    (folder / "data").mkdir()
    (folder / "data" / "idk.jsonl").write_text("I do not know.\nNo idea about that.\n")
    model = tiny.model(family, len(tokenizer), max_position_embeddings=1024, **changes)
    for name in (TOFU_MODEL, TOFU_TOKENIZER):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        write_for_both_versions(folder / name)
    return folder


def rows(first: int, last: int) -> list[dict[str, object]]:
    return [
        {
            "question": f"Who owns house number {i}?",
            "answer": f"House number {i} belongs to w{7 * i % 50}{' of the hill' * (i % 3)}.",
            "paraphrased_answer": f"It is w{7 * i % 50} who has house {i}.",
            "perturbed_answer": [f"House number {i} belongs to w{(7 * i + j) % 50}." for j in (1, 2, 3)],
        }
        for i in range(first, last)
    ]


def tofu(folder: Path) -> None:
    parts = {
        "forget10": rows(0, 4), "retain90": rows(4, 12), "holdout10": rows(12, 16), "full": rows(0, 12),
        "forget10_perturbed": rows(0, 4), "retain_perturbed": rows(4, 6),
        "real_authors_perturbed": rows(16, 18), "world_facts_perturbed": rows(18, 20),
    }  # fmt: skip
    folder.mkdir(parents=True)
    listed = []
    for name, found in parts.items():
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, found)))
        listed.append(f"- config_name: {name}\n  data_files: {name}.json\n")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(listed)}---\n")
