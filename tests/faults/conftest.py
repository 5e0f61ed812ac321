"""Figures of the faults that were tried, and the page that shows them.

A test gives its own by `tally`, one that does many things a sentence by
`record_property("long", ...)`; with `--reliability=PATH` those of all processes of the
test run are written there when it is over.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import page, starts
from faults.compare import Comparison

_FIGURES: list[page.Figures] = []
_LONG: list[str] = []


def pytest_addoption(parser):
    parser.addoption("--reliability", help="the page of figures, to be written")


def pytest_runtest_logreport(report):
    """In the process that started the others, if there are such."""
    found = [json.loads(v) for k, v in report.user_properties if k == "faults"]
    if report.when == "teardown":
        _FIGURES.extend(page.Figures(*own) for own in found)
        _LONG.extend(v for k, v in report.user_properties if k == "long")


def pytest_sessionfinish(session):
    path = session.config.getoption("--reliability", None)
    if path and not hasattr(session.config, "workerinput"):
        Path(path).write_text(page.text(_FIGURES, _LONG, session.testsfailed))


@pytest.fixture
def tally(record_property) -> Callable:
    """`tally(names, comparison, told=n)`: so many faults were tried, with one end.

    Fails if there are differences, after they were noted.
    """

    def note(names: list[str], found: Comparison, told: int = 0) -> None:
        for i, name in enumerate(names):
            rows = (found.lost, found.doubled) if i == 0 else (0, 0)
            own = page.Figures(name, not found.differences, told > i, *rows)
            record_property("faults", json.dumps(own))
        assert not found.differences
        assert (found.lost, found.doubled) == (0, 0)

    return note


class Whole:
    """Runs that nothing happens to, each trained once, and how they went."""

    def __init__(self, root: Path):
        self.root = root

    def workdir(self, name: str) -> Path:
        found = self.root / name.replace(" ", "_")
        if not found.exists():
            fault = {"counts": str(self._counts(name))}
            if name == "two processes":
                outcomes = starts.together(found, [starts.NONE] * 2)
            else:
                outcomes = [starts.end(starts.KINDS[name].args(found), fault)]
            for outcome in outcomes:
                assert outcome.status == 0, outcome.stderr
        return found

    def counts(self, name: str) -> dict[str, int]:
        self.workdir(name)
        return json.loads(self._counts(name).read_text())

    def _counts(self, name: str) -> Path:
        return self.root / f"{name.replace(' ', '_')}.json"


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def cold():
    """An empty cache of compiled programs for each call."""
    with tempfile.TemporaryDirectory(prefix="lottery_flow_cold_") as root:
        yield lambda: Path(tempfile.mkdtemp(dir=root))
