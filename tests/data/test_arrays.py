"""The training stream, and the batches of an evaluation."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lottery_flow.data import arrays, batch_indices, gather, padded_batches

seeds = st.integers(0, 2**40)
sizes = st.integers(1, 40)


def stream(seed, n_steps, n_examples, batch_size):
    steps = (batch_indices(seed, t, n_examples, batch_size) for t in range(n_steps))
    return np.concatenate(list(steps))


@given(seed=seeds, n=sizes, batch_size=st.integers(1, 100), epoch=st.integers(0, 4))
def test_each_epoch_visits_every_example_exactly_once(seed, n, batch_size, epoch):
    n_steps = -(-(epoch + 1) * n // batch_size)
    visited = stream(seed, n_steps, n, batch_size)[epoch * n : (epoch + 1) * n]
    np.testing.assert_array_equal(np.sort(visited), np.arange(n))


@given(seed=seeds, n=sizes, batch_size=sizes, steps=st.lists(st.integers(0, 10**6)))
def test_a_batch_depends_on_its_arguments_alone(seed, n, batch_size, steps):
    first = {t: batch_indices(seed, t, n, batch_size) for t in steps}
    arrays._epochs.cache_clear()
    for step in reversed(steps):
        again = batch_indices(seed, step, n, batch_size)
        assert again.dtype == np.int32
        assert again.shape == (batch_size,)
        np.testing.assert_array_equal(again, first[step])


@given(seed=seeds, n=sizes, batch_size=sizes)
def test_another_batch_size_cuts_the_same_stream(seed, n, batch_size):
    n_steps = 60 // batch_size + 1
    np.testing.assert_array_equal(
        stream(seed, n_steps, n, batch_size)[:60], stream(seed, 60, n, 1)
    )


@given(seed=seeds, other=seeds)
def test_seeds_and_epochs_differ(seed, other):
    epochs = [batch_indices(seed, t, 60, 60).tolist() for t in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    if seed != other:
        assert batch_indices(other, 0, 60, 60).tolist() not in epochs


def test_the_stream_is_the_one_of_earlier_versions():
    # A change here changes every run that is resumed.
    assert batch_indices(8, 0, 10, 10).tolist() == [2, 3, 6, 5, 8, 9, 4, 0, 1, 7]
    assert batch_indices(8, 1, 10, 10).tolist() == [9, 2, 4, 7, 3, 0, 8, 1, 6, 5]


def test_writing_into_a_batch_changes_no_later_batch():
    batch = batch_indices(0, 0, 10, 10)
    expected = batch.copy()
    batch[:] = -1
    np.testing.assert_array_equal(batch_indices(0, 0, 10, 10), expected)


def test_gather_takes_images_and_labels_of_the_same_examples():
    images, labels = numbered(7)
    batch = gather(images, labels, np.array([6, 0, 6]))
    assert batch["label"].tolist() == [6, 0, 6]
    assert batch["image"][:, 1, 2, 0].tolist() == [6, 0, 6]
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32


@given(n=st.integers(0, 30), batch_size=st.integers(1, 12))
def test_padded_batches_hold_every_example_once_and_weigh_nothing_else(n, batch_size):
    images, labels = numbered(n)
    batches = list(padded_batches(images, labels, batch_size))
    assert len(batches) == -(-n // batch_size)
    for batch in batches:
        assert batch["image"].shape == (batch_size, 2, 3, 1)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].shape == batch["weight"].shape == (batch_size,)
        assert batch["label"].dtype == np.int32
        assert batch["weight"].dtype == np.float32
        assert not batch["image"][batch["weight"] == 0].any()
        assert not batch["label"][batch["weight"] == 0].any()
        assert set(batch["weight"].tolist()) <= {0.0, 1.0}
    for key, expected in (("image", images), ("label", labels)):
        real = [batch[key][batch["weight"] == 1] for batch in batches]
        np.testing.assert_array_equal(np.concatenate([expected[:0], *real]), expected)


def numbered(n):
    """Images that are filled with the number of the example."""
    labels = np.arange(n, dtype=np.int32)
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (n, 2, 3, 1))
    return images, labels


def test_a_long_stream_keeps_two_epochs():
    """The order of every epoch of ImageNet would be five megabytes more."""
    arrays._epochs.cache_clear()
    for step in range(200):
        for seed in range(3):
            arrays.batch_indices(seed, step, 10, 7)
    for seed in range(3):
        info = arrays._epochs(seed, 10).cache_info()
        assert info.currsize == 2
        assert info.misses == 140  # each epoch was drawn once
    assert arrays._epochs.cache_info().currsize == 3
