"""How peers evaluate: a pass over the texts for each metric, and lm-evaluation-harness."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from membership_peers import BATCH, forward
from scipy.stats import ks_2samp
from transformers import AutoModelForCausalLM

from expunge.data.batches import answer_tokens, prompt_tokens
from expunge.data.records import part, read_records, sample
from expunge.evaluate import tofu
from expunge.evaluate.mmlu import Question
from expunge.evaluate.tofu_suite import TEMPLATES

_SUBSETS = {"forget": "forget01", "retain": "retain", "authors": "real_authors"}
_SUBSETS["world"] = "world_facts"


def plain_model(folder: Path) -> Any:
    """The model as transformers loads it, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()


def one_pass_a_metric(model: Any, retain: Any, tokenizer: Any, section: Any) -> dict[str, float]:
    """The numbers of the suite tofu, each from passes of its own; `retain` is the retain model."""
    found: dict[str, float] = {}
    for group, subset in _SUBSETS.items():
        texts = ["question", "answer"]
        texts += ["paraphrased_answer"] if group in ("forget", "retain") else []
        source = part(section.path, f"{subset}_perturbed")
        records = read_records(source, texts, ["perturbed_answer"])
        chosen = sample(len(records), section.limit, name=group, seed=section.seed)
        asked = [record for i, record in enumerate(records) if i in chosen]
        answers = [record["answer"] for record in asked]
        right = [record.get("paraphrased_answer", record["answer"]) for record in asked]
        wrong = [record["perturbed_answer"] for record in asked]

        losses = _losses(model, tokenizer, asked, [[answer] for answer in answers])
        if group in ("forget", "retain"):
            chances = [tofu.answer_probability(loss) for (loss,) in losses]
        else:
            options = _losses(model, tokenizer, asked, wrong)
            chances = [
                tofu.option_probability(loss, others)
                for (loss,), others in zip(losses, options, strict=True)
            ]
        found[f"tofu.{group}.probability"] = float(np.mean(chances))

        kept = _losses(model, tokenizer, asked, [[answer] for answer in right])
        perturbed = _losses(model, tokenizer, asked, wrong)
        ratios = [tofu.truth_ratio(a, b) for (a,), b in zip(kept, perturbed, strict=True)]
        truth = tofu.forget_truth if group == "forget" else tofu.kept_truth
        found[f"tofu.{group}.truth_ratio"] = float(np.mean([truth(r) for r in ratios]))
        if group == "forget":
            kept = _losses(retain, tokenizer, asked, [[answer] for answer in right])
            perturbed = _losses(retain, tokenizer, asked, wrong)
            others = [tofu.truth_ratio(a, b) for (a,), b in zip(kept, perturbed, strict=True)]
            p_value = ks_2samp(ratios, others).pvalue  # pyright: ignore[reportAttributeAccessIssue]
            found["tofu.forget_quality"] = float(p_value)

        written = _written(model, tokenizer, asked, section.max_new_tokens)
        scores = [tofu.answer_rouge(a, text) for a, text in zip(answers, written, strict=True)]
        found[f"tofu.{group}.rouge"] = float(np.mean(scores))
    terms = [value for name, value in found.items() if "forget" not in name]
    found["tofu.model_utility"] = len(terms) / sum(1 / v for v in terms) if min(terms) > 0 else 0.0
    return found


def harness_mmlu(
    folder: Path,
    model: Any,
    tokenizer: Any,
    dev: Mapping[str, Sequence[Question]],
    test: Mapping[str, Sequence[Question]],
) -> Callable[[], np.ndarray]:
    """A function that asks lm-evaluation-harness and returns the letters chosen, in order."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for subject in test:
        for split, asked in (("dev", dev[subject]), ("test", test[subject])):
            rows = [
                {"question": q.question, "choices": list(q.choices), "answer": q.answer}
                for q in asked
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{subject}-{split}.jsonl").write_text(lines)
        about = f"about {subject.replace('_', ' ')}"
        (folder / f"{subject}.yaml").write_text(
            _TASK.format(subject=subject, folder=folder, about=about)
        )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    as_given: Any = HFLM  # its decorator hides its parameters
    harness = as_given(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, max_length=2048)

    ask_harness: Any = simple_evaluate

    def ask() -> np.ndarray:
        tasks = [f"local_{subject}" for subject in test]
        results = ask_harness(
            harness, tasks=tasks, num_fewshot=5, task_manager=manager, bootstrap_iters=0
        )
        assert results is not None
        letters = []
        for task in tasks:
            for row in sorted(results["samples"][task], key=lambda row: row["doc_id"]):
                letters.append(int(np.argmax([float(r[0]) for r in row["filtered_resps"]])))
        return np.array(letters)

    return ask


_TASK = r"""
task: local_{subject}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/{subject}-test.jsonl, dev: {folder}/{subject}-dev.jsonl}}
  cache_dir: {folder}/cache
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) {about}.\n\n"
doc_to_text: "{{{{question.strip()}}}}\nA. {{{{choices[0]}}}}\nB. {{{{choices[1]}}}}\nC. \
  {{{{choices[2]}}}}\nD. {{{{choices[3]}}}}\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def _losses(
    model: Any, tokenizer: Any, records: Sequence[Any], answers: Sequence[Sequence[str]]
) -> list[list[float]]:
    """The mean loss of each answer to each question, in padded batches in the order given."""
    rows = []
    for record, several in zip(records, answers, strict=True):
        prompt = prompt_tokens(tokenizer, TEMPLATES["plain"].format(question=record["question"]))
        rows += [(prompt, answer_tokens(tokenizer, " " + answer)) for answer in several]
    found: list[float] = []
    for low in range(0, len(rows), BATCH):
        part_ = rows[low : low + BATCH]
        logits, tokens = forward(model, [[*prompt, *answer] for prompt, answer in part_])
        log_p = logits.log_softmax(-1)
        for i, (prompt, answer) in enumerate(part_):
            places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
            targets = tokens[i, len(prompt) : len(prompt) + len(answer)]
            found.append(-float(log_p[i, places, targets].mean()))
    left = iter(found)
    return [[next(left) for _ in several] for several in answers]


@torch.inference_mode()
def _written(model: Any, tokenizer: Any, records: Sequence[Any], new_tokens: int) -> list[str]:
    """Greedy answers in batches in the order given, padded on the left."""
    texts = []
    for low in range(0, len(records), BATCH):
        prompts = [
            prompt_tokens(tokenizer, TEMPLATES["plain"].format(question=record["question"]))
            for record in records[low : low + BATCH]
        ]
        longest = max(map(len, prompts))
        tokens = torch.full((len(prompts), longest), tokenizer.eos_token_id)
        mask = torch.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            tokens[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        made = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )[:, longest:]
        texts += tokenizer.batch_decode(made, skip_special_tokens=True)
    return texts
