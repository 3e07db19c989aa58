"""What the pages share: their templates and how times are written."""

import importlib.resources
from typing import Any

import jinja2

from sequencer.files import to_json


def render(template: str, context: dict[str, Any], script: dict[str, Any]) -> str:
    """Renders a page; texts are escaped by jinja2, and the numbers of its script are JSON without `<`."""
    templates = importlib.resources.files("sequencer.report") / "templates"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.loader = jinja2.FunctionLoader(lambda name: (templates / name).read_text(encoding="utf-8"))
    css, code = ((templates / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    data = to_json(script).replace("<", "\\u003c")
    return environment.get_template(template).render(**context, css=css, script=code, data=data)


def duration(seconds: float) -> str:
    """Formats seconds as a person says them: `38 s`, `4 min 10 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
