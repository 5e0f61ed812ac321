"""The page of results shows texts as texts, whatever is in them."""

import collections
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd

from experiments import report

HARM = '<script>alert("1")</script>\'"><img src=x onerror=alert(1)>&amp;'


def test_the_report_escapes_every_text(tmp_path, monkeypatch):
    name = "calibration"
    folder = tmp_path / name
    folder.mkdir()
    strings = {k: HARM for k in ("about", "command", "backend")}
    record = {
        **strings,
        "seeds": [HARM],
        "settings": {HARM: HARM},
        "versions": {HARM: HARM},
        "trainings": [{"training": HARM, "config": HARM, "file": HARM}],
    }
    (folder / "config.json").write_text(json.dumps(record))
    frame = pd.DataFrame({HARM: [HARM], "x": [1]})
    frame.to_csv(folder / f"{name}.csv", index=False)
    (folder / (HARM.replace("/", "") + ".png")).write_bytes(b"<script>")
    monkeypatch.setitem(report.paper.EXPECTED, name, HARM)
    monkeypatch.setattr(
        report, "load", lambda _: type("M", (), {"beside": lambda found: found[""]})
    )
    page = report.page(tmp_path)
    own = report._SCRIPT, report._STYLE
    for text in own:
        assert text in page
        page = page.replace(text, "")
    assert page.count("&lt;script&gt;") >= 12
    seen = Elements()
    seen.feed(page)
    assert seen.tags["script"] == 1  # its own, now empty
    assert seen.tags["img"] == 1
    assert {src[:22] for src in seen.attributes["src"]} == {"data:image/png;base64,"}
    assert not [name for name in seen.attributes if name.startswith("on")]


class Elements(HTMLParser):
    """How often each tag is there, and the values of each attribute."""

    def __init__(self):
        super().__init__()
        self.tags = collections.Counter()
        self.attributes = collections.defaultdict(list)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes[name].append(value)


def test_every_string_of_a_record_reaches_the_test_above():
    """A new field of a record that the page shows needs a line above."""
    source = Path(report.__file__).read_text()
    shown = set(re.findall(r"""(?:record|t)\[['"](\w+)['"]\]""", source))
    shown |= set(re.findall(r'"(\w+)"', source.partition("for k in (")[2][:60]))
    assert shown == {
        *("about", "command", "trainings", "training", "config", "file"),
        *("seeds", "settings", "versions", "backend"),
    }
