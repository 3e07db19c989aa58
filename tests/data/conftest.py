import pytest

from sequencer.config.schema import DataConfig


@pytest.fixture
def digits() -> DataConfig:
    return DataConfig(name="digits", in_chans=1, img_size=8, mean=[0.0], std=[1.0], batch_size=100, num_workers=0)
