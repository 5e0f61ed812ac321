"""Crops by hand, records of three sources, and a stream that depends on its place."""

import io
import itertools

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from lottery_flow.data import arrays, images, stream
from lottery_flow.errors import UserError


def gradient_image(width, height):
    """Red grows to the right, green downwards, to 255 at the far side."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, np.full_like(x, 7)], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


# --- Crops ---------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (64, 64)])
def test_the_test_crop_is_the_middle(width, height):
    """Of a linear image the mean of a crop tells its middle, the range its size."""
    pixels = images.eval_crop(gradient_image(width, height), 32).astype(float)
    assert pixels.shape == (32, 32, 3)
    side = min(width, height) * 32 / 64
    for channel, extent in ((0, width), (1, height)):
        assert pixels[..., channel].mean() == pytest.approx(127.5, abs=1)
        found = np.ptp(pixels[..., channel])
        # From the centre of the first pixel to that of the last one.
        assert found == pytest.approx(255 * side / extent * 31 / 32, rel=0.05)
    assert (pixels[..., 2] == 7).all()


def test_training_crops_have_the_areas_and_ratios_of_the_recipe():
    """Read off the crops of a linear image, which tells where each pixel came from."""
    rng, image, size = np.random.default_rng(0), gradient_image(400, 300), 24
    areas, ratios, mirrored, lefts = [], [], 0, []
    for _ in range(400):
        pixels = images.train_crop(image, size, rng).astype(float)
        across, down = (
            pixels[:, -1, 0] - pixels[:, 0, 0],
            pixels[-1, :, 1] - pixels[0, :, 1],
        )
        mirrored += across.mean() < 0
        width = abs(across.mean()) / 255 * 400 * size / (size - 1)
        height = down.mean() / 255 * 300 * size / (size - 1)
        areas.append(width * height / (400 * 300))
        ratios.append(width / height)
        lefts.append(pixels[..., 0].min() / 255)
    # The resize looks at neighbours: edges are known to a few percent.
    assert 0.07 < min(areas) < 0.12
    assert 0.9 < max(areas) < 1.08
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.42
    # Parts as high as they come are too high for the image if they are large: those
    # with an area below 3/4 of the ratio remain.
    bound = 0.75 * np.exp(np.linspace(np.log(3 / 4), np.log(4 / 3), 1001))
    mean = np.mean((bound**2 - 0.08**2) / 2) / np.mean(bound - 0.08)
    assert np.mean(areas) == pytest.approx(mean, abs=0.04)
    assert abs(mirrored - 200) < 50  # 5 standard deviations
    assert len(set(np.round(lefts, 2))) > 20


def test_very_long_images_give_the_largest_part_that_is_permitted():
    rng = np.random.default_rng(0)
    pixels = images.train_crop(gradient_image(200, 10), 16, rng).astype(float)
    width = np.ptp(pixels[..., 0]) / 255 * 200 * 16 / 15
    assert width == pytest.approx(10 * 4 / 3, rel=0.15)
    assert pixels[..., 0].mean() == pytest.approx(127.5, abs=2)


def test_images_are_decoded_to_colours():
    image = gradient_image(9, 5)
    assert_array_equal(np.asarray(images.decode(encoded(image))), np.asarray(image))
    assert_array_equal(images.decode(np.asarray(image)), np.asarray(image))
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for given in (grey, grey[..., None], encoded(Image.fromarray(grey))):
        assert_array_equal(images.decode(given), np.stack([grey] * 3, axis=-1))
    with_alpha = image.convert("RGBA")
    assert images.decode(encoded(with_alpha)).mode == "RGB"


# --- Sources -------------------------------------------------------------------------


def write_folder(root, splits):
    """{split: {class: number of images}}; each image tells where it lies."""
    for split, classes in splits.items():
        for label, (name, n) in enumerate(sorted(classes.items())):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.full((8, 8, 3), (40 * label, 40 * i, 0), np.uint8)
                path = root / split / name / f"{i}.{('png', 'JPEG')[i % 2]}"
                Image.fromarray(pixels).save(path, quality=100)


def test_folders(tmp_path):
    write_folder(tmp_path, {"train": {"cat": 3, "ant": 2}, "val": {"ant": 1, "cat": 1}})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    found = images.open_folder(str(tmp_path), 16)
    assert found.spec.image_shape == (16, 16, 3)
    assert found.spec[2:5] == (2, 5, 2)
    assert [found.train[i]["label"] for i in range(5)] == [0, 0, 1, 1, 1]
    batch = stream.examples(found, "train", 1, 5)
    assert_array_equal(batch["label"], [0, 1, 1, 1])
    red, green = (batch["image"][..., c].mean(axis=(1, 2)) for c in (0, 1))
    np.testing.assert_allclose(red, [0, 40, 40, 40], atol=3)
    np.testing.assert_allclose(green, [40, 0, 40, 80], atol=3)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": {"a": 1}}, "test is missing"),
        ({"train": {"a": 1}, "val": {"b": 1}}, r"different classes \(a, b\)"),
        ({"train": {"a": 0}, "val": {"a": 1}}, "train has no images"),
    ],
)
def test_unusable_folders(tmp_path, splits, message):
    write_folder(tmp_path, splits)
    with pytest.raises(UserError, match=message):
        images.open_folder(str(tmp_path), 16)


def test_tfds_gives_the_files_as_they_are(tmp_path, write_tfds):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for n in (5, 2))
    labels = np.arange(5, dtype=np.int32)
    splits = {"train": (train, labels), "test": (test, labels[:2])}
    write_tfds(tmp_path, "cifar10", splits)
    found = images.open_tfds("cifar10", str(tmp_path), 16)
    assert found.spec[1:5] == ((16, 16, 3), 10, 5, 2)
    for i in range(5):
        record = found.train[i]
        assert isinstance(record["image"], bytes)
        assert_array_equal(images.decode(record["image"]), train[i])
        assert record["label"] == i


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_set", "data.name='no_such_set' is unknown"),
        ("mnist", "was not found in"),
    ],
)
def test_missing_tfds_data(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        images.open_tfds(name, str(tmp_path), 16)


def test_noise_is_a_function_of_its_number():
    found = images.synthetic(12, n_classes=7, n_train=20, n_test=3)
    first, again = found.train[4], found.train[4]
    assert_array_equal(first["image"], again["image"])
    assert first["label"] == again["label"] < 7
    assert (first["image"] != found.train[5]["image"]).any()
    assert (first["image"] != found.test[4]["image"]).any()


# --- The stream ----------------------------------------------------------------------


def labelled(n_train=10, n_test=5):
    """Every record is told by its label."""
    found = images.synthetic(8, n_classes=100, n_train=n_train, n_test=n_test)
    train = [found.train[i] | {"label": i} for i in range(n_train)]
    test = [found.test[i] | {"label": i} for i in range(n_test)]
    return found._replace(train=train, test=test)


def collect(iterator):
    return list(iterator)


def test_the_stream_is_that_of_data_in_memory():
    found, options = labelled(), {"seed": 3, "batch_size": 4}
    batches = collect(stream.train_batches(found, start=0, stop=6, **options))
    for step, batch in enumerate(batches):
        expected = arrays.batch_indices(3, step, 10, 4)
        assert_array_equal(batch["label"], expected)
        assert batch["image"].shape == (4, 8, 8, 3)
        assert batch["image"].dtype == np.uint8
    # The same example in another epoch has another crop.
    crops = {}
    for batch in batches:
        for label, image in zip(batch["label"], batch["image"], strict=True):
            crops.setdefault(int(label), []).append(image)
    assert any(len(c) > 1 for c in crops.values())
    for own in crops.values():
        for a, b in itertools.combinations(own, 2):
            assert (a != b).any()


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for k in x:
            assert_array_equal(x[k], y[k])


@pytest.mark.parametrize("batch_size", [4, 6, 130])
def test_a_stream_goes_on_where_it_stopped_on_any_number_of_hosts(batch_size):
    found, options = labelled(), {"seed": 1, "batch_size": batch_size}
    whole = collect(stream.train_batches(found, start=0, stop=4, **options))
    same(collect(stream.train_batches(found, start=2, stop=4, **options)), whole[2:])
    halves = [
        collect(stream.train_batches(found, start=0, stop=4, shard=(i, 2), **options))
        for i in range(2)
    ]
    joined = [
        {k: np.concatenate([a[k], b[k]]) for k in a}
        for a, b in zip(*halves, strict=True)
    ]
    same(joined, whole)


def test_workers_give_the_same_batches():
    found, options = labelled(), {"seed": 1, "batch_size": 4}
    here = collect(stream.train_batches(found, start=1, stop=4, **options))
    there = stream.train_batches(found, start=1, stop=4, n_workers=2, **options)
    same(collect(there), here)


def test_batches_need_equal_parts():
    with pytest.raises(ValueError, match="batch_size=4 has no 3 equal parts"):
        stream.train_batches(
            labelled(), seed=0, batch_size=4, start=0, stop=1, shard=(0, 3)
        )


@pytest.mark.parametrize("n_hosts", [1, 2])
def test_every_test_example_comes_once(n_hosts):
    found, seen = labelled(), []
    for host in range(n_hosts):
        for batch in stream.eval_batches(found, batch_size=4, shard=(host, n_hosts)):
            assert len(batch["image"]) == len(batch["weight"]) == 4 // n_hosts
            real = batch["weight"] == 1
            assert not batch["image"][~real].any()
            assert set(batch["weight"]) <= {0, 1}
            seen += batch["label"][real].tolist()
            for label, image in zip(
                batch["label"][real], batch["image"][real], strict=True
            ):
                crop = images.eval_crop(
                    images.decode(found.test[int(label)]["image"]), 8
                )
                assert_array_equal(image, crop)
    assert sorted(seen) == [0, 1, 2, 3, 4]
