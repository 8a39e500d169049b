"""What `auto` chooses backends by: `vattention/attention/measured.json`, from a benchmark's report.

`python -m bench attention --save` writes it on the machine that measures;
`python -m bench save-measured REPORT` from the report of such a run, brought from elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vattention.attention import choice

PATH = Path(choice.__file__).with_name("measured.json")

# Of a report's environment, what says how fast a kernel is.
_FROM = ("driver", "cuda", "torch", "vattention", "commit")


def save_report(report: dict[str, Any], path: Path = PATH) -> None:
    """Replaces what the file says about the device of that report.

    Raises:
        ValueError: it is no report of all repetitions of `attention` on a GPU.
    """
    if report.get("benchmark") != "attention":
        raise ValueError("it is no report of the benchmark attention")
    measurements = report["measurements"]
    if measurements["capability"] is None or report["quick"]:
        raise ValueError("only full runs on a GPU say what is fast: this one is quick, or a host's")
    environment = report["environment"]
    source = {
        "command": report["command"],
        "date": report["date"],
        **{name: environment[name] for name in _FROM},
        "backends": measurements["backends"],
    }
    save(environment["device"], measurements["capability"], measurements["measured"], source, path)


def save(
    name: str,
    capability: list[int],
    shapes: list[dict[str, Any]],
    source: dict[str, Any],
    path: Path = PATH,
) -> None:
    """Replaces what the file says about a device, for this process too."""
    devices = json.loads(path.read_text())["devices"] if path.exists() else []
    others = [device for device in devices if device["name"] != name]
    entry = {"name": name, "capability": capability, "from": source, "shapes": shapes}
    text = json.dumps({"devices": [*others, entry]}, indent=1)
    path.write_text(text + "\n")
    choice._shapes.cache_clear()
