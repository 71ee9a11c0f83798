"""A bridge to lm-evaluation-harness: its tasks, asked of the model that is evaluated here."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from expunge.config import Section
from expunge.errors import EvaluationError
from expunge.evaluate.numbers import Measured, Number
from expunge.evaluate.reader import Reader
from expunge.registry import did_you_mean

INSTALL = "the suite lm_eval needs lm-evaluation-harness: pip install 'expunge[harness]'"
NORMAL_95 = 1.959964
"""Half the width of a 95 % interval, in standard errors."""


class LmEval(Section):
    """Which tasks of lm-evaluation-harness are run, and how."""

    tasks: list[str] = Field(min_length=1)
    """Names of tasks, groups or tags, as `lm-eval ls tasks` lists them."""

    include: Path | None = None
    """A folder of tasks of your own (YAML). Such a task may name Python functions in that folder,
    which are then run: name only a folder that you trust."""

    num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples before each question; null leaves each task its own number."""

    limit: int | None = Field(default=None, ge=1)
    """Ask only the first so many items of each task; the others are items without a score."""

    batch_size: int = Field(default=8, ge=1)
    """Texts in one forward pass; a score depends on it by rounding alone."""


def lm_eval_suite(reader: Reader, section: LmEval) -> Measured:
    """Numbers `<task>.<metric>` as the harness computes them, groups included.

    The interval is value ± 1.96 standard errors where the harness gives one. A filter other than
    `none` is appended to the metric's name. The harness reads the model itself, so what it asks is
    not kept in the reader's tables. No code is fetched: a task whose metric would be is refused.

    Source: Gao et al., lm-evaluation-harness 0.4.
    """
    if reader.guard:
        raise EvaluationError("lm_eval asks the model itself, so no guard would be measured")
    lm_eval, manager = _harness(section)
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    model = cast(Any, HFLM)(
        pretrained=reader.model,
        tokenizer=reader.tokenizer,
        batch_size=section.batch_size,
        max_length=min(reader.context, reader.tokenizer.model_max_length),
        trust_remote_code=False,
    )
    with _readable_errors(section.tasks), _no_fetched_code():
        results = lm_eval.simple_evaluate(
            model,
            tasks=section.tasks,
            num_fewshot=section.num_fewshot,
            limit=section.limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=True,
        )
    return measured(results)


def measured(results: Mapping[str, Any]) -> Measured:
    """The numbers and items of the harness's results; what has no number is None."""
    counts = {task: n["effective"] for task, n in results["n-samples"].items()}
    members = results.get("group_subtasks") or {}
    found = Measured(facts={"versions": results["versions"], "num_fewshot": results["n-shot"]})
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        n = (
            counts[task]
            if task in counts
            else sum(counts.get(m, 0) for m in _leaves(task, members))
        )
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{filtered}")
                found.numbers[f"{task}.{_name(metric, filtered)}"] = _number(value, n, error)
    for task, rows in results["samples"].items():
        found.items += _items(task, rows, results["n-samples"][task]["original"])
    found.facts["items"] = dict(results["n-samples"])
    return found


def _items(task: str, rows: Sequence[Mapping[str, Any]], given: int) -> list[dict[str, Any]]:
    """One row an item, with every metric of every filter."""
    scores: dict[int, dict[str, Any]] = defaultdict(dict)
    names: dict[str, None] = {}
    for row in rows:
        for metric in row["metrics"]:
            name = _name(metric, row["filter"])
            names.setdefault(name)
            value = row[metric]
            scores[row["doc_id"]][name] = float(value) if isinstance(value, Real) else None
    return [
        {"group": task, "id": f"{task}/{i}", **{name: scores[i].get(name) for name in names}}
        for i in range(given)
    ]


def _name(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric}.{filtered}"


def _leaves(group: str, members: Mapping[str, Sequence[str]]) -> set[str]:
    """The tasks of a group, those of its groups included."""
    below = members.get(group, ())
    return {leaf for name in below for leaf in (_leaves(name, members) or {name})}


def _number(value: Any, n: int, error: Any) -> Number:
    """A value that is no number is None; an error that is none ("N/A") gives no interval."""
    if not isinstance(value, Real) or value != value:
        return Number(None, n)
    mean = float(value)
    if not isinstance(error, Real) or error != error:
        return Number(mean, n)
    return Number(mean, n, mean - NORMAL_95 * float(error), mean + NORMAL_95 * float(error))


def _harness(section: LmEval) -> tuple[Any, Any]:
    """The package and its list of tasks; a name that is none of them is refused."""
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise EvaluationError(f"{INSTALL} ({error})") from None
    if section.include is not None and not section.include.is_dir():
        raise EvaluationError(f"lm_eval.include: {section.include} is no folder")
    with _readable_errors(section.tasks):
        manager = _tasks(section.include)
    known = manager.all_tasks
    for task in section.tasks:
        if task not in known:
            raise EvaluationError(
                f"lm-evaluation-harness has no task '{task}'.{did_you_mean(task, known)}"
            )
    return lm_eval, manager


@cache
def _tasks(include: Path | None) -> Any:
    """The harness's list of tasks; it reads thousands of files, so once a process."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager(include_path=include)


@contextmanager
def _readable_errors(tasks: Sequence[str]) -> Iterator[None]:
    """What a task's data, files or packages lack, in one line."""
    from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingImports]

    try:
        yield
    except (OSError, ValueError, ImportError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EvaluationError(
            f"lm-evaluation-harness cannot run {', '.join(tasks)}: {reason}"
        ) from None


@contextmanager
def _no_fetched_code() -> Iterator[None]:
    """The package `evaluate` fetches a metric's code from the Hub and runs it; here it may not."""
    import evaluate  # pyright: ignore[reportMissingImports]

    refused: list[str] = []

    def refuse(path: str, *_: Any, **__: Any) -> Any:
        refused.append(path)
        raise EvaluationError(f"the metric '{path}' is refused")

    load, evaluate.load = evaluate.load, refuse
    try:
        yield
    finally:
        evaluate.load = load
        if refused:  # the harness swallows what is raised above, and goes on without the metric
            raise EvaluationError(
                f"the metric '{refused[0]}' would run code from the Hub, which is refused"
            ) from None
