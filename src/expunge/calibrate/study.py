"""Where a search keeps its trials: an Optuna study, which other processes may work at too."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from expunge.calibrate.candidate import TARGET, Candidate, End
from expunge.calibrate.section import Calibrate
from expunge.errors import CalibrationError
from expunge.merge.methods import METHODS

Spent = Mapping[str, Any]
"""What a process screened: the keys of what it `read`, of these the `whole`, and the seconds."""


class Study:
    """An Optuna study; a database that is lost on the way is a `CalibrationError`."""

    def __init__(self, study: Any, config: Calibrate) -> None:
        """`study` as Optuna opened it."""
        self.study, self.config = study, config
        self.own = f"screened {uuid4()}"  # by this process, for the ones that go on after it

    def ask(self, over: Sequence[End], under: Sequence[End]) -> tuple[Any, Candidate]:
        """A trial, and the line that it is to solve."""
        with _storage_errors():
            trial = self.study.ask()
            return trial, _suggested(trial, self.config, over, under)

    def tell(
        self,
        trial: Any,
        candidate: Candidate,
        value: float,
        *,
        bracketed: bool,
        lacks: Mapping[str, float],
        spent: Spent,
    ) -> None:
        """What a trial found: `lacks` are by how much it fails what is asked, `spent` is what this
        process has screened so far."""
        with _storage_errors():
            trial.set_user_attr("candidate", candidate.model_dump(mode="json"))
            trial.set_user_attr("bracketed", bracketed)
            for name, lack in lacks.items():
                trial.set_constraint(name, lack)
            self.study.tell(trial, value)
            self.study.set_user_attr(self.own, dict(spent))

    def found(self) -> list[tuple[Candidate, bool]]:
        """The balanced candidate of each finished trial, those of other processes too, and whether
        its line was bracketed."""
        with _storage_errors():
            told = [trial.user_attrs for trial in _finished(self.study)[: self.config.trials]]
        return [(Candidate.model_validate(t["candidate"]), t["bracketed"]) for t in told]

    def spent(self, own: Spent) -> dict[str, Any]:
        """What this process and the others screened for the search."""
        with _storage_errors():
            told = self.study.user_attrs
        return together([own, *(spent for name, spent in told.items() if name != self.own)])


def open_study(url: str, name: str, config: Calibrate) -> Study:
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
        raise CalibrationError(
            f"calibrate.storage cannot be used: {_reason(error)}. It is the URL of a database, as "
            "in sqlite:////a/folder/study.db or postgresql://user:word@host/name, whose driver is "
            "installed"
        ) from None
    with _storage_errors():
        study.sampler = _sampler(config, len(_finished(study)))
    return Study(study, config)


def together(spent: Iterable[Spent]) -> dict[str, Any]:
    """What several processes screened: `candidates`, each counted once, of these `whole`, which
    were read with their items, and the `seconds` of all."""
    every = list(spent)
    whole = {key for one in every for key in one["whole"]}
    read = {key for one in every for key in one["read"]}
    seconds = sum(one["seconds"] for one in every)
    return {"candidates": len(read), "whole": len(whole), "seconds": round(seconds, 2)}


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Turn what a database says that was there before into a `CalibrationError`."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise CalibrationError(
            f"calibrate.storage was lost while searching: {_reason(error.__cause__ or error)}. "
            "Once it is back the same command goes on with the trials that it holds"
        ) from None


def _reason(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _finished(study: Any) -> list[Any]:
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


def _suggested(
    trial: Any, config: Calibrate, over: Sequence[End], under: Sequence[End]
) -> Candidate:
    """A line for a trial to solve; only what is free is asked for, but CMA-ES learns of nothing
    that some trial lacks, and is asked for all."""
    every = config.sampler == "cmaes"
    first = trial.suggest_categorical("over", [end.label for end in over])
    second = trial.suggest_categorical("under", [end.label for end in under])
    method = trial.suggest_categorical("method", list(config.methods))
    named = {end.label: end for end in (*over, *under)}
    row = METHODS["task_arithmetic" if method == "linear" else method]
    made: dict[str, Any] = {"scale": config.scale[1]}
    between = second != TARGET  # to which scale · (1 - t) is the one weight, and t is solved for
    if between or every:
        scale = trial.suggest_float("scale", *config.scale)
        made |= {"scale": scale} if between else {}
    trims = "density" in row.options
    if trims or (every and any("density" in METHODS[one].options for one in config.methods)):
        density = trial.suggest_float("density", *config.density)
        made |= {"density": density} if trims else {}
    if config.groups > 1:
        made["groups"] = tuple(
            trial.suggest_float(f"group_{n}", *config.spread) for n in range(config.groups)
        )
    if config.repair:
        made["repair"] = trial.suggest_float("repair", 0.0, config.repair)
    return Candidate(over=named[first], under=named[second], t=0.5, method=method, **made)
