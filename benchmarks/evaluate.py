"""Evaluation: ours against what peers do, interleaved, with the same results shown in the run.

    python benchmarks/evaluate.py [--cases semeval,rescore] [--items 4] [--model smollm2]

- semeval: the twelve terms and the losses of LUME items, against a plain loop of one prompt at a
  time (greedy, 256 new tokens) and one text at a time, as the official script works.
- tofu: the suite tofu, with its forget quality, and every membership attack, against passes over
  the texts for each metric (padded batches of 8, full logits) and unsorted generation.
- mmlu: 5-shot, against lm-evaluation-harness on the same questions.
- rescore: the same as semeval again after the definition of the questions' score has changed, which
  needs the ends of texts that were stopped early: they are counted.

Everything is in float32 on the CPU's threads; data is read from EXPUNGE_DATA.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate_peers import harness_mmlu, one_pass_a_metric, plain_model
from membership_peers import LONGEST, membership

from expunge import models
from expunge.data.batches import encode, prompt_tokens
from expunge.data.examples import Example
from expunge.data.sources import Source, locate, read_examples
from expunge.evaluate import semeval
from expunge.evaluate.attacks import ATTACKS
from expunge.evaluate.mmlu import letter_logits, read_mmlu
from expunge.evaluate.reader import open_reader
from expunge.evaluate.suite import Evaluate, EvaluationData, evaluate
from expunge.evaluate.suites import measure, parse_suites

RESULTS = Path(__file__).parent / "results" / "evaluate.json"
NEW_TOKENS = 256
READING = {"max_length": 256, "prompt_tail": 204, "separator": ""}


def main() -> None:
    """Run the cases asked for, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--items", type=int, default=4, help="of each of the twelve terms")
    parser.add_argument("--model", default=models.EMBEDDED)
    options = parser.parse_args()
    for name in options.cases:  # each is kept as soon as it is measured
        _write({"case": name, **CASES[name](options)}, options)


def semeval_case(options: Any) -> dict[str, Any]:
    """LUME against one prompt at a time."""
    folder = models.resolve(options.model)
    data = EvaluationData(_items("forget", options.items), _items("retain", options.items))
    config = Evaluate(max_new_tokens=NEW_TOKENS, resamples=100)
    model, tokenizer = plain_model(folder), models.load_tokenizer(folder)

    def ours() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return evaluate(_reader(folder, None), data, config, **READING)

    def peer() -> list[tuple[float, float]]:
        return [_alone(model, tokenizer, item) for item in [*data.forget, *data.retain]]

    _warm(model)
    (entry, rows), seconds = _timed(ours)
    found, peer_seconds = _timed(peer)
    scores = [row["score"] for row in rows]
    losses = [row["nll"] for row in rows]
    same = sum(a == b for a, (b, _) in zip(scores, found, strict=True))
    apart = max(abs(a - b) for a, (_, b) in zip(losses, found, strict=True))
    assert entry["semeval"]["counts"]["forget/Task1/sc"] == options.items
    return _row(
        seconds,
        peer_seconds,
        8.0,
        f"{same} of {len(rows)} scores identical, losses within {apart:.1e}",
        same == len(rows) and apart < 1e-3,
    )


def rescore_case(options: Any) -> dict[str, Any]:
    """A metric's definition changes: no text is read again but the ends of those that were stopped.

    The goal is met where none is.
    """
    folder = models.resolve(options.model)
    data = EvaluationData(_items("forget", options.items), _items("retain", options.items))
    config = Evaluate(max_new_tokens=NEW_TOKENS, resamples=100)

    def contains(truth: str, text: str) -> float:
        return float(truth.lower() in text.lower())

    def evaluated(reader: Any) -> list[dict[str, Any]]:
        return evaluate(reader, data, config, **READING)[1]

    with tempfile.TemporaryDirectory() as cache:
        first, seconds = _timed(lambda: evaluated(_reader(folder, cache)))
        before = semeval.SCORES["qa"]
        semeval.SCORES["qa"] = contains
        try:
            reader = _reader(folder, cache)
            again, second = _timed(lambda: evaluated(reader))
        finally:
            semeval.SCORES["qa"] = before
    questions = [row for row in again if row["kind"] == "qa"]
    whole = all(row["complete"] for row in questions)
    right = all(row["score"] == contains(row["truth"], row["generation"]) for row in questions)
    pairs = zip(first, again, strict=True)
    alike = all(old == new for old, new in pairs if old["kind"] != "qa")
    written = sum(row["tokens"] for row in again) - sum(row["tokens"] for row in first)
    stopped = sum(not row["complete"] for row in first)
    said = (
        f"{stopped} of {len(first)} texts had been stopped, {reader.forwards} were written on by "
        f"{written} tokens; scores are those of the new definition on whole texts"
    )
    return _row(second, seconds, 1.0, said, reader.forwards == 0 and whole and right and alike)


def tofu_case(options: Any) -> dict[str, Any]:
    """TOFU and membership against one pass for each metric."""
    folder = models.resolve(options.model)
    model, tokenizer = plain_model(folder), models.load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as work:
        other = Path(work) / "reference"
        reference = _shaken(folder)
        reference.save_pretrained(other)
        tokenizer.save_pretrained(other)
        sections = parse_suites(["tofu", "membership"], _settings(options.items, other))

        def ours() -> dict[str, Any]:
            return measure(_reader(folder, None), sections)

        def peer() -> dict[str, float]:
            return one_pass_a_metric(model, reference, tokenizer, sections["tofu"]) | membership(
                model, reference, tokenizer, sections["membership"]
            )

        _warm(model)
        found, seconds = _timed(ours)
        theirs, peer_seconds = _timed(peer)
    mine = {f"{s}.{n}": v.value for s, m in found.items() for n, v in m.numbers.items()}
    apart = {name: abs(mine[name] - value) for name, value in theirs.items()}
    worst = max(apart, key=lambda name: apart[name])
    said = f"{len(apart)} numbers, most apart {worst} by {apart[worst]:.1e}"
    return _row(seconds, peer_seconds, 5.0, said, apart[worst] < 1e-3)


def _settings(items: int, reference: Path) -> list[str]:
    """Options of the suites: 2 records a subset and 6 documents a side for each item."""
    sides = [
        f"membership.{side}={{path: 'data:lume/{side}.jsonl', documents: {{'*': {6 * items}}}}}"
        for side in ("members", "nonmembers")
    ]
    return [
        *("tofu.path=data:tofu", "tofu.forget=forget01", f"tofu.limit={2 * items}"),
        f"tofu.retain={reference}",
        *sides,
        f"membership.attacks=[{', '.join(ATTACKS)}]",
        f"membership.reference={reference}",
        f"membership.document_tokens={LONGEST}",
    ]


def _shaken(folder: Path) -> Any:
    """A reference with the same tokenizer: the model with a little noise in every weight."""
    model = plain_model(folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.05 * float(parameter.std()))
    return model


def mmlu_case(options: Any) -> dict[str, Any]:
    """5-shot MMLU against lm-evaluation-harness."""
    folder = models.resolve(options.model)
    model, tokenizer = plain_model(folder), models.load_tokenizer(folder)
    questions = read_mmlu(locate("data:mmlu/mmlu.parquet"))
    subjects = sorted({q.subject for q in questions})[:: 57 // 4][:4]
    dev = {s: [q for q in questions if q.subject == s and q.split == "dev"] for s in subjects}
    test = {s: [q for q in questions if q.subject == s and q.split == "test"] for s in subjects}
    test = {s: asked[: 8 * options.items] for s, asked in test.items()}
    asked = [question for group in test.values() for question in group]

    def ours() -> np.ndarray:
        reader = _reader(folder, None)
        return letter_logits(reader, asked, dev, shots=5, style="harness")[0].argmax(-1)

    _warm(model)
    found, seconds = _timed(ours)
    with tempfile.TemporaryDirectory() as work:
        ask = harness_mmlu(Path(work), model, tokenizer, dev, test)
        theirs, peer_seconds = _timed(ask)
    same = int((found == theirs).sum())
    return _row(
        seconds,
        peer_seconds,
        5.0,
        f"{same} of {len(asked)} predictions identical",
        same == len(asked),
    )


def _alone(model: Any, tokenizer: Any, item: Example) -> tuple[float, float]:
    """The score and the answer's loss of one item by itself."""
    prompt = torch.tensor([prompt_tokens(tokenizer, item.prompt)])
    with torch.inference_mode():
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )[0, prompt.shape[1] :]
        sequence = encode(item, tokenizer, **READING)
        tokens = torch.tensor([sequence.tokens])
        labels = tokens.clone()
        labels[:, : sequence.answer_start] = -100
        loss = float(model(input_ids=tokens, labels=labels).loss)
    text = tokenizer.decode(written, skip_special_tokens=True)
    return semeval.SCORES[item.kind](item.answer, text), loss


def _items(half: str, count: int) -> list[Example]:
    """The first items of each task and kind."""
    examples = read_examples(Source(path=f"data:lume/{half}_train.parquet"))
    taken: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        taken.setdefault((example.task, example.kind), []).append(example)
    return [example for group in taken.values() for example in group[:count]]


def _reader(folder: Path, cache: str | None) -> Any:
    return open_reader(folder, None, dtype="float32", folder=Path(cache) if cache else None)


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    found = run()
    return found, time.perf_counter() - begin


def _warm(model: Any) -> None:
    with torch.inference_mode():
        model(input_ids=torch.arange(64)[None])


def _row(ours: float, peer: float, goal: float, equal: str, holds: bool) -> dict[str, Any]:
    ratio = peer / ours
    return {
        "ours": round(ours, 2),
        "peer": round(peer, 2),
        "unit": "seconds",
        "ratio": round(ratio, 1),
        "goal": goal,
        "met": bool(ratio >= goal and holds),
        "equal": equal,
    }


CASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "semeval": semeval_case,
    "tofu": tofu_case,
    "mmlu": mmlu_case,
    "rescore": rescore_case,
}


def _write(case: dict[str, Any], options: Any) -> None:
    """Keep one case beside what was measured of the others, and print all."""
    from expunge.provenance import git_commit, machine

    command = f"python benchmarks/evaluate.py --items (of each case) --model {options.model}"
    commit, measured = git_commit(), {}
    if RESULTS.is_file():
        before = json.loads(RESULTS.read_text())
        kept = {name: before[name] for name in ("commit", "machine")}
        measured = {one["case"]: {**kept, **one} for one in before["cases"]}
    now = {"commit": commit, "machine": machine(), "items": options.items}
    measured[case["case"]] = {**now, **case}
    cases = [measured[name] for name in CASES if name in measured]
    result = {"machine": machine(), "commit": commit, "command": command, "cases": cases}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'case':12} {'ours s':>8} {'peer s':>8} {'ratio':>7} {'goal':>5}  met  same")
    for case in cases:
        print(
            f"{case['case']:12} {case['ours']:8.2f} {case['peer']:8.2f} {case['ratio']:7.1f} "
            f"{case['goal']:5.0f}  {'yes' if case['met'] else 'no':3}  {case['equal']}"
        )


if __name__ == "__main__":
    main()
