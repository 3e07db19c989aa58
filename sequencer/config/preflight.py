"""Checks of what a request names, which take a moment: models by their names, published weights, files, data.

They come before torch is imported. What passes them may still be refused by the component that reads it.
"""

import difflib
import os
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from sequencer.config.errors import RequestError
from sequencer.config.layouts import check_data
from sequencer.config.named_runs import named_run
from sequencer.config.schema import Config
from sequencer.model_table import PUBLISHED, VARIANTS
from sequencer.printing import first_line, quote_odd

HUB_LIMIT = 2.0  # s that the hub has for an answer
WEIGHTS_OF_A_RUN = ("checkpoints", "model")  # what a run folder has of these is read before any other weights


@lru_cache
def _names_in_timm() -> dict[str, None]:
    """Returns what may be names of timm's models: functions of its modules of models, and keys of their tables."""
    found = re.finditer(r"^def (\w+)\(|['\"](\w+)(?:\.\w+)?['\"]\s*:", _sources_of_timm(), re.MULTILINE)
    return dict.fromkeys(match[1] or match[2] for match in found)


def _sources_of_timm() -> str:
    """Returns the sources of timm's models as one text; importing them would take seconds."""
    spec = find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0], "models")
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))


def may_be_model(name: str) -> bool:
    """Whether a name, without its tag, may be that of a model; False if no model has this name."""
    arch = name.partition(".")[0]
    return arch in VARIANTS or arch in _names_in_timm()


def check_model_name(name: str) -> None:
    """Checks the name of a model.

    Raises:
        RequestError: There is no such model; the message suggests similar names.
    """
    if not may_be_model(name):
        nearest = difflib.get_close_matches(name, dict.fromkeys([*VARIANTS, *_names_in_timm()]), n=3)
        hint = f"; did you mean {', '.join(nearest)}?" if nearest else ""
        raise RequestError(f"unknown model {quote_odd(name)}{hint}")


def check_source(source: str, online: bool = True) -> None:
    """Checks that MODEL exists: as a file or folder, or as a model with published weights that can be downloaded.

    Args:
        source: MODEL.
        online: whether its weights are wanted, and not its name alone.

    Raises:
        RequestError: It does not.
    """
    if os.path.exists(source):  # False, not an error, for a name that is too long
        return
    if not may_be_model(source):
        raise RequestError(f"{quote_odd(source)} is neither a file or folder nor a timm model name")
    if online:
        check_published(source)


def check_published(name: str) -> None:
    """Checks that the published weights of a model are in the cache, or the hub answers within two seconds.

    Without an answer the hub's client is set to use its cache alone, where it holds models: it then fails at once,
    instead of trying again for a minute.

    Raises:
        RequestError: The model has no published weights, or they cannot be downloaded.
    """
    arch = name.partition(".")[0]
    if arch in VARIANTS and arch not in PUBLISHED:
        raise RequestError(f"{name} has no published weights; give a checkpoint file and --arch {name}")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    cached = [path.name for path in Path(constants.HF_HUB_CACHE).glob("models--*")]
    if any(folder.startswith(f"models--timm--{arch}") for folder in cached):
        return
    problem = _ask(constants.ENDPOINT)
    if problem is None:
        return
    if not cached:
        raise RequestError(
            f"{name}: its weights are not here, and {constants.ENDPOINT} does not answer ({problem})\n"
            "check the connection, or name a file or folder with weights"
        )
    constants.HF_HUB_OFFLINE = True


def _ask(address: str) -> str | None:
    """Asks a server for any answer within `HUB_LIMIT`, the look-up of its address included; returns what went wrong."""
    problem: list[str | None] = [f"no answer within {HUB_LIMIT:g} s"]

    def ask() -> None:
        try:
            urlopen(Request(address, method="HEAD"), timeout=HUB_LIMIT).close()
        except HTTPError:  # an answer
            problem[0] = None
        except Exception as error:
            problem[0] = first_line(getattr(error, "reason", error))
        else:
            problem[0] = None

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_LIMIT)
    return problem[0]


def check_request(config: Config, resume: bool = False, plan: bool = False) -> None:
    """Checks what a run reads: its data, its model, and the weights that it starts from or learns from.

    Args:
        config: The run.
        resume: Whether the run is resumed, where it has saved weights, from these.
        plan: Whether the run is only planned, for which no weights are read.

    Raises:
        RequestError: Something is missing.
    """
    check_model_name(config.model.name)
    check_data(config.data)
    started = resume and any(Path(config.run_dir, name).exists() for name in WEIGHTS_OF_A_RUN)
    if config.model.pretrained and not (started or plan):
        check_published(config.model.name)
    for key, source in (("init_from", config.init_from), ("optim.distill_from", config.optim.distill_from)):
        if source is not None and not (started and key == "init_from"):
            try:
                check_source(source, online=not plan)
            except RequestError as error:
                raise RequestError(f"{key}={error}") from error  # which begins with the source


def name_runs(config: Config) -> None:
    """Replaces folders of runs in `init_from` and `optim.distill_from` by their newest runs."""
    for section, key in ((config, "init_from"), (config.optim, "distill_from")):
        if source := getattr(section, key):
            setattr(section, key, str(named_run(source, besides=config.run_dir)))
