"""Figures of long tests: lines of JSON, where LOTTERY_FLOW_FAULTS_FIGURES says."""

import json
import os
from typing import Any


def append(kind: str, tried: int, survived: int, **more: Any) -> None:
    """Prints what was tried and how often it went well; keeps it, if asked."""
    line = json.dumps({"kind": kind, "tried": tried, "survived": survived, **more})
    print(line)
    path = os.environ.get("LOTTERY_FLOW_FAULTS_FIGURES")
    if path:
        with open(path, "a") as file:
            file.write(line + "\n")
