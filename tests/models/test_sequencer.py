"""Stochastic depth, input sizes, initialisation, position embeddings, checkpointing, export and compilation."""

import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
from timm.layers import DropPath

from sequencer.models import Sequencer2d, VSequencer
from sequencer.models.sequencer import Sequencer

TINY = {"layers": (1, 1), "patch_sizes": (2, 2), "embed_dims": (8, 16), "hidden_sizes": (4, 8), "num_classes": 5}


def tiny(model: type[Sequencer], **kwargs) -> Sequencer:
    """Builds a model of two stages with one block each and a total stride of 4; no weight is zero."""
    torch.manual_seed(0)
    built = model(**TINY | {"img_size": 8} | kwargs)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built


@pytest.mark.parametrize("name", ["sequencer2d_s", "sequencer2d_l", "v_sequencer_s", "sequencer2d_t_8"])
def test_stochastic_depth_grows_linearly(name):
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=0.4)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    n = len(rates)
    assert n == sum(len(stage.blocks) for stage in model.stages)
    assert rates == [0.4 * k / (n - 1) for k in range(n)]


def test_dropout_rates():
    model = Sequencer2d(**TINY, img_size=8, drop_rate=0.1, proj_drop_rate=0.2)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    mlps = {f"stages.{stage}.blocks.0.mlp_channels.drop{i}": 0.2 for stage in (0, 1) for i in (1, 2)}
    assert rates == mlps | {"head.drop": 0.1}


def test_stochastic_depth_of_one_block():
    model = Sequencer2d(layers=(1,), patch_sizes=(2,), embed_dims=(8,), hidden_sizes=(4,), drop_path_rate=0.4)
    assert model.stages[0].blocks[0].drop_path.drop_prob == 0


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((13, 14), "input height 13 is smaller than the total stride 14"),
        ((14, 13), "input width 13 is smaller than the total stride 14"),
        ((0, 14), "input height 0 is smaller than the total stride 14"),
    ],
)
def test_images_without_a_token_raise(size, message):
    with torch.device("meta"):
        model = timm.create_model("sequencer2d_s")
        image = torch.zeros(1, 3, *size)
    with pytest.raises(ValueError, match=message):
        model(image)
    with pytest.raises(ValueError, match=message):
        model.forward_intermediates(image)
    with pytest.raises(ValueError, match=message):
        timm.create_model("sequencer2d_s", img_size=size)


@pytest.mark.parametrize("model", [Sequencer2d, VSequencer])
def test_sizes_that_the_strides_do_not_divide(model):
    """Left-over pixels are ignored; left-over tokens are scanned in their stage, then dropped."""
    built = tiny(model)
    x = torch.randn(2, 3, 11, 13)
    torch.testing.assert_close(built(x), built(x[:, :, :10, :12]))
    assert not torch.allclose(
        built(x), built(x[:, :, :8, :12])
    )  # the fifth row of tokens is scanned in the first stage
    assert built.forward_features(x).shape == (2, 2, 3, 16)


@pytest.mark.parametrize("model", [Sequencer2d, partial(VSequencer, ape=True)])
def test_weights_are_drawn_after_to_empty(model):
    """A model built without memory and initialised has the distribution of one that was built at once."""
    args = {"layers": (2,), "patch_sizes": (4,), "embed_dims": (64,), "hidden_sizes": (32,), "img_size": 32}
    with torch.device("meta"):
        empty = model(**args).to_empty(device="cpu")
    for parameter in empty.parameters():
        parameter.data.fill_(torch.nan)
    torch.manual_seed(0)
    empty.init_weights()
    for name, expected in model(**args).state_dict().items():
        actual = empty.state_dict()[name]
        error = expected.std() / expected.numel() ** 0.5
        assert (actual.mean() - expected.mean()).abs() <= 8 * error, name
        assert (actual.std() - expected.std()).abs() <= 8 * error, name


def test_392_models_take_other_sizes():
    model = timm.create_model("sequencer2d_s_392", layers=(1, 1, 1, 1)).eval()
    assert model.pretrained_cfg["crop_pct"] == 1.0
    for size in ((392, 392), (224, 224), (28, 42)):
        assert model(torch.zeros(1, 3, *size)).shape == (1, 1000)


def test_stage_lists_of_different_lengths_raise():
    with pytest.raises(ValueError, match="one entry per stage"):
        Sequencer2d(layers=(1, 1))


@pytest.mark.parametrize("model", [Sequencer2d, VSequencer])
def test_initialisation(model):
    torch.manual_seed(0)
    built = model(**TINY | {"num_classes": 7})
    assert torch.equal(built(torch.randn(2, 3, 8, 8)), torch.zeros(2, 7))
    assert 0 < built.stages[0].blocks[0].mlp_channels.fc1.bias.abs().max() < 1e-5
    assert built.stem.proj.bias.abs().max() == 0
    assert built.stem.proj.weight.std().item() == pytest.approx((3 * 2 * 2) ** -0.5, rel=0.3)


def test_position_embedding_at_other_sizes():
    """The embedding is added to the tokens of the stem; it is resampled for images of other sizes."""
    model = tiny(VSequencer, ape=True)
    embedding = model.absolute_pos_embed
    assert embedding.shape == (1, 4, 4, 8)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.forward_embed(x), model.stem(x) + embedding)
    x = torch.randn(2, 3, 16, 12)
    torch.nn.init.constant_(embedding, 0.5)
    torch.testing.assert_close(model.forward_embed(x), model.stem(x) + 0.5)
    torch.nn.init.normal_(embedding)
    assert model(x).shape == (2, 5)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    initial = VSequencer(**TINY, ape=True, img_size=(8, 12)).absolute_pos_embed
    assert initial.shape == (1, 4, 6, 8)
    assert initial.std().item() == pytest.approx(0.02, rel=0.3)


def test_shuffle_permutes_all_images_alike_in_training_only():
    model = tiny(VSequencer, shuffle=True)
    x = torch.randn(1, 3, 16, 16).expand(3, -1, -1, -1)
    tokens = model.stem(x).flatten(1, 2)
    torch.testing.assert_close(model.eval().forward_embed(x).flatten(1, 2), tokens)
    first, second = (model.train().forward_embed(x).flatten(1, 2) for _ in range(2))
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first, tokens)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sort(dim=1).values, tokens.sort(dim=1).values)
    assert torch.equal(tiny(VSequencer).train().forward_embed(x), tiny(VSequencer).stem(x))


@pytest.mark.parametrize("model", [Sequencer2d, VSequencer])
def test_checkpointing_saves_memory(model):
    """Results are equal, also with dropout and stochastic depth, and fewer activations are kept."""
    x, upstream = torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    results, kept = [], []
    for enable in (False, True):
        built = tiny(model, layers=(3, 3), drop_path_rate=0.5, drop_rate=0.1).train()
        built.set_grad_checkpointing(enable)
        held = []

        def hold(tensor, held=held):
            held.append(tensor.numel())
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            logits = built(x)
        results.append([logits, *torch.autograd.grad(logits, list(built.parameters()), upstream)])
        kept.append(sum(held))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 4


def test_pruning_removes_later_stages():
    model = tiny(Sequencer2d)
    assert model.prune_intermediate_layers([0]) == [0]
    assert len(model.stages) == 1
    assert model.num_features == model.feature_info[0]["num_chs"] == 8
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 4, 4, 8)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_tracing_by_torchscript_names_its_successor():
    mixer = tiny(Sequencer2d).stages[0].blocks[0].rnn_tokens
    with pytest.raises(RuntimeError, match=r"use torch\.export"):
        torch.jit.trace(mixer, torch.randn(1, 4, 4, 8))


# These programs run in processes of their own, since the run-time type checks of the tests cannot be traced.

EXPORT = """
import timm, torch, sequencer
torch.manual_seed(0)
tiny = dict(layers=(1, 1), patch_sizes=(2, 2), embed_dims=(16, 32), hidden_sizes=(8, 16), img_size=8, in_chans=1)
for name, args in (("sequencer2d_t_8", {"layers": (1, 1)}), ("gru_sequencer2d_s", tiny),
                   ("indylstm_sequencer2d_s", tiny), ("v_sequencer_s", tiny), ("v_sequencer_s_pe", tiny)):
    model = timm.create_model(name, num_classes=10, **args).eval()
    torch.nn.init.normal_(model.head.fc.weight)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(3, 1, 8, 8),), dynamic_shapes={"x": {0: batch}}).module()
    for size in (1, 3, 8):
        x = torch.randn(size, 1, 8, 8)
        torch.testing.assert_close(program(x), model(x))
"""

COMPILE = """
import sys, timm, torch, sequencer
torch.manual_seed(0)
model = timm.create_model("sequencer2d_t_8", num_classes=10, layers=(1, 2))
torch.nn.init.normal_(model.head.fc.weight)
compiled = torch.compile(model, backend=sys.argv[1])
for size in (3, 5):
    x, upstream = torch.randn(size, 1, 8, 8), torch.randn(size, 10)
    (expected, actual) = (
        [logits, *torch.autograd.grad(logits, list(model.parameters()), upstream)]
        for logits in (model(x), compiled(x))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
"""


FX = """
import timm, torch, sequencer
from timm.models._features_fx import create_feature_extractor
torch.manual_seed(0)
for name, args in (("sequencer2d_t_32", {}), ("gru_sequencer2d_s", {}), ("v_sequencer_s_pe", {"shuffle": True})):
    args = dict(embed_dims=(16, 16), hidden_sizes=(8, 8), layers=(1, 2), patch_sizes=(2, 2), img_size=16) | args
    whole = timm.create_model(name, features_only=True, **args).eval()
    traced = timm.create_model(name, features_only=True, feature_cls="fx", **args).eval()
    weights = {f"graph_module.{key}": value for key, value in whole.model.state_dict().items()}
    assert not traced.load_state_dict(weights, strict=False).missing_keys
    for size in (16, 21):  # a graph is not bound to a size
        x = torch.randn(2, 3, size, size)
        for actual, expected in zip(traced(x), whole(x), strict=True):
            torch.testing.assert_close(actual, expected)
    logits = timm.create_model(name, num_classes=5, **args).train()
    graph = create_feature_extractor(logits, ["head.flatten"])
    graph(x)["head.flatten"].sum().backward()
    assert all(parameter.grad is not None for parameter in graph.parameters())
"""


def run(program: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)


@pytest.mark.slow
def test_export_with_a_dynamic_batch_and_compilation():
    run(EXPORT + COMPILE, "aot_eager")


def test_symbolic_tracing_by_torch_fx():
    run(FX)


@pytest.mark.slow
def test_compilation_with_inductor():
    run(COMPILE, "inductor")
