"""Train an image classifier: `python train.py experiment=NAME group=choice key=value`; `--help` shows what there is."""

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sequencer.config.errors import RequestError, SharedError, say
from sequencer.config.request import (
    Request,
    check_overrides,
    check_restarts,
    compose,
    request,
    resume_request,
    take_plan,
    to_config,
)
from sequencer.config.schema import check_environment
from sequencer.config.sources import Sources
from sequencer.config.sweep import first_trial, is_sweep, prepare_sweep, run_trial, start_folder


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_trial(__file__, composed)
    try:
        start(request(composed))
    except Exception as error:  # Hydra would print a traceback and exit with 1 whatever it was
        sys.exit(exit_code(error))
    return None


def start(wanted: Request) -> None:
    from sequencer.training import run  # imports torch

    run(wanted.config, resume=wanted.resume)


def command(arguments: list[str]) -> object:
    parsed = get_args_parser().parse_args(arguments)
    if not (parsed.help or parsed.hydra_help or parsed.shell_completion or parsed.info):
        check_environment()
        planned, overrides = take_plan(parsed.overrides)
        check_restarts(overrides)
        if wanted := resume_request(overrides):
            return start(wanted)
        sweep = is_sweep(overrides, parsed.multirun) and not parsed.cfg
        if planned:
            return show_plan(*first_trial(overrides) if sweep else (overrides, 1))
        flags = [argument for argument in arguments if argument not in parsed.overrides]
        if sweep:
            folder, overrides = prepare_sweep(overrides)
            start_folder(folder)
            sys.argv[1:] = [*flags, *overrides]
            main()
            return finish_sweep(folder)
        request(compose(overrides))
        sys.argv[1:] = [*flags, *check_overrides(overrides)]
    return main()


def show_plan(overrides: list[str], trials: int) -> None:
    config, sources = to_config(compose(overrides)), Sources(overrides)
    from sequencer.measure import plan  # imports torch

    plan(config, sources, trials)


def finish_sweep(folder: Path) -> None:
    """
    Raises:
        RuntimeError: trials have failed.
    """
    from sequencer.analysis import write_sweep  # imports torch

    write_sweep(folder, folder.name)
    print(f"sweep folder: {folder}")
    if failed := sorted(path.stem for path in folder.glob("*.failed")):
        listed = f"{'; '.join(failed[:3])}{'; ...' if len(failed) > 3 else ''}"
        raise RuntimeError(f"{len(failed)} of the trials failed, and are tried again by the same command: {listed}")


def exit_code(error: Exception) -> int:
    """Says what went wrong: 2 where the request was at fault, 1 where the work was."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    elif (rank := os.environ.get("RANK", "0")) == "0":
        print(f"train.py: {say(error)}", file=sys.stderr)
    elif not isinstance(error, SharedError):
        print(f"train.py, process {rank}: {say(error)}", file=sys.stderr)
    return 2 if isinstance(error, RequestError) else 1


if __name__ == "__main__":
    try:
        command(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted; python train.py resume=RUN_DIR goes on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.exit(exit_code(error))
