"""Private functions of timm that this package uses, as read in timm 1.0.31.

They may change without notice. Everything else that the package imports from timm is public, but for the function of
timm's optimizer that `sequencer.training.muon` replaces.
"""

from timm.models._features import feature_take_indices

__all__ = ["feature_take_indices"]
