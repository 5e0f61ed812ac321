"""Starts `python -m lottery_flow.main`: in this process, or in one of its own."""

import atexit
import contextlib
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict

from lottery_flow import command, main
from lottery_flow.build import build
from lottery_flow.config import default
from lottery_flow.job import Job

ROOT = Path(__file__).parents[1]
TIMEOUT = 300.0  # seconds, for what never takes that long

# One cache for all starts of this session: a program is compiled once. The tests of
# resuming compare bits of many starts, which also shows that the cache keeps them.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(prefix="lottery_flow_tests_"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}
atexit.register(shutil.rmtree, CACHE["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
for _name, _value in CACHE.items():
    jax.config.update(_name.lower(), _value)


SMALL = {
    "name": "small",
    "model.name": "mlp",
    "model.widths": (6,),
    "optim.weight_decay": 1e-2,
    "sparsity.sparsity": 0.8,
    "sparsity.interval_steps": 3,
    "sparsity.grow_examples": 30,
    "train.total_steps": 12,
    "train.batch_size": 16,
    "train.probe_examples": 40,
    "train.log_every_steps": 5,
    "train.checkpoint_every_steps": 6,
    "train.figure": False,
    "eval.every_steps": 6,
}


def small_config(**fields: object) -> ConfigDict:
    """A run of a tiny network on the digits; `a__b` sets the field a.b."""
    config = default()
    own = {k.replace("__", "."): v for k, v in fields.items()}
    config.update_from_flattened_dict(SMALL | own)
    return config


def small_job(seed: int = 0, **fields: object) -> Job:
    """The job of `small_config`."""
    return build(small_config(**fields), seed)


class Outcome(NamedTuple):
    """What a start of the program left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr that tell an error."""
        return [k for k in self.stderr.splitlines() if k.startswith("error: ")]


def flag_list(config: str, workdir: Path, **fields: object) -> list[str]:
    """The command line; a field `a__b` is `--config.a.b`."""
    name, _, arg = config.partition(":")
    path = ROOT / "configs" / f"{name}.py"
    chosen = [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]
    chosen.append(f"--workdir={workdir}")
    return [f"--config={path}:{arg}" if arg else f"--config={path}", *chosen]


def in_process(*args: str, module: types.ModuleType = main) -> Outcome:
    """A command with flags of its own; any exception but SystemExit comes through.

    Args:
      args: the command line.
      module: of the command: has `define_flags` and `cli`.
    """
    out, err = io.StringIO(), io.StringIO()
    logger = logging.getLogger("lottery_flow")
    handlers = logger.handlers[:]
    status = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        # optax's schedules mix dtypes.
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(warnings.catch_warnings())
        # ml_collections loads config files by it.
        warnings.filterwarnings("ignore", r"the load_module\(\) method is deprecated")
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        patch.setattr(sys, "argv", ["command", *args])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # is put back
        own = flags.FlagValues()
        for name in flags.FLAGS:  # which grain looks at
            if name.startswith("grain"):
                own[name] = flags.FLAGS[name]
        patch.setattr(flags, "FLAGS", own)
        patch.setattr(command, "app", types.SimpleNamespace(run=_run))
        try:
            module.cli()
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            logger.handlers[:] = handlers
            logger.propagate = True
    return Outcome(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def process(
    *args: str,
    n_devices: int | None = None,
    module: str = "lottery_flow.main",
    environment: Mapping[str, str] | None = None,
    **kwargs: object,
) -> Iterator[subprocess.Popen]:
    """The program as a process, which is dead when the context ends.

    Args:
      args: the command line.
      n_devices: simulated devices; None: as many as here.
      module: that is run.
      environment: more variables.
      kwargs: to `subprocess.Popen`.
    """
    command = [sys.executable, "-m", module, *args]
    environment = {k: str(v) for k, v in CACHE.items()} | dict(environment or {})
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    if n_devices is not None:
        flags_ = environment["XLA_FLAGS"].split()
        count = "--xla_force_host_platform_device_count"
        own = [flag for flag in flags_ if not flag.startswith(count)]
        environment["XLA_FLAGS"] = " ".join([f"{count}={n_devices}", *own])
    with subprocess.Popen(command, cwd=ROOT, env=environment, **kwargs) as started:
        try:
            yield started
        finally:
            started.kill()


def subprocess_run(*args: str) -> Outcome:
    """Starts the program as a process and waits until it ends."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with process(*args, **pipes) as started:
        out, err = started.communicate(timeout=TIMEOUT)
    return Outcome(started.returncode, out, err)


def script(
    module: types.ModuleType, *args: str, timeout: float, **environment: str
) -> str:
    """What a script beside the tests prints, in a process that has to end well.

    Args:
      module: the script, imported.
      args: its command line.
      timeout: seconds.
      environment: more variables.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    own = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(
        [sys.executable, str(module.__file__), *args],
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def snapshot(directory: Path) -> dict[str, tuple[bytes, int] | None]:
    """Every path below a directory: content and time of change, None if it has none."""
    return {
        str(p.relative_to(directory)): (p.read_bytes(), p.stat().st_mtime_ns)
        if p.is_file()
        else None
        for p in sorted(directory.rglob("*"))
    }


def run_directory(workdir: Path, seed: int = 0) -> Path:
    """The only run of a work directory."""
    (found,) = workdir.glob(f"*/seed_{seed}")
    return found


def _run(guarded, flags_parser) -> None:
    """What `absl.app.run` does, without its lasting changes to the process."""
    sys.exit(guarded(flags_parser(sys.argv)))
