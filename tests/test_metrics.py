"""Rows of metrics: whole lines, none twice, none lost."""

import json
import math

import pytest

from lottery_flow import metrics
from lottery_flow.errors import UserError


def row(step: int) -> dict:
    return {"step": step, "seed": 0, "loss": 0.1 + step, "test_loss": None}


def write(path, steps, last_step=-1, **kwargs) -> list[dict]:
    with metrics.Writer(path, last_step, **kwargs) as writer:
        for step in steps:
            writer.write(row(step))
    return writer.rows


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = write(path, [0, 5, 10])
    assert metrics.read(path) == rows == [row(0), row(5), row(10)]
    assert path.read_text().count("\n") == 3


def test_a_row_is_on_the_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.Writer(path, -1) as writer:
        writer.write(row(0))
        assert metrics.read(path) == [row(0)]


def test_no_file_is_no_rows(tmp_path):
    assert metrics.read(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("n_cut", [1, 2, 10, 25])
def test_a_last_line_that_was_cut_short_is_left_out(tmp_path, n_cut):
    path = tmp_path / "metrics.jsonl"
    write(path, [0, 5, 10])
    path.write_bytes(path.read_bytes()[:-n_cut])
    assert metrics.read(path) == [row(0), row(5)]
    assert write(path, [10], last_step=5) == [row(0), row(5), row(10)]
    assert metrics.read(path) == [row(0), row(5), row(10)]


@pytest.mark.parametrize("last_step", [-1, 0, 4, 5, 10, 99])
def test_rows_after_the_restored_step_are_forgotten(tmp_path, last_step):
    path = tmp_path / "metrics.jsonl"
    write(path, [0, 5, 10])
    kept = [row(s) for s in (0, 5, 10) if s <= last_step]
    assert write(path, [100], last_step=last_step) == [*kept, row(100)]
    assert metrics.read(path) == [*kept, row(100)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "line", [b"[]", b"{}", b'{"step": "5"}', b"\xb7", b'{"step": 0} {"step": 5}', b""]
)
def test_a_line_that_is_no_row(tmp_path, line):
    (tmp_path / "m").write_bytes(b'{"step": 0}\n' + line + b"\n")
    with pytest.raises(UserError, match="m is damaged in line 2; mend that line"):
        metrics.read(tmp_path / "m")


def test_rows_that_were_lost_are_told(tmp_path):
    write(tmp_path / "m", [0, 5, 10, 12])
    metrics.check_whole(tmp_path / "m", [0, 5, 10])
    with pytest.raises(UserError, match=r"no row of step 7, .* from step 7 on away"):
        metrics.check_whole(tmp_path / "m", [0, 5, 7, 9, 10])
    with pytest.raises(UserError, match="no row of step 0"):
        metrics.check_whole(tmp_path / "none", [0])


@pytest.mark.parametrize("steps", [[0, 5, 5], [0, 10, 5]])
def test_rows_twice_or_out_of_order_are_told(tmp_path, steps):
    (tmp_path / "m").write_text("".join(f'{{"step": {s}}}\n' for s in steps))
    with pytest.raises(UserError, match="rows twice or out of order"):
        metrics.check_whole(tmp_path / "m", [0, 5])


def test_what_is_no_number_is_never_written(tmp_path):
    with metrics.Writer(tmp_path / "m", -1) as writer, pytest.raises(ValueError):
        writer.write({"step": 0, "loss": math.nan})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("saved", [None, 7])
def test_a_loss_that_is_not_finite_stops_the_run(value, saved):
    with pytest.raises(UserError) as error:
        metrics.check_finite("the training loss", value, 9, saved)
    message = str(error.value)
    assert "the training loss" in message
    assert "step 9" in message
    assert "optim.learning_rate" in message
    assert ("step 7 is kept" in message) == (saved == 7)
    assert "\n" not in message


def test_finite_values_pass():
    metrics.check_finite("the training loss", 1e30, 9, None)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter

    assert RecordWriter  # the reader below knows its format: length, crc, data, crc
    write(tmp_path / "m", [0, 5], tensorboard=tmp_path / "board")
    (path,) = (tmp_path / "board").iterdir()
    data, found, start = path.read_bytes(), {}, 0
    while start < len(data):
        length = int.from_bytes(data[start : start + 8], "little")
        event = event_pb2.Event.FromString(data[start + 12 : start + 12 + length])
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
        start += 16 + length
    assert found == {("loss", 0): pytest.approx(0.1), ("loss", 5): pytest.approx(5.1)}


def test_without_tensorboard_nothing_else_is_written(tmp_path):
    write(tmp_path / "metrics.jsonl", [0])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    json.loads((tmp_path / "metrics.jsonl").read_text())
