"""What docs/metrics.md says of a suite's numbers and facts is what the suite gives."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from expunge.evaluate.attacks import ATTACKS
from expunge.evaluate.harness import measured
from expunge.evaluate.names import EVERY_FACT, FACTS, NUMBERS
from expunge.evaluate.reader import open_reader
from expunge.evaluate.suites import SUITES, measure, parse_suites
from expunge.report.metrics_page import metrics_page, suite_rows

HARNESS = {
    "results": {"facts": {"alias": "facts", "acc,none": 0.5, "acc_stderr,none": 0.1}},
    "n-samples": {"facts": {"original": 2, "effective": 2}},
    "versions": {"facts": 1},
    "n-shot": {"facts": 0},
    "samples": {"facts": []},
}


def declared(name):
    """A pattern of what a declared name stands for."""
    return re.compile(re.sub(r"<\w+>", ".+", re.escape(name)))


def rows(count, **columns):
    """So many rows; `{}` in a column stands for the row's number."""
    return [
        {key: text.format(n) if isinstance(text, str) else text for key, text in columns.items()}
        for n in range(count)
    ]


@pytest.fixture
def options(tmp_path, tiny_folder):
    """By suite, what it is told of toy data."""

    def written(name, given):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in given)
        path.write_text(json.dumps(given) if path.suffix == ".json" else lines)
        return path

    data = {}
    for half, place in (("forget", "Lisbon"), ("retain", "Oslo")):
        answer = f"write to {half}{{0}}@me.com in {place}"
        passages = rows(2, id=half + "{}sc0", input="He said {}", output=answer, task="Task1")
        asked = rows(2, id=half + "{}qa0", input=f"Who {half} {{}}?", output="Ada {}", task="Task1")
        data[half] = written(f"{half}.jsonl", passages + asked)
    data["members"] = written("members.jsonl", rows(3, id="forget{}", text="Member {} of them"))
    data["nonmembers"] = written("others.jsonl", rows(5, id="n{}", text="Some text {}, unseen"))
    four = {"choices": list("wxyz"), "answer": 1}
    questions = rows(20, subject="maths", split="test", question="What is {}?", **four)
    pq.write_table(pa.Table.from_pylist(questions), tmp_path / "mmlu.parquet")
    halves = {half: data[half] for half in ("forget", "retain")}
    for name in ("forget10", "retain", "real_authors", "world_facts"):
        more = {"paraphrased_answer": "It is {}", "perturbed_answer": ["No", "Never"]}
        given = rows(3, question="Who wrote {}?", answer="Ada {}", **more)
        written(f"tofu/{name}_perturbed.jsonl", given)
    for half in ("forget", "retain"):
        for name in ("qa", "qa_icl"):
            given = rows(2, question=f"{half} {{}}?", answer="It is {}")
            written(f"knowmem/{half}_{name}.jsonl", given)
        written(f"rwku/{half}_mia.json", rows(2, text=f"A {half} text {{}}."))
    written("verbmem/forget.jsonl", rows(2, prompt="Once {}", gt="there was {} and more"))
    for side in ("forget", "holdout"):
        written(f"privleak/{side}.jsonl", rows(2, text=f"A text {{}} of {side}."))
    for name in ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1"):
        given = rows(2, query="Born in {}?", answer="Maine", level=name[-1], type="role play")
        written(f"rwku/{name}.json", given)
    written("rwku/retain_mmlu.json", rows(2, question="{}?", task="x", examples=[], **four))
    written("rwku/retain_bbh.json", rows(2, cot="Q: 1?\nA: 1.", question="{}?", answer="2"))
    sides = {"choices": ["No", "Yes"], "labels": [1, 0]}
    written("rwku/truthful.json", rows(2, question="{}?", mc1_targets=sides, mc2_targets=sides))
    written("rwku/triviaqa.json", rows(2, question="{}?", answers=["Nile"]))
    written("rwku/fluency.json", rows(2, instruction="Write {} lines."))
    told = {
        "semeval": {
            **data,
            "evaluate": "{max_new_tokens: 4, resamples: 5, partial: true, mmlu: "
            f"{{path: {tmp_path}/mmlu.parquet, shots: 0}}}}",
        },
        "membership": {
            **{side: data[side] for side in ("members", "nonmembers")},
            "attacks": f"[{', '.join(ATTACKS)}]",
            "reference": tiny_folder,
            "resamples": 5,
        },
        "memorisation": {**halves, "max_new_tokens": 4},
        "robustness": {
            "forget": data["forget"],
            "control": data["nonmembers"],
            "relearn": "{share: 0.5, epochs: 1}",
        },
        "tofu": {"path": tmp_path / "tofu", "max_new_tokens": 4},
        "muse": {"path": tmp_path, "retrained_auc": 0.5, "verbatim_tokens": 4},
        "mmlu": {"path": tmp_path / "mmlu.parquet", "shots": 0},
        "wmdp": {
            name: written(f"{name}.jsonl", rows(8, question="What {}?", **four))
            for name in ("bio", "cyber", "chem")
        },
        "rwku": {"path": tmp_path / "rwku", "max_new_tokens": 4, "long_tokens": 4},
        "knowledge": {"limit": 3},
        "collapse": {"kept": data["retain"]},
        "traces": {"before": tiny_folder, **halves, "vectors": 1, "top_tokens": 9, "random": 3},
    }
    return {
        suite: [f"{suite}.{name}={value}" for name, value in given.items()]
        for suite, given in told.items()
    }


@pytest.fixture
def found(options, tiny_folder, tmp_path):
    """What each suite measures of the tiny model."""
    reader = open_reader(tiny_folder, None, dtype="float32", folder=tmp_path / "cache")
    words = [word for given in options.values() for word in given]
    results = measure(reader, parse_suites(list(options), words))
    results["lm_eval"] = measured(HARNESS)
    return results


def test_every_number_and_fact_of_every_suite_is_declared_and_no_other(found):
    assert set(found) == set(SUITES) == set(NUMBERS) == set(FACTS)
    for suite, results in found.items():
        every = {} if suite == "lm_eval" else EVERY_FACT
        for table, given in (
            (NUMBERS[suite], results.numbers),
            ({**FACTS[suite], **every}, results.facts),
        ):
            patterns = {name: declared(name) for name in table}
            unsaid = [n for n in given if not any(p.fullmatch(n) for p in patterns.values())]
            assert not unsaid, f"{suite}: names.py says nothing of {unsaid}"
            gone = [name for name, p in patterns.items() if not any(map(p.fullmatch, given))]
            assert not gone, f"{suite} gives no {gone}"


def test_what_is_declared_and_defined_stands_on_the_page():
    page = metrics_page(suite_rows(SUITES), [])
    sections = {text.partition("\n")[0]: text for text in page.split("\n### ")[1:]}
    for suite in SUITES:
        for name in {**NUMBERS[suite], **FACTS[suite], **EVERY_FACT}:
            assert f"| `{name}` |" in sections[suite]
    assert "final = (task_aggregate + mia.score + mmlu) / 3" in sections["semeval"]
    assert "about biology." in sections["wmdp"]
    assert "neutral.perplexity = exp(mean NLL a token)" in sections["collapse"]
    assert "1.96 standard errors" in sections["lm_eval"]
    assert "Differs: the released code reads whole texts" in sections["muse"]
    assert "Not printed of a collapsed model: `accuracy`, `macro`" in sections["wmdp"]
    assert "Not printed of" not in sections["collapse"]  # control
