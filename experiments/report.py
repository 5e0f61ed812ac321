"""All results as one page: `python -m experiments.report` writes results/report.html.

The page holds everything itself, figures included, and loads nothing; a click on the
head of a column sorts its table. The tables of results/README.md between
`<!-- NAME -->` and `<!-- end NAME -->` are written anew from the same CSV files.
"""

import argparse
import base64
import html
import json
import re
from pathlib import Path

import pandas as pd

from experiments import costs, paper, publish, tables
from experiments.run import EXPERIMENTS, beside, load
from lottery_flow import files

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 72em;
  padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { border-bottom: 1px solid #ddd; padding: 3px 10px; text-align: left; }
th { cursor: pointer; user-select: none; background: #f4f4f4; }
th[data-up="1"]::after { content: " \\25B2"; }
th[data-up="0"]::after { content: " \\25BC"; }
img { max-width: 100%; }
code, pre { background: #f4f4f4; }
summary { cursor: pointer; color: #555; }
"""

# Numbers sort by value, everything else as text; what is no number comes last.
_SCRIPT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const table = head.closest("table"), body = table.tBodies[0];
  const column = [...head.parentNode.children].indexOf(head);
  const up = head.dataset.up !== "1";
  for (const other of head.parentNode.children) delete other.dataset.up;
  head.dataset.up = up ? "1" : "0";
  const rows = [...body.rows], key = row => row.cells[column].textContent.trim();
  rows.sort((a, b) => {
    const x = parseFloat(key(a)), y = parseFloat(key(b));
    const values = isNaN(x) ? key(a).localeCompare(key(b)) : x - y;
    const order = isNaN(x) - isNaN(y) || values;
    return up ? order : -order;
  });
  body.append(...rows);
};
"""


def finished(out: Path) -> list[str]:
    """The experiments that have results, in their usual order."""
    return [name for name in EXPERIMENTS if (out / name / "config.json").exists()]


def page(out: Path) -> str:
    """The whole report as HTML; every text is escaped."""
    names = finished(out)
    links = " · ".join(f'<a href="#{name}">{name}</a>' for name in names)
    sections = "\n".join(_section(out, name) for name in names)
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        "<title>lottery_flow: results</title>"
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>lottery_flow: results</h1>\n"
        f"<p>{links}</p>\n{sections}\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(out: Path, name: str) -> str:
    record = json.loads((out / name / "config.json").read_text())
    found = publish.read(out, name)
    figures = "\n".join(map(_image, sorted((out / name).glob("*.png"))))
    trainings = pd.DataFrame(
        [
            {"training": t["training"], "config": t["config"], "file": t["file"]}
            for t in record["trainings"]
        ]
    )
    expected = paper.EXPECTED.get(name)
    said = f"<p>The paper: {html.escape(expected)}.</p>" if expected else ""
    about = {k: record[k] for k in ("seeds", "settings", "versions", "backend")}
    return (
        f'<h2 id="{html.escape(name)}">{html.escape(record["about"])}</h2>\n'
        f"<pre>{html.escape(record['command'])}</pre>\n{figures}\n"
        f"{_table(load(name).beside(found))}\n{said}\n"
        f"<details><summary>settings and trainings</summary>"
        f"<pre>{html.escape(json.dumps(about, indent=1))}</pre>{_table(trainings)}"
        "</details>\n"
    )


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def _table(frame: pd.DataFrame) -> str:
    if frame.empty:
        return ""
    return frame.to_html(index=False, border=0, escape=True)


def refresh(page_: Path, out: Path) -> None:
    """Writes the tables of a Markdown page anew, between their marks."""
    text = page_.read_text()
    found = {name: beside(name, publish.read(out, name)) for name in finished(out)}
    timings = costs.path(str(out / "runs"))
    if timings.exists():
        found["costs"] = tables.markdown(costs.table(timings))
    for name, table in found.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        new = f"{begin}\n\n{table}\n\n{end}"
        text = re.sub(pattern, lambda _, new=new: new, text, flags=re.DOTALL)
    files.write(page_, text)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    out = parser.parse_args().out
    if not finished(out):
        raise SystemExit(
            f"error: {out} holds no results; run python -m experiments.run first"
        )
    files.write(out / "report.html", page(out))
    if (out / "README.md").exists():
        refresh(out / "README.md", out)
    print(out / "report.html")


if __name__ == "__main__":
    main()
