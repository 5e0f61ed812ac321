"""Downloads data sets and prepares them for reading, with TFDS's own builders.

    python -m lottery_flow.data.prepare mnist cifar10 --data_dir=DIR

Needs TensorFlow (`pip install 'lottery_flow[prepare]'`), as nothing else does. A data
set that is there already is left alone. Without a network, put the original archives
into `<download_dir>/manual` first, one data set at a time: TFDS looks there by file
name, checks the SHA-256 sums and downloads what is missing.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from lottery_flow.data.tfds_arrays import SPECS, data_directory, wrong_format
from lottery_flow.errors import UserError


def prepare(name: str, data_dir: str = "", download_dir: str = "") -> str:
    """Downloads one data set and writes it as ArrayRecord files.

    Args:
      name: of TFDS, for instance "mnist" or "imagenette/160px-v2".
      data_dir: where to write; "" for TFDS's own default.
      download_dir: where to keep the downloads; "" for `<data_dir>/downloads`.

    Returns:
      The directory of the prepared data set.

    Raises:
      UserError: an unknown name; TensorFlow or importlib_resources is missing; the data
        set is there in another file format; a download failed.
    """
    _check_name(name)
    # TFDS imports importlib_resources when it prepares, and does not declare it.
    for package in ("tensorflow", "importlib_resources"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"Preparing {name!r} needs the package {package}, which is not"
                " installed: run `pip install 'lottery_flow[prepare]'`."
            )
    import tensorflow_datasets as tfds

    directory = data_directory(data_dir)
    builder = tfds.builder(name, data_dir=directory)
    array_record = tfds.core.FileFormat.ARRAY_RECORD
    if builder.is_prepared():
        if array_record not in builder.info.available_file_formats():
            raise wrong_format(builder, directory)
        return os.fspath(builder.data_path)
    try:
        builder.download_and_prepare(
            download_dir=download_dir or os.path.join(directory, "downloads"),
            # What Google has prepared is TFRecord.
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            file_format=array_record,
        )
    except (AssertionError, OSError, tfds.download.DownloadError) as error:
        # AssertionError: what has to be downloaded by hand is not there.
        raise UserError(
            f"Preparing {name!r} in {directory} failed ({error}): mend this and run the"
            " same command again."
        ) from error
    if not builder.is_prepared():  # TFDS leaves alone a directory that is there
        raise UserError(
            f"Directory {builder.data_path} is there but holds no data set: delete it"
            " and run the same command again."
        )
    return os.fspath(builder.data_path)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares the data sets named on the command line; 0, or 2 after a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m lottery_flow.data.prepare",
        description="Downloads data sets and prepares them for reading.",
    )
    known = f"{', '.join(SPECS)}, or another of TFDS"
    parser.add_argument("names", nargs="+", metavar="NAME", help=known)
    parser.add_argument("--data_dir", default="", help="default: as TFDS has it")
    parser.add_argument("--download_dir", default="", help="default: DIR/downloads")
    args = parser.parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        for name in args.names:
            _check_name(name)  # all of them, before the first download
        for name in args.names:
            print(f"{name}: {prepare(name, args.data_dir, args.download_dir)}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _check_name(name: str) -> None:
    """Refuses what cannot be prepared."""
    import tensorflow_datasets as tfds

    try:
        tfds.builder_cls(name)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"NAME must be one that TFDS knows, {', '.join(SPECS)}, imagenet2012 or"
            f" another, not {name!r} (digits needs no preparing)."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
