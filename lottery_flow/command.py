"""What the commands share: logging, flags, and errors as one sentence."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from lottery_flow import allocator
from lottery_flow.errors import UserError


def run(
    main: Callable[[Sequence[str]], None],
    explain: Callable[[Sequence[str]], str | None] = lambda argv: None,
) -> None:
    """Runs a command; a user's mistake is one sentence and exit status 2.

    Args:
      main: gets the arguments that are no flags, the command's name first.
      explain: says what is wrong with flags that could not be parsed, or None.
    """
    prepare()

    def guarded(argv):
        try:
            main(argv)
        except UserError as error:
            _fail(error)

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except UserError as error:
            _fail(error)
        except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
            _fail(explain(argv) or error)

    app.run(guarded, flags_parser=parse)


def prepare(level: int = logging.INFO) -> None:
    """What every process wants: logging and memory.

    Args:
      level: from which on our own lines are shown; the libraries' from WARNING on.
    """
    allocator.keep_freed_memory()
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("lottery_flow")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def _fail(message: object) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)
