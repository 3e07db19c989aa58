"""Train an image classifier: `python train.py experiment=NAME group=choice key=value`; `--help` lists the groups."""

import os
import sys
import time
import traceback
from functools import partial, update_wrapper

from omegaconf import DictConfig

from sequencer.config.command import CommandLine, check_restarts, parse_command
from sequencer.config.composition import to_config
from sequencer.config.errors import RequestError, SharedError, summarise_error
from sequencer.config.hydra_internals import ask_hydra, run_hydra
from sequencer.config.inheritance import warn_of_data
from sequencer.config.preflight import check_request, name_runs
from sequencer.config.request import Request, refuse_sweep, request, resume_request
from sequencer.config.schema import Config
from sequencer.config.sources import Sources, describe_origin
from sequencer.config.sweep import Sweep, Trials, check_trials, prepare_sweep, start_folder
from sequencer.console import say
from sequencer.output import drop_unread_output

ALONE = os.environ.get("WORLD_SIZE", "1") == "1"  # read at once, since Lightning deletes the variable


def main(command: CommandLine) -> None:
    """Runs a parsed command, checked before torch is imported: a question, a plan, a smoke test, a sweep or a run."""
    if command.is_question:
        return ask_hydra(trial, command.flags, command.flags.overrides, command.files)
    check_restarts(command)
    if command.resume:
        return train(resume_request(command), command)
    try:
        composed = command.compose()
    except RequestError:
        if not command.flags.multirun:
            refuse_sweep(command)  # values without -m, or a list without brackets, are the likeliest mistakes
        raise
    if command.flags.cfg:
        to_config(composed.config)
        return ask_hydra(trial, command.flags, composed.lines, command.files)
    if command.flags.multirun or composed.multirun:
        return sweep(prepare_sweep(command, composed))
    refuse_sweep(command)
    config = to_config(composed.config)
    name_runs(config)
    warn_of_data(config, command.overrides)
    if command.plan:
        return show_plan(command, config)
    wanted = request(config)
    return smoke(config) if command.smoke else train(wanted, command)


def train(wanted: Request, command: CommandLine) -> None:
    check_request(wanted.config, wanted.resume)
    from sequencer.training import run  # imports torch

    run(wanted.config, wanted.resume, {} if wanted.resume else describe_origin(command))


def smoke(config: Config) -> None:
    check_request(config)
    from sequencer.training import smoke  # imports torch

    smoke(config)


def show_plan(command: CommandLine, config: Config, trials: int = 1) -> None:
    started = time.monotonic()
    check_request(config, plan=True)
    from sequencer.measure import plan  # imports torch

    plan(config, Sources(command), trials, started, full=command.plan == "full")


def sweep(wanted: Sweep) -> None:
    """Runs a sweep's trials by Hydra's sweeper and launcher and writes its table, or plans or tries the first trial."""
    if wanted.command.plan:
        return show_plan(wanted.command, wanted.config, wanted.trials)
    if wanted.command.smoke:
        return smoke(wanted.config)
    start_folder(wanted.folder)
    trials = partial(trial, trials=Trials(__file__, wanted.trials))
    run_hydra(update_wrapper(trials, trial), wanted.command.flags, wanted.lines, wanted.command.files)
    from sequencer.analysis import write_sweep  # imports torch

    write_sweep(wanted.folder, wanted.folder.name)
    say(f"sweep folder: {wanted.folder}")
    return check_trials(wanted.folder)


def trial(composed: DictConfig, trials: Trials | None = None) -> float | None:
    """Runs a trial of a sweep. Hydra answers questions without calling its task."""
    assert trials is not None
    drop_unread_output("stdout", "stderr")  # some launchers call this in a process of their own
    return trials.run(composed)


def exit_code(error: Exception) -> int:
    """Prints an error and returns the exit code: 2 if the request was wrong, 1 if the work failed."""
    rank = "0" if ALONE else os.environ.get("RANK", "0")
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    elif rank == "0" or not isinstance(error, SharedError):
        print(f"train.py{f', rank {rank}' if rank != '0' else ''}: {summarise_error(error)}", file=sys.stderr)
    return 2 if isinstance(error, RequestError) else 1


if __name__ == "__main__":
    drop_unread_output("stdout", "stderr")
    try:
        main(parse_command(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.exit(exit_code(error))
