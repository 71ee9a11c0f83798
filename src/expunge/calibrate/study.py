"""Where a search keeps its trials: an Optuna study, which other processes may work at too."""

import warnings
from typing import Any

from expunge.calibrate.section import Calibrate
from expunge.errors import CalibrationError


def open_study(url: str, name: str, config: Calibrate) -> Any:
    """The study of that name, made where there is none; a storage that cannot be used is a
    `CalibrationError`."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=url, study_name=name, direction="maximize", load_if_exists=True
        )
    except (SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise CalibrationError(
            f"calibrate.storage cannot be used: {reason}. It is the URL of a database, as in "
            "sqlite:////a/folder/study.db or postgresql://user:word@host/name, whose driver is "
            "installed"
        ) from None
    study.sampler = _sampler(config, len(finished(study)))
    return study


def finished(study: Any) -> list[Any]:
    """The trials that were solved, whoever did them."""
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def _sampler(config: Calibrate, done: int) -> Any:
    """Optuna's sampler; one that goes on draws otherwise than it began."""
    from optuna.samplers import CmaEsSampler, TPESampler

    seed = (config.seed + done) % 2**32
    if config.sampler == "cmaes":
        warnings.filterwarnings("ignore", message="Constraints have been set")
        return CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return TPESampler(seed=seed, n_startup_trials=max(4, config.trials // 3))
