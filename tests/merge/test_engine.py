"""The engine: kernels equal torch bit for bit, bounds are exact, files are whole or not there."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from expunge.errors import ExpungeError, MergeError
from expunge.memory import aligned
from expunge.merge import bounds, codec, direct, fused, operands, plain, shards
from expunge.merge.bounds import find_bounds
from expunge.merge.codec import WINDOW
from expunge.merge.families import REQUIRED
from expunge.merge.fused import Rounding, Tally
from expunge.merge.methods import METHODS
from expunge.merge.operands import Operand, Update, Whole
from expunge.merge.options import resolved
from expunge.merge.run import merge_models
from expunge.merge.survival import Survival
from expunge.merge.tensor import merge_operand
from expunge.merge.trim import Settings

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored(tensor):
    raw = tensor.contiguous().view(torch.uint8).numpy().reshape(-1).copy()
    raw.setflags(write=False)
    return Whole(raw, next(name for name, kind in DTYPES.items() if kind == tensor.dtype))


def near(base, seed, spread=1e-3):
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    return (base.float() + spread * noise).to(base.dtype)


def example(dtype="BF16", shape=(70, 257), models=3):
    base = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(9))
    base = base.to(DTYPES[dtype])
    parts = [stored(near(base, seed)) for seed in range(models)]
    return Operand("w", shape, stored(base), parts)


def settings_for(name, models):
    method = METHODS[name]
    wanted = {"density": 0.4, "gamma": 0.05, "select_topk": 0.3, "t": 0.3, "epsilon": 0.1}
    if name.startswith("ram"):
        wanted["epsilon"] = 1e-4
    known = {k: v for k, v in wanted.items() if k in method.options}
    assert all(k in known for k, v in method.options.items() if v is REQUIRED)
    options = resolved(name, method, known, models, where="w")
    return Settings("w", (0.7, 1.3, -0.2)[:models], options)


def run(operand, name, ops, kind=codec.BFLOAT16, **rounding):
    tally = Tally()
    settings = settings_for(name, len(operand.models))
    how = Rounding(kind, **rounding)
    slices = merge_operand(operand, METHODS[name], settings, how, tally, ops=ops)
    return np.concatenate([raw for _, raw in slices]), tally


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_kernels_give_the_bits_that_torch_gives(name, dtype, monkeypatch):
    monkeypatch.setattr(operands, "SLICE", 5_000)
    count = min(3, METHODS[name].models[1])
    operand = example(dtype, models=2 if name == "slerp" else count)
    kind = operands.KINDS[dtype]
    ours, tally = run(operand, name, fused, kind)
    theirs, again = run(operand, name, plain, kind)
    assert tally == again
    size = 4 if dtype == "F32" else 2
    one, two = (torch.from_numpy(raw.copy()).view(DTYPES[dtype]).float() for raw in (ours, theirs))
    assert len(ours) == operand.size * size
    if METHODS[name].how.__class__.__name__ in ("Elect", "Piece", "Matrix"):
        assert torch.equal(one, two)
    else:  # inner products are summed in another order
        torch.testing.assert_close(one, two, rtol=1e-2 if size == 2 else 1e-6, atol=1e-8)
    base = torch.from_numpy(operands.decode(operand.base.raw, kind).copy())
    assert (one != base).any()  # control


@pytest.mark.parametrize("name", ["ties", "della", "dare_ties", "sce", "linear", "slerp"])
def test_the_size_of_a_slice_changes_nothing(name, monkeypatch):
    operand = example(shape=(300, 257), models=2)
    whole = run(operand, name, fused)[0]
    monkeypatch.setattr(operands, "SLICE", 3_000)
    assert np.array_equal(run(operand, name, fused)[0], whole)


def assert_bounds_as_of_a_sort(numbers, counts, ops=fused, columns=None, part=None):
    size = numbers.size
    shape = (size // (columns or size), columns or size)
    operand = Operand("w", shape, None, [part or stored(torch.from_numpy(numbers))])
    ((found,),) = find_bounds([operand], [tuple(counts)], ops)
    order = np.lexsort((np.arange(size), -np.abs(numbers)))
    magnitudes = np.abs(numbers).view(np.uint32)
    for (bits, cut), count in zip(found, counts, strict=True):
        within = (magnitudes > bits) | ((magnitudes == bits) & (np.arange(size) < cut))
        assert np.array_equal(np.flatnonzero(within), np.sort(order[:count]))


@pytest.mark.parametrize("ops", [fused, plain])
def test_bounds_equal_those_of_a_sort(ops):
    rng = np.random.default_rng(0)
    for number in range(20):
        numbers = np.round(rng.normal(size=5_000), number % 4).astype(np.float32)
        assert_bounds_as_of_a_sort(numbers, sorted(rng.integers(1, 5_000, 2)), ops)


@pytest.mark.parametrize("slice_size", [70_000, 9_000])
@pytest.mark.parametrize("digits", [1, 2, 6])
def test_bounds_among_equals_in_many_slices_and_parts_of_them(digits, slice_size, monkeypatch):
    monkeypatch.setattr(operands, "SLICE", slice_size)
    rng = np.random.default_rng(digits)
    numbers = np.round(rng.normal(size=200_000), digits).astype(np.float32)
    for _ in range(3):
        counts = sorted(rng.integers(1, 200_000, 2))
        assert_bounds_as_of_a_sort(numbers, counts, columns=100)


@pytest.mark.parametrize("misleading", [False, True])
@pytest.mark.parametrize("formed", [False, True])
def test_bounds_are_exact_whether_or_not_the_sample_misleads(misleading, formed, monkeypatch):
    monkeypatch.setattr(bounds, "_WORTH_SAMPLING", 1)
    monkeypatch.setattr(bounds, "_LEAST_SAMPLE", 1)
    monkeypatch.setattr(operands, "_BLOCKS", 2)
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=100).astype(np.float32)
    rows = np.stack([rng.permutation(numbers) for _ in range(320)])  # each row tells of the others
    if misleading and formed:  # what the sample is made of is tiny
        rows[:10] *= 1e-6
        rows[-10:] *= 1e-6
    elif misleading:
        rows.reshape(-1, 16)[::17] *= 1e-6
    counted = []

    def bins(piece, shared):
        counted.append(piece.n)
        return fused.bins(piece, shared)

    ops = SimpleNamespace(bins=bins, window=fused.window, place_of=fused.place_of)
    part = Update(lambda first, last: rows[first:last]) if formed else None
    assert_bounds_as_of_a_sort(rows.ravel(), (3_000, 20_000), ops, columns=100, part=part)
    sampled = 2_000 if formed else 118 * 16  # of 20 blocks of rows, or of one piece in 17
    assert counted == ([sampled, 32_000] if misleading else [sampled])


@pytest.mark.parametrize("ops", [fused, plain])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("sample", ["none", "true", "misleading"])
def test_the_greatest_variances_are_those_of_a_sort(ops, count, sample, monkeypatch):
    """A share of what differs at all, whether or not a sample tells where the bound is."""
    if sample != "none":
        monkeypatch.setattr(bounds, "_WORTH_SAMPLING", 1)
        monkeypatch.setattr(bounds, "_LEAST_SAMPLE", 1)
    rng = np.random.default_rng(count)
    deltas = np.round(rng.normal(size=(count, 20_000)), 2).astype(np.float32)
    deltas[:, rng.random(20_000) < 0.3] = 0.25  # the same in all
    if sample == "misleading":
        deltas.reshape(count, -1, 16)[:, ::20] *= 1e-6
    mean = sum(deltas) / np.float32(count)
    scores = sum((row - mean) * (row - mean) for row in deltas) / np.float32(count)
    operand = Operand("w", (200, 100), None, [stored(torch.from_numpy(row)) for row in deltas])
    order = np.lexsort((np.arange(20_000), -scores))
    for share in (0.0, 1e-5, 0.3, 0.999, 1.0):
        wanted = int(share * (scores != 0).sum()) if share < 1 else 20_000
        ((outer, (bits, cut)),) = bounds.find_varied_bounds(operand, share, ops)
        assert tuple(outer) == fused.NEVER
        magnitudes = scores.view(np.uint32)
        within = (magnitudes > bits) | ((magnitudes == bits) & (np.arange(20_000) < cut))
        assert np.array_equal(np.flatnonzero(within), np.sort(order[:wanted]))


def test_differences_that_are_not_finite_are_named_among_variances():
    rows = [stored(torch.tensor([1.0, float("nan")])), stored(torch.tensor([1.0, 2.0]))]
    with pytest.raises(MergeError, match="w"):
        bounds.find_varied_bounds(Operand("w", (1, 2), None, rows), 0.5, fused)


@pytest.mark.parametrize("share", [0.0, 0.004, 0.06, 0.07, 1.0])
@pytest.mark.parametrize("size", [7, 16_384, 50_003])
def test_a_window_counts_the_same_however_many_lie_within(share, size):
    rng = np.random.default_rng(1)
    low = 0x3F800000
    inside = (low + rng.integers(0, WINDOW, size)).astype(np.uint32).view(np.float32)
    outside = rng.choice([-0.5, 0.25, 3.0, -9.0], size).astype(np.float32)
    numbers = np.where(rng.random(size) < share, inside, outside)
    piece = Operand("w", (1, size), None, [stored(torch.from_numpy(numbers))]).slice(0, size)
    none, lows = np.zeros(1, np.int64), np.array([low])
    above, _, bad, firsts, parts = fused.window(piece, False, none, lows)
    bits = np.abs(numbers).view(np.uint32)
    places = bits[(bits >= low) & (bits < low + WINDOW)] - low
    assert np.array_equal(parts.sum(0)[0], np.bincount(places, minlength=WINDOW))
    assert (above.tolist(), bad) == ([int((bits >= low + WINDOW).sum())], 0)
    ends = [*firsts[1:], size]
    for first, end, (hist,) in zip(firsts, ends, parts, strict=True):
        part = bits[first:end]
        assert hist.sum() == ((part >= low) & (part < low + WINDOW)).sum()


def test_a_trim_over_the_model_keeps_the_greatest_of_all_tensors(tuned, tmp_path):
    file = merge_file(tuned, tmp_path, density=0.3, trim="model", method="magnitude_prune")
    file["models"] = file["models"][:1]
    merge_models(written(file, tmp_path), tmp_path / "out")
    base, one, out = map(tensors, (tuned[0], tuned[1], tmp_path / "out"))
    deltas = torch.cat([(one[name] - base[name]).flatten() for name in base])
    bound = deltas.abs().sort(descending=True).values[int(0.3 * len(deltas)) - 1]
    shares = []
    for name in base:
        delta = one[name] - base[name]
        kept = torch.where(delta.abs() >= bound, delta, 0.0)
        torch.testing.assert_close(out[name], base[name] + kept)
        shares.append(float((kept != 0).float().mean()))
    assert max(shares) > min(shares) + 0.01  # control: not the same share of each


@pytest.mark.parametrize(("kind", "dtype"), [(1, torch.bfloat16), (2, torch.float16)])
def test_rounding_is_to_nearest_even_for_every_stored_value_and_its_midpoints(kind, dtype):
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    codes = codes[torch.isfinite(codes)].sort().values.unique()
    middle = (codes[1:].double() + codes[:-1].double()) / 2
    numbers = torch.cat([codes, middle.float(), middle.float() * (1 + 1e-6)])
    numbers = numbers[numbers.to(dtype).isfinite()]
    operand = Operand("w", (len(numbers),), None, [stored(numbers)])
    (piece,) = operand
    raw = fused.combine(piece, np.ones(1), Rounding(kind), Tally())
    assert torch.equal(torch.from_numpy(raw).view(dtype), numbers.to(dtype))


@pytest.mark.parametrize(("kind", "dtype"), [(1, torch.bfloat16), (2, torch.float16)])
def test_stochastic_rounding_is_right_on_average_and_the_same_in_torch(kind, dtype):
    for value in (1.0 + 2.0**-12, 3e-7):
        numbers = torch.full((200_000,), value)
        operand = Operand("w", (len(numbers),), None, [stored(numbers)])
        (piece,) = operand
        how = Rounding(kind, stochastic=True, key=7)
        raw = fused.combine(piece, np.ones(1), how, Tally())
        rounded = torch.from_numpy(raw).view(dtype).double()
        assert np.array_equal(raw, plain.combine(piece, np.ones(1), how, Tally()))
        spread = float(rounded.std()) / len(rounded) ** 0.5
        assert abs(float(rounded.mean()) - value) <= 5 * spread + 1e-12
        assert len(rounded.unique()) == 2
    nearest = fused.combine(piece, np.ones(1), Rounding(kind), Tally())
    assert len(torch.from_numpy(nearest).view(dtype).unique()) == 1  # control


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def merge_file(tuned, tmp_path, method="ties", **parameters):
    base, *models = map(str, tuned)
    return {
        "method": method,
        "base_model": base,
        "models": [{"model": model} for model in models],
        "parameters": parameters,
    }


def written(fields, tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(json.dumps(fields))
    return path


def test_shards_index_config_and_tokenizer_load(tuned, tmp_path):
    path = written(merge_file(tuned, tmp_path, density=0.5), tmp_path)
    report = merge_models(path, tmp_path / "one")
    merge_models(path, tmp_path / "many", shard_bytes=40_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert not list((tmp_path / "many").glob("*.jsonl"))
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert torch.equal(model.state_dict()["model.norm.weight"], one["model.norm.weight"])
    assert AutoTokenizer.from_pretrained(tmp_path / "many")("a")["input_ids"]
    assert report["tensors"] == len(one) and report["storage_survival"] == 1.0


KILLED = """
import sys, time
from pathlib import Path
from expunge.merge import shards
from expunge.merge.run import merge_models
setattr(shards, sys.argv[3], 0.01)
plain = shards.ShardWriter.finished
def slow(self, name, note):
    plain(self, name, note)
    self._wait()
    time.sleep(0.05)
shards.ShardWriter.finished = slow
merge_models(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("limit", ["_SYNC_BYTES", "_SYNC_SECONDS"])
def test_a_killed_merge_goes_on_where_it_stopped(tuned, tmp_path, limit):
    path = written(merge_file(tuned, tmp_path, density=0.5), tmp_path)
    merge_models(path, tmp_path / "whole")
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(out), limit])
    journal = partial / "journal.jsonl"
    while not (journal.is_file() and len(journal.read_text().splitlines()) > 4):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    report = merge_models(path, out)
    assert report["resumed"] > 3
    assert not partial.exists()
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_what_a_failure_leaves_is_removed_and_what_an_interruption_leaves_is_not(
    tuned, tmp_path, monkeypatch
):
    path = written(merge_file(tuned, tmp_path, density=0.5), tmp_path)
    plain_finish = shards.ShardWriter.finished
    for failure, left in ((ValueError, []), (KeyboardInterrupt, [".out.partial"])):
        finished = []

        def finish(self, name, note, failure=failure, finished=finished):
            plain_finish(self, name, note)
            finished.append(name)
            if len(finished) == 3:
                raise failure

        monkeypatch.setattr(shards.ShardWriter, "finished", finish)
        with pytest.raises(failure):
            merge_models(path, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == left
    monkeypatch.setattr(shards.ShardWriter, "finished", plain_finish)
    assert merge_models(path, tmp_path / "out")["resumed"] == 3


def test_a_write_that_failed_is_never_in_the_journal(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_SYNC_SECONDS", 0.0)
    writer = shards.ShardWriter(tmp_path, [shards.Planned("x", "F32", (2,))], 100)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(direct.OutputFile, "write", fail)
    writer.write("x", 0, np.zeros(8, np.uint8))
    writer.finished("x", [])
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert not (tmp_path / "journal.jsonl").exists()


def test_what_another_merge_left_is_not_gone_on_with(tuned, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "identity.json").write_text("another")
    (partial / "journal.jsonl").write_text('["model.norm.weight", []]\n')
    path = written(merge_file(tuned, tmp_path, density=0.5), tmp_path)
    report = merge_models(path, tmp_path / "out")
    assert report["resumed"] == 0
    assert float(tensors(tmp_path / "out")["model.norm.weight"].abs().sum()) > 0


def test_overflow_and_nan_are_named_and_leave_nothing(tuned, tmp_path):
    for name, value, message in (
        ("nan", float("nan"), r"nan/model\.safetensors: model\.norm\.weight holds NaN"),
        ("huge", 1e30, r"model\.norm\.weight overflows once merged \(stored as F16\)"),
    ):
        bad = tmp_path / name
        AutoModelForCausalLM.from_pretrained(tuned[1]).save_pretrained(bad)
        found = tensors(bad)
        found["model.norm.weight"][3] = value
        save_file(found, bad / "model.safetensors", metadata={"format": "pt"})
        fields = merge_file([tuned[0], bad], tmp_path, weight=1.0)
        for method in ("ties", "linear", "task_arithmetic"):
            path = written({**fields, "method": method, "out_dtype": "float16"}, tmp_path)
            with pytest.raises(MergeError, match=message):
                merge_models(path, tmp_path / "out")
        assert not [p for p in tmp_path.iterdir() if "out" in p.name]


@pytest.mark.parametrize("method", ["knots", "tsv"])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_is_named_before_a_matrix_is_decomposed(tuned, tmp_path, method, which):
    bad = tmp_path / "nan"
    AutoModelForCausalLM.from_pretrained(tuned[which]).save_pretrained(bad)
    found = tensors(bad)
    found["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(found, bad / "model.safetensors", metadata={"format": "pt"})
    folders = [bad if number == which else folder for number, folder in enumerate(tuned)]
    path = written(merge_file(folders, tmp_path, method), tmp_path)
    with pytest.raises(
        MergeError, match=r"nan/model\.safetensors: model\.layers\.1\.mlp\.up_proj\."
    ):
        merge_models(path, tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


@pytest.mark.parametrize("refused", [None, "open", "write"])
def test_a_file_written_past_the_page_cache_holds_what_was_written(tmp_path, monkeypatch, refused):
    """At any offset, from any address, and where the file system refuses such writes."""
    size, rng = 100_000, np.random.default_rng(0)
    plain_write = os.pwrite
    if refused == "open":
        monkeypatch.setattr(direct, "_open_direct", lambda path: None)
    file = direct.OutputFile(tmp_path / "f", size)

    def write(descriptor, data, offset):
        if descriptor == file._direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain_write(descriptor, data, offset)

    if refused == "write":
        monkeypatch.setattr(os, "pwrite", write)
    expected = np.zeros(size, np.uint8)
    for number in range(60):
        low, high = sorted(rng.integers(0, size, 2))
        raw = rng.integers(0, 256, high - low, dtype=np.uint8)
        if number % 2:
            held = aligned(len(raw))
            held[:] = raw
            raw = held
        file.write(int(low), raw)
        expected[low:high] = raw
    file.sync()
    file.close()
    assert np.array_equal(np.fromfile(tmp_path / "f", np.uint8), expected)


def test_what_cannot_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        direct.OutputFile(tmp_path / "f", 1 << 60)
    assert (tmp_path / "f").stat().st_size == 0


def test_a_full_disk_is_one_line_and_leaves_nothing(tuned, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = written(merge_file(tuned, tmp_path, density=0.5), tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ExpungeError, match="the disk is full"):
        merge_models(path, tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_survival_says_what_storage_keeps(tuned, tmp_path):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tuned[0]).bfloat16().save_pretrained(base)
    shares = []
    for weight in (1.0, 1e-4):
        fields = merge_file([base, *tuned[1:]], tmp_path, method="task_arithmetic", weight=weight)
        out = tmp_path / f"out-{weight}"
        path = written({**fields, "out_dtype": "bfloat16"}, tmp_path)
        shares.append(merge_models(path, out)["storage_survival"])
        before, after = tensors(base), tensors(out)
        changed = sum(int((before[n] != after[n]).sum()) for n in before)
        total = sum(tensor.numel() for tensor in before.values())
        assert shares[-1] == pytest.approx(changed / total, rel=0.01)
    assert shares[0] > 0.9 > 0.2 > shares[1]


@pytest.mark.parametrize("columns", [576, 130, 3])
def test_int8_and_int4_survival_are_counted_by_hand_whatever_the_columns(columns):
    """The last weight is edited by 2: less than half a step of the row's int8, not of its own."""
    base = torch.zeros(65, columns)
    base[:, 0], base[:, -1] = 1270.0, 7.0  # steps: int8 10; int4 of the first group 181
    edited = base.clone()
    edited[:, -1] += 2  # int8: 7 and 9 are both 1 step; int4: 7 and 9 are 7, for they are cut off
    edited[:, 1] += 6  # int8: 0 becomes 1; int4: 0 stays
    edited[64, -1] = 4  # int8: 7 is 1, 4 is 0; int4: 7 becomes 4 in a short group of its own
    survival = Survival()
    operand = Operand("w", tuple(base.shape), stored(base), [stored(edited)])
    survival.sample(operand, 0, stored(edited).raw, codec.FLOAT32)
    assert survival.sampled == 4  # rows 0 and 64
    assert survival.kept8 == 3
    assert survival.kept4 == (0 if columns == 3 else 1)
