"""The choice of how a layer is computed: measured once, and only clear winners."""

import pytest

from lottery_flow.sparsity import execution_choice
from lottery_flow.sparsity.execution import linear
from lottery_flow.sparsity.execution_choice import Layer, Times


@pytest.mark.parametrize(
    ("times", "dense_grads", "path"),
    [
        (Times(1.0, 0.98, 0.98), False, "dense"),  # within the margin
        (Times(1.0, 0.97, 0.98), False, "csr"),
        (Times(1.0, 0.6, 0.5), False, "csr_gathered"),
        (Times(1.0, 0.6, 0.5), True, "csr"),
        (Times(1.0, 1.2, 0.5), True, "dense"),
        (Times(1.0, 1.2, 0.5), False, "csr_gathered"),
    ],
)
def test_the_fastest_path_has_to_win_clearly(times, dense_grads, path):
    assert execution_choice.fastest(times, dense_grads) == path


def test_choose_measures_masked_layers_once_and_obeys(monkeypatch):
    asked = []

    def measure(*args):
        asked.append(args)
        return Times(1.0, 0.5, 2.0)

    monkeypatch.setattr(execution_choice, "measure", measure)
    sizes = {"fc1": (6, 5), "fc2": (5, 4), "fc3": (4, 3)}
    layers = {k: Layer(linear, size, size[:1]) for k, size in sizes.items()}
    paths = execution_choice.choose(
        layers,
        {"fc1": 7, "fc2": 5},
        batch=3,
        without_dx=("fc1",),
        override={"fc2": "csr_gathered"},
    )
    assert paths == {"fc1": "csr", "fc2": "csr_gathered", "fc3": "dense"}
    assert asked == [(layers["fc1"], 7, 3, False)]
    for wrong in ({"fc9": "csr"}, {"fc1": "fast"}):
        with pytest.raises(ValueError, match="override"):
            execution_choice.choose(layers, {}, 3, override=wrong)


def test_measured_times_are_kept_and_printed():
    sizes = {"fc1": (6, 5), "fc2": (5, 4)}
    layers = {k: Layer(linear, size, size[:1]) for k, size in sizes.items()}
    times = execution_choice.measure(layers["fc1"], 7, 3, False)
    assert min(times) > 0
    assert execution_choice.measure(layers["fc1"], 7, 3, False) is times
    paths = execution_choice.choose(layers, {"fc1": 7}, 3, without_dx=("fc1",))
    assert paths["fc1"] == execution_choice.fastest(times)
    assert paths["fc2"] == "dense"
    lines = execution_choice.table(layers, {"fc1": 7}, 3, paths, without_dx=("fc1",))
    head, first, second = lines.splitlines()
    assert "csr_gathered" in head
    assert f"{1e3 * times.dense:.3f}" in first
    assert first.split()[-1] == paths["fc1"]
    assert second.split()[-1] == "dense"
