"""Receptive fields of tokens, on models whose fields are known."""

import numpy as np
import timm
import torch

from sequencer.analysis.receptive_field import token_fields


def build(**kwargs):
    torch.manual_seed(0)
    args = {"layers": (1, 1), "patch_sizes": (2, 2), "embed_dims": (8, 16), "hidden_sizes": (4, 8)}
    return timm.create_model("sequencer2d_t_32", num_classes=3, img_size=16, **args | kwargs).eval()


def test_a_token_of_the_first_stage_sees_its_row_and_column():
    model, images = build(), torch.randn(2, 3, 16, 12)
    fields = token_fields(model, images, 0)
    assert fields.shape == (8, 6, 16, 12)
    seen = np.zeros((16, 12), bool)
    seen[4:6], seen[:, 6:8] = True, True  # token (2, 3), of patches of two pixels
    assert ((fields[2, 3] > 0) <= seen).all()
    assert (fields[2, 3] > 0)[seen].mean() > 0.9  # a gradient may be negative in both channels of a pixel


def test_the_grid_is_that_of_single_gradients():
    model, images = build(), torch.randn(2, 3, 16, 16)
    fields = token_fields(model, images, 1, most=3)
    assert fields.shape == (3, 3, 16, 16)
    x = images.clone().requires_grad_()
    tokens = model.forward_intermediates(x, [1], output_fmt="NHWC", intermediates_only=True)[0]
    (gradient,) = torch.autograd.grad(tokens[:, 3, 2].sum(), x)  # of 4 tokens the grid has 0, 2 and 3
    np.testing.assert_allclose(fields[2, 1], gradient.relu().sum(dim=1).mean(dim=0), rtol=1e-4, atol=1e-8)


def test_parameters_get_no_gradient():
    model = build()
    token_fields(model, torch.randn(1, 3, 16, 16), 1)
    assert all(parameter.grad is None for parameter in model.parameters())
