"""Image classifiers that mix tokens by recurrence.

Importing this package registers its models with timm: at once where timm has been imported, otherwise as soon as it is.
"""

import importlib

from wrapt import when_imported

__version__ = "0.1.0"


@when_imported("timm")
def _register_models(timm: object) -> None:
    importlib.import_module("sequencer.variants")
