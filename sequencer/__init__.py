"""Image classifiers that mix tokens by recurrence; importing this registers them with timm."""

from sequencer import models

__all__ = ["models"]
__version__ = "0.1.0"
