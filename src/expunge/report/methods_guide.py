"""The first part of docs/methods.md: the tables again, as a newcomer looks for a method."""

from collections.abc import Callable, Sequence

from expunge.report.methods_page import MethodRow
from expunge.report.tables import NOT_MEASURED, markdown

_ANSWERS = ("refusal", "alternate", "mismatch", "random_label", "paraphrase")

_HAVE: tuple[tuple[str, str, Callable[[MethodRow], bool]], ...] = (
    (
        "weights and the forget set alone",
        "`objective` or `terms` of a branch, `edits`",
        lambda row: (
            (row.kind == "objective" and not row.needs)
            or (row.kind == "edit" and not _of_sets(row))
            or (row.kind == "forget loss" and not row.needs)
        ),
    ),
    (
        "a retain set too",
        "`objective` of a branch; `step`, `mask`, `schedule` for both halves; `edits`",
        lambda row: (
            (row.kind == "objective" and row.needs == "retain")
            or (
                row.kind in ("step rule", "weight mask", "schedule", "edit")
                and "retain" in row.needs
            )
        ),
    ),
    (
        "other answers to put in place, which the program makes by itself",
        "`objective` of a branch; sets that a term reads",
        lambda row: row.kind == "objective" and any(name in row.needs for name in _ANSWERS),
    ),
    (
        "models or adapters that are trained already",
        "`merges`, `expunge merge`",
        lambda row: row.kind == "merge",
    ),
    (
        "no weights to change: an API, prompts and logits",
        "`guards`, `expunge guard`",
        lambda row: row.kind == "guard",
    ),
)

_WANT = {
    "to forget this far and no further": ("hinge", "hinge_token", "npo", "simnpo", "ce_u"),
    "to end where text never seen lies": (
        "hinge_level",
        "match_level",
        "match_profile",
        "match_standardized",
    ),
    "a balance between too much and too little": ("ties", "normalized", "sage"),
    "a refusal in place of an answer": ("idk", "idk_dpo", "flat", "prefix", "input_filter"),
    "another plausible answer in its place": ("alt_po", "relearn", "random_label"),
    "the retain set kept before all": ("dual", "ngdiff", "kl_minimisation", "wagle", "sage"),
    "that a fine-tune does not bring it back": ("sam", "latent_adversarial", "repselect", "tar"),
    "to remove a skill or a domain": ("rmu", "adaptive_rmu", "prune", "negate"),
    "to remove single tokens, such as a number": ("revs", "needle", "sensitive_tokens"),
    "one request after another": ("sequential", "layered", "sugd"),
    "an edit in seconds that can be taken back": ("negate", "needle", "revs", "revert"),
    "weights untouched": ("uld", "icul", "eco", "output_filter"),
}

EXAMPLE = """\
branches:
  forgets:
    objective: npo                      # its terms, and what stands beside them
    terms:                              # what is changed of them, by set or loss
      npo: {options: {beta: 0.2}}
      retain: {weight: 2}
    optimizer: {lr: 1.0e-4}             # all other fields as ever
"""
_NAMED = f"""\
## How do I say it?

An `objective` by name is its terms and, field by field, what is not given beside it. A term is
called by its set, its loss or both (`retain.kl`); every field of it but these two may be changed.

```yaml
{EXAMPLE}```
"""


def methods_guide(rows: Sequence[MethodRow]) -> str:
    """What do I have, what do I want: the names of the methods for each answer."""
    have = [
        [title, _names([row.name for row in rows if fits(row)]), how] for title, how, fits in _HAVE
    ]
    known = {row.name for row in rows}
    want = [
        [title, _names([name for name in names if name in known])] for title, names in _WANT.items()
    ]
    return "\n".join(
        [
            "## What do I have?\n",
            markdown(["I have", "look at", "where"], have, text_columns=3),
            "## What do I want?\n",
            markdown(["I want", "look at"], want, text_columns=2),
            _NAMED,
        ]
    )


def named() -> set[str]:
    """Every method that the guide names by hand."""
    return {name for names in _WANT.values() for name in names}


def _of_sets(row: MethodRow) -> bool:
    return "retain" in row.needs


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names)) or NOT_MEASURED
