"""docs/metrics.md: every suite with what it is told, and every metric with its exact definition."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticUndefined

from expunge.config import Section
from expunge.evaluate.names import EVERY_FACT, FACTS, NUMBERS
from expunge.report.methods_page import Description, MethodRow, describe, method_parts
from expunge.report.tables import markdown

_HEAD = """\
<!-- Written by `make docs` from the tables of suites and metrics; do not edit by hand. -->
# Suites and metrics

`expunge evaluate MODEL --suite NAME[,NAME] -o NAME.field=value --out FOLDER` measures a model.
What it says is kept by the hash of its weights, so nothing is read twice: another suite that asks
for the same texts, or a metric whose definition has changed, needs no forward pass (but for what
`semeval` had stopped early, below). Every number
has the count of its items and a 95 % interval; FOLDER/items.jsonl holds a row for each given item.
A share of hits and misses has Wilson's interval (Wilson 1927; Brown, Cai and DasGupta 2001), which
is not 0 wide where all items are alike; other numbers have the bootstrap's, and of one item none.
So has an AUC; where it is 0 or 1, which every resample is too, it has Newcombe's (2006).
A MIA score reaches as far as it does on its AUC's interval, a final score as far as its three parts
let it (Zou and Donner 2008). Greatest lengths, p-values, KS distances, the share of the commonest
letter (`top_letter`) and the verdict on it (`constant_answer`) have none. `expunge compare` draws
the same items again for both models wherever items stand behind a number: those of its name, or
those that FOLDER/results.json names under `behind`; a difference counts as real where its interval
lacks 0 and the scores of six documents or more differ. Questions of one document or person tend to
go right or wrong together: `semeval` and `compare` draw the items of a document, which their ids
name (`…-qa0`, `…sc1`), together, and give Wilson's formula as many items as they are worth (Korn
and Graubard 1998). Other suites draw items.

Generation is greedy, many prompts at once, each continued as it would be alone (in float32 token
for token). It ends at the end of the text or after `max_new_tokens`. Only the suite `semeval` stops
a row earlier, where no further token can change its score: a question's once what is written can
no longer become the answer (`knowledge` is 0), a passage's once every word of the truth has come in
order and another has begun (`regurgitation` is 1); and never before the 48 tokens that `collapse`
looks at. The proof holds for one definition of the score: by another one (another source of the
function) nothing is stopped, and rows that were are written on from where they stand. A text that
is known serves every request for less of it, and begins every longer one, by whatever suite and in
whatever call. A loop alone stops nothing, for greedy text may leave it. `--backend vllm`
(`pip install 'expunge[vllm]'`, on a GPU) continues prompts by vLLM and swaps adapters in its
running engine; what it wrote is kept apart from what torch wrote, and texts are scored by torch.

A destroyed model has forgotten everything and would win most suites. So every run asks whether the
model still writes language: it goes on from twenty built-in openings for 48 tokens each, and their
loss is read (in one batch, kept like all else), and what a suite hears of kept texts counts too.
The verdict is one for all suites asked in one call: `collapsed` and its `reasons` stand in the
facts of each, and the numbers by which a destroyed model would win, as each suite names them below,
are neither printed nor compared.

Sets of your own are scored as the contest's are. An item whose id ends in neither `sc1` nor `qa0`
(of any number) is a question where its prompt ends in a question mark, else a passage; a text
without a prompt is begun with the first half of its words. Where tasks are others than Task1 to
Task3, each has a term of its own (`items`, where none is named), and the aggregate over these is
marked partial: no published number compares to it.

For automation, `--fail-if 'forget.knowledge > 0.05'` ends with exit code 3 where that holds of the
number of that name (its suite may be left out where one suite has it). With any such condition a
collapsed model fails too, unless a condition names `collapsed`, which is 0 or 1, itself. Of a
recipe's run (`run`, `evaluate RECIPE`, `report RUN`) a name begins with the model,
`merged.forget.knowledge`, and may go on with a side of the documents, `merged.test.mia.auc`,
`merged.test.min_k_plus_plus.two_sided`.
"""


@dataclass(frozen=True)
class SuiteRow:
    """One suite as docs/metrics.md lists it."""

    name: str
    about: str
    source: str
    said: Description
    """What the docstring of its function says."""

    fields: tuple[tuple[str, str, str], ...]
    """(name, default, what it means) of each field of its Section."""

    numbers: Mapping[str, str]
    """What each number is, by its name."""

    facts: Mapping[str, str]
    """What each fact says, by its name."""

    aggregates: tuple[str, ...]
    """Numbers that are not printed of a collapsed model, as patterns."""


def suite_rows(suites: Mapping[str, Any]) -> list[SuiteRow]:
    """The rows of the table of suites."""
    return [
        SuiteRow(
            name,
            suite.about,
            suite.source,
            describe(suite.fn),
            tuple(_fields(suite.section)),
            NUMBERS[name],
            {**FACTS[name], **EVERY_FACT},
            suite.aggregates,
        )
        for name, suite in suites.items()
    ]


def metrics_page(suites: Iterable[SuiteRow], metrics: Iterable[MethodRow]) -> str:
    """The whole page."""
    rows = list(suites)
    body = [[f"`{row.name}`", row.about, row.source] for row in rows]
    table = markdown(["suite", "what it measures", "source"], body, text_columns=3)
    parts = [_HEAD, f"## Suites\n\n{table}"]
    parts.extend(map(_section, rows))
    return "\n".join([*parts, *method_parts(metrics)])


def _section(row: SuiteRow) -> str:
    """A suite's definition, its numbers and facts, and what it is told."""
    said = row.said
    parts = [f"### {row.name}", said.summary, f"```\n{said.equation}\n```" if said.equation else ""]
    parts += [said.notes, f"Differs: {said.differs}" if said.differs else ""]
    parts.append(_table("number", row.numbers))
    barred = ", ".join("all of these" if n == "*" else f"`{n}`" for n in row.aggregates)
    parts.append(f"Not printed of a collapsed model: {barred}." if barred else "")
    parts.append(_table("fact", row.facts))
    fields = [[f"`{name}`", default, text] for name, default, text in row.fields]
    parts.append(markdown(["field", "default", "what it means"], fields, text_columns=3))
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _table(name: str, rows: Mapping[str, str]) -> str:
    body = [[f"`{key}`", text] for key, text in rows.items()]
    return markdown([name, "what it says"], body, text_columns=2)


def _fields(section: type[Section]) -> Iterable[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if default is PydanticUndefined:
            said = "required"
        elif isinstance(default, Section):
            said = "see recipes"
        else:
            said = "null" if default is None else f"`{default!r}`"
        yield name, said, " ".join((field.description or "").split())
