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


#: What transformers and accelerate load where they are asked to, and no extra of ours brings.
ON_REQUEST = ("bitsandbytes", "comet_ml", "deepspeed", "mlflow", "swanlab", "tensorboard", "torchao", "wandb")


def needs(package: str, extra: str = "train") -> str:
    """What to do about a package that is not there.

    >>> needs("transformers.trainer")
    "needs the package transformers, which is not installed: pip install '.[train]' in the folder of trace-kernels"
    >>> needs("wandb")
    'needs the package wandb, which is not installed: pip install wandb'
    """
    name = package.split(".")[0]
    what = name if name in ON_REQUEST else f"'.[{extra}]' in the folder of trace-kernels"
    return f"needs the package {name}, which is not installed: pip install {what}"
