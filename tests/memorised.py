"""The tiny model after it has memorised some items."""

from expunge.data.batches import encode
from expunge.models import load_model
from expunge.unlearn.tune import Tune, tune


def memorised(folder, tokenizer, examples, work):
    """The model in `folder`, tuned on the examples until it knows them, and their tokens."""
    model = load_model(folder)
    items = [encode(example, tokenizer, max_length=64) for example in examples]
    config = Tune(
        epochs=150,
        batch=5,
        stop_nll=0.05,
        optimizer={"lr": 1e-2, "warmup": 0, "compute": "float32"},
    )
    tune(model, tokenizer, items, [], config, folder=work)
    return model, items
