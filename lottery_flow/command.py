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

from lottery_flow import allocator, check_kinds, command_errors
from lottery_flow.errors import DiskError, UserError
from lottery_flow.stopping import Stopped

# Exit status of a run that goes on when it is started again: EX_TEMPFAIL of sysexits.h.
AGAIN = 75


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command; a user's mistake is one sentence and exit status 2.

    A run that was asked to end, or lost another process, exits with `AGAIN`.

    Args:
      main: gets the arguments that are no flags, the command's name first.
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
        except MemoryError as error:
            _fail(command_errors.memory(error))
        except jax.errors.JaxRuntimeError as error:
            if command_errors.is_memory(error):
                _fail(command_errors.memory(error))
            if jax.process_count() == 1:
                raise
            reason = command_errors.short(error)
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
        except Exception as error:  # of a configuration file anything
            _fail(command_errors.field(argv) or command_errors.parsing(error, argv))

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
      UserError: it is missing, there is no such file, or a field is missing or of
        another kind.
    """
    config = flags.FLAGS.config
    if config is None and flags.FLAGS["config"].present:
        raise UserError("--config: get_config returned None; end it with return config")
    if config is None:
        raise UserError("--config is missing; give --config=configs/quickstart.py")
    try:
        _ = config.name  # a file that could not be read says so at the first access
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config: give the path of a file ({reason})") from error
    except Exception as error:  # no configuration at all
        told = f"{type(error).__name__}: {error}"
        raise UserError(
            f"--config: it has no fields ({told}); start from "
            "lottery_flow.config.default()"
        ) from error
    check_kinds.fields(config)
    return config


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
    sys.stderr.write(f"error: {command_errors.line(message)}\n")
    sys.exit(2)
