"""What convergence.py, transfer.py and finetuning.py share: runs, their ledger, tuning, intervals, tables and plots.

Text and the small decoder are those of the example programs.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples"))
