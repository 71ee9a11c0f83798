"""What tests/test_parallel.py runs in one process and in several: training, and reading a model."""

import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from expunge import parallel, runs, sharding
from expunge.companions.levels import UnseenLevels
from expunge.companions.making import Making, companion_sets
from expunge.data.batches import TokenSequence, encode
from expunge.data.examples import Example
from expunge.data.sets import Sets
from expunge.errors import TrainingError
from expunge.evaluate.gradients import gradient_norms
from expunge.evaluate.options import option_logits
from expunge.evaluate.reader import open_reader
from expunge.models import load_model, load_tokenizer
from expunge.unlearn.branch import train_branch
from expunge.unlearn.companions import Companions
from expunge.unlearn.halves import Halves
from expunge.unlearn.section import Branch
from expunge.unlearn.tune import Tune, tune

WORDS = ["ann", "bob", "cy", "dorothea of the long valley", "eve", "fay and her brother", "gil"]
FORGET = [Example(f"f{n}", f"Who is {w}?", w[::-1] * (1 + n % 3)) for n, w in enumerate(WORDS)]
RETAIN = [Example(f"r{n}", f"Where is {w}?", w[::-1]) for n, w in enumerate(WORDS[:4])]

OPTIMIZER = {"lr": 1e-2, "compute": "float32", "max_tokens": 60, "checkpoint_seconds": 0}
BRANCH = {
    "terms": [
        {"half": "forget", "loss": "npo"},
        {"half": "retain", "loss": "nll"},
        {"half": "retain", "loss": "kl", "scope": "document"},
    ],
    "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
    "schedule": {"epochs": 1, "micro_batch": 2, "accumulation": 2},
    "optimizer": OPTIMIZER,
}
BRANCHES = {
    "joint": {
        **BRANCH,
        "keep": {"at": [1], "epochs": True},
        "watch": {"every": 1, "metric": "nll.forget"},
    },
    "normalized": {**BRANCH, "step": {"rule": "normalized"}},
    # The last step of the epoch has one micro-batch of one item, whose loss cannot be divided.
    "lone": {
        **BRANCH,
        "terms": [{"half": "forget", "loss": "npo_batch"}],
        "schedule": {"micro_batch": 3, "accumulation": 2, "epochs": 1},
    },
    # Its last step has one pair, which is not divided either.
    "pairs": {
        **BRANCH,
        "terms": [{"half": "alternate_pair", "loss": "dpo"}, {"half": "mismatch", "loss": "nll"}],
    },
    "full": {
        **BRANCH,
        "training": "full",
        "step": {"rule": "normalized"},
        "optimizer": {**OPTIMIZER, "lr": 1e-3},
    },
    "last_block": {
        **BRANCH,
        "training": "full",
        "mask": {"kind": "last_blocks", "count": 1},
        "schedule": {"kind": "layered", "folds": 2, "epochs": 1, "micro_batch": 2},
        "optimizer": {**OPTIMIZER, "lr": 1e-3},
    },
    "ngdiff": {
        **BRANCH,
        "terms": [{"half": "forget", "loss": "gradient_ascent"}, {"half": "retain", "loss": "nll"}],
        "step": {"rule": "ngdiff", "every": 1},
        "optimizer": {**OPTIMIZER, "kind": "sgd", "clip": None, "weight_decay": 0},
    },
    "sam": {
        **BRANCH,
        "training": "full",
        "step": {"rule": "sam", "radius": 0.1},
        "optimizer": {**OPTIMIZER, "lr": 1e-3},
    },
    "logits": {
        **BRANCH,
        "training": "full",
        "terms": [
            {"half": "forget", "loss": "undial", "weighting": {"kind": "memorised"}},
            {"half": "forget", "loss": "ce_u"},
            {"half": "retain", "loss": "nll"},
        ],
        "optimizer": {**OPTIMIZER, "lr": 1e-3},
    },
    "hidden": {
        **BRANCH,
        "training": "full",
        "terms": [
            {"half": "forget", "loss": "adaptive_rmu", "layer": 0},
            {"half": "retain", "loss": "hidden_distance", "layer": 0, "weight": 10.0},
        ],
        "optimizer": {**OPTIMIZER, "lr": 1e-3},
    },
    # One rank reads the item that is steered at block 0, the other the item that is kept.
    **{
        f"steered_{training}": {
            **BRANCH,
            "training": training,
            "terms": [
                {"half": "forget", "loss": "rmu", "layer": 0},
                {"half": "retain", "loss": "nll"},
            ],
            "schedule": {"epochs": 1, "micro_batch": 1, "accumulation": 1},
            "optimizer": {**OPTIMIZER, "lr": 1e-3},
        }
        for training in ("lora", "full")
    },
    "raised": {**BRANCH, "step": {"rule": "raised", "first": 1}},
    "levels": {
        **BRANCH,
        "terms": [
            {"half": "forget", "loss": "match_profile", "scope": "document"},
            {"half": "forget", "loss": "match_standardized", "scope": "document"},
            {"half": "retain", "loss": "nll"},
        ],
        "levels": {"of": "unseen", "every": 1},
    },
}
TUNE = {
    "epochs": 2,
    "batch": 3,
    "neutral_per_item": 1,
    "neutral_loss": "kl",
    "optimizer": OPTIMIZER,
}


def train_all(base: Path, out: Path) -> None:
    """Train every branch from `base`, and tune it."""
    for name in (*BRANCHES, "tune"):
        model = load_model(base, shard=True)
        tokenizer = load_tokenizer(base)
        forget = [encode(e, tokenizer, max_length=64) for e in FORGET]
        retain = [encode(e, tokenizer, max_length=64) for e in RETAIN]
        folder = out / name
        runs.make_folder(folder)
        if name == "tune":
            tune(model, tokenizer, forget, retain, Tune.model_validate(TUNE), folder=folder)
            continue
        cache = out / "cache" / name
        config = Branch.model_validate(BRANCHES[name])
        found, levels = companions(forget, tokenizer), (None, None)
        if config.levels is not None:
            unseen = UnseenLevels.of(retain, forget, RETAIN, FORGET)
            levels = unseen.now(model), unseen.now
        halves = Halves(forget, retain, cache, "key", found, *levels)
        train_branch(
            model, tokenizer, halves, config, seed=1, folder=folder, base="tiny", label=name
        )


def companions(forget: list[TokenSequence], tokenizer: PreTrainedTokenizerBase) -> dict:
    """Pairs of the true answer and another one, and answers of retain items."""

    def encoded(examples: list[Example]) -> list[TokenSequence]:
        return [encode(example, tokenizer, max_length=64) for example in examples]

    sets = Sets(FORGET, RETAIN, [], [], [])
    answers = [["someone", "no one"] for _ in FORGET]
    making = Making(sets, forget, Companions(), encoded, tokenizer, answers)
    return companion_sets(["alternate_pair", "mismatch"], making)


def read_all(base: Path, out: Path) -> None:
    """What each rank is told of every text, prompt, gradient and option."""
    reader = open_reader(base, None, dtype="float32", folder=out / "tables", max_batch=2)
    texts = [encode(e, reader.tokenizer, max_length=64) for e in [*FORGET, *RETAIN, *FORGET]]
    prompts = [list(text.tokens[: text.answer_start]) for text in texts]
    told = {
        "gradients": gradient_norms(reader, texts[:9]),
        "scores": [[s.logp.tolist(), s.rank.tolist()] for s in reader.scores(texts)],
        "generations": [g.tokens for g in reader.generations(prompts, max_new_tokens=5)],
        "options": option_logits(reader, prompts, [0] * len(prompts), [1, 2, 3]).tolist(),
        "forwards": reader.forwards,
    }
    runs.make_folder(out)
    (out / f"told-{parallel.rank()}.json").write_text(json.dumps(told))
    parallel.barrier()


def refused(base: Path, out: Path) -> None:
    """Write why a branch that is evaluated while it trains is refused; nothing, where it is not."""
    model, tokenizer = load_model(base, shard=True), load_tokenizer(base)
    forget, retain = ([encode(e, tokenizer, max_length=64) for e in s] for s in (FORGET, RETAIN))
    config = Branch.model_validate({**BRANCH, "watch": {"every": 1, "read": "evaluation"}})
    runs.make_folder(out / "watched")
    halves, said = Halves(forget, retain, out / "cache" / "watched", "key"), ""
    told = {"seed": 1, "folder": out / "watched", "base": "tiny", "label": "watched"}
    try:
        train_branch(model, tokenizer, halves, config, **told, measure=lambda model: {})
    except TrainingError as error:
        said = str(error)
    (out / f"refused-{parallel.rank()}.txt").write_text(said)


def held(base: Path, out: Path) -> None:
    """Write how many numbers of the model this rank holds."""
    weights = sharding.trainable(load_model(base, shard=True)).values()
    count = sum(sharding.local(weight).numel() for weight in weights)
    (out / f"held-{parallel.rank()}.json").write_text(json.dumps(count))


if __name__ == "__main__":
    given = Path(sys.argv[1]), Path(sys.argv[2])
    train_all(*given)
    read_all(*given)
    refused(*given)
    held(*given)
