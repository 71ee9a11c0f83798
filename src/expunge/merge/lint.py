"""What should be looked at before a merge: things that are legal and seldom meant.

Dimensions: M models. Cheap checks read headers, configs and tokenizers; with `weights` every number
is read once: NaN, deltas that are zero, deltas that cancel.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expunge import runs
from expunge.errors import ExpungeError
from expunge.merge.as_adapter import settled
from expunge.merge.checkpoint import FLOATS
from expunge.merge.codec import LOW_BITS
from expunge.merge.operands import summed
from expunge.merge.plan import Plan
from expunge.merge.sources import Source
from expunge.merge.tensor import operations
from expunge.merge.vocabulary import chat_template, vocabulary
from expunge.progress import progress

_SHAPING = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act"),
    *("rms_norm_eps", "tie_word_embeddings", "vocab_size", "sliding_window"),
)
"""Fields of config.json whose difference makes weights mean different things."""


@dataclass(frozen=True)
class Finding:
    """One thing to look at."""

    kind: str
    where: str
    what: str


def lint(plan: Plan, *, weights: bool = True) -> list[Finding]:
    """Everything found, cheap things first."""
    refused = list(_refused(plan))
    found = [*_parameters(plan), *_configs(plan), *_types(plan), *_adapters(plan)]
    found += [*_tokenizers(plan), *refused]
    if weights and not refused:
        found += _numbers(plan)
    return found


def _parameters(plan: Plan) -> Iterator[Finding]:
    for name, meant in plan.file.unread():
        yield Finding("unread", plan.file.name, f"has no parameter '{name}'.{meant}")


def _refused(plan: Plan) -> Iterator[Finding]:
    """What the merge would end with, before it reads a tensor."""
    try:
        if plan.file.output == "adapter":
            settled(plan)
        else:
            plan.jobs(vocabulary(plan))
            chat_template(plan.file, plan.sources)
    except ExpungeError as error:
        yield Finding("refused", plan.file.name, str(error))


def _configs(plan: Plan) -> Iterator[Finding]:
    donor = plan.donor
    for source in plan.sources:
        for field in _SHAPING:
            one, two = donor.checkpoint.config.get(field), source.checkpoint.config.get(field)
            if one != two:
                yield Finding("config", source.name, f"{field} is {two}, in {donor.name} {one}")
        tied = source.checkpoint.config.get("tie_word_embeddings")
        if tied and any(name.endswith("lm_head.weight") for name in source.checkpoint):
            yield Finding("tied", source.name, "ties lm_head to its embeddings, yet holds both")


def _types(plan: Plan) -> Iterator[Finding]:
    theirs = _floats(plan.donor)
    for source in plan.sources:
        kinds = Counter(stored.dtype for stored in source.checkpoint.values())
        if len(kinds) > 1:
            counts = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
            yield Finding("type", source.name, f"holds {counts}")
        floats = _floats(source)
        if not floats:
            yield Finding("type", source.name, "holds no float that can be merged")
        elif floats != theirs:
            one, two = (" and ".join(sorted(kinds)) or "none" for kinds in (floats, theirs))
            yield Finding("type", source.name, f"its floats are {one}, in {plan.donor.name} {two}")


def _floats(source: Source) -> set[str]:
    return {stored.dtype for stored in source.checkpoint.values()} & FLOATS.keys()


def _adapters(plan: Plan) -> Iterator[Finding]:
    adapters = [source for source in plan.sources if source.adapter is not None]
    ranks = {source.name: source.adapter.ranks for source in adapters if source.adapter}
    if len({tuple(sorted(set(found))) for found in ranks.values()}) > 1:
        each = ", ".join(f"{name} {sorted(set(found))}" for name, found in ranks.items())
        yield Finding("rank", "adapters", f"ranks differ: {each}")
    for source in adapters:
        assert source.adapter is not None
        stated = str(source.adapter.config.get("base_model_name_or_path") or "")
        name = source.checkpoint.name if source.alone else source.name.partition("+")[0]
        folder = source.checkpoint.folder
        if (
            stated
            and stated not in (name, name.partition("@")[0], str(folder))
            and not _same_folder(stated, source)
        ):
            yield Finding("base", source.name, f"was trained on {stated}, not on {name}")
        if source.checkpoint.config.get("tie_word_embeddings"):
            for changed in sorted(source.adapter.names()):
                if changed.endswith("embed_tokens.weight"):
                    what = f"changes {changed}, which is the head of {name} too (tied)"
                    yield Finding("tied", source.name, what)


def _same_folder(stated: str, source: Source) -> bool:
    """Whether an adapter's base, where it is here, holds the very weights it is put on."""
    folder = Path(stated).expanduser()
    if not folder.is_dir():
        return False
    ours = [runs.hash_file(path) for path in source.checkpoint.files]
    return ours == [runs.hash_file(path) for path in sorted(folder.glob("*.safetensors"))]


def _tokenizers(plan: Plan) -> Iterator[Finding]:
    donor = plan.donor.checkpoint.folder
    for source in plan.sources:
        folder = source.checkpoint.folder
        for name, kind in (("tokenizer.json", "vocabulary"), ("chat_template.jinja", "template")):
            one, two = donor / name, folder / name
            if one.is_file() != two.is_file():
                has = folder if two.is_file() else donor
                yield Finding(kind, source.name, f"only {has} has {name}")
            elif one.is_file() and runs.hash_file(one) != runs.hash_file(two):
                yield Finding(kind, source.name, f"{name} differs from that of {plan.donor.name}")


def _numbers(plan: Plan) -> Iterator[Finding]:
    """NaN, models that equal the base, and updates that cancel."""
    ops = operations()
    jobs = [job for job in plan.jobs() if job.operand is not None]
    total = weighted = np.zeros(())
    with progress("lint", len(jobs), "tensors") as bar:
        for job in jobs:
            operand = job.operand
            assert operand is not None
            counts = summed(ops.bins(piece, False) for piece in operand)
            broken = int(counts[..., 0x7F800000 >> LOW_BITS :].sum())
            if broken:
                yield Finding("nan", job.name, f"{broken} numbers are NaN or infinite")
            elif operand.base is not None:
                assert job.settings is not None
                gram = summed(ops.products(piece) for piece in operand)
                if total.shape != gram.shape:
                    total = weighted = np.zeros(gram.shape)
                signs = np.sign(job.settings.weights)
                total, weighted = total + gram, weighted + gram * np.outer(signs, signs)
            bar()
    if total.ndim:
        yield from _of_products(total, weighted)


def _of_products(total: np.ndarray, weighted: np.ndarray) -> Iterator[Finding]:
    """From inner products of the updates, and of the updates with the signs of their weights."""
    lengths = np.sqrt(np.diag(total))
    for number, length in enumerate(lengths):
        if length == 0:
            yield Finding("same", f"model {number + 1}", "equals the base")
    for i in range(len(lengths)):
        for j in range(i + 1, len(lengths)):
            if lengths[i] and lengths[j]:
                cosine = weighted[i, j] / (lengths[i] * lengths[j])
                turned = ", weights of opposite sign counted" if total[i, j] > 0 else ""
                if cosine < -0.5:
                    yield Finding(
                        "cancel",
                        f"models {i + 1} and {j + 1}",
                        f"updates have cosine {cosine:.2f}{turned}",
                    )
