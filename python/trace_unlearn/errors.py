"""What a user's mistake raises."""


class UserError(Exception):
    """A mistake in what the user gave: a file, a name, an option.

    The message is one sentence or a few, for people: it names what was given and what is allowed. The command line
    prints it on stderr without a traceback and exits with code 2.

    >>> raise UserError("forget.jsonl: line 3, column 9: not valid JSON")
    Traceback (most recent call last):
        ...
    trace_unlearn.errors.UserError: forget.jsonl: line 3, column 9: not valid JSON
    """


def needs(package: str, extra: str = "train") -> str:
    """What to do about a package that is not there.

    >>> needs("transformers.trainer")
    "needs the package transformers, which is not installed: pip install '.[train]' in the folder of trace-kernels"
    """
    name = package.split(".")[0]
    return f"needs the package {name}, which is not installed: pip install '.[{extra}]' in the folder of trace-kernels"
