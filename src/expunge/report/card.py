"""Model cards: what one unlearned model is and what was measured of it, as a README.md for the Hub.

Pure: facts and results in, text out. Nothing of the forgotten items is among the facts. Whatever
a recipe or a data set is called is shown as text, never as markup.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import EvalResult, ModelCardData

from expunge.report.results import Interval, ModelResults
from expunge.report.tables import NOT_MEASURED, final_cell, markdown, number, term_label

REPOSITORY = "REPOSITORY_OR_FOLDER"
"""Stands in the commands for where the reader has the model."""

_METRICS = {"sc": ("rouge", "ROUGE-L recall"), "qa": ("exact_match", "exact match")}
"""What scores each kind of item: its name on the Hub, and in words."""

_LIMITS = """\
- The scores are of these items in these wordings. Another wording, another language or a longer
  talk may still bring the content back.
- An interval says how far the score would move with other items of the same kind; it does not say
  how far it would move with another seed.
- A membership test by loss is one attack of many; a stronger one may still tell members apart.
- What an attacker reaches by training the model again, or by quantizing it, is in no number here;
  `expunge evaluate MODEL --suite robustness` measures some of it.
- No measurement of a model is a proof that content is gone from its weights."""

_ADAPTER_LIMIT = """
- This is an adapter: whoever takes it off has the model that still knows everything."""


@dataclass(frozen=True)
class SetFacts:
    """One set of the data, without anything that it says."""

    name: str
    """`forget`, `retain`, `members` or `nonmembers`."""

    items: int
    documents: int
    origin: str
    """Where it is from, in words: a Hub data set, invented, or a local file by its hash."""


@dataclass(frozen=True)
class Facts:
    """What is known of a model before anything is measured."""

    name: str
    recipe: str
    seed: int
    kind: Literal["branch", "merge", "edit"]
    made_from: tuple[str, ...]
    adapter: bool
    start: str
    """The model that the recipe starts from, in words."""

    base: str
    """Where the base of an adapter lies: a Hub id, or a place in the run folder."""

    base_id: str | None
    """The Hub id of the model that the recipe starts from, where it has one."""

    tuned: bool
    """Whether the run first made the model memorise both halves."""

    sets: tuple[SetFacts, ...]
    section: str
    """The model's section of the recipe, as YAML."""

    provenance: Mapping[str, str]
    """What ran: versions, commit, seeds."""

    datasets: tuple[str, ...] = ()
    """Ids of the Hub data sets that it was unlearned on."""

    license: str | None = None
    language: tuple[str, ...] = ()


def model_card(
    facts: Facts,
    results: ModelResults | None,
    before: ModelResults | None = None,
    *,
    repository: str = REPOSITORY,
) -> str:
    """The card: metadata for the Hub, then what a reader must know.

    `results` are None before the model is evaluated, and the card then says so. `before` are
    those of the model that still knows everything. `repository` is where the model is to be had.
    """
    measured = results if results is not None and results.is_measured else None
    parts = [
        f"# {plain(facts.recipe)}: {plain(facts.name)}",
        _summary(facts, measured),
        "## What was removed, what was kept",
        _sets(facts),
        "## How",
        _method(facts),
        "## Load it",
        _loading(facts, repository),
        "## Measured",
        _measured(measured, before),
        "## What this does not prove",
        _LIMITS + (_ADAPTER_LIMIT if facts.adapter else ""),
        "## Provenance",
        markdown(
            ["", ""],
            [[plain(k), plain(v)] for k, v in facts.provenance.items()],
            text_columns=2,
        ),
    ]
    header = card_data(facts, measured).to_yaml()
    return f"---\n{header}\n---\n\n" + "\n\n".join(part.strip() for part in parts) + "\n"


def card_data(facts: Facts, results: ModelResults | None) -> ModelCardData:
    """The metadata of the card; of a collapsed model, no aggregate is among the results."""
    tags = ["unlearning", "expunge", facts.kind, *(["lora"] if facts.adapter else [])]
    collapsed = results is not None and bool(results.collapse.collapsed)
    relation = ("adapter" if facts.adapter else "finetune") if facts.base_id else None
    found = list(eval_results(results)) if results is not None else []
    return ModelCardData(
        base_model=facts.base_id,
        base_model_relation=relation,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*tags, *(["collapsed"] if collapsed else [])],
        language=list(facts.language) or None,
        license=facts.license,
        datasets=list(facts.datasets) or None,
        model_name=_line(f"{facts.recipe} {facts.name}"),
        eval_results=found or None,
    )


def eval_results(results: ModelResults) -> Iterator[EvalResult]:
    """What was measured, as the Hub's model index takes it; the interval is in `metric_args`."""
    scores = results.semeval

    def result(
        where: str,
        config: str,
        metric: tuple[str, str],
        value: float,
        interval: Interval | None = None,
        n: int | None = None,
    ) -> EvalResult:
        told = {} if interval is None else {"low": interval.low, "high": interval.high}
        told |= {} if n is None else {"n": n}
        return EvalResult(
            task_type="text-generation",
            dataset_type=where,
            dataset_name=config,
            dataset_config=config,
            metric_type=metric[0],
            metric_name=metric[1],
            metric_value=value,
            metric_args=told or None,
        )

    for term, value in scores.terms.items():
        if value is not None:
            half, _, kind = term.partition("/")
            kind = _METRICS.get(kind.rpartition("/")[2], ("score", "score"))
            interval = scores.intervals.get(term)
            yield result(half, _line(term), kind, value, interval, scores.counts.get(term))
    mia = scores.mia
    if mia is not None and mia.auc is not None:
        interval = _interval(mia.low, mia.high)
        name = ("roc_auc", "membership AUC (0.5 is best)")
        yield result("members-nonmembers", "membership", name, mia.auc, interval, mia.n)
    mmlu = scores.mmlu
    if mmlu is not None and mmlu.accuracy is not None:
        interval, name = scores.interval("mmlu"), ("accuracy", "accuracy")
        yield result("cais/mmlu", "mmlu", name, mmlu.accuracy, interval, mmlu.n)
    if results.collapse.collapsed:
        return
    official = ("llmunlearningsemeval2025", "SemEval-2025 Task 4")
    if scores.task_aggregate is not None:
        interval = scores.intervals.get("task_aggregate")
        name = ("task_aggregate", "task aggregate")
        yield result(official[0], official[1], name, scores.task_aggregate, interval)
    if scores.final is not None:
        name = ("final_score", "final score")
        yield result(official[0], official[1], name, scores.final, scores.interval("final"))


def plain(text: str) -> str:
    """Text on one line that Markdown and HTML show as it is: no markup, no link, no cell's end."""
    escaped = re.sub(r"([\\`*_\[\]#~@&$])", r"\\\1", _line(text))
    for markup, shown in (("<", "&lt;"), ("|", "&#124;"), ("://", ":\\//"), ("www.", "www\\.")):
        escaped = escaped.replace(markup, shown)
    return escaped


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _interval(low: float | None, high: float | None) -> Interval | None:
    return None if low is None or high is None else Interval(low=low, high=high)


def _summary(facts: Facts, results: ModelResults | None) -> str:
    what = {"branch": "an unlearned branch", "merge": "a merge", "edit": "an edit"}[facts.kind]
    of = " and ".join(plain(name) for name in facts.made_from)
    lines = [
        f"This is {what} of {of}, made by expunge from {plain(facts.start)}"
        f"{', which was first tuned to know both sets' if facts.tuned else ''}, to forget chosen "
        "content and keep the rest.",
    ]
    if results is None:
        lines.append("**It has not been evaluated: whether it forgot anything is not known.**")
    elif results.collapse.collapsed:
        reasons = "; ".join(plain(reason) for reason in results.collapse.reasons)
        lines.append(f"**COLLAPSED: it is destroyed as a language model ({reasons}).**")
    return "\n\n".join(lines)


def _sets(facts: Facts) -> str:
    body = [[one.name, plain(one.origin), str(one.items), str(one.documents)] for one in facts.sets]
    note = "Forget is what was removed, retain what was kept. What they say is not part of a card."
    return markdown(["set", "origin", "items", "documents"], body, text_columns=2) + "\n" + note


def _method(facts: Facts) -> str:
    text = facts.section.strip("\n")
    ticks = max([2, *(len(found) for found in re.findall("`+", text))]) + 1
    fence = "`" * ticks
    return f"The section `{facts.kind}` of the recipe:\n\n{fence}yaml\n{text}\n{fence}"


def _loading(facts: Facts, repository: str) -> str:
    if not facts.adapter:
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{repository}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repository}")\n```'
        )
    base = re.sub(r"[^\w./ -]", "", _line(facts.base))
    return (
        "```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = "{base}"\n'
        "model = AutoModelForCausalLM.from_pretrained(base)\n"
        f'model = PeftModel.from_pretrained(model, "{repository}")\n'
        "tokenizer = AutoTokenizer.from_pretrained(base)\n```\n\n"
        "On another base the adapter does nothing that was measured."
    )


def _measured(results: ModelResults | None, before: ModelResults | None) -> str:
    if results is None:
        return "Nothing has been measured of this model."
    body = [list(row) for row in _rows(results, before or ModelResults())]
    header = ["", "before", "this model", "95 % interval", "n"]
    note = "Forget scores should be low, retain scores high. A dash was not measured."
    return markdown(header, body) + "\n" + note


def _rows(now: ModelResults, before: ModelResults) -> Iterator[tuple[str, ...]]:
    """Label, value before, value now, interval, items of each measure."""
    scores, was = now.semeval, before.semeval
    for term, value in scores.terms.items():
        if value is None:
            continue
        n = str(scores.counts.get(term) or "")
        interval = _shown(scores.intervals.get(term))
        yield plain(term_label(term)), number(was.terms.get(term)), number(value), interval, n
    aggregate = NOT_MEASURED if now.collapse.collapsed else number(scores.task_aggregate)
    interval = "" if now.collapse.collapsed else _shown(scores.intervals.get("task_aggregate"))
    label = "task aggregate ↑" + (" (partial)" if scores.partial else "")
    yield label, number(was.task_aggregate), aggregate, interval, ""
    if scores.mia is not None:
        shown = _shown(_interval(scores.mia.low, scores.mia.high))
        known = number(was.mia and was.mia.auc)
        n = str(scores.mia.n or "")
        yield "membership AUC → 0.5", known, number(scores.mia.auc), shown, n
    if scores.mmlu is not None:
        n = str(scores.mmlu.n or "") + (" (sample)" if scores.mmlu.sampled else "")
        known = number(was.mmlu and was.mmlu.accuracy)
        yield "MMLU ↑", known, number(scores.mmlu.accuracy), _shown(scores.interval("mmlu")), n
    interval = "" if now.collapse.collapsed else _shown(scores.interval("final"))
    yield "final ↑", final_cell(before), final_cell(now), interval, ""
    yield "collapsed", _said(before), _said(now), "", ""


def _said(model: ModelResults) -> str:
    return {None: NOT_MEASURED, True: "yes", False: "no"}[model.collapse.collapsed]


def _shown(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"
