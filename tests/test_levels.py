"""Iterative pruning as runs: what each level starts from, and that it goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_cli

from lottery_flow import checkpoint, levels, metrics
from lottery_flow.build import build
from lottery_flow.errors import UserError
from lottery_flow.runs import RunPaths
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import tickets

FIELDS = {
    "tickets__rounds": 2,
    "sparsity__sparsity": 0.75,  # half of the weights in each round
    "train__seeds": "(0, 1)",
}


def start(workdir, **fields):
    args = run_cli.flag_list("scratch_mlp:smoke", workdir, **(FIELDS | fields))
    outcome = run_cli.in_process(*args)
    assert not outcome.errors
    return outcome


def network(run, level, step):
    return checkpoint.restore_network(run / f"level_{level}" / "checkpoints", step)[1]


@pytest.fixture(scope="module")
def rewound(tmp_path_factory):
    """Two seeds, rewound to step 6 of 12."""
    workdir = tmp_path_factory.mktemp("levels")
    start(workdir, tickets__rewind_steps=6)
    return workdir, [run_cli.run_directory(workdir, seed) for seed in (0, 1)]


def test_every_level_is_a_finished_run(rewound):
    _, runs = rewound
    for run in runs:
        steps = {
            level: checkpoint.steps_in(run / f"level_{level}" / "checkpoints")
            for level in (0, 1, 2)
        }
        assert steps == {0: [0, 6, 12], 1: [0, 6], 2: [0, 6]}
        for level in (0, 1, 2):
            assert (run / f"level_{level}" / "DONE").exists()
        assert not (run / "level_3").exists()


def test_masks_are_those_of_the_largest_weights_and_nested(rewound):
    _, runs = rewound
    for run in runs:
        n = 266_200
        for level in (1, 2):
            before, after = network(run, level - 1, -1), network(run, level, 0)
            n -= n // 2
            counts = masks_lib.counts(after.masks, after.params)
            assert sum(counts.values()) == n
            kept, gone = [], []
            for old, new, w in zip(
                jax.tree.leaves(before.masks),
                jax.tree.leaves(after.masks),
                masks_lib.tree_leaves_at(before.masks, before.params),
                strict=True,
            ):
                assert not np.any(new & ~old)
                kept.append(np.abs(w[new]).min())
                gone.append(np.abs(w[old & ~new]).max())
            assert max(gone) <= min(kept)


def test_a_level_starts_from_the_weights_and_the_rate_of_the_rewinding_step(rewound):
    _, runs = rewound
    for run in runs:
        anchor = network(run, 0, 6)
        rows = metrics.read(run / "level_0" / "metrics.jsonl")
        rate = {row["step"]: row["learning_rate"] for row in rows}
        for level in (1, 2):
            found = network(run, level, 0)
            wanted = masks_lib.apply(found.masks, anchor.params)
            for a, b in zip(
                jax.tree.leaves(found.params), jax.tree.leaves(wanted), strict=True
            ):
                np.testing.assert_array_equal(a, b)
            own = metrics.read(run / f"level_{level}" / "metrics.jsonl")
            assert own[0]["learning_rate"] == pytest.approx(rate[6], rel=1e-6)
            assert own[-1]["learning_rate"] == pytest.approx(rate[12], abs=1e-9)


def test_they_are_the_levels_of_the_library(rewound):
    """`iterative_pruning`, around the trainings that are on the disk."""
    _, runs = rewound
    first = network(runs[0], 0, 0)

    def train(params, masks, level):
        found = network(runs[0], level, 0)
        for a, b in zip(
            jax.tree.leaves((params, masks)),
            jax.tree.leaves((found.params, found.masks)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
        return network(runs[0], level, -1).params, network(runs[0], 0, 6).params

    made = tickets.iterative_pruning(
        train,
        jax.tree.map(jnp.asarray, first.params),
        jax.tree.map(jnp.asarray, first.masks),
        key=jax.random.fold_in(jax.random.key(0), levels._ROUND),
        n_rounds=2,
        rate=0.5,
    )
    assert len(list(made)) == 3


def test_what_is_finished_is_not_repeated_and_what_is_not_goes_on(rewound, monkeypatch):
    workdir, runs = rewound
    (runs[1] / "level_2" / "DONE").unlink()
    trained = []
    monkeypatch.setattr(
        "lottery_flow.main.train_all",
        lambda started: trained.append([run.paths.root for _, run in started]),
    )
    args = run_cli.flag_list(
        "scratch_mlp:smoke", workdir, **FIELDS, tickets__rewind_steps=6
    )
    run_cli.in_process(*args)
    assert trained == [[runs[1] / "level_2"]]


def test_other_ways_back(tmp_path):
    start(
        tmp_path,
        tickets__rewind="learning_rate",
        tickets__rounds=1,
        train__seeds="(0,)",
    )
    run = run_cli.run_directory(tmp_path, 0)
    final, found = network(run, 0, -1), network(run, 1, 0)
    for a, b in zip(
        jax.tree.leaves(found.params),
        jax.tree.leaves(masks_lib.apply(found.masks, final.params)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    rows = metrics.read(run / "level_1" / "metrics.jsonl")
    assert rows[0]["learning_rate"] == pytest.approx(0.2)


@pytest.mark.parametrize("treatment", ["reinit", "sign_constant", "shuffle"])
def test_treatments_change_what_a_level_starts_from(rewound, treatment):
    _, runs = rewound
    plain = network(runs[0], 1, 0)
    config = run_cli.small_config(
        model__widths=(300, 100),
        tickets__rounds=2,
        tickets__treatment=treatment,
        tickets__rewind_steps=6,
        sparsity__sparsity=0.75,
        train__checkpoint_every_steps=6,
    )
    own = levels.at(config, 1)
    job = levels.with_ticket(own, build(own, 0), RunPaths(runs[0] / "level_1"))
    found = job.make_network()
    for name, mask in masks_lib.named_leaves(found.masks).items():
        if mask is None:
            continue
        np.testing.assert_array_equal(mask, masks_lib.named_leaves(plain.masks)[name])
        mine = np.asarray(masks_lib.named_leaves(found.params)[name])
        theirs = np.asarray(masks_lib.named_leaves(plain.params)[name])
        assert not np.any(mine[~np.asarray(mask)])
        a, b = mine[np.asarray(mask)], theirs[np.asarray(mask)]
        assert not np.array_equal(a, b)
        if treatment == "sign_constant":
            np.testing.assert_array_equal(np.sign(a), np.sign(b))
            assert len(set(np.abs(a))) == 1
        if treatment == "shuffle":
            np.testing.assert_array_equal(np.sort(a), np.sort(b))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tickets__rounds": -1}, r"tickets\.rounds=-1"),
        ({"tickets__rate": 1.0}, r"tickets\.rate=1\.0: give a fraction"),
        ({"tickets__criterion": "best"}, r"tickets\.criterion='best' is unknown"),
        ({"tickets__rewind": "all"}, r"tickets\.rewind='all' is unknown"),
        (
            {"tickets__rewind": "fine_tune"},
            r"which optim\.schedule='cosine' makes zero",
        ),
        ({"tickets__rewind_steps": 5}, r"tickets\.rewind_steps=5 needs the checkpoint"),
        ({"tickets__rewind_steps": 12}, r"tickets\.rewind_steps=12 leaves no step"),
        ({"tickets__layer_rates": "fc1"}, r"tickets\.layer_rates: layer map item"),
        ({"sparsity__rule": "rigl"}, r"sparsity\.rule='rigl'; leave that at 'static'"),
        ({"sparsity__sparsity": 0.0}, r"makes no layer sparse"),
    ],
)
def test_wrong_rounds_get_one_sentence(fields, message):
    config = run_cli.small_config(**({"tickets__rounds": 1} | fields))
    with pytest.raises(UserError, match=message):
        build(config, 0)
