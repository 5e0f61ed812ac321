"""A training that goes on for very long holds no more than one that has just begun.

A hundred thousand steps: `pytest -m faults -s tests/test_soak.py`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import run_cli
import soak

# Parameters and momentum in float32, and the mask; biases are few.
STATE = 9 * (784 * soak.WIDTH + 10 * soak.WIDTH)


def samples(directory: Path, steps: int, save: int, *flags: str, timeout=600):
    """What a process held at each of its checkpoints."""
    out = directory / "samples.json"
    args = f"--steps={steps}", f"--save={save}", f"--out={out}"
    xla = "" if steps > 10_000 else "--xla_backend_optimization_level=0"
    workdir = f"--workdir={directory / 'runs'}"
    run_cli.script(soak, *flags, *args, workdir, timeout=timeout, XLA_FLAGS=xla)
    found = [soak.Sample(**own) for own in json.loads(out.read_text())]
    assert found[-1].step == steps
    return found


def test_hundreds_of_steps_hold_nothing_and_what_is_held_is_found(tmp_path):
    """In one process, which after half of its steps begins to leak all there is."""
    flags = ("--leaks=state,arrays,file,thread,program", "--leaks_from=500")
    found = samples(tmp_path, 750, 25, *flags)
    half = [sample.step for sample in found].index(500)
    assert soak.problems(found[:half], STATE) == []
    names = [p.partition(":")[0] for p in soak.problems(found[half:], STATE)]
    assert names == ["resident", "arrays", "files", "threads", "programs"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", soak.Sample._fields[1:])
def test_one_leak_among_noise_is_found_and_noise_alone_is_not(seed, name):
    rng = np.random.default_rng(seed)
    n, leaked = 60, {"resident": STATE, "arrays": STATE}.get(name, 1)

    def sample(i, more):
        held = {
            "resident": 6 * 10**8 + int(rng.normal(0, 10**6)),
            "arrays": 8 * 10**6,
            "files": 30 + int(rng.integers(0, 6)),
            "threads": 38 + int(rng.integers(0, 4)),
            "programs": 16,
        }
        held[name] += more * i
        return soak.Sample(i, **held)

    assert soak.problems([sample(i, 0) for i in range(n)], STATE) == []
    (problem,) = soak.problems([sample(i, leaked) for i in range(n)], STATE)
    assert problem.startswith(f"{name}: ")


@pytest.mark.faults
def test_a_hundred_thousand_steps_hold_nothing(tmp_path, record_property):
    steps, save = 100_000, 500
    found = samples(tmp_path, steps, save, timeout=7200)
    wrong = soak.problems(found, STATE)
    own = found[int(soak.WARM * len(found)) :]
    for_ten_thousand = 10_000 / save / 1e6
    growth = soak.slope([s.resident for s in own]) * for_ten_thousand

    def ends(name):
        first, last = (getattr(s, name) for s in (own[0], own[-1]))
        return f"{first:,} to {last:,}"

    record_property(
        "long",
        f"{steps:,} steps of the MLP with {steps // 50:,} rewires and {len(found)} "
        f"checkpoints: after the first {soak.WARM:.0%} of them, resident memory "
        f"{ends('resident')} bytes ({growth:.2f} MB in 10,000 steps; one state kept "
        f"by each checkpoint would be {STATE * for_ten_thousand:.1f}), open files "
        f"{ends('files')}, threads "
        f"{ends('threads')}, compiled programs {ends('programs')}.",
    )
    assert wrong == []
