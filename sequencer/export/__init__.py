"""Models in forms that leave this project."""

from sequencer.export.export import GRAPHS, WEIGHTS, export_graph, export_weights
from sequencer.export.folder import push, save_model_folder, write_model_folder
from sequencer.export.provenance import commit, versions
from sequencer.export.verify import Mismatch

__all__ = [
    "GRAPHS",
    "WEIGHTS",
    "Mismatch",
    "commit",
    "export_graph",
    "export_weights",
    "push",
    "save_model_folder",
    "versions",
    "write_model_folder",
]
