"""The private interfaces of Optuna that the package uses, as read in Optuna 2.10.1, the version of Hydra's sweeper."""

from typing import Any

from optuna.distributions import LogUniformDistribution, UniformDistribution
from optuna.trial import Trial

DIGITS = 4  # significant


def round_suggestions(config: Any, trial: Trial) -> None:
    """Rounds the numbers that Optuna suggests for a trial, in its study as well, so that all places show the same ones.

    `conf/hydra/sweeper/tune.yaml` names this function as `custom_search_space`, which Hydra's sweeper calls after each
    suggestion. A number that rounding would move out of its interval stays as it is.

    Args:
        config: The sweep's configuration; not used.
        trial: The trial, whose values are replaced.
    """
    for name, distribution in trial.distributions.items():
        if isinstance(distribution, LogUniformDistribution | UniformDistribution):
            rounded = float(f"{trial.params[name]:.{DIGITS}g}")
            if distribution.low <= rounded <= distribution.high:
                trial.storage.set_trial_param(trial._trial_id, name, rounded, distribution)
