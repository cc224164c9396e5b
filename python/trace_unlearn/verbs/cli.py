"""The command ``trace-unlearn VERB``: flags from the verb's options class, errors in one line, quick to start.

A verb is a module with an options dataclass, whose docstring documents the flags, and ``main(options)``. It is
imported only when its verb is asked for. A verb whose flags are not simply the fields of its options brings its own
``add_arguments(parser)`` and ``options_from(namespace)``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import json
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trace_unlearn.checks import meant
from trace_unlearn.errors import UserError, needs

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

PROGRAM = "trace-unlearn"
INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


@dataclass(frozen=True)
class Verb:
    """Where a verb lives and what it is for."""

    module: str
    options: str
    summary: str
    positional: str | None = None  # the flag that a first bare argument stands for


VERBS = {
    "profile": Verb("verbs.profile", "ProfileOptions", "count which experts the forget and the retain data activate"),
    "calibrate": Verb(
        "verbs.calibrate", "CalibrateOptions", "choose forget-critical experts and weigh the retain tokens"
    ),
    "plan": Verb(
        "verbs.plan", "PlanOptions", "say what train needs of every device's memory, before anything is loaded"
    ),
    "train": Verb("verbs.train", "TrainOptions", "unlearn: write a checkpoint that has forgotten"),
    "evaluate": Verb("verbs.evaluate", "EvaluateOptions", "measure checkpoints on forget and retain data"),
    "attack": Verb(
        "verbs.attack", "AttackOptions", "relearn, quantise, reroute: what comes back of what was forgotten"
    ),
    "report": Verb("verbs.report", "ReportOptions", "write one HTML page and plots about a run folder", "--run"),
    "run": Verb(
        "verbs.run", "RunOptions", "all of the above from one configuration file; goes on where it stopped", "--config"
    ),
    "demo": Verb("demo.demo", "DemoOptions", "the whole method on tiny built-in models, in minutes on a laptop CPU"),
}


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Raises an interrupt again that came while an object was being deleted, where Python prints and forgets it."""
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # From another thread, a moment later: here it would be printed and forgotten too.
            main_thread = threading.main_thread().ident
            threading.Timer(0.05, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"{PROGRAM} {_version()}")
        return 0
    name, *rest = words
    if name not in VERBS:
        return _fail(PROGRAM, f"unknown verb {name!r}, allowed are {', '.join(VERBS)}{meant(name, VERBS)}")
    try:
        with _interrupts_kept():
            run_verb(name, rest)
    except UserError as error:
        return _fail(f"{PROGRAM} {name}", str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("trace_unlearn", "trace_kernels"):
            raise
        return _fail(f"{PROGRAM} {name}", needs(error.name))
    except KeyboardInterrupt:
        print(f"\n{PROGRAM} {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def run_verb(name: str, words: Sequence[str]) -> None:
    """Parse the flags of the verb `name` and run it.

    Raises:
        UserError: an unknown flag, a bad value, or whatever mistake the verb finds.
        SystemExit: after ``--help``.
    """
    from trace_unlearn.files import at_home  # not above: help does without torch

    verb = VERBS[name]
    module = importlib.import_module(f"trace_unlearn.{verb.module}")
    options_class = getattr(module, verb.options)
    parser = build_parser(name, module, options_class)
    if verb.positional is not None and words and not words[0].startswith("-"):
        words = [verb.positional, *words]
    namespace = _parse(parser, words, module)
    if hasattr(module, "options_from"):
        options = module.options_from(namespace)
    else:
        values = parser.instantiate(namespace)
        options = options_class(**{field.name: values[field.name] for field in dataclasses.fields(options_class)})
    if not sys.stderr.isatty():
        _without_bars()
    module.main(at_home(options))


def _without_bars() -> None:
    """In a file, a progress bar is a line after the other; ours know that by themselves."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()


def build_parser(name: str, module: Any, options_class: type) -> ArgumentParser:
    """The parser of a verb: ``--config`` and a flag for every field of its options."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=_paragraphs(options_class.__doc__ or VERBS[name].summary)[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="config", help="a YAML file with any of the options below; flags override it"
    )
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    else:
        parser.add_class_arguments(options_class, as_group=False)
    return parser


def _parse(parser: ArgumentParser, words: Sequence[str], module: Any) -> Namespace:
    import jsonargparse

    words = _with_lists(parser, _with_switches(parser, words))
    for flag, following in itertools.pairwise([*words, ""]):
        if flag == "--config" or flag.startswith("--config="):
            _check_file(flag.partition("=")[2] or following)
    try:
        return parser.parse_args(words)
    except (jsonargparse.ArgumentError, OSError) as error:
        message = _plain(str(getattr(error, "message", None) or error))
        raise UserError(f"{message}{_meant(message, parser, module)}\nSee {parser.prog} --help") from error


def _check_file(path: str) -> None:
    """UserError where a YAML file is none, or has a key twice: the parser takes the last one without a word."""
    import yaml

    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except OSError:
        return  # which the parser says better
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): a YAML file is expected") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        tab = " (YAML indents with spaces, not with tabs)" if "'\\t'" in problem or "tab character" in problem else ""
        raise UserError(f"{path}: {place}not valid YAML: {problem}{tab}") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise UserError(f"{path}: {kind}; options are expected, one a line, such as model: ./my-moe")
    nodes = [root] if root is not None else []
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                    raise UserError(
                        f"{path}: line {line}: {key.value!r} is there twice, first in line {lines[key.value]}"
                    )
                lines[key.value] = line
                nodes.append(value)


def _with_switches(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """Lets a yes-or-no flag stand alone: ``--quick`` means ``--quick true``."""
    defaults = vars(parser.get_defaults().as_flat())
    switches = {f"--{key}" for key, default in defaults.items() if isinstance(default, bool)}
    spelled: list[str] = []
    for word, following in itertools.zip_longest(words, words[1:], fillvalue="--"):
        spelled.append(word)
        if word in switches and following.startswith("-"):
            spelled.append("true")
    return spelled


def _with_lists(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """Lets a list be words: ``--bits 8 4`` and ``--bits [8, 4]``, which a shell splits, mean ``--bits '[8, 4]'``."""
    types = {
        flag: str(getattr(action, "_typehint", "")) for action in parser._actions for flag in action.option_strings
    }
    spelled: list[str] = []
    rest = list(words)
    while rest:
        flag = rest.pop(0)
        spelled.append(flag)
        if "list[" not in types.get(flag, ""):
            continue
        given = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
        del rest[: len(given)]
        if given and given[0].startswith("["):
            spelled.append(" ".join(given))
        elif len(given) > 1 or (given and "| str" not in types[flag]):
            spelled.append(json.dumps(given))  # JSON: a word stays a word, 1.10 is not 1.1
        else:
            spelled += given
    return spelled


def _plain(message: str) -> str:
    """The parser's message, with the flag's name instead of its key and types as users write them."""
    message = re.sub(
        r"\s*Does not validate against any of the Union subtypes.*?Subtypes: \[(.*?)\]\n.*?Given value: (.*)",
        lambda found: f" expected {found[1].replace(', ', ' or ')}, got {found[2]!r}",
        message,
        flags=re.DOTALL,
    )
    message = re.sub(r"Unexpected config: \s*$", "--config: the file is empty", message)
    message = re.sub(r'Parser key "([^"]+)":\s*', r"--\1: ", message)
    message = re.sub(r"Expected an? (.+?)\. Got value: (.*)", r"expected \1, got '\2'", message)
    message = re.sub(
        r"expected <class 'str'>, got '(-?[\d.]+)'", r"expected text, got the number \1: put it in quotes", message
    )
    message = re.sub(r"<class '(?:builtins\.)?(\w+)'>", r"\1", message).replace("NoneType", "null")
    return re.sub(
        r"the following arguments are required: (.*)",
        lambda found: "missing: " + ", ".join(f"--{key.strip()}" for key in found[1].split(",")),
        message,
    )


def _meant(message: str, parser: ArgumentParser, module: Any) -> str:
    """The option that an unknown one was probably meant to be."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'", message)
    if unknown is None:
        return ""
    group = re.search(r"Group '([\w.]+)'", message)
    given = (f"{group[1]}." if group else "") + (unknown[1] or unknown[2])
    flat = vars(parser.get_defaults().as_flat())
    known = [*flat, *getattr(module, "known_names", list)(), *(name.split(".")[0] for name in flat)]
    return meant(given, known, getattr(module, "RENAMED", None))


def _overview() -> str:
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:<{width}}{verb.summary}" for name, verb in VERBS.items())
    return textwrap.dedent(f"""\
        usage: {PROGRAM} VERB [--config FILE.yaml] [--OPTION VALUE ...]

        TRACE: machine unlearning for Mixture-of-Experts language models that weighs the retain data by routing.

        verbs:
        {{verbs}}

        {PROGRAM} VERB --help   lists the options of a verb
        {PROGRAM} demo --quick  shows the method in a minute, without a model hub or a GPU
        {PROGRAM} --version""").format(verbs=verbs)


def _paragraphs(docstring: str) -> list[str]:
    return [" ".join(part.split()) for part in inspect.cleandoc(docstring).split("\n\n")]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("trace-kernels")
    except PackageNotFoundError:
        return "(not installed)"


def _fail(program: str, message: str) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
