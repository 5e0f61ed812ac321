"""The notebook runs as it stands, and shows what it says."""

import json
import os
import subprocess
import sys

import matplotlib
import numpy as np
import run_cli

from lottery_flow import report

PATH = run_cli.ROOT / "notebooks" / "sparse_networks.ipynb"
SHOWN = """
import json
print()
print(json.dumps({
    "barriers": {k: interpolation.barrier(path) for k, path in paths.items()},
    "at_start": {k: float(f["gradient_norm"][0]) for k, f in rows.items()},
    "density": {k: float(f["density"].iloc[-1]) for k, f in rows.items()},
    "below": [int((s.eigenvalues < -0.01).sum()) for s in pair],
    "exact": pair[1].eigenvalues[::-1][:3].tolist(),
    "estimate": top.values.tolist(),
}))
"""


def cells(kind: str) -> list[dict]:
    found = json.loads(PATH.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_the_notebook_is_kept_without_outputs():
    assert cells("code")
    for cell in cells("code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def test_the_figure_of_a_run_leaves_the_backend_alone(tmp_path):
    # A notebook would show no figure any more.
    row = {"step": 0, "probe_accuracy": 0.1, "test_accuracy": 0.1, "gradient_norm": 1.0}
    before = matplotlib.get_backend(auto_select=False)
    matplotlib.use("svg")
    try:
        report.figure(tmp_path / "figure.png", "a run", [row, row | {"step": 1}])
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before or "agg")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_notebook_shows_what_it_says(tmp_path):
    code = "\n".join("".join(cell["source"]) for cell in cells("code")) + SHOWN
    env = {**os.environ, "PYTHONPATH": str(run_cli.ROOT), "MPLBACKEND": "agg"}
    # As a user has it: one device, fully compiled.
    del env["XLA_FLAGS"]
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=run_cli.TIMEOUT,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["barriers"]["lottery"] < 0.1
    assert min(found["barriers"][k] for k in ("scratch", "scratch+")) > 0.5
    start = found["at_start"]
    assert start["scratch+"] > 5 * max(start["scratch"], start["RigL"])
    before, after = found["below"]
    assert after > before
    np.testing.assert_allclose(list(found["density"].values()), 0.05, atol=1e-3)
    np.testing.assert_allclose(found["estimate"], found["exact"], rtol=1e-3)
