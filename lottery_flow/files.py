"""Files in directories that others may have written to."""

from pathlib import Path


def no_link(path: Path) -> Path:
    """The path, to be written: a link there is deleted, not followed."""
    if path.is_symlink():
        path.unlink()
    return path
