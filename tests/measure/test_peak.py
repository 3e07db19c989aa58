import torch

from sequencer.measure import peak, peak_rates


def test_the_rate_is_that_of_the_fastest_product(monkeypatch):
    rates = {"torch": 2e9, "onednn": 5e9}
    asked = []

    def rate(name, shape, device, dtype):
        asked.append((name, shape))
        return rates[name] * (2 if shape == (1, 2, 3) else 1)

    monkeypatch.setattr(peak, "_rate", rate)
    monkeypatch.setattr(peak.products, "SHAPES", ((1, 2, 3),))
    monkeypatch.setattr(peak.products, "candidates", lambda dtype: list(rates))
    found, _ = peak_rates(torch.device("cpu"), torch.float32)
    assert found == 1e10
    assert asked == [(name, shape) for name in rates for shape in ((2048, 2048, 2048), (1, 2, 3))]


def test_a_rate_is_that_of_its_product():
    assert 1e6 < peak._rate("torch", (64, 64, 64), torch.device("cpu"), torch.float32) < 1e13
