"""Which code made a result: the commits of its stages."""

from collections.abc import Iterable, Mapping

from pydantic import JsonValue

from expunge.report.results import Results


def made_by(results: Results) -> str | None:
    """The commits of the code that made the stages of a run, the oldest first; of results without
    stages, that of the code which put them together.

    A finished stage is not made again by newer code, so it has the commit of its day.
    """
    stages = [stage for stage in results.stages if _seed(stage) in (None, str(results.seed))]
    return joined(str(stage["commit"]) for stage in stages if stage.get("commit")) or results.commit


def joined(commits: Iterable[str]) -> str:
    """Each commit once, in order; some of those given may be several, joined."""
    return ", ".join(dict.fromkeys(one for some in commits for one in some.split(", ")))


def _seed(stage: Mapping[str, JsonValue]) -> JsonValue:
    """The seed that a stage depends on, if it does; a run has the stages of all its seeds."""
    inputs = stage.get("inputs")
    return inputs.get("seed") if isinstance(inputs, dict) else None
