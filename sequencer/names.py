"""Names and limits of requests, which are checked before torch is imported, and of the files of others.

`sequencer.data.add_data_set` and `sequencer.ops.add_backend` add to the lists.
"""

LARGEST_IMAGE = 8192  # height and width, pixels
MOST_CLASSES = 10**6
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
    "filelist",
    "webdataset",
]
# arguments of timm.create_model and timm's builders that are no arguments of an architecture: they load weights, read
# files, or build something other than a classifier
LOADING_ARGUMENTS = [
    "cache_dir",
    "checkpoint_path",
    "device",
    "dtype",
    "exportable",
    "feature_cfg",
    "feature_cls",
    "features_only",
    "kwargs_filter",
    "model_cfg",
    "model_cls",
    "model_name",
    "no_jit",
    "out_indices",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "pretrained_strict",
    "pruned",
    "scriptable",
    "variant",
]
