"""The peers that `scripts/baselines.py` trains."""

import sys

import pytest
import timm
from timm.models import _registry

from sequencer.report.results import count_operations


@pytest.fixture
def baselines(load_script):
    return load_script("baselines")


def test_peers_take_as_many_operations_as_the_sequencer(baselines, monkeypatch):
    monkeypatch.setitem(sys.modules, baselines.__name__, baselines)  # where timm looks for it
    monkeypatch.setattr(_registry, "_model_entrypoints", _registry._model_entrypoints.copy())
    baselines.register_mixer()
    operations = {}
    for name in baselines.PEERS:
        config = baselines.configure(name, "0", ["data.root=here"])
        model = timm.create_model(config.model.name, num_classes=10, **config.model.kwargs)
        operations[name] = count_operations(model.eval(), (3, config.data.img_size, config.data.img_size))
    own = operations["sequencer2d_p4_32"]
    assert operations == pytest.approx(dict.fromkeys(operations, own), rel=0.04)


def test_an_override_counts_more_than_the_recipe_of_a_peer(baselines):
    config = baselines.configure("mixer_p4_32", "3", ["data.root=here", "trainer.max_epochs=1"])
    assert (config.trainer.max_epochs, config.seed, config.run_dir) == (1, 3, "outputs/baselines/mixer_p4_32-3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "mixer"], "--models mixer: choose from sequencer2d_p4_32"),
        (["--seeds", "a"], "give numbers"),
        (["seed=1"], "sets seed"),
        (["data.root=here", "--output", "."], "--output . is a folder"),
        (["optim.lrr=1", "data.root=here"], "optim.lr"),
    ],
)
def test_wrong_requests(baselines, capsys, arguments, message):
    assert baselines.main(arguments) == 2
    assert message in capsys.readouterr().err
