"""Export of models: model folders, ONNX graphs, torch.export programs and weight files."""

from sequencer.export.description import describe_export, loads_with_timm
from sequencer.export.export import export_graph, export_weights
from sequencer.export.folder import push, save_model_folder, write_model_folder
from sequencer.export.formats import to_onnx
from sequencer.export.provenance import commit, versions
from sequencer.export.verify import Mismatch

__all__ = [
    "Mismatch",
    "commit",
    "describe_export",
    "export_graph",
    "export_weights",
    "loads_with_timm",
    "push",
    "save_model_folder",
    "to_onnx",
    "versions",
    "write_model_folder",
]
