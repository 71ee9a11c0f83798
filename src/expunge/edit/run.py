"""Do an edit and say what it did: what a stage of a recipe and `expunge edit` share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge import models, parallel, provenance, runs
from expunge.adapter_files import CONFIG
from expunge.config import parse_section
from expunge.data.batches import encode_all
from expunge.data.examples import Example, check_disjoint
from expunge.data.sources import Source, read_examples
from expunge.edit.section import Edit
from expunge.edit.task import Encode, Task, Weights
from expunge.errors import EditError
from expunge.model_section import Model

EDIT = "edit.json"


def do_edit(
    edit: Edit,
    given: Sequence[Weights],
    out: Path,
    *,
    base: Path | None,
    sets: Mapping[str, list[Example]] | None = None,
    encode: Encode | None = None,
    note: Path,
) -> dict[str, Any]:
    """Write the folder `out`, and to the file `note` what was done; `given` are of and others."""
    parallel.refuse_several(f"the edit {edit.method}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EditError(f"{out} exists and is not empty; choose another folder")
    of, *others = given
    row = edit.row
    task = Task(
        edit.method, edit.settings, edit.seed, of, tuple(others), base, out, sets or {}, encode
    )
    if row.takes == "adapter" and task.adapters is None:
        raise EditError(f"{edit.method} takes LoRA adapters: give --adapter")
    _check_fit(task)
    made = row.run(task)
    said = {
        "method": edit.method,
        "options": edit.settings.model_dump(mode="json"),
        "seed": edit.seed,
        "of": [str(one.folder) for one in given],
        "base": str(base) if base else None,
        **made,
    }
    runs.write_json(note, said)
    return said


def _check_fit(task: Task) -> None:
    """Refuse a LoRA that is of another model than the one that it is on."""
    for one in (task.of, *task.others):
        if one.adapter is not None and _kind(one.adapter) == "LORA":
            task.source(one)


def _kind(adapter: Path) -> str | None:
    path = adapter / CONFIG
    config = runs.read_json(path) if path.is_file() else None
    return config.get("peft_type") if isinstance(config, dict) else None


def edit_model(
    method: str,
    model: str,
    out: Path | str,
    *,
    adapter: Path | str | None = None,
    base: str | None = None,
    others: Sequence[str] = (),
    forget: str | None = None,
    retain: str | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 42,
) -> dict[str, Any]:
    """Edit a model (id, folder or GGUF), or the adapter on it, into the folder `out`.

    With an adapter, `others` are adapters on the same model, and updates are counted from `model`;
    else they are models, and updates are counted from `base`. `forget` and `retain` are files of
    items. Returns what `out/edit.json` holds.
    """
    fields = {"of": model, "others": others, "method": method, "options": dict(options or {})}
    edit = parse_section({**fields, "seed": seed}, Edit, origin="edit")
    folder = models.resolve(model)
    if adapter is not None:
        given = [Weights(folder, Path(one).expanduser()) for one in (adapter, *others)]
        start = folder
        if base is not None:
            raise EditError("an adapter's base is MODEL; --base is for whole models")
    else:
        given = [Weights(folder), *(Weights(models.resolve(other)) for other in others)]
        start = models.resolve(base) if base is not None else None
        if start is not None and start.resolve() == folder.resolve():
            raise EditError("MODEL and --base are one model; --base is what MODEL was trained from")
    files = {"forget": forget, "retain": retain}
    sets = {n: read_examples(Source(path=path)) for n, path in files.items() if path is not None}
    if len(sets) == len(files):
        check_disjoint(sets["forget"], sets["retain"])
    reading = Model().reading
    out = Path(out)
    said = do_edit(
        edit,
        given,
        out,
        base=start,
        sets=sets,
        encode=lambda items, tokenizer: encode_all(items, tokenizer, **reading),
        note=out / EDIT,
    )
    runs.write_json(out / EDIT, {**said, "provenance": provenance.provenance()})
    return said
