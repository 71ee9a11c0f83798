"""How peers attack membership: each attack reads the documents again, in padded batches."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from expunge.data.batches import prompt_tokens
from expunge.data.sources import read_documents
from expunge.evaluate.membership import auc

BATCH, LONGEST = 8, 512

Rows = Sequence[list[int]]


def membership(model: Any, reference: Any, tokenizer: Any, section: Any) -> dict[str, float]:
    """The AUC, and the TPR at the section's FPR, of every attack of the section."""
    documents = [read_documents(section.members), read_documents(section.nonmembers)]
    tokens = [[prompt_tokens(tokenizer, d.text)[:LONGEST] for d in side] for side in documents]
    texts = [
        [
            tokenizer.decode(row) if len(row) == LONGEST else document.text
            for row, document in zip(rows, side, strict=True)
        ]
        for rows, side in zip(tokens, documents, strict=True)
    ]
    shots = section.recall_shots
    before = "".join(document.text + "\n\n" for document in documents[1][:shots])
    prefix = prompt_tokens(tokenizer, before)

    def means(of: Any, rows: Rows) -> list[float]:
        return [float(logps.mean()) for logps, _, _ in statistics(of, rows)]

    def by_text(rows: Rows, of: Sequence[str], score: Callable[..., float]) -> list[float]:
        found = statistics(model, rows)
        return [score(logps, text) for (logps, _, _), text in zip(found, of, strict=True)]

    def ratio(logps: Any, text: str) -> float:
        return float(logps.mean()) / len(zlib.compress(text.encode()))

    def total(logps: Any, text: str) -> float:
        return float(logps.sum()) / len(zlib.compress(text.encode()))

    def lowest(values: Any) -> float:
        kept = max(1, int(len(values) * section.k / 100))
        return float(values.sort().values[:kept].mean())

    def standardised(rows: Rows, of: Sequence[str]) -> list[float]:
        found = statistics(model, rows, full=True)
        return [lowest((logps - mean) / deviation) for logps, mean, deviation in found]

    def after(rows: Rows, of: Sequence[str]) -> list[float]:
        alone = means(model, rows)
        joined = statistics(model, [prefix + row for row in rows])
        kept = [float(logps[len(prefix) :].mean()) for logps, _, _ in joined]
        return [b / a for a, b in zip(alone, kept, strict=True)]

    def gap(rows: Rows, of: Sequence[str]) -> list[float]:
        pairs = zip(means(model, rows), means(reference, rows), strict=True)
        return [a - b for a, b in pairs]

    attacks: dict[str, Callable[[Rows, Sequence[str]], list[float]]] = {
        "loss": lambda rows, of: means(model, rows),
        "zlib": lambda rows, of: by_text(rows, of, ratio),
        "zlib_total": lambda rows, of: by_text(rows, of, total),
        "min_k": lambda rows, of: by_text(rows, of, lambda logps, _: lowest(logps)),
        "min_k_plus_plus": standardised,
        "reference": gap,
        "recall": after,
        "gradient_norm": lambda rows, of: [-_gradient_norm(model, row) for row in rows],
    }
    found = {}
    for name in section.attacks:
        skipped = [0, shots if name == "recall" else 0]  # a shot is not scored after itself
        scores = [
            attacks[name](rows[first:], of[first:])
            for rows, of, first in zip(tokens, texts, skipped, strict=True)
        ]
        found[f"membership.{name}.auc"] = auc(*scores)
        members, others = scores
        highest = sorted(others, reverse=True)[int(section.fpr * len(others))]
        found[f"membership.{name}.tpr"] = float(np.mean([score > highest for score in members]))
    return found


def statistics(model: Any, rows: Rows, *, full: bool = False) -> list[tuple[Any, Any, Any]]:
    """Log-probabilities of the tokens of each text, and with `full` their means and deviations."""
    found = []
    for low in range(0, len(rows), BATCH):
        part = rows[low : low + BATCH]
        logits, tokens = forward(model, part)
        log_p = logits.log_softmax(-1)
        for i, row in enumerate(part):
            lines = log_p[i, : len(row) - 1]
            logps = lines.gather(1, tokens[i, 1 : len(row), None]).squeeze(1)
            mean = deviation = None
            if full:
                p = lines.exp()
                mean = (p * lines).sum(-1)
                deviation = ((p * lines.square()).sum(-1) - mean.square()).sqrt().clamp_min(1e-4)
            found.append((logps, mean, deviation))
    return found


@torch.inference_mode()
def forward(model: Any, rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Logits (B, T, V) in float32 and tokens (B, T) of a batch padded on the right."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return model(input_ids=tokens, attention_mask=mask).logits.float(), tokens


def _gradient_norm(model: Any, row: list[int]) -> float:
    model.zero_grad()
    tokens = torch.tensor([row])
    model(input_ids=tokens, labels=tokens).loss.backward()
    squares = [np.square(float(p.grad.norm())) for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return float(np.sqrt(sum(squares)))
