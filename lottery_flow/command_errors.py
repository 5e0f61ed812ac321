"""What is wrong with a command line, or with the file it names, as one sentence."""

import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from lottery_flow import config as config_lib
from lottery_flow.build import flat_fields

_LONGEST = 1500  # characters that are told; the field comes first, the remedy last


def field(argv: Sequence[str]) -> str | None:
    """A sentence on the first --config.FIELD that is none, or has no value of its kind.

    Texts and brackets are checked with the configuration as a whole.
    """
    known = flat_fields(config_lib.default())
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        if not arg.startswith("--config."):
            continue
        name, equals, value = arg.removeprefix("--config.").partition("=")
        if name not in known:
            return f"--config.{name} is not a field; {_others(name, known)}"
        value = value if equals else following
        told = f"--config.{name}={value}: give"
        like = known[name]
        if isinstance(like, bool):
            if equals and value.lower() not in ("true", "false", "1", "0", "t", "f"):
                return f"{told} True or False"
        elif isinstance(like, int | float) and not _is(type(like), value):
            kind = "a number" if isinstance(like, float) else "a whole number"
            return f"{told} {kind}, such as {like}"
    return None


def parsing(error: Exception, argv: Sequence[str]) -> str:
    """A sentence on flags, or a configuration file, that could not be read."""
    for arg in argv:
        path = arg.removeprefix("--config=").split(":")[0]
        if arg.startswith("--config=") and (told := _in_file(error, path)):
            return told
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, flags.Error) and "Error whilst" not in text:
        return text
    return (
        f"--config: it cannot be read ({type(error).__name__}: {text[:300]}); give a "
        "file with a function get_config, like those of configs/"
    )


def is_memory(error: Exception) -> bool:
    """Whether XLA found no room."""
    return bool(re.search("out of memory|RESOURCE_EXHAUSTED", str(error), re.I))


def memory(error: Exception) -> str:
    """A sentence on memory that is not there."""
    return (
        f"there is not enough memory ({short(error)}); give a smaller model.name, "
        "train.batch_size or eval.batch_size, more train.accumulate_steps or "
        "train.model_devices, or set model.remat"
    )


def short(error: Exception) -> str:
    """The beginning of what an error says, on one line."""
    return " ".join(str(error).split())[:300]


def line(message: object) -> str:
    """A message as one line that can be printed; of a long one both ends."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 500]} ... {text[-500:]}"
    return text


def _others(name: str, known: dict[str, Any]) -> str:
    """Which fields there are in the group of a name; without one, which groups."""
    group = name.rpartition(".")[0]
    found = [f for f in known if f.rpartition(".")[0] == group]
    if not group or not found:
        found = sorted({f.partition(".")[0] + ".*" * ("." in f) for f in known})
    if any(f.startswith(f"{name}.") for f in known):
        found = [f for f in known if f.startswith(f"{name}.")]
    return f"there are {', '.join(found)}"


def _is(kind: type, text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _in_file(error: BaseException, path: str) -> str | None:
    """Where a configuration file went wrong, if it was the file that did."""
    name = Path(path).name
    for cause in reversed(list(_chain(error))):
        number, text = None, ""
        if isinstance(cause, SyntaxError) and str(cause.filename).endswith(name):
            number, text = cause.lineno, cause.msg
        for frame in traceback.extract_tb(cause.__traceback__):
            if Path(frame.filename).name == name:
                number, text = frame.lineno, str(cause)
        if number is not None:
            text = " ".join(text.split())[:500]
            return (
                f"--config={path}: line {number} cannot be executed "
                f"({type(cause).__name__}: {text}); mend it, give values of the kinds "
                "that lottery_flow/config.py has"
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
