"""Which errors are those of a disk, and what is said of them."""

import errno
import os
from pathlib import Path

import pytest

from lottery_flow import disk, lock
from lottery_flow.errors import DiskError

ROOT = Path("/runs/seed_0")
# As orbax raises it where it is waited for.
OF_ARRAYS = ValueError(
    'RESOURCE_EXHAUSTED: Failed writing: "/runs/seed_0/checkpoints/12": Failed to '
    "write 983 bytes to file 6: No space left on device [os_error_code='28']"
)
LATER = RuntimeError("could not be closed")
LATER.__context__ = OF_ARRAYS


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "whatever"), "No space left on device"),
        (OSError(errno.EROFS, "whatever"), "Read-only file system"),
        (PermissionError(errno.EACCES, "", "/runs/seed_0/DONE"), "Permission denied"),
        (OF_ARRAYS, "No space left on device"),
        (LATER, "No space left on device"),
    ],
)
def test_it_is_told_in_a_sentence(error, reason):
    with pytest.raises(DiskError) as found, disk.told([ROOT, ROOT / "x"]):
        raise error
    assert str(found.value).startswith(f"cannot write to {ROOT} and 1 more ({reason});")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "", "/data/images"),
        FileNotFoundError(errno.ENOENT, "", "/runs/seed_0/DONE"),
        ValueError("a defect"),
        RuntimeError("[os_error_code='2']"),
    ],
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as found, disk.told([ROOT]):
        raise error
    assert found.value is error


def test_a_lock_is_held_though_nothing_can_be_written(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with lock.hold(tmp_path), pytest.raises(lock.UserError), lock.hold(tmp_path):
            pass
        assert not (tmp_path / "lock").exists()
        patch.setattr(Path, "unlink", fail)
        with lock.hold(tmp_path):
            pass
    assert (tmp_path / "lock").exists()
    with lock.hold(tmp_path):
        pass
    assert not (tmp_path / "lock").exists()
