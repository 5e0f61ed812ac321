"""What the commands share: logging, flags, and errors as one sentence."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from lottery_flow import allocator
from lottery_flow import config as config_lib
from lottery_flow.build import flat_fields
from lottery_flow.errors import DiskError, UserError
from lottery_flow.stopping import Stopped

# Exit status of a run that goes on when it is started again: EX_TEMPFAIL of sysexits.h.
AGAIN = 75


def run(
    main: Callable[[Sequence[str]], None],
    explain: Callable[[Sequence[str]], str | None] = lambda argv: None,
) -> None:
    """Runs a command; a user's mistake is one sentence and exit status 2.

    A run that was asked to end, or lost another process, exits with `AGAIN`.

    Args:
      main: gets the arguments that are no flags, the command's name first.
      explain: says what is wrong with flags that could not be parsed, or None.
    """
    prepare()

    def guarded(argv):
        try:
            main(argv)
        except DiskError as error:
            _leave(f"error: {error}", 2)
        except UserError as error:
            _fail(error)
        except Stopped as stopped:
            sys.stderr.write(f"{stopped}; the same command goes on from there\n")
            sys.exit(AGAIN)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            reason = " ".join(str(error).split())[:300]
            _leave(
                f"error: process {jax.process_index()} of {jax.process_count()} lost "
                f"another one ({reason}); start all of them again, they go on from the "
                "newest checkpoint",
                AGAIN,
            )

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except UserError as error:
            _fail(error)
        except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
            _fail(explain(argv) or error)

    app.run(guarded, flags_parser=parse)


def define_config(values: flags.FlagValues) -> None:
    """The flag `--config`, whose fields are flags too: `--config.optim.name=adam`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file, with an argument after a colon if it has one.",
        flag_values=values,
    )


def load_config() -> ConfigDict:
    """What `--config` names.

    Raises:
      UserError: it is missing, or there is no such file.
    """
    config = flags.FLAGS.config
    if config is None:
        raise UserError("--config is missing; give --config=configs/quickstart.py")
    try:
        _ = config.name  # a file that could not be read says so at the first access
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config: give the path of a file ({reason})") from error
    return config


def unknown_field(argv: Sequence[str]) -> str | None:
    """A sentence on the first --config.FIELD that no configuration has."""
    fields = flat_fields(config_lib.default())
    for arg in argv:
        name = arg.removeprefix("--config.").split("=")[0]
        if arg.startswith("--config.") and name not in fields:
            group = name.rpartition(".")[0]
            known = [f for f in fields if f.rpartition(".")[0] == group] or fields
            return f"--config.{name} is not a field; there are {', '.join(known)}"
    return None


def prepare(level: int = logging.INFO) -> None:
    """What every process wants: logging and memory.

    Args:
      level: from which on our own lines are shown; the libraries' from WARNING on.
    """
    allocator.keep_freed_memory()
    absl_logging.set_verbosity(absl_logging.WARNING)
    # What goes wrong in threads of orbax is raised where we wait for them.
    absl_logging.get_absl_logger().addFilter(_is_no_traceback)
    sys.unraisablehook = _all_but_closed_loops
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("lottery_flow")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def _is_no_traceback(log: logging.LogRecord) -> bool:
    return not log.exc_info


def _all_but_closed_loops(found) -> None:
    """After a failed write others of the same checkpoint find nobody to answer to."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def _leave(message: str, status: int) -> NoReturn:
    """Ends at once: an orderly end would wait for what does not come any more."""
    sys.stdout.flush()
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
    os._exit(status)


def _fail(message: object) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)
