"""The command line: quick to start, one message for a mistake, nothing left behind."""

import dataclasses
import importlib
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import trace_unlearn
from trace_unlearn.errors import UserError
from trace_unlearn.verbs import cli

ROOT = Path(__file__).parents[3]


@dataclasses.dataclass
class Inner:
    """Knobs.

    Args:
        gamma: weight of the forget loss.
    """

    gamma: float = 1.0


@dataclasses.dataclass
class Options:
    """Does a thing.

    Args:
        model: the checkpoint.
        batch_size: rows a forward.
        names: some names.
        loud: whether to shout.
        inner: nested.
    """

    model: str
    batch_size: int | None = None
    names: list[str] = dataclasses.field(default_factory=list)
    loud: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)


@pytest.fixture
def verb(monkeypatch):
    """A verb `fake` that records its options, or does what `module.action` says."""
    module = types.ModuleType("trace_unlearn.fake")
    module.Options = Options
    module.seen = []
    module.action = module.seen.append
    module.main = lambda options: module.action(options)
    monkeypatch.setitem(sys.modules, "trace_unlearn.fake", module)
    monkeypatch.setitem(cli.VERBS, "fake", cli.Verb("fake", "Options", "fakes"))
    return module


def test_flags_come_from_the_options(verb):
    assert cli.main(["fake", "--model", "m", "--batch_size", "3", "--names", "[a,b]", "--inner.gamma", "2"]) == 0
    assert verb.seen == [Options("m", 3, ["a", "b"], False, Inner(2.0))]


def test_config_file_with_overrides(verb, tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\nbatch_size: 3\ninner:\n  gamma: 5\n")
    assert cli.main(["fake", "--config", str(tmp_path / "c.yaml"), "--batch_size=4"]) == 0
    assert verb.seen == [Options("m", 4, [], False, Inner(5.0))]


@pytest.mark.parametrize(
    ("words", "loud"), [(["--loud"], True), (["--loud", "false"], False), (["--loud", "--batch_size", "1"], True)]
)
def test_switches_may_stand_alone(verb, words, loud):
    assert cli.main(["fake", "--model", "m", *words]) == 0
    assert verb.seen[0].loud is loud


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
        (["[a,", "b]"], ["a", "b"]),
        (["1.3", "1.10"], ["1.3", "1.10"]),
        ([r"mlp\.[ab]{1,2}", "x: y"], [r"mlp\.[ab]{1,2}", "x: y"]),
        ([], None),
    ],
)
def test_a_list_may_be_words(verb, words, names):
    code = cli.main(["fake", "--names", *words, "--model", "m"])
    assert (code, [options.names for options in verb.seen]) == ((0, [names]) if names else (2, []))


PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
COMMANDS = [
    pytest.param(line.partition(" #")[0], id=f"{page.name}: {line[:60]}")
    for page in PAGES
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("trace-unlearn ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_parse(command, tmp_path, monkeypatch):
    """As a shell without quotes would split them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("model: m\nforget: f\nretain: r\n")
    _, name, *words = shlex.split(command)
    verb = cli.VERBS[name]
    module = importlib.import_module(f"trace_unlearn.{verb.module}")
    monkeypatch.setattr(module, "main", lambda options: None)
    cli.run_verb(name, words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "missing: --model"),
        (["--model", "m", "--names", "[1.3]"], "--names: expected text, got the number 1.3: put it in quotes"),
        (["--model", "m", "--batch_size", "x"], "--batch_size: expected int or null, got 'x'"),
        (["--model", "m", "--inner.gamma", "x"], "--inner.gamma: expected float, got 'x'"),
        (["--model", "m", "--bogus", "1"], "--bogus"),
        (["--model", "m", "--batchsize", "1"], "did you mean 'batch_size'?"),
        (["--model", "m", "stray"], "stray"),
        (["--model", "m", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--model"], "--model"),
    ],
)
def test_a_wrong_flag_is_one_message_and_exit_code_2(verb, capsys, words, said):
    assert cli.main(["fake", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("trace-unlearn fake: ")
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert verb.seen == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("bogus: 1\n", "'bogus' is not accepted\n"),
        ("inner: {gama: 1}\n", "did you mean 'inner.gamma'?"),
        ("iner: {gamma: 1}\n", "did you mean 'inner.gamma'?"),
        ("model: [\n", "c.yaml: line 2, column 1: not valid YAML"),
        ("- a\n", ""),
        ("", "--config: the file is empty"),
    ],
)
def test_a_wrong_config_file(verb, capsys, tmp_path, content, said):
    (tmp_path / "c.yaml").write_text(content)
    assert cli.main(["fake", "--model", "m", "--config", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trace-unlearn fake: ")
    assert said in error
    assert verb.seen == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: a\nbatch_size: 1\nmodel: b\n", "line 3: 'model' is there twice, first in line 1"),
        ("model: a\ninner:\n  gamma: 1.0\n  gamma: 2.0\n", "line 4: 'gamma' is there twice, first in line 3"),
        ('{"model": "a", "model": "b"}', "line 1: 'model' is there twice"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(verb, capsys, tmp_path, content, said):
    (tmp_path / "c.yaml").write_text(content)
    for words in (["--config", str(tmp_path / "c.yaml")], [f"--config={tmp_path / 'c.yaml'}"]):
        assert cli.main(["fake", *words]) == 2
        assert said in capsys.readouterr().err
    assert verb.seen == []


def test_a_users_mistake_in_the_verb(verb, capsys):
    def action(options):
        raise UserError("forget.jsonl: line 3: not JSON")

    verb.action = action
    assert cli.main(["fake", "--model", "m"]) == 2
    assert capsys.readouterr().err == "trace-unlearn fake: forget.jsonl: line 3: not JSON\n"


def test_a_defect_is_not_dressed_as_a_users_mistake(verb):
    def action(options):
        raise ZeroDivisionError

    verb.action = action
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake", "--model", "m"])


def test_interrupted(verb, capsys):
    def action(options):
        raise KeyboardInterrupt

    verb.action = action
    assert cli.main(["fake", "--model", "m"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_an_interrupt_while_an_object_is_deleted_is_not_lost(verb, capsys):
    class Deleted:
        def __del__(self):
            raise KeyboardInterrupt

    def action(options):
        Deleted()
        time.sleep(10)

    verb.action = action
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell lets it be ignored
    try:
        assert cli.main(["fake", "--model", "m"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Traceback" not in capsys.readouterr().err


def test_help_of_a_verb_shows_the_fields_docs(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fake", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for text in ("Does a thing.", "the checkpoint.", "rows a forward.", "weight of the forget loss."):
        assert text in shown


def test_unknown_verb(capsys):
    assert cli.main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


def test_the_module_is_the_command_and_a_reader_may_go_away():
    command = [sys.executable, "-m", "trace_unlearn", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_overview_lists_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb}" in shown for verb in cli.VERBS)
    assert cli.main([]) == 2


@pytest.mark.parametrize("verb_name", cli.VERBS)
def test_every_verb_documents_every_flag(verb_name):
    module = importlib.import_module(f"trace_unlearn.{cli.VERBS[verb_name].module}")
    parser = cli.build_parser(verb_name, module, getattr(module, cli.VERBS[verb_name].options))
    flags = {action.dest: action.help for action in parser._actions}
    assert len(flags) > 3
    assert [flag for flag, text in flags.items() if not text] == []


def test_start_up_loads_nothing_heavy():
    program = (
        "import sys; from trace_unlearn.verbs import cli; cli.main(['--help']); "
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'jsonargparse'} & set(sys.modules); "
        "sys.exit(bool(heavy) and str(heavy))"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 20  # a hang, not a figure of speed


def test_calibrate_is_the_function_whatever_was_imported_before():
    program = (
        "import trace_unlearn.calibration.calibrate; import trace_unlearn; from trace_unlearn import calibrate; "
        "from trace_unlearn.calibration.calibrate import calibrate as function; assert calibrate is function; "
        "assert trace_unlearn.calibrate is function"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_exported_names_exist():
    for name in trace_unlearn.__all__:
        assert getattr(trace_unlearn, name) is not None
    with pytest.raises(AttributeError):
        _ = trace_unlearn.no_such_name


def test_public_names_are_listed_and_are_what_their_pages_say():
    assert sorted(trace_unlearn.__all__) == dir(trace_unlearn)
    assert {"attack", "calibrate", "evaluate", "report", "verdict", "TraceTrainer"} <= set(dir(trace_unlearn))
    for name in dir(trace_unlearn):
        assert getattr(trace_unlearn, name).__doc__, name
