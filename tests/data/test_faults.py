"""Damaged images and impossible labels are found by name, in one sentence."""

import io
import re

import numpy as np
import pytest
import run_cli
from PIL import Image

from lottery_flow import data
from lottery_flow.data import digits, faults, images, records, stream, tfds_arrays
from lottery_flow.errors import UserError


def encoded(kind="JPEG", mode="RGB", size=(40, 30)):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def sixteen_bits():
    file = io.BytesIO()
    Image.fromarray(np.full((30, 40), 40_000, np.uint16)).save(file, "PNG")
    return file.getvalue()


def flipped(content):
    """Bits in the middle of the file are others."""
    half = len(content) // 2
    noise = bytes(b ^ 0x5A for b in content[half : half + 200])
    return content[:half] + noise + content[half + 200 :]


BAD_FILES = {
    "a truncated JPEG": encoded()[:500],
    "half of a JPEG": encoded()[: len(encoded()) // 2],
    "a truncated PNG": encoded("PNG")[:1500],
    "a damaged PNG": flipped(encoded("PNG")),
    "an empty file": b"",
    "a text": b"not an image, whatever its name says\n",
    "zeros": bytes(1000),
    "16 bits a pixel": sixteen_bits(),
}
GOOD_FILES = {
    "colour": encoded(),
    "grey": encoded(mode="L"),
    "CMYK": encoded(mode="CMYK"),
    "palette": encoded("PNG", mode="P"),
    "alpha": encoded("PNG", mode="RGBA"),
    "webp": encoded("WEBP"),
}


def write_folder(root, bad=b"", split="train", name="b/2.jpg"):
    """Two classes of three images in both splits, one of which is `bad`."""
    for part in ("train", "val"):
        for label in "ab":
            (root / part / label).mkdir(parents=True)
            for i in range(3):
                (root / part / label / f"{i}.jpg").write_bytes(encoded())
    (root / split / name).write_bytes(bad)
    return root


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_file_is_told_by_its_path(tmp_path, content, split):
    root = write_folder(tmp_path / "images", content, split)
    found = images.open_folder(str(root), 8)
    called = "training" if split == "train" else "test"
    pattern = re.escape(f"{root / split / 'b/2.jpg'} ({called} image 5 of images)")
    if split == "train":
        batches = stream.train_batches(found, seed=0, batch_size=3, start=0, stop=2)
    else:
        batches = stream.eval_batches(found, batch_size=4)
    with pytest.raises(UserError, match=rf"data\.name: {pattern} cannot be read .*; m"):
        list(batches)


@pytest.mark.parametrize("content", GOOD_FILES.values(), ids=GOOD_FILES)
def test_all_kinds_of_images_are_read(tmp_path, content):
    found = images.open_folder(str(write_folder(tmp_path, content)), 8)
    batch = stream.examples(found, "train", 0, 6)
    assert batch["image"].shape == (6, 8, 8, 3)
    assert batch["image"][5].std() > 5


def test_a_file_that_is_gone_or_a_directory(tmp_path):
    found = images.open_folder(str(write_folder(tmp_path, encoded())), 8)
    path = tmp_path / "train" / "b" / "2.jpg"
    path.unlink()
    with pytest.raises(UserError, match=rf"{path} .*FileNotFoundError"):
        records.read(found, "train", 5)
    path.mkdir()
    with pytest.raises(UserError, match=rf"{path} .*IsADirectoryError"):
        records.read(found, "train", 5)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_run_ends_with_the_sentence(tmp_path, n_workers):
    """From the threads and from the processes that decode."""
    root = write_folder(tmp_path / "images", encoded()[:400])
    fields = {
        "data__name": f"folder:{root}",
        "data__image_size": 8,
        "data__workers": n_workers,
        "model__widths": "(4,)",
        "train__batch_size": 6,
        "train__probe_examples": 2,
        "train__total_steps": 3,
        "eval__batch_size": 6,
        "train__figure": False,
    }
    arguments = run_cli.flag_list("dense_mlp:smoke", tmp_path / "runs", **fields)
    start = run_cli.subprocess_run if n_workers else run_cli.in_process
    outcome = start(*arguments)
    assert outcome.status == 2, outcome.stderr
    (line,) = outcome.errors
    assert re.search(r"train/b/2\.jpg \(training image 5 of images\) cannot be", line)
    assert "Traceback" not in outcome.stderr


class Listed(list):
    """Records in memory."""


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"image": np.zeros((4, 4, 2), np.uint8), "label": 0}, "1 or 3 channels"),
        ({"image": np.zeros((4, 4, 4), np.uint8), "label": 0}, "1 or 3 channels"),
        ({"image": np.zeros((4, 4, 3), np.float32), "label": 0}, "not uint8"),
        ({"image": np.zeros((4,), np.uint8), "label": 0}, "1 or 3 channels"),
        ({"image": np.zeros((0, 4, 3), np.uint8), "label": 0}, "cannot be read"),
        ({"image": None, "label": 0}, "cannot be read"),
        ({"label": 0}, "cannot be read"),
        ({"image": encoded(), "label": "1"}, "cannot be read .TypeError"),
        ({"image": encoded(), "label": 0.5}, "cannot be read .TypeError"),
        ({"image": encoded(), "label": 2}, "has the label 2, not one from 0 to 1"),
        ({"image": encoded(), "label": -1}, "has the label -1, not one from 0 to 1"),
    ],
)
def test_a_bad_record_is_told_by_its_number(record, fault):
    good = {"image": encoded(), "label": 1}
    spec = data.Spec("own", (8, 8, 3), 2, 3, 1, images.MEAN, images.STD)
    found = images.Images(spec, Listed([good, good, record]), Listed([good]))
    with pytest.raises(
        UserError, match=f"data.name: training image 2 of own .*{fault}"
    ):
        stream.examples(found, "train", 0, 3)
    found = images.Images(spec, Listed([good] * 3), Listed([record]))
    with pytest.raises(UserError, match=f"data.name: test image 0 of own .*{fault}"):
        stream.examples(found, "test", 0, 1)


def test_a_label_of_no_class_in_a_streamed_data_set_of_tfds(tmp_path, write_tfds):
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    splits = {"train": (pixels, [1, 2, 3, 17]), "test": (pixels, [0, 1, 2, 3])}
    write_tfds(tmp_path, "cifar10", splits)
    found = images.open_tfds("cifar10", str(tmp_path), 8)
    assert len(stream.examples(found, "test", 0, 4)["label"]) == 4
    with pytest.raises(UserError, match="training image 3 of cifar10 has the label 17"):
        list(stream.train_batches(found, seed=0, batch_size=4, start=0, stop=1))


# --- In memory -----------------------------------------------------------------------


def spoilt(**changes):
    whole = digits.load()
    return whole._replace(**{k: fn(getattr(whole, k)) for k, fn in changes.items()})


def with_value(i, value):
    def change(values):
        values = values.copy()
        values[i] = value
        return values

    return change


def with_nan(pixels):
    pixels = pixels.astype(np.float32)
    pixels[7, 3, 3, 0] = np.nan
    return pixels


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"train_labels": with_value(5, 10)}, "first is 10, of training image 5"),
        ({"train_labels": with_value(0, -1)}, "first is -1, of training image 0"),
        ({"test_labels": with_value(354, 99)}, "first is 99, of test image 354"),
        ({"train_labels": lambda v: v[:-1]}, "1442 training images and 1441 labels"),
        ({"test_images": lambda v: v[1:]}, "354 test images and 355 labels"),
        ({"train_images": with_nan}, "not finite is training image 7"),
        ({"train_images": lambda v: v.astype(float)}, "images float64.*not uint8"),
        ({"test_images": lambda v: v[..., 0]}, r"test images uint8\(355, 28, 28\)"),
        ({"test_labels": lambda v: v.astype(np.int64)}, "test labels int64"),
        ({"test_labels": lambda v: v[:, None]}, r"test labels int32\(355, 1\)"),
    ],
)
def test_what_is_wrong_in_memory(changes, fault, monkeypatch, tmp_path):
    bad = spoilt(**changes)
    assert re.search(fault, faults.of_arrays(bad, digits.SPEC))
    own = data.Source(digits.SPEC, lambda data_dir: bad)
    monkeypatch.setitem(data.DATASETS, "digits", own)
    with pytest.raises(UserError, match=f"data.name='digits' has .*{fault}.*; mend"):
        data.find("digits", "").load("")


def test_nothing_is_wrong_with_the_digits():
    assert faults.of_arrays(digits.load(), digits.SPEC) is None


def test_a_bad_data_set_leaves_no_directory(monkeypatch, tmp_path):
    bad = data.Source(digits.SPEC, lambda _: spoilt(test_labels=with_value(3, 10)))
    monkeypatch.setitem(data.DATASETS, "digits", bad)
    arguments = run_cli.flag_list("dense_mlp:smoke", tmp_path / "runs")
    outcome = run_cli.in_process(*arguments)
    assert outcome.status == 2
    (line,) = outcome.errors
    assert "of test image 3; mend the data set" in line
    assert not (tmp_path / "runs").exists()


def test_a_damaged_image_in_the_files_of_tfds(tmp_path, write_tfds):
    """Its number is found, though images are read in blocks."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)
    splits = {"train": (pixels, [0] * 5), "test": (pixels[:3], [0] * 3)}
    folder = write_tfds(tmp_path, "mnist", splits)
    (path,) = folder.glob("*-train.*")
    _write_with_broken_image(path, pixels, 3)
    spec = tfds_arrays.SPECS["mnist"]._replace(n_train=5, n_test=3)
    with pytest.raises(UserError, match=r"cannot be read \(training image 3: "):
        tfds_arrays.load(spec, str(tmp_path))


def _write_with_broken_image(path, pixels, broken):
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i, image in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(image[..., 0]).save(file, "PNG")
        content = file.getvalue()[: 60 if i == broken else None]
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(content)
        example.features.feature["label"].int64_list.value.append(0)
        writer.write(example.SerializeToString())
    writer.close()
