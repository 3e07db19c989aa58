"""Names that a request may contain and that packages with torch give a meaning to, so that a request is checked first.

`sequencer.data.add_data_set` and `sequencer.ops.add_backend` add to the lists.
"""

EXPORTED_GRAPHS = {"onnx": "model.onnx", "torch_export": "model.pt2"}  # by format: the file
EXPORTED_WEIGHTS = {"hub": "model.safetensors", "timm": "model.safetensors", "paper": "model.pth"}
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
