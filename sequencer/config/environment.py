"""The environment variables that every command reads."""

import os

from sequencer.config.errors import RequestError
from sequencer.names import BACKENDS

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def check_environment() -> None:
    """Checks the environment variables that choose kernels, and those by which torchrun numbers the ranks.

    Raises:
        RequestError: SEQUENCER_BACKEND names no backend, or the variables of ranks are ill-typed or incomplete.
    """
    backend = os.environ.get("SEQUENCER_BACKEND", "auto")
    if backend not in BACKENDS:
        raise RequestError(f"SEQUENCER_BACKEND={backend}: there are {', '.join(BACKENDS)}")
    given = {name: os.environ[name] for name in RANK_VARIABLES if name in os.environ}
    for name, text in given.items():
        lowest = int(name.endswith("SIZE"))
        if not (text.isdecimal() and int(text) >= lowest):
            raise RequestError(f"{name}={text}: torchrun sets it to a number of {lowest} or more; unset it")
    numbers = {name: int(text) for name, text in given.items()}
    world = numbers.get("WORLD_SIZE", 1)
    missing = [name for name in (*RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world > 1 and missing:
        raise RequestError(
            f"WORLD_SIZE={world}, but {missing[0]} is not set: torchrun sets both; for a single rank unset WORLD_SIZE"
        )
    for name, size in (("RANK", world), ("LOCAL_RANK", numbers.get("LOCAL_WORLD_SIZE", world))):
        if numbers.get(name, 0) >= size:
            raise RequestError(f"{name}={numbers[name]}, but there are {size} ranks: torchrun sets both; unset {name}")
