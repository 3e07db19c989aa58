"""The key figures of a model as text, for the page of a run and for its model card."""

from sequencer.models import KeyFigures


def describe_figures(figures: KeyFigures) -> list[tuple[str, str, str]]:
    """Returns name, value and note of each key figure."""
    interval = [f"{value:.2%}" for value in figures.top1_interval or ()]
    return [
        ("top-1", _text(figures.top1, ".2%"), f"95%: {' to '.join(interval)}" if interval else ""),
        ("loss", _text(figures.loss, ".4f"), "cross-entropy, nats"),
        ("calibration error", _text(figures.calibration_error, ".2%"), "expected, 15 bins"),
        ("operations", short_number(figures.operations), "multiplications and additions, an image"),
    ]


def short_number(value: float) -> str:
    """Formats a number with three digits: `4.13 M`."""
    for factor, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:g}"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
