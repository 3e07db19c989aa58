"""Pictures of evidence maps and of the contributions of scan directions."""

from itertools import pairwise

import numpy as np
from matplotlib.text import Text

from sequencer.analysis.attribution import Part
from sequencer.analysis.attribution_plots import EvidenceRow, plot_directions, plot_evidence, signed


def test_captions_of_evidence_stay_above_their_own_image(tmp_path):
    image, values = np.full((8, 8, 3), 100, np.uint8), np.linspace(-2, 1, 16).reshape(4, 4)
    captions = ["for ants", "for a golden retriever against a labrador retriever with a long name"]
    row = EvidenceRow(image, "10308379_1b6c72e180_and_more.jpg", "ants 51.3%", [(text, values) for text in captions])
    figure = plot_evidence([row], tmp_path / "evidence.png")
    figure.draw_without_rendering()
    panels, scale = figure.axes[:3], figure.axes[3]
    texts = [next(t for t in panel.findobj(Text) if t.get_text() == panel.get_title(loc="left")) for panel in panels]
    titles = [text.get_window_extent() for text in texts]
    assert all(left.x1 < right.x0 for left, right in pairwise(titles))
    assert texts[0].get_text() == "10308379_1b6c72e180_and_m…\nants 51.3%"
    assert texts[2].get_text().endswith("…")
    assert scale.get_ylabel() == "logits"
    assert scale.get_ylim() == (-2, 2)


def test_decimals_of_directions_follow_the_largest_value(tmp_path):
    parts = [Part(0, 0, source) for source in ("down", "up", "mlp")]
    for factor, expected in ((1, ["+0.10", "-0.02", "+3.00"]), (0.01, ["+0.0010", "-0.0002", "+0.0300"])):
        values = np.array([0.1, -0.02, 3.0]) * factor
        table, sums, *_ = plot_directions(parts, values, "title", tmp_path / "directions.png").axes
        assert [text.get_text() for text in table.texts] == expected
        assert [text.get_text() for text in sums.texts] == expected


def test_what_rounds_to_zero_has_no_sign():
    assert [signed(value) for value in (-0.004, 0.004, -0.006, 1.0)] == ["0.00", "0.00", "-0.01", "+1.00"]
