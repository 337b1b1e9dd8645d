"""Put what pretrained.py and pretraining.py found into one picture and one page of tables.

python benchmarks/rates.py docs/evidence/rates-*.json --out docs/evidence/rates.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from evidence.rate_report import Comparison, draw, markdown
from rich.console import Console


def read(file: Path) -> list[Comparison]:
    """Return the comparisons of a file of results; their summaries are made anew from the losses."""
    record = json.loads(file.read_text())
    return [
        Comparison(**{key: value for key, value in each.items() if key != "summary"}) for each in record["comparisons"]
    ]


def main() -> None:
    """Draw and print what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="that --out of the two programs wrote, in order")
    parser.add_argument("--out", type=Path, default=Path("rates.png"), help="the picture")
    args = parser.parse_args()
    comparisons = [each for file in args.files for each in read(file)]
    draw(comparisons, args.out)
    console = Console()
    console.print("\n".join(map(markdown, comparisons)), markup=False, soft_wrap=True)
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
