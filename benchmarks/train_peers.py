"""Training as peers do it: transformers + peft loops with padded batches, and the Trainer.

Each takes the same sequences, the same steps and the same first factors as ours (see train.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

BETA, NPO, KL, NLL = 0.1, 0.4, 0.4, 0.2


class Padded:
    """A batch of sequences, padded on the right to the longest or to a width."""

    def __init__(self, rows: list[dict[str, Any]], width: int | None) -> None:
        width = width or max(len(row["tokens"]) for row in rows)
        self.tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        self.mask = torch.zeros_like(self.tokens)
        self.answer = torch.zeros(len(rows), width - 1, dtype=torch.bool)
        self.document = torch.zeros_like(self.answer)
        for number, row in enumerate(rows):
            length = len(row["tokens"])
            self.tokens[number, :length] = torch.tensor(row["tokens"])
            self.mask[number, :length] = 1
            self.document[number, : length - 1] = True
            self.answer[number, max(1, row["answer_start"]) - 1 : length - 1] = True

    def logits(self, model: torch.nn.Module) -> Tensor:
        """Logits that predict tokens 1 … of each row: (rows, width - 1, V)."""
        return model(input_ids=self.tokens, attention_mask=self.mask).logits[:, :-1]

    def logps(self, logits: Tensor) -> Tensor:
        """log p of each token, in float32: (rows, width - 1)."""
        found = logits.float().log_softmax(-1)
        return found.gather(-1, self.tokens[:, 1:, None]).squeeze(-1)


def peft_loop(spec: dict[str, Any], wait: Callable[[int], None], *, released: bool) -> list[float]:
    """NPO + KL + NLL: a loss a step.

    Best effort: a micro-batch is one padded batch, the reference is the model with its adapter off.
    Released: all is padded to the longest allowed, the reference is a second model in memory.
    """
    kind = getattr(torch, spec["dtype"])
    base = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=kind)
    model = PeftModel.from_pretrained(base, spec["factors"], is_trainable=True).train()
    second = None
    if released:
        second = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=kind).eval()
    width = spec["max_length"] if released else None
    optimizer, schedule = _optimizer(model, spec)
    losses = []
    for number, step in enumerate(spec["steps"]):
        wait(number)
        total = 0.0
        for forget, retain in step:
            loss = _loss(
                model,
                second,
                Padded([spec["forget"][i] for i in forget], width),
                Padded([spec["retain"][i] for i in retain], width),
            )
            (loss / len(step)).backward()
            total += float(loss.detach()) / len(step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses


def _loss(
    model: torch.nn.Module, second: torch.nn.Module | None, forget: Padded, retain: Padded
) -> Tensor:
    with torch.no_grad():
        if second is not None:
            old_forget = forget.logps(forget.logits(second))
            old_retain = retain.logits(second).float().log_softmax(-1)
        else:
            with model.disable_adapter():  # pyright: ignore
                old_forget = forget.logps(forget.logits(model))
                old_retain = retain.logits(model).float().log_softmax(-1)
    ratio = (forget.logps(forget.logits(model)) - old_forget)[forget.answer].mean()
    npo = -(2 / BETA) * F.logsigmoid(-BETA * ratio)
    now = retain.logits(model)
    log_p = now.float().log_softmax(-1)
    kl = F.kl_div(log_p, old_retain, log_target=True, reduction="none").sum(-1)
    logps = log_p.gather(-1, retain.tokens[:, 1:, None]).squeeze(-1)
    nll = -logps[retain.answer].mean()
    return NPO * npo + KL * kl[retain.document].mean() + NLL * nll


def _optimizer(model: torch.nn.Module, spec: dict[str, Any]) -> tuple[Any, Any]:
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = spec["weight_decay"]
    optimizer = torch.optim.AdamW(trained, lr=spec["lr"], weight_decay=decay, fused=True)
    total = len(spec["steps"])
    return optimizer, get_linear_schedule_with_warmup(optimizer, spec["warm"], total)


def trainer(spec: dict[str, Any], wait: Callable[[int], None], folder: Path) -> list[float]:
    """A full fine-tune by the transformers Trainer, its batches grouped by length beforehand."""
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    order = [index for step in spec["steps"] for index in step]
    rows = [spec["items"][index]["tokens"] for index in order]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        padded = Padded([{"tokens": row["tokens"], "answer_start": 0} for row in batch], None)
        labels = padded.tokens.masked_fill(padded.mask == 0, -100)
        return {"input_ids": padded.tokens, "attention_mask": padded.mask, "labels": labels}

    class Paced(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wait(state.global_step)

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=len(spec["steps"][0]),
        num_train_epochs=1,
        learning_rate=spec["lr"],
        weight_decay=spec["weight_decay"],
        warmup_steps=spec["warm"],
        max_grad_norm=spec["clip"],
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        bf16=spec["compute"] == "bfloat16",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    done = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"tokens": row} for row in rows],  # pyright: ignore
        data_collator=collate,  # pyright: ignore
        callbacks=[Paced()],
    )
    done.train()
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]
