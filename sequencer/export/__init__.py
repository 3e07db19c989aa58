"""Models in forms that leave this project."""

from sequencer.export.folder import save_model_folder

__all__ = ["save_model_folder"]
