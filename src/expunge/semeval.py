"""The contest's entry point: SemEval-2025 Task 4 gives folders and one hour, and takes a model."""

import tempfile
import time
from pathlib import Path

from expunge import lora, models, parallel
from expunge.data.batches import encode
from expunge.data.examples import check_disjoint
from expunge.data.sources import Source, read_examples
from expunge.errors import DataError, RecipeError
from expunge.merge.adapters import merge_adapters
from expunge.merge.section import Merge
from expunge.model_section import Model
from expunge.unlearn.branch import train_branch
from expunge.unlearn.halves import Halves
from expunge.unlearn.section import Branch

BRANCHES = {
    name: Branch.model_validate(
        {
            "terms": [
                {
                    "half": "forget",
                    "loss": "npo_batch",
                    "weight": npo,
                    "options": {"beta": 0.1},
                },
                {"half": "retain", "loss": "kl", "weight": kl, "scope": "document"},
                {"half": "retain", "loss": "nll", "weight": nll},
            ],
            "lora": {"rank": 32, "alpha": 32, "dropout": 0.05},
            "schedule": {"epochs": 5, "micro_batch": micro_batch, "accumulation": 4},
            "optimizer": {"lr": 1e-4, "warmup": 0.2, "weight_decay": 0.01},
        }
    )
    for name, npo, kl, nll, micro_batch in (
        ("strong", 0.4, 0.4, 0.2, 1),
        ("weak", 0.3, 0.3, 0.4, 2),
    )
}
"""The two branches of recipes/zjuklab.yaml."""

SEED = 42
SAVING_SHARE = 0.15
"""Share of the budget that is kept for loading, merging and writing."""


def unlearn(
    model_path: str | Path,
    output_path: str | Path,
    forget_dir: str | Path,
    retain_dir: str | Path,
    *,
    budget_seconds: float = 3600,
    branches: dict[str, Branch] | None = None,
    merge: Merge | None = None,
) -> Path:
    """Unlearn what `forget_dir` holds and write the merged model to `output_path`, in time.

    Each folder holds one data file (.parquet, .jsonl, .json or .csv). The branches share what the
    budget leaves; one that would take too long is trained for fewer steps, its learning rate
    still falling to zero. Returns `output_path`.
    """
    parallel.refuse_several("the contest's entry point")
    start = time.monotonic()
    branches = branches or BRANCHES
    for name, branch in branches.items():
        extra = [term.half for term in branch.terms if term.half not in ("forget", "retain")]
        if extra:
            raise RecipeError(
                f"branch '{name}' reads {extra[0]}, and the contest's entry point has the forget "
                "and retain sets alone; expunge run makes the others"
            )
        if branch.levels is not None:
            raise RecipeError(
                f"branch '{name}' reads levels, and the contest's entry point has no model from "
                "before the target; expunge run finds them"
            )
    config = (merge or Merge()).model_copy(update={"output": "model"})
    base = models.resolve(str(model_path))
    forget, retain = (read_examples(Source(path=str(_file(d)))) for d in (forget_dir, retain_dir))
    check_disjoint(forget, retain)
    out = Path(output_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".expunge-") as work:
        for number, (name, branch) in enumerate(branches.items()):
            share = (number + 1) / len(branches) * (1 - SAVING_SHARE)
            folder = Path(work) / name
            folder.mkdir()
            _train(base, (forget, retain), branch, folder, start + share * budget_seconds)
        adapters = [Path(work) / name / "adapter" for name in branches]
        merge_adapters(adapters, config, out, base=base)
    return out


def _train(base: Path, sets: tuple, branch: Branch, folder: Path, deadline: float) -> None:
    model = models.load_model(base, dtype="bfloat16")
    tokenizer = models.load_tokenizer(base, model)
    how = Model(path=str(base))
    forget, retain = (
        [
            encode(e, tokenizer, max_length=how.max_length, prompt_tail=how.prompt_tail)
            for e in examples
        ]
        for examples in sets
    )
    halves = Halves(forget, retain, folder.parent / "cache", "target")
    train_branch(
        model,
        tokenizer,
        halves,
        branch,
        seed=SEED,
        folder=folder,
        base=str(base),
        label=folder.name,
        deadline=deadline,
    )
    lora.remove_adapter(model)


def _file(folder: str | Path) -> Path:
    """The one data file of a folder (or the file itself)."""
    folder = Path(folder)
    if folder.is_file():
        return folder
    found = [p for e in ("parquet", "jsonl", "json", "csv") for p in sorted(folder.glob(f"*.{e}"))]
    if not found:
        raise DataError(f"{folder} holds no .parquet, .jsonl, .json or .csv file")
    if len({path.suffix for path in found}) < len(found):
        raise DataError(f"{folder} holds several data files; leave one")
    return found[0]
