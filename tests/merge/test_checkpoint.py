"""Hostile model files: one line that names the file and the tensor, whatever the bytes."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from expunge.errors import ExpungeError, ModelError
from expunge.merge.checkpoint import INDEX, Checkpoint, read_header
from expunge.merge.companions import copy_companions
from expunge.merge.updates import Adapter

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def file_of(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header claims 0 bytes"),
        (struct.pack("<Q", 1 << 60) + b"{}", "its header claims"),
        (file_of(b"[]"), "does not name tensors"),
        (file_of(b"{nonsense"), "its header cannot be read"),
        (file_of(b"[" * 100_000), "its header cannot be read"),
        (file_of(b'{"a": {}, "a": {}}'), "a name is given twice"),
        (file_of({"a": {**GOOD["a"], "dtype": "F3"}}), "a has the unknown type 'F3'"),
        (file_of({"a": {**GOOD["a"], "shape": [-2]}}), "a has a shape or offsets that are not"),
        (file_of({"a": {**GOOD["a"], "shape": [True]}}), "a has a shape or offsets that are not"),
        (file_of({"a": {**GOOD["a"], "shape": [3]}}), "12 bytes, but takes 8"),
        (file_of({"a": {**GOOD["a"], "shape": [1 << 40, 1 << 40]}}), "bytes, but takes 8"),
        (file_of({"a": {**GOOD["a"], "data_offsets": [8, 16]}}, b"\0" * 16), "a leaves a gap"),
        (file_of({"a": {**GOOD["a"], "more": 1}}), "a lacks one of dtype"),
        (file_of(GOOD, b"\0" * 7), "its tensors end at byte .* but the file has"),
        (file_of(GOOD, b"\0" * 9), "end at byte .* but the file has"),
        (
            file_of({**GOOD, "b": {**GOOD["a"], "data_offsets": [4, 12]}}, b"\0" * 12),
            "b overlaps the one before it",
        ),
        (
            file_of(
                {
                    "far": {**GOOD["a"], "data_offsets": [10**9, 10**9 + 8]},
                    "next": {**GOOD["a"], "data_offsets": [8, 16]},
                },
                b"\0" * 16,
            ),
            "far would end at byte",
        ),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, content, message):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"m.safetensors is damaged: .*{message}"):
        read_header(path)


def test_an_honest_file_is_read(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(save({"x": torch.arange(6.0).view(2, 3), "y": torch.ones(4).bfloat16()}))
    found = read_header(path)
    assert found["x"].shape == (2, 3) and found["y"].dtype == "BF16"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_change_of_bytes_gets_past_the_reader_unnoticed(tmp_path_factory, data):
    good = save({"x": torch.arange(6.0).view(2, 3), "y": torch.ones(4).bfloat16()})
    header = struct.unpack("<Q", good[:8])[0] + 8
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header - 1))
        content[place] = data.draw(st.integers(0, 255))
    content = (
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    path.write_bytes(bytes(content))
    try:
        found = read_header(path)
    except ModelError:
        return
    assert sum(tensor.nbytes for tensor in found.values()) <= len(content)
    assert all(t.offset + t.nbytes <= len(content) for t in found.values())


@settings(max_examples=150, deadline=None)
@given(config=st.dictionaries(
    st.sampled_from(["peft_type", "r", "lora_alpha", "rank_pattern", "use_dora", "use_rslora"]),
    st.none() | st.integers(-2, 9) | st.text(max_size=3) | st.booleans() | st.just("LORA"),
))  # fmt: skip
def test_no_adapter_config_does_worse_than_one_line(tmp_path_factory, tiny_folder, config):
    folder = tmp_path_factory.mktemp("adapter")
    key = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(48, 2)}
    (folder / "adapter_model.safetensors").write_bytes(save(factors))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    try:
        adapter = Adapter(folder)
        adapter.check(Checkpoint(tiny_folder))
    except ExpungeError as error:
        assert "\n" not in str(error)
    else:
        assert config["peft_type"] == "LORA" and config["r"] == 2


def model_folder(tmp_path, name="m"):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def indexed(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_and_index_must_agree(tmp_path):
    folder = model_folder(tmp_path)
    (folder / "one.safetensors").write_bytes(save({"x": torch.ones(2), "y": torch.ones(2)}))
    indexed(folder, {"x": "one.safetensors"})
    with pytest.raises(ModelError, match=r"one.safetensors holds y, which .* does not place there"):
        Checkpoint(folder)
    indexed(folder, {"x": "one.safetensors", "y": "one.safetensors", "z": "one.safetensors"})
    with pytest.raises(ModelError, match=r"one.safetensors lacks z, which .* names"):
        Checkpoint(folder)
    indexed(folder, {"x": "two.safetensors"})
    with pytest.raises(ModelError, match=r"holds no two.safetensors"):
        Checkpoint(folder)
    indexed(folder, {"x": "../one.safetensors"})
    with pytest.raises(ModelError, match="which is not a safetensors file"):
        Checkpoint(folder)
    (folder / INDEX).write_text("[]")
    with pytest.raises(ModelError, match="has no weight_map"):
        Checkpoint(folder)


def test_links_out_of_the_folder_are_refused_and_those_of_a_hub_cache_are_not(tmp_path):
    folder = model_folder(tmp_path)
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(save({"x": torch.ones(2)}))
    (folder / "model.safetensors").symlink_to(secret)
    with pytest.raises(ModelError, match="is a link out of its folder"):
        Checkpoint(folder)
    cache = tmp_path / "models--who--what"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    snapshot = model_folder(cache / "snapshots", "abc")
    (cache / "blobs" / "f00").write_bytes(save({"x": torch.ones(2)}))
    (snapshot / "model.safetensors").symlink_to(cache / "blobs" / "f00")
    assert list(Checkpoint(snapshot)) == ["x"]


@pytest.mark.parametrize(
    "name", ["LICENSE", "config.json", "chat_template.jinja", "additional_chat_templates"]
)
def test_what_lies_beside_the_weights_is_not_copied_from_elsewhere(tmp_path, name):
    folder, out = model_folder(tmp_path), tmp_path / "out"
    (folder / "model.safetensors").write_bytes(save({"x": torch.ones(2)}))
    secret = tmp_path / "secret"
    if name == "additional_chat_templates":
        secret.mkdir()
        (secret / "tool.jinja").write_text("{{ x }}")
    else:
        secret.write_text("{}")
    out.mkdir()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    for read in (Checkpoint, lambda it: copy_companions(it, out)):
        with pytest.raises(ModelError, match=f"{name}.* is a link out of its folder, to"):
            read(folder)
    assert not [path for path in out.rglob("*") if path.read_text() != "{}"]
    (folder / name).unlink()
    if name == "additional_chat_templates":
        secret.rename(folder / name)
    else:
        (folder / "config.json").write_text("{}")
        (folder / name).write_text("own")
    copy_companions(folder, out)  # control
    assert (out / name).exists()


def test_the_companions_of_a_hub_cache_are_copied(tmp_path):
    blobs = tmp_path / "models--who--what" / "blobs"
    snapshot = blobs.parent / "snapshots" / "abc"
    for path in (blobs, snapshot / "additional_chat_templates"):
        path.mkdir(parents=True)
    (blobs / "f00").write_text("{}")
    names = ["config.json", "LICENSE", "additional_chat_templates/tool.jinja"]
    for name in names:
        (snapshot / name).symlink_to(blobs / "f00")
    (tmp_path / "out").mkdir()
    copy_companions(snapshot, tmp_path / "out")
    assert all((tmp_path / "out" / name).read_text() == "{}" for name in names)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    folder = model_folder(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="is a pickle, which can run code when read; convert it"):
        Checkpoint(folder)
