"""The memory of a stage, foretold from its config; what is said when memory runs out."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from expunge.data.batches import TokenSequence, pack
from expunge.lora import Lora, add_adapter
from expunge.scores import score
from expunge.unlearn import fit
from expunge.unlearn.fit import changes_of, fitting, readable_out_of_memory
from expunge.unlearn.footprint import Demand, Shape, layer_bytes, memory_of, passing, shape_of
from expunge.unlearn.trainer import Optimizer
from expunge.unlearn.tune import Tune, tune_gradient

BIG = Shape(32, 4096, 1024, 14336, 32, 128256, 8_030_261_248)


def demand(**changes) -> Demand:
    given = {"optimizer": Optimizer(max_tokens=4096), "weights": "bfloat16", "rank": 16}
    return Demand(**{**given, "passes": ((256,) * 16,), "piece": 256, "longest": 256, **changes})


def test_the_shape_is_that_of_the_model(tiny, tiny_folder):
    shape = shape_of(tiny_folder)
    assert shape == Shape(2, 32, 16, 48, 4, 257, sum(p.numel() for p in tiny.parameters()))
    adapters = add_adapter(tiny, Lora(rank=3), seed=1)
    trained = sum(p.numel() for layer in adapters.values() for p in (layer.lora_A, layer.lora_B))
    assert shape.adapter(3) == trained


@pytest.mark.parametrize("full", [True, False])
def test_memory_grows_with_the_tokens_forwarded_at_once(full):
    rank = None if full else 16
    needs = [memory_of(BIG, demand(rank=rank).at(max_tokens=2**n)) for n in range(8, 14)]
    assert needs == sorted(needs)
    assert len(set(needs[:5])) == 5
    assert needs[4] == needs[5]  # the step holds no more than 4096


def test_a_pack_holds_no_more_than_asked_but_for_a_piece_that_cannot_be_parted():
    assert demand().at(max_tokens=1).tokens() == 256
    batches = demand(passes=((900, 100), (300,)))
    assert batches.at(max_tokens=500).tokens() == 500  # in pieces of 256 or less
    assert replace(batches, piece=900).at(max_tokens=500).tokens() == 900
    assert batches.at(max_tokens=5000).tokens() == 1000


def test_checkpointing_and_narrow_types_need_less():
    plain = demand(optimizer=Optimizer(max_tokens=4096))
    assert passing(BIG, plain.at(checkpointing=True)) < passing(BIG, plain) / 4
    wide = demand(rank=None, weights="float32", optimizer=Optimizer(compute="float32"))
    assert passing(BIG, wide.at(compute="bfloat16")) < passing(BIG, wide)
    assert memory_of(BIG, demand(weights="float32")) > memory_of(BIG, demand())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("full", [True, False])
def test_the_formula_counts_what_the_layers_keep(tiny, full, dropout):
    """The bytes that autograd saves; the control has twice the tokens and saves twice as much."""
    model = copy.deepcopy(tiny)
    if full:
        model.requires_grad_(True)
    else:
        add_adapter(model, Lora(rank=2, dropout=dropout), seed=1)
    model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def saved(count):
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = tensor, storage.nbytes()
            return tensor

        texts = [TokenSequence(str(i), tuple(range(1, 121)), 60) for i in range(count)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            score(model, pack(texts, "document", "cpu"))
        return sum(size for _, size in kept.values())

    config = Optimizer(compute="float32")
    rank = None if full else 2
    asked = Demand(config, "float32", (), 120, 120, rank=rank, dropout=dropout > 0 and not full)
    each = (saved(8) - saved(4)) / (4 * 120)
    shape = Shape.of(model.config.to_dict(), 1)
    assert shape.layers * layer_bytes(shape, asked) == pytest.approx(each, rel=0.15)


def test_smaller_packs_and_then_checkpoints_are_picked_where_room_is_short():
    stage = demand(optimizer=Optimizer(max_tokens=4096))
    need = memory_of(BIG, stage)
    assert fitting(BIG, stage, 2 * need) == stage
    quarter = memory_of(BIG, stage.at(max_tokens=1024))
    found = fitting(BIG, stage, int(quarter / (1 - fit.SPARE)) + 1)
    assert changes_of(stage.optimizer, found.optimizer) == {"max_tokens": 1024}
    least = memory_of(BIG, stage.at(max_tokens=256))
    found = fitting(BIG, stage, least - 10_000_000)
    assert found.optimizer.checkpointing
    assert fitting(BIG, stage, 1_000_000) is None
    without = replace(stage, recomputes=False)  # as latent_adversarial
    assert fitting(BIG, without, least - 10_000_000) is None


def test_larger_packs_and_no_checkpoints_are_picked_where_there_is_room():
    slow = Optimizer(max_tokens=64, checkpointing=True)
    stage = demand(optimizer=slow, passes=((32,) * 96,), piece=32, longest=32)
    found = fitting(BIG, stage, 10**12)
    assert changes_of(slow, found.optimizer) == {"max_tokens": 4096, "checkpointing": False}
    needs = memory_of(BIG, stage.at(max_tokens=1024, checkpointing=False))
    found = fitting(BIG, stage, int(needs / (1 - fit.SPARE)) + 1)
    assert changes_of(slow, found.optimizer) == {"max_tokens": 1024, "checkpointing": False}
    tight = fitting(BIG, stage, int(memory_of(BIG, stage) / (1 - fit.SPARE)) + 1)
    assert tight == stage  # all that is faster needs more
    short = replace(stage, passes=((32,) * 5,))
    assert fitting(BIG, short, 10**12).optimizer.max_tokens == 256  # what a step holds


def test_settings_that_fit_are_left_where_others_would_hardly_be_faster():
    stage = demand(optimizer=Optimizer(max_tokens=2048))
    assert fit.cost(stage.at(max_tokens=4096)) < fit.cost(stage)
    assert fitting(BIG, stage, 10**12) == stage
    assert fitting(BIG, stage.at(max_tokens=256), 10**12).optimizer.max_tokens == 4096  # control


def test_any_error_of_full_memory_is_told_and_others_are_left(tiny, monkeypatch):
    monkeypatch.setattr(fit, "room_bytes", lambda: 10**9)
    stage = replace(demand(), weights="float32")
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ):
        with (
            pytest.raises(fit.TrainingError, match="out of memory in b at max_tokens: 4096; set"),
            readable_out_of_memory("b", tiny, stage),
        ):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), readable_out_of_memory("b", tiny, stage):
        raise RuntimeError("shapes do not match")
    monkeypatch.setattr(fit, "room_bytes", lambda: 10**6)
    with (
        pytest.raises(fit.TrainingError, match=r"no setting .* use training: lora"),
        readable_out_of_memory("b", tiny, stage),
    ):
        raise MemoryError


def test_what_will_not_fit_is_said_before_and_within_a_containers_limit(tiny, monkeypatch, capsys):
    stage = replace(demand(), weights="float32")
    with readable_out_of_memory("b", tiny, stage):
        assert not capsys.readouterr().err  # control
    monkeypatch.setattr(fit, "container_room", lambda: 0)
    with readable_out_of_memory("b", tiny, replace(stage, kept=10**9)):
        said = capsys.readouterr().err
    assert said.startswith("expunge: memory may run out in b at max_tokens: 4096; ")
    assert said.count("\n") == 1


def test_a_sharded_model_is_held_in_slices():
    full = demand(rank=None, weights="float32")
    held = [memory_of(BIG, replace(full, shards=count)) for count in (1, 2, 64)]
    assert held[0] > 1.6 * held[1] > 1.6 * held[2]
    assert memory_of(BIG, replace(demand(), shards=64)) > 16 * BIG.adapter(16)  # each has it whole


SCRIPT = """
import resource, sys
import peft, psutil, torch
import expunge.pipeline, expunge.cli
import transformers.models.llama.modeling_llama  # so that the limit's room is the training's
torch.set_num_threads(1)
sys.argv = ["expunge", "unlearn", *sys.argv[1:]]
limit = psutil.Process().memory_info().vms + 800_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
expunge.cli.main()
"""


def test_a_run_that_is_out_of_memory_names_the_setting_that_then_fits(tiny_folder, tmp_path):
    optimizer = {"compute": "float32", "max_tokens": 1_000_000}
    branch = {
        "terms": [{"half": "forget", "loss": "npo", "scope": "document"}],
        "lora": {"rank": 2},
        "schedule": {"epochs": 1, "micro_batch": 1, "accumulation": 1000},
        "optimizer": optimizer,
    }
    fields = {
        "name": "r",
        "model": {"path": str(tiny_folder), "max_length": 500, "prompt_tail": None},
        "data": {"synthetic": {"documents": 60, "nonmembers": 1, "sentences": 8}},
        "branches": {"strong": branch},
    }

    def run():
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump(fields))
        words = [sys.executable, "-c", SCRIPT, str(path), "--out", str(tmp_path / "out")]
        return subprocess.run(words, capture_output=True, text=True, timeout=120)

    done = run()
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert "out of memory in strong (seed 42) at max_tokens: 1000000; set optimizer." in line
    picked = line.split("optimizer.max_tokens: ")[1].split(" ")[0]
    optimizer["max_tokens"] = int(picked)
    assert run().returncode == 0


def test_tuning_splits_a_batch_that_exceeds_max_tokens_and_learns_the_same(tiny, tmp_path):
    texts = [TokenSequence(str(i), tuple(range(1 + i, 30 + 8 * i)), 5) for i in range(4)]
    found = []
    for limit in (1000, 40):
        model = copy.deepcopy(tiny)
        own = {"lr": 1e-4, "warmup": 0, "compute": "float32", "max_tokens": limit}
        config = Tune.model_validate({"batch": 4, "optimizer": own})
        _, gradient, _ = tune_gradient(model, texts, [], config, folder=tmp_path)
        record = gradient(0)
        found.append((record["loss"], model.get_input_embeddings().weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
