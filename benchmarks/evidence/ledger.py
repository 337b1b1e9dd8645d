"""The results file: one line per finished run, so that an interrupted benchmark goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


class Ledger:
    """Results by configuration and seed, appended to a file of JSON lines as they come.

    Args:
        file: Created when the first result is added. A last line that an interruption cut off is removed.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._results: dict[str, Any] = {}
        if file.exists():
            text = file.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                file.write_bytes(whole)
            for line in whole.decode().splitlines():
                record = json.loads(line)
                self._results[_key(record["run"])] = record["result"]

    def __contains__(self, run: Any) -> bool:
        return _key(asdict(run)) in self._results

    def __getitem__(self, run: Any) -> Any:
        return self._results[_key(asdict(run))]

    def __len__(self) -> int:
        return len(self._results)

    def add(self, run: Any, result: Any) -> None:
        """Keep the result of a run (a dataclass), in memory and in the file."""
        record = {"run": asdict(run), "result": result}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._results[_key(record["run"])] = result


def _key(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)
