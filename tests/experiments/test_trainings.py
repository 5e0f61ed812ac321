"""Which networks experiments train, and how they are cut into populations."""

import pytest

from experiments import accuracy_table, launch, run, trainings
from experiments.trainings import Setup, Training
from lottery_flow import runs

SETUP = Setup(smoke=True)


def test_a_training_is_a_config_file_with_its_fields_set():
    training = Training("lenet5", "rigl", "per_neuron", "pruned")
    config = training.config(Setup())
    assert config.sparsity.rule == "rigl"
    assert config.model.init == "per_neuron"
    assert config.data.name == "mnist"
    assert config.train.total_steps == 11_719
    source = Training("lenet5", "prune").directory(Setup())
    assert config.sparsity.masks_from == f"{source}/seed_{{seed}}"


def test_a_lottery_ticket_takes_masks_and_weights_from_the_same_run():
    ticket = Training("lenet5", "lottery", masks="pruned", source_seed=3)
    config = ticket.config(Setup())
    assert config.sparsity.masks_from.endswith("/seed_3")
    assert config.sparsity.weights_from == config.sparsity.masks_from
    assert config.sparsity.weights_step == 0


def test_masks_of_scratch():
    found = {
        masks: Training("mlp", "scratch", masks=masks).config(SETUP).sparsity
        for masks in trainings.MASKS
    }
    assert [found[m].shuffle_masks for m in trainings.MASKS] == [False, True, False]
    assert found["random"].masks_from == ""
    assert found["shuffled"].masks_from == found["pruned"].masks_from != ""


def test_every_setting_has_a_directory_of_its_own():
    for setup in (SETUP, Setup()):
        wanted = {t for name in run.EXPERIMENTS for t in run.load(name).runs(setup)}
        if setup.smoke:
            # On the bundled data Fashion-MNIST is the same as MNIST, and a shorter
            # training is as short as any.
            wanted = {t._replace(data="mnist", arg=_without_length(t)) for t in wanted}
        assert len({t.directory(setup) for t in wanted}) == len(wanted)


def _without_length(training):
    """The argument but for the length; LeNet-5's own sparsity needs no argument."""
    words = [w for w in training.arg.split(",") if w and not w.startswith("length")]
    return "" if words == ["sparsity=0.95"] else ",".join(words)


def test_the_place_of_the_data_is_no_part_of_a_run():
    training = Training("mlp", "prune")
    assert training.digest(Setup(data_dir="here")) == training.digest(Setup())


def test_accuracy_table_has_every_method_under_every_init():
    found = accuracy_table.runs(SETUP)
    for network in ("lenet5", "mlp"):
        own = [t for t in found if t.network == network]
        for method in ("dense", "small_dense", "prune", "lottery"):
            assert sum(t.method == method for t in own) == 1
        for method in ("set", "rigl", "rigl_inverted"):
            inits = {t.init for t in own if t.method == method}
            assert inits == set(trainings.INITS)
        scratch = {(t.masks, t.init) for t in own if t.method == "scratch"}
        assert len(scratch) == 9


# --- Populations --------------------------------------------------------------------


def test_sources_come_with_the_seeds_that_are_needed():
    own = Training("lenet5", "lottery", masks="pruned")
    one = own._replace(source_seed=1)
    prune = Training("lenet5", "prune")
    assert launch.missing([own], SETUP) == [
        (prune, 0),
        (own, 0),
        (prune, 1),
        (own, 1),
    ]
    assert launch.missing([one], SETUP) == [(prune, 1), (one, 0), (one, 1)]


def test_a_finished_run_is_not_missing(tmp_path):
    setup = SETUP._replace(workdir=str(tmp_path))
    training = Training("mlp", "dense")
    paths = runs.RunPaths(training.run(setup, 1))
    paths.root.mkdir(parents=True)
    paths.done.write_text("{}")
    assert launch.missing([training], setup) == [(training, 0)]


def test_no_directory_is_trained_twice():
    wanted = [t for name in run.EXPERIMENTS for t in run.load(name).runs(SETUP)]
    found = [t.run(SETUP, seed) for t, seed in launch.missing(wanted, SETUP)]
    assert len(found) == len(set(found)) > 100


def test_members_with_the_same_batches_are_trained_together(tmp_path):
    setup = Setup(workdir=str(tmp_path))
    inits = [Training("mlp", "set", init, "random") for init in trainings.INITS]
    dense = Training("mlp", "dense")
    found = launch.populations(trainings.members([*inits, dense], setup), setup)
    sizes = sorted(len(p.members) for p in found)
    assert sizes == [3, 3, 3, 3, 3, 5]  # the inits of each seed; all seeds of dense
    for population in found:
        seeds = {seed for _, seed in population.members}
        settings = {t for t, _ in population.members}
        assert min(len(seeds), len(settings)) == 1


def test_large_populations_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_MOST", 2)
    setup = Setup(workdir=str(tmp_path))
    found = launch.populations(
        trainings.members([Training("mlp", "dense")], setup), setup
    )
    assert [len(p.members) for p in found] == [2, 2, 1]


def test_no_process_is_idle_where_members_can_be_divided():
    def sizes(found, n_jobs):
        parts = launch.spread(found, n_jobs)
        members = sorted(m for p in found for m in p.members)
        assert sorted(m for p in parts for m in p.members) == members
        return [len(p.members) for p in parts]

    def of_size(*numbers):
        training = Training("mlp", "dense")
        return [
            launch.Population(tuple((training, 10 * i + j) for j in range(n)))
            for i, n in enumerate(numbers)
        ]

    assert sizes(of_size(5), 1) == [5]
    assert sizes(of_size(5), 2) == [3, 2]
    assert sizes(of_size(2, 5), 4) == [2, 2, 2, 1]
    assert sizes(of_size(1, 1), 4) == [1, 1]
    assert sizes(of_size(2, 8, 3), 2) == [8, 3, 2]
    assert sizes([], 2) == []


@pytest.mark.parametrize("name", run.EXPERIMENTS)
def test_every_experiment_describes_itself(name):
    module = run.load(name)
    assert module.ABOUT
    assert isinstance(module.settings(SETUP), dict)
    assert isinstance(module.runs(SETUP), list)
    for function in ("collect", "plot", "beside"):
        assert callable(getattr(module, function))
