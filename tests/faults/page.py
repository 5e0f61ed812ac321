"""The page of figures: which faults were tried, and what became of them."""

from typing import NamedTuple


class Figures(NamedTuple):
    """One fault.

    Attributes:
      name: of its kind.
      survived: the run ended with the bits of one that nothing happened to.
      told: the program said in a sentence what was wrong.
      lost, doubled: rows of metrics.
    """

    name: str
    survived: bool
    told: bool
    lost: int
    doubled: int


_HEAD = """# Reliability

    make faults

Each line is a kind of fault, done to real processes at moments drawn by a seed. They
train the MLP on the digits by RigL for 240 steps, with 24 rewires, 21 checkpoints and
65 rows of metrics; some train a population, rounds of pruning, on images that workers
decode, or with two processes. After the fault, and once it was lifted, the same command
was started again until it was through, and the run compared with one that nothing
happened to: parameters, masks, state of the optimizer, keys and step in all
checkpoints, and the files `metrics.jsonl`, `summary.txt` and `DONE`, byte by byte.
*Same bits*: all of it was the same. *Told*: so many times the program said what was
wrong, in one sentence; the others needed none. Rows are those of `metrics.jsonl`.

| fault | tried | same bits | told | rows lost | rows doubled |
| --- | --- | --- | --- | --- | --- |
"""


def text(figures: list[Figures], long: list[str], failed: int) -> str:
    """The page.

    Args:
      figures: of all faults.
      long: what tests say of themselves that do many things.
      failed: tests that failed, whose faults may be missing.
    """
    kinds = {f.name: [g for g in figures if g.name == f.name] for f in figures}
    lines = [_line(name, kinds[name]) for name in sorted(kinds)]
    lines.append(_line("**all**", figures))
    for sentence in sorted(long):
        lines += ["", sentence]
    if failed:
        lines += ["", f"**{failed} tests failed.**"]
    return _HEAD + "\n".join(lines) + "\n"


def _line(name: str, own: list[Figures]) -> str:
    survived, told = sum(f.survived for f in own), sum(f.told for f in own)
    lost, doubled = sum(f.lost for f in own), sum(f.doubled for f in own)
    return f"| {name} | {len(own)} | {survived} | {told} | {lost} | {doubled} |"
