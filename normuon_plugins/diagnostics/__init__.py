"""What the method does to a model: singular values and neuron norms of momentum, Muon's direction and NorMuon's.

``diagnose(optimizer)`` looks at a live optimizer, ``watch(optimizer, every=100)`` at every hundredth step,
``read_checkpoint(path)`` at a file or folder; ``write_report(diagnosis, "report.html")`` makes a page of it.
"""

from normuon_plugins.diagnostics.checkpoint import read_checkpoint
from normuon_plugins.diagnostics.live import diagnose, watch
from normuon_plugins.diagnostics.report import write_report
from normuon_plugins.diagnostics.spectra import Diagnosis, MatrixDiagnosis, Stage

__all__ = ["Diagnosis", "MatrixDiagnosis", "Stage", "diagnose", "read_checkpoint", "watch", "write_report"]
