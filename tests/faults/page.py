"""The page of figures: which faults were tried, and what became of them."""

from typing import NamedTuple


class Figures(NamedTuple):
    """One fault.

    Attributes:
      name: of its kind.
      survived: the run ended with the bits of one that nothing happened to.
      told: the program said in a sentence what was wrong, before or instead of going on.
      lost, doubled: rows of metrics.
    """

    name: str
    survived: bool
    told: bool
    lost: int
    doubled: int


_HEAD = """# Reliability

    make faults

Each line is a kind of fault; each fault was done to a real process that trains a sparse
network (the MLP on the digits: RigL for 240 steps with 24 rewires, 21 checkpoints and 65
rows of metrics; some of them a population, rounds of pruning, images that workers
decode, or two processes), at a moment drawn by a seed. After it the same command was
started again, if need be until it was through, and the run was compared with one that
nothing happened to: parameters, masks, state of the optimizer, keys and step in all
checkpoints, and the files `metrics.jsonl`, `summary.txt` and `DONE`, byte by byte. *Same
bits*: all of it was the same. *Told*: of them, so many times the program said in one
sentence what was wrong; the others it passed over by itself. Rows are those of
`metrics.jsonl`.

| fault | tried | same bits | told | rows lost | rows doubled |
| --- | --- | --- | --- | --- | --- |
"""


def text(figures: list[Figures], failed: int) -> str:
    """The page.

    Args:
      figures: of all faults.
      failed: tests that failed, whose faults may be missing.
    """
    kinds = {f.name: [g for g in figures if g.name == f.name] for f in figures}
    lines = [_line(name, kinds[name]) for name in sorted(kinds)]
    lines.append(_line("**all**", figures))
    if failed:
        lines += ["", f"**{failed} tests failed.**"]
    return _HEAD + "\n".join(lines) + "\n"


def _line(name: str, own: list[Figures]) -> str:
    survived, told = sum(f.survived for f in own), sum(f.told for f in own)
    lost, doubled = sum(f.lost for f in own), sum(f.doubled for f in own)
    return f"| {name} | {len(own)} | {survived} | {told} | {lost} | {doubled} |"
