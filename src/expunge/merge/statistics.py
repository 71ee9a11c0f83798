"""What regmean and fisher need of a model: sums over texts, read one by one.

Dimensions: T tokens of a text, (out, in) the shape of a weight.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from expunge import models, parallel, runs
from expunge.data.batches import TokenSequence, encode_document, pack
from expunge.data.sources import named_source, read_documents
from expunge.disk import readable_errors, safetensors_errors
from expunge.errors import ModelError
from expunge.packs import given_to, hidden_states
from expunge.products import product
from expunge.progress import progress
from expunge.registry import lookup
from expunge.scores import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def gram(model: "PreTrainedModel", texts: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """How the inputs of every linear layer but the head lie: by tensor name, (in, in) float32.

        G = (1/N) Σ_t x_t x_tᵀ,   N tokens of all texts

    Source: RegMean, arXiv:2212.09849.

    Differs: a mean where RegMean has a sum, so that models with more texts do not weigh more.
    """
    _check(texts)
    head = model.get_output_embeddings()
    layers = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    found = {name: torch.zeros(m.in_features, m.in_features) for name, m in layers.items()}
    device = next(model.parameters()).device

    def add(name: str, given: Tensor) -> None:
        x = given.flatten(0, -2).float()
        found[name] += product(x.T, x.T).cpu()

    tokens = sum(len(text.tokens) for text in texts)
    with given_to(layers, add), torch.no_grad(), progress("gram", len(texts), "texts") as bar:
        for text in texts:
            hidden_states(model, pack([text], "document", device))
            bar(1)
    return {name: total / tokens for name, total in found.items()}


def fisher(model: "PreTrainedModel", texts: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """How much each weight matters to the texts: by tensor name, in its own shape, float32.

        F = (1/B) Σ_b (∂ log p(text_b) / ∂W)²,   B texts, log p a mean over tokens

    Source: Fisher-weighted averaging, arXiv:2111.09832.

    Differs: the texts' own tokens stand for draws from the model (the empirical Fisher
    information), and log p is a mean, so that long texts do not weigh more.
    """
    _check(texts)
    parameters = dict(model.named_parameters())
    before = {name: p.requires_grad for name, p in parameters.items()}
    found = {name: torch.zeros(p.shape) for name, p in parameters.items()}
    device = next(model.parameters()).device
    try:
        model.requires_grad_(True)
        with progress("fisher", len(texts), "texts") as bar:
            for text in texts:
                nll = score(model, pack([text], "document", device)).nll.sum()
                slopes = torch.autograd.grad(nll, list(parameters.values()), allow_unused=True)
                for total, slope in zip(found.values(), slopes, strict=True):
                    if slope is not None:
                        total += slope.float().cpu().square()
                bar(1)
    finally:
        for name, wanted in before.items():
            parameters[name].requires_grad_(wanted)
    return {name: total / len(texts) for name, total in found.items()}


def gather(model: str, documents: str, out: Path, *, kind: str, max_length: int) -> dict[str, Any]:
    """Write the statistics of a model over a file of documents; returns what was done."""
    parallel.refuse_several("expunge statistics")
    fn = lookup(KINDS, kind, "kind of statistics")
    source = named_source(documents, out)
    if out.exists():
        raise ModelError(f"{out} exists; choose another name, or delete it first")
    folder = models.resolve(model)
    tokenizer = models.load_tokenizer(folder)
    given = read_documents(source)
    texts = [encode_document(d, tokenizer, max_length=max_length) for d in given]
    found = fn(models.load_model(folder), texts)
    write_statistics(found, out, kind=kind, texts=len(texts))
    tokens = sum(len(text.tokens) for text in texts)
    return {"tensors": len(found), "texts": len(texts), "tokens": tokens, "written": str(out)}


KINDS: dict[str, Callable[..., dict[str, Tensor]]] = {"gram": gram, "fisher": fisher}


def write_statistics(found: Mapping[str, Tensor], path: Path, *, kind: str, texts: int) -> None:
    """Keep statistics as a safetensors file, whole or not at all; NaN is a `ModelError`."""
    for name, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"the {kind} statistics of {name} are not finite; the model is broken")
    with readable_errors(path), runs.replacing(path) as temporary, safetensors_errors():
        whole = {name: tensor.contiguous() for name, tensor in found.items()}
        save_file(whole, temporary, metadata={"kind": kind, "texts": str(texts)})


def _check(texts: Sequence[TokenSequence]) -> None:
    if not texts:
        raise ModelError("statistics need at least one text")
