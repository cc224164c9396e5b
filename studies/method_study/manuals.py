"""Real text that a machine carries: manual pages and documentation strings, by family; one page is one source.

The domain to forget from is git's manual pages, which are each other's natural neighbours. Other families are manuals
of other programs and the documentation of Python packages; the licences are the general stream.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trace_unlearn.errors import UserError
from trace_unlearn.files import read_json, staged_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANUALS = Path("/usr/share/man")
LICENCES = Path("/usr/share/common-licenses")
FORGOTTEN = "git"
GENERAL = "licences"
# Family: globs of manual pages.
PAGES = {
    "git": ("man1/git*.gz",),
    "openssl": ("man1/openssl*.gz",),
    "systemd": ("man[158]/systemd*.gz",),
    "dpkg": ("man[158]/dpkg*.gz", "man3/Dpkg*.gz"),
    "network": ("man8/tc*.gz", "man8/ip-*.gz"),
    "postgres": ("man[17]/pg_*.gz", "man7/CREATE*.gz", "man7/ALTER*.gz"),
    "threads": ("man3/pthread_*.gz",),
}
# Family: packages whose documentation strings are taken.
PACKAGES = {"numpy": "numpy", "torch": "torch", "transformers": "transformers"}
VOCABULARY = 1024
WINDOW_TOKENS = 62  # with <s> and </s> 64, the model's context
WINDOWS_A_PAGE = 8
PAGES_A_FAMILY = 24
MOST_PAGES = 300  # read of a family
GROUP_PAGES = {"F": 12, "N": 24, "A": 24}
GENERAL_SHARE = 0.2
ASKED = 48  # windows of a group in the read-out
LEAST_FAMILIES = 3


def load(folder: Path) -> tuple[dict[str, list[list[str]]], PreTrainedTokenizerBase]:
    """Windows of text by family and page, and the tokenizer learnt on them; made once in `folder`."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        _make(folder)
    windows: dict[str, list[list[str]]] = read_json(folder / "windows.json")
    return windows, AutoTokenizer.from_pretrained(folder)


def _make(folder: Path) -> None:
    texts = {family: list(_pages(globs)) for family, globs in PAGES.items()}
    texts |= {family: list(_docstrings(package)) for family, package in PACKAGES.items()}
    texts[GENERAL] = [
        _flat(path.read_text(errors="replace")) for path in sorted(LICENCES.glob("*")) if not path.is_symlink()
    ]
    tokenizer = _learn([text for pages in texts.values() for text in pages])
    windows = {family: [_windows(page, tokenizer) for page in pages] for family, pages in texts.items()}
    enough = {
        family: [page for page in pages if page]
        for family, pages in windows.items()
        if sum(map(bool, pages)) >= (sum(GROUP_PAGES.values()) if family == FORGOTTEN else PAGES_A_FAMILY)
        or (family == GENERAL and any(pages))
    }
    if FORGOTTEN not in enough or GENERAL not in enough or len(enough) < 2 + LEAST_FAMILIES:
        raise UserError(
            f"manuals: this machine has too little text under {MANUALS} and {LICENCES}: {sorted(enough)}; needed are "
            f"{FORGOTTEN!r}, {GENERAL!r} and {LEAST_FAMILIES} other families. Leave the section out with --only"
        )
    with staged_folder(folder) as staged:
        write_json(staged / "windows.json", enough)
        tokenizer.save_pretrained(staged)


def _pages(globs: Sequence[str]) -> Iterator[str]:
    paths = sorted(path for pattern in globs for path in MANUALS.glob(pattern) if not path.is_symlink())
    for path in _thinned(paths):
        yield plain_text(gzip.decompress(path.read_bytes()).decode(errors="replace"))


def plain_text(roff: str) -> str:
    r"""The words of a manual page, without its formatting.

    >>> plain_text('.\\" comment\n.TH X 1\n.SH "NAME"\ngit\\-add \\- Add \\fBfile\\fR contents\\&.\n.sp\nNow.')
    'NAME git-add - Add file contents. Now.'
    """
    lines = []
    body = re.split(r"^\.TH.*$", roff, maxsplit=1, flags=re.MULTILINE)[-1]  # before it, macros are defined
    for line in body.splitlines():
        if line.startswith(('.\\"', "'\\\"", "'", ".ie", ".el", ".if", ".de", ".ds", ".nr", ".so")):
            continue
        if line.startswith("."):
            line = re.sub(r"^\.\s*\S+", "", line).replace('"', " ")  # a macro's words stay
            if not re.search(r"[A-Za-z]{2}", line):
                continue
        lines.append(line)
    text = " ".join(lines)
    text = re.sub(r"\\f(\[[^]]*\]|\(..|.)", "", text)
    text = text.replace("\\(aq", "'").replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ")
    text = re.sub(r"\\\((..)|\\\*\(..|\\\*\[[^]]*\]|\\s[-+]?\d|\\[&|^%:/,c]", "", text)
    return _flat(text)


def _docstrings(package: str) -> Iterator[str]:
    """One source file's documentation strings are one page."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return
    sources = [p for p in sorted(Path(found.origin).parent.rglob("*.py")) if "test" not in str(p)]
    pages = []
    for path in _thinned([p for p in sources if p.stat().st_size > 20_000]):
        nodes = ast.walk(ast.parse(path.read_text(errors="replace")))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        pages.append(_flat(" ".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))))
    yield from pages


def _thinned(paths: list[Path]) -> list[Path]:
    return random.Random(0).sample(paths, min(MOST_PAGES, len(paths)))


def _flat(text: str) -> str:
    return " ".join("".join(c if c.isascii() and c.isprintable() else " " for c in text).split())


def _learn(texts: list[str]) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return tokenizer


def _windows(page: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The first windows of a page, of whole words and at most WINDOW_TOKENS; none of a page with less than two."""
    words = page.split()[: WINDOWS_A_PAGE * WINDOW_TOKENS]
    if not words:
        return []
    lengths = [len(ids) for ids in tokenizer(words, add_special_tokens=False)["input_ids"]]
    windows: list[str] = []
    window: list[str] = []
    room = WINDOW_TOKENS
    for word, length in zip(words, lengths, strict=True):
        if length > room:
            windows.append(" ".join(window))
            window, room = [], WINDOW_TOKENS
        if length <= room:  # a word longer than a window is left out
            window.append(word)
            room -= length
    return windows[:WINDOWS_A_PAGE] if len(windows) > 1 else []


@dataclass(frozen=True)
class Split:
    """The pages of one seed, as windows.

    Attributes:
        seed: what drew it.
        groups: F to forget, N neighbours, A adjacent, R held out of other families.
        held_out: the windows of R by family.
        retained: the other half of each other family.
        general: of the licences.
    """

    seed: int
    groups: dict[str, list[str]]
    held_out: dict[str, list[str]]
    retained: dict[str, list[str]]
    general: list[str]

    @property
    def forget(self) -> list[str]:
        return self.groups["F"]

    def retain(self, adjacent: float, count: int) -> tuple[list[str], list[int]]:
        """`count` windows and which are adjacent ones."""
        draw = random.Random(f"{self.seed} retain")
        near, general = round(adjacent * count), round(GENERAL_SHARE * count)
        others = [window for windows in self.retained.values() for window in windows]
        chosen = [
            *((True, window) for window in _drawn(draw, self.groups["A"], near)),
            *((False, window) for window in _drawn(draw, self.general, general)),
            *((False, window) for window in _drawn(draw, others, count - near - general)),
        ]
        draw.shuffle(chosen)
        return [window for _, window in chosen], [i for i, (is_near, _) in enumerate(chosen) if is_near]

    def pretrain(self, count: int) -> list[str]:
        """`count` windows of everything, again and again in new orders."""
        draw = random.Random(f"{self.seed} pretrain")
        everything = [w for windows in (*self.groups.values(), *self.retained.values(), self.general) for w in windows]
        found: list[str] = []
        while len(found) < count:
            found += draw.sample(everything, len(everything))
        return found[:count]


def split(text: dict[str, list[list[str]]], seed: int) -> Split:
    """Which pages are to forget, to keep and to hold out."""
    draw = random.Random(f"{seed} pages")
    pages = draw.sample(text[FORGOTTEN], sum(GROUP_PAGES.values()))
    groups: dict[str, list[str]] = {}
    for group, size in GROUP_PAGES.items():
        groups[group] = [window for page in pages[:size] for window in page]
        pages = pages[size:]
    held_out, retained = {}, {}
    for family in sorted(set(text) - {FORGOTTEN, GENERAL}):
        chosen = draw.sample(text[family], PAGES_A_FAMILY)
        half = PAGES_A_FAMILY // 2
        retained[family] = [window for page in chosen[:half] for window in page]
        held_out[family] = [window for page in chosen[half:] for window in page]
    groups["R"] = [window for windows in held_out.values() for window in windows]
    general = _drawn(draw, [window for page in text[GENERAL] for window in page], 10**6)
    return Split(seed, groups, held_out, retained, general)


def spread(windows: Sequence[str], count: int) -> list[str]:
    """`count` of them, evenly.

    >>> spread(["a", "b", "c", "d"], 2)
    ['a', 'c']
    """
    count = min(count, len(windows))
    return [windows[i * len(windows) // count] for i in range(count)]


def _drawn(draw: random.Random, windows: Sequence[str], count: int) -> list[str]:
    return draw.sample(windows, min(count, len(windows)))
