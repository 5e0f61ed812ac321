"""What a run cannot do without, beside what the machine has.

    parameters: 4 bytes each for the value, the gradient and the optimizer
    a batch: 4 bytes for each number of its images

Far less than what training takes; who lacks even this would see the process killed.
"""

import os

import jax

from lottery_flow.errors import UserError

_GIGABYTE = 1e9


def check(n_parameters: int, image_size: int, batches: dict[str, int], devices: int):
    """Raises UserError where the devices, or the host, are too small.

    Args:
      n_parameters: of the network.
      image_size: numbers of an image.
      batches: by field, the images of a batch.
      devices: that the parameters are cut along; batches may be cut along all.
    """
    have = available()
    if have is None:
        return
    need = 12 * n_parameters / devices
    if need > have:
        raise UserError(
            "model.name, model.widths, model.width and data.image_size make a network "
            f"of {n_parameters:,} parameters, whose training needs more than "
            f"{need / _GIGABYTE:,.0f} GB; there are {have / _GIGABYTE:,.0f} GB, so "
            "give a smaller one"
        )
    for field, n in batches.items():
        need = 4 * n * image_size / jax.device_count()
        if need > have:
            raise UserError(
                f"{field}={n} images of {image_size:,} numbers need "
                f"{need / _GIGABYTE:,.0f} GB; there are {have / _GIGABYTE:,.0f} GB, so "
                "give fewer"
            )


def available() -> int | None:
    """Bytes of a device, or of the host where that computes; None: unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    if jax.default_backend() != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not everywhere
        return None
