"""Predictions for image files, as a stream."""

import threading

import torch
from PIL import Image
from torch import nn

from sequencer.evaluation import predict


def test_a_stream_that_is_closed_reads_no_further_image(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (4, 4)).save(path)
    read, gate = [], threading.Event()

    def transform(image: Image.Image) -> torch.Tensor:
        read.append(image)
        if len(read) > 2:
            gate.wait(10)
        return torch.zeros(3, 4, 4)

    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    stream = predict(model, transform, [str(path)] * 20, ["a", "b"], 1, batch_size=2, num_workers=1, device="cpu")
    next(stream)  # the third image is being read and others wait
    threading.Timer(0.5, gate.set).start()
    stream.close()
    assert len(read) <= 3
