"""What a run was computed with: versions, devices, and the commit of this package.

It is a part of config.json that makes no difference to which run it is. The same
configuration has the same bits only where the environment is the same.
"""

import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lottery_flow._version import __version__

_PACKAGES = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"


def describe() -> dict[str, Any]:
    """{'jax': '0.10.2', ..., 'device_count': 8}, ready for JSON."""
    return dict(_describe())


@functools.cache  # one search for all members of a population
def _describe() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found | {
        "lottery_flow": __version__,
        "commit": commit(Path(__file__).parent),
        "backend": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
    }


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """'jax 0.9.0 there and 0.10.2 here; ...', '' if all is the same."""
    names = [*here, *(name for name in there if name not in here)]
    return "; ".join(
        f"{name} {there.get(name) or '(unknown)'} there and "
        f"{here.get(name) or '(unknown)'} here"
        for name in names
        if there.get(name) != here.get(name)
    )


def commit(directory: Path) -> str:
    """The commit that git has of a package, with `+` if it was changed; '' without."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(directory), *args]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # Of a package that is installed below some other checkout git knows no file.
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return ""
