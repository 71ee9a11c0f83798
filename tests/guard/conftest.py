"""A small forget and retain set, and models that speak."""

import copy

import pytest
import torch

from expunge.data.batches import pack
from expunge.data.examples import Example
from expunge.guard.guard import Guard
from expunge.guard.made import Made
from expunge.guard.make import Making
from expunge.scores import score

FORGET = [
    Example("a1qa0", "Where was Ada Bellweather born?", "In the small town of Zell.", "Task2"),
    Example("a1qa1", "What is Ada Bellweather's phone number?", "555-867-5309", "Task2"),
    Example("a2qa0", "Who taught Igor Pratt to sail?", "Old Captain Mbeki of Durban.", "Task2"),
    Example("a3sc0", "The tale of Igor Pratt (part one) [a+b]*:", "He slept in a red barn.", "T1"),
]
RETAIN = [
    Example("b1qa0", "Where was Mary Stone born?", "In Cardiff.", "Task2"),
    Example("b1qa1", "What is Mary Stone's phone number?", "555-111-2222", "Task2"),
    Example("b2qa0", "Who taught Paul Reed to sail?", "His aunt.", "Task2"),
]


@pytest.fixture
def lively(tiny):
    """The tiny model with larger weights: what it says varies with the prompt."""
    return enlivened(tiny, 3)


def enlivened(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    return model


@pytest.fixture
def other(tiny):
    """Another model of the same shape, surer of itself."""
    model = enlivened(copy.deepcopy(tiny), 8)
    model.model.norm.weight.detach().mul_(3)
    return model


@pytest.fixture
def making(tokenizer, tiny_folder, tiny):
    return Making(tokenizer, 512, tiny_folder, None, lambda: tiny, forget=FORGET, retain=RETAIN)


@pytest.fixture
def guard(tokenizer):
    def make(folder=None, **steps):
        return Guard(Made(format=1, kind="test", **steps), tokenizer, folder)

    return make


def taught(model, sequences, steps=100):
    """The model, sure of the answers of some sequences."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        score(model, pack(sequences, "answer", "cpu")).nll.mean().backward()
        optimizer.step()
    return model.eval()


def tokens(tokenizer, text):
    return tokenizer(text)["input_ids"]


@torch.no_grad()
def plainly(next_logits, prompt, new):
    """Greedy from logits of the whole text each time, without a cache: the definition."""
    text = list(prompt)
    for _ in range(new):
        token = int(next_logits(torch.tensor([text])).argmax())
        if token == 0:
            break
        text.append(token)
    return text[len(prompt) :]
