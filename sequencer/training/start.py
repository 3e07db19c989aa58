"""What the log and errors say of the run that another run starts from."""

from sequencer.config.inheritance import inherited_values
from sequencer.config.request import describe_differences
from sequencer.config.schema import Config


def describe_start(config: Config) -> list[str]:
    """Says which weights the run starts from, and which settings it has taken from their run."""
    if config.init_from is None:
        return []
    there = inherited_values(config.init_from)
    here = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in there}
    taken = ", ".join(key for key in there if here[key] == there[key])
    others = describe_differences(there, here)
    parts = [
        f"weights of {config.init_from}",
        f"from there {taken}" if taken else "",
        f"not {others}" if others else "",
    ]
    return ["; ".join(filter(None, parts))]


def suggest_inheriting(config: Config) -> str:
    """Says, as a line of its own, which keys of the architecture differ from those of the run that is started from."""
    there = inherited_values(config.init_from)
    here = {"model.name": config.model.name, "model.kwargs": config.model.kwargs, "data.in_chans": config.data.in_chans}
    differences = describe_differences({key: there.get(key) for key in here}, here) if there else ""
    return f"\nits architecture is another one: {differences}" if differences else ""
