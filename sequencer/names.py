"""Names that a request may contain and that packages with torch give a meaning to, so that a request is checked first.

`sequencer.data.add_data_set` and `sequencer.ops.add_backend` add to them.
"""

BACKENDS = ["auto", "triton", "fused", "torch", "reference"]
DATA_SETS = [
    "digits",
    "mnist",
    "fashion_mnist",
    "cifar10",
    "cifar100",
    "flowers102",
    "stanford_cars",
    "imagefolder",
    "imagenet",
    "webdataset",
]
