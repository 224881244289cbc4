"""Reading checkpoints: files of every kind, damaged ones, the hub, and which tensors are Linear weights along which axis."""

import json
import os
import random
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from mxfp4_rl import ModelRecipe, QuantRecipe
from mxfp4_rl.analysis import checkpoint as checkpoint_module
from mxfp4_rl.analysis import gguf_file
from mxfp4_rl.analysis.checkpoint import Checkpoint, CheckpointError, TensorInfo, open_checkpoint
from mxfp4_rl.analysis.weights import linear_weights
from mxfp4_rl.nn import plan

gguf = pytest.importorskip("gguf")

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0.self_attn.q_proj.weight"


def tensors(*names, rows=4, columns=32, dtype=torch.bfloat16):
    return {name: torch.randn(rows, columns).to(dtype) for name in names}


def write_shards(folder, *shards, index=True, config=None):
    """Shards with an index beside them; returns all tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def safetensors_bytes(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def write_gguf(path, stored, architecture="llama", split=None, **metadata):
    """stored: name -> float array, or (bytes array, quantised type)."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0, 2.0])
    for key, value in metadata.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    if split:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", split[2])
    for name, value in stored.items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_all(model):
    with open_checkpoint(str(model)) as opened:
        return {info.name: opened.read(info).clone() for info in opened.tensors}


def assert_same(read, expected):
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def listed(names, config=None, format="safetensors", dtype="BF16"):
    """A checkpoint of which only the names and shapes exist; names -> shapes."""
    infos = [TensorInfo(name, shape, dtype, Path("model")) for name, shape in names.items()]
    return Checkpoint("model", [Path("model")], infos, config or {}, None, format=format)


# ------------------------------------------------------------------------------------------------------- safetensors


def test_a_sharded_folder_is_read_tensor_by_tensor_in_file_order(tmp_path):
    stored = write_shards(
        tmp_path,
        {"z": torch.randn(3, 32), "a": torch.randn(5).bfloat16()},
        {"m": torch.randn(2, 2, 32).half(), "s": torch.tensor(2.0, dtype=torch.float64)},
        config={"model_type": "llama"},
    )
    with open_checkpoint(str(tmp_path)) as opened:
        assert opened.source == str(tmp_path) and opened.config == {"model_type": "llama"} and opened.note == ""
        assert [p.name for p in opened.files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        infos = {info.name: info for info in opened.tensors}
        assert {n: (i.shape, i.dtype, i.elements) for n, i in infos.items()} == {
            "z": ((3, 32), "F32", 96),
            "a": ((5,), "BF16", 5),
            "m": ((2, 2, 32), "F16", 128),
            "s": ((), "F64", 1),
        }
        # A pass streams: shard after shard, and within a shard by where the bytes lie (safetensors sorts by dtype, then name).
        assert [info.file for info in opened.tensors] == sorted(info.file for info in opened.tensors)
        assert [info.name for info in opened.tensors] == ["z", "a", "s", "m"]
        assert_same({name: opened.read(infos[name]).clone() for name in ("s", "z", "m", "a", "z")}, stored)  # any order works


@pytest.mark.parametrize("layout", ["shards without index", "single file", "file by path", "odd name", "beside consolidated"])
def test_every_layout_gives_the_same_tensors(tmp_path, layout):
    first, second = tensors("a", "b"), tensors("c")
    if layout == "shards without index":
        write_shards(tmp_path, first, second, index=False)
    elif layout == "odd name":
        save_file(first | second, tmp_path / "pytorch_weights.safetensors")
    else:
        save_file(first | second, tmp_path / "model.safetensors")
    if layout == "beside consolidated":
        save_file(first | second, tmp_path / "consolidated.safetensors")
    assert_same(read_all(tmp_path / "model.safetensors" if layout == "file by path" else tmp_path), first | second)


def test_one_shard_may_be_named_on_its_own_and_config_is_optional(tmp_path):
    first, second = tensors("a"), tensors("b")
    write_shards(tmp_path, first, second)
    assert_same(read_all(tmp_path / "model-00002-of-00002.safetensors"), second)
    assert open_checkpoint(str(tmp_path)).config == {}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_only_one_file_is_mapped_and_closing_unmaps_it(tmp_path, monkeypatch):
    stored = write_shards(tmp_path, tensors("a", "b"), tensors("c"))

    def mapped():
        return {
            Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
        }

    opened = open_checkpoint(str(tmp_path))
    infos = {info.name: info for info in opened.tensors}
    assert mapped() == set()
    for name, file in (("a", "model-00001-of-00002.safetensors"), ("c", "model-00002-of-00002.safetensors")):
        assert torch.equal(opened.read(infos[name]), stored[name])
        assert mapped() == {file}
    opened.close()
    assert mapped() == set()
    # After a gigabyte the same file is mapped anew; here after every tensor.
    monkeypatch.setattr(checkpoint_module, "_MAPPED_LIMIT", 0)
    assert_same({name: opened.read(info).clone() for name, info in infos.items()}, stored)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_pass_needs_no_more_memory_than_one_shard(tmp_path):
    size = 256 << 20
    for number in (1, 2, 3):
        names = [f"model.layers.{number}{i}.mlp.up_proj.weight" for i in range(4)]
        offsets = {
            name: {"dtype": "F32", "shape": [size // 16384, 1024], "data_offsets": [size // 4 * i, size // 4 * (i + 1)]}
            for i, name in enumerate(names)
        }
        with (tmp_path / f"model-{number:05d}-of-00003.safetensors").open("wb") as stream:
            header = stream.write(safetensors_bytes(offsets))
            stream.truncate(header + size)  # a hole: takes no time to write, but its pages are mapped like any other
    code = """if True:
        import sys
        from mxfp4_rl.analysis.checkpoint import open_checkpoint
        def peak():
            return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10
        before = peak()
        with open_checkpoint(sys.argv[1]) as opened:
            total = sum(float(opened.read(info).abs().max()) for info in opened.tensors)
        print(len(opened.tensors), total, peak() - before)
    """
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    count, total, grown = result.stdout.split()
    assert (count, float(total)) == ("12", 0.0)
    assert int(grown) < 256 + 192  # MiB: one shard, one tensor's abs(), and some


# ------------------------------------------------------------------------------------------------- what is refused


def broken(folder, what):
    """A model folder with one thing wrong; returns what to open."""
    first, second = tensors("a", "b"), tensors("c")
    shard = folder / "model-00002-of-00002.safetensors"
    if what not in ("empty folder", "only pickled", "verl's shards", "two ggufs", "other files"):
        write_shards(folder, first, second, config={})
    if what == "missing shard":
        shard.unlink()
    elif what == "missing shard without index":
        shard.unlink()
        (folder / INDEX).unlink()
    elif what == "index promises more":
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["d"] = shard.name
        (folder / INDEX).write_text(json.dumps(index))
    elif what == "index names the other shard":
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["a"] = shard.name
        (folder / INDEX).write_text(json.dumps(index))
    elif what == "index without map":
        (folder / INDEX).write_text("{}")
    elif what == "index is no JSON":
        (folder / INDEX).write_text("<html>")
    elif what == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif what == "config is a list":
        (folder / "config.json").write_text("[]")
    elif what == "duplicate":
        save_file(second | tensors("a"), shard)
    elif what == "garbage":
        shard.write_bytes(b"<!DOCTYPE html><title>404</title>" * 9)
    elif what == "cut off":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif what == "too long":
        shard.write_bytes(shard.read_bytes() + b"\0")
    elif what == "header longer than the file":
        shard.write_bytes(struct.pack("<Q", 1 << 20) + shard.read_bytes()[8:])
    elif what == "zero bytes":
        shard.write_bytes(b"")
    elif what == "lfs pointer":
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    elif what == "link to nothing":
        shard.unlink()
        (folder / INDEX).unlink()
        (folder / "model-00001-of-00002.safetensors").unlink()
        (folder / "weights.safetensors").symlink_to(folder / "gone")
    elif what == "no tensors":
        (folder / INDEX).unlink()
        for file in folder.glob("*.safetensors"):
            file.unlink()
        (folder / "model.safetensors").write_bytes(safetensors_bytes({}))
    elif what == "only pickled":
        (folder / "pytorch_model.bin").write_bytes(b"x")
    elif what == "verl's shards":
        (folder / "model_world_size_1_rank_0.pt").write_bytes(b"x")
    elif what == "two ggufs":
        for name in ("a", "b"):
            write_gguf(folder / f"{name}.gguf", {"blk.0.attn_q.weight": np.ones((2, 32), np.float32)})
    elif what == "other files":
        (folder / "notes.txt").write_text("x")
    elif what == "pickled file":
        (folder / "model.pth").write_bytes(b"x")
        return folder / "model.pth"
    elif what == "text file":
        (folder / "notes.txt").write_text("x")
        return folder / "notes.txt"
    elif what == "no such path":
        return folder / "nothing"
    elif what == "no such file":
        return "nothing/model.safetensors"
    elif what == "no name":
        return ""
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing shard", r"names 2 shards, of which 1 are missing: model-00002-of-00002.safetensors; download"),
        ("missing shard without index", r"lacks 1 parts of the model: model-00002-of-00002.safetensors; add"),
        ("index promises more", r"promises 1 tensors .* do not hold: d in model-00002.*download both"),
        ("index names the other shard", r"do not hold: a in model-00002"),
        ("index without map", r"index.json has no weight_map .*download it again"),
        ("index is no JSON", r"index.json is no JSON"),
        ("config is no JSON", r"config.json is no JSON"),
        ("config is a list", r"config.json holds a list where an object"),
        ("duplicate", r"tensor a lies in .*00001-of-00002.* and again in .*00002-of-00002.*leave one set"),
        ("garbage", r"model-00002-of-00002.safetensors \(\d+ bytes\) is no whole safetensors file.*copy or download"),
        ("cut off", r"model-00002.* is no whole safetensors file.*cut off"),
        ("too long", r"model-00002.* is no whole safetensors file"),
        ("header longer than the file", r"model-00002.* is no whole safetensors file"),
        ("zero bytes", r"model-00002.* is empty \(0 bytes\).*download it again"),
        ("lfs pointer", r"model-00002.* is a Git LFS pointer.*git lfs pull"),
        ("link to nothing", r"weights.safetensors is a link to nothing"),
        ("no tensors", r"no tensor in .*model.safetensors"),
        ("empty folder", r"no .safetensors and no .gguf in .*it is empty"),
        ("other files", r"no .safetensors and no .gguf in .*notes.txt"),
        ("only pickled", r"pickled weights only \(pytorch_model.bin\).*safe_serialization=True"),
        ("verl's shards", r"verl.model_merger merge"),
        ("two ggufs", r"holds 2 GGUF models: give one of a.gguf, b.gguf"),
        ("pickled file", r"model.pth is a pickled file.*safe_serialization=True"),
        ("text file", r"notes.txt is neither .safetensors nor .gguf"),
        ("no such path", r"no such file or folder: .*nothing"),
        ("no such file", r"no such file or folder: nothing/model.safetensors"),
        ("no name", r"the model's name is empty"),
    ],
)
def test_what_is_wrong_is_told_when_it_opens(tmp_path, what, message):
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        open_checkpoint(str(broken(tmp_path, what)))


def test_missing_shards_are_told_before_any_header_is_read(tmp_path):
    write_shards(tmp_path, tensors("a"), tensors("b"))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"garbage")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing: model-00002"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},  # shape and bytes disagree
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},  # a hole before it
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},  # beyond the end
        {"a": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        b"[1, 2]",
        b"\xff\xfe",
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(header, bytes(8)))
    with pytest.raises(CheckpointError, match=r"model\.safetensors .* is no whole safetensors file"):
        open_checkpoint(str(tmp_path))


def test_a_file_that_changes_after_it_was_opened_is_told(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(tensors("a"), file)
    opened = open_checkpoint(str(file))
    save_file(tensors("a", rows=8), file)
    with pytest.raises(CheckpointError, match=r"a in .* had shape \(4, 32\) and now has \(8, 32\)"):
        opened.read(opened.tensors[0])
    opened.close()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"cannot read a \(BF16\) in .*model.safetensors.*start again"):
        opened.read(opened.tensors[0])


# -------------------------------------------------------------------------------------------------------------- GGUF


def test_gguf_floats_come_as_stored_and_shapes_as_in_torch(tmp_path):
    f32, f16 = np.random.randn(3, 64).astype(np.float32), np.random.randn(2, 3, 32).astype(np.float16)
    bf16 = torch.randn(5, 32).bfloat16()
    raw = (bf16.view(torch.int16).numpy().view(np.uint8), gguf.GGMLQuantizationType.BF16)
    stored = {"blk.0.attn_q.weight": f32, "blk.0.ffn_up_exps.weight": f16, "blk.0.attn_k.weight": raw}
    path = write_gguf(tmp_path / "m.gguf", stored, block_count=2, nextn_predict_layers=1, embedding_length=32)
    with open_checkpoint(str(path)) as opened:
        assert opened.format == "gguf" and opened.note == "" and not opened.unreadable
        assert opened.config == {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32}
        assert [(i.name, i.shape, i.dtype) for i in opened.tensors] == [
            ("blk.0.attn_q.weight", (3, 64), "F32"),
            ("blk.0.ffn_up_exps.weight", (2, 3, 32), "F16"),
            ("blk.0.attn_k.weight", (5, 32), "BF16"),
        ]
    expected = [torch.from_numpy(f32), torch.from_numpy(f16), bf16]
    assert_same(read_all(path), dict(zip(stored, expected)))
    assert_same(read_all(tmp_path), dict(zip(stored, expected)))  # the folder that holds exactly one


QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "TQ2_0"]


@pytest.mark.parametrize("name", QUANTISED)
def test_gguf_types_are_dequantised_as_gguf_does(tmp_path, name, monkeypatch):
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Random codes under small float16 scales: any byte pattern is a valid block, but half floats must not be infinite.
    raw = np.random.default_rng(0).integers(0, 60, (6, 512 // block * size), dtype=np.uint8).reshape(2, 3, -1)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_down_exps.weight": (raw, kind)})
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind)).reshape(2, 3, 512)
    assert expected.isfinite().all() and expected.abs().max() > 0
    monkeypatch.setattr(gguf_file, "_ROWS_AT_ONCE", 1024)  # two rows, then the rest
    with open_checkpoint(str(path)) as opened:
        assert name in opened.note and "on top of that error" in opened.note
        (info,) = opened.tensors
        assert (info.shape, info.dtype) == ((2, 3, 512), name)
        assert opened.read(info).dtype == torch.float32 and torch.equal(opened.read(info), expected)


def test_a_type_gguf_cannot_dequantise_is_left_out_and_never_guessed(tmp_path):
    raw = np.zeros((4, 292), np.uint8)  # Q8_K is for llama.cpp's inner use only
    stored = {"blk.0.attn_q.weight": (raw, gguf.GGMLQuantizationType.Q8_K), "blk.0.attn_k.weight": np.ones((2, 32), np.float32)}
    opened = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", stored)))
    weights, left_out = linear_weights(opened)
    assert [w.info.name for w in weights] == ["blk.0.attn_k.weight"]
    assert "stored as Q8_K, which the installed gguf cannot dequantise" in left_out["blk.0.attn_q.weight"]
    with pytest.raises(CheckpointError, match=r"cannot read blk.0.attn_q.weight \(Q8_K\)"):
        opened.read(opened.tensors[0])


def split_gguf(folder, count=2):
    stored = {f"blk.{i}.attn_q.weight": np.full((2, 32), i, np.float32) for i in range(count)}
    for i, (name, array) in enumerate(stored.items()):
        write_gguf(folder / f"m-{i + 1:05d}-of-{count:05d}.gguf", {name: array}, split=(i, count, count), block_count=count)
    return stored


def test_a_split_gguf_is_one_model_whichever_part_is_named(tmp_path):
    expected = {name: torch.from_numpy(array) for name, array in split_gguf(tmp_path, 3).items()}
    for model in (tmp_path, tmp_path / "m-00001-of-00003.gguf", tmp_path / "m-00003-of-00003.gguf"):
        assert_same(read_all(model), expected)


def test_incomplete_or_mixed_splits_are_refused(tmp_path):
    split_gguf(tmp_path)
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"model of 2 parts with 2 tensors, but here are 1 parts with 1"):
        open_checkpoint(str(alone))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.weight lies in .*00001.* and again in .*00002"):
        open_checkpoint(str(first))
    second.unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 parts of the model: m-00002-of-00002.gguf"):
        open_checkpoint(str(first))


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path, kind):
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    if kind == "gguf":
        write_gguf(
            whole, {"blk.0.attn_q.weight": np.ones((2, 32), np.float32), "blk.0.attn_k.weight": np.ones((1, 24), np.float32)}
        )
    else:
        save_file(tensors("a", "b"), whole)
    content = whole.read_bytes()
    # gguf pads the end of the file to its alignment; bytes that no tensor has may be missing.
    needed = len(content) - (32 if kind == "gguf" else 0)
    for length in range(needed):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.(gguf|safetensors)"):
            open_checkpoint(str(cut))
    assert len(open_checkpoint(str(whole)).tensors) == 2


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_flipped_bits_give_a_clear_error_or_the_shape_that_is_promised(tmp_path, kind):
    whole, damaged = tmp_path / f"whole.{kind}", tmp_path / f"damaged.{kind}"
    if kind == "gguf":
        stored = {"blk.0.attn_q.weight": np.ones((2, 32), np.float32), "blk.0.attn_k.weight": np.ones((1, 32), np.float32)}
        write_gguf(whole, stored, split=(0, 1, 2), block_count=1, nextn_predict_layers=0)
    else:
        save_file(tensors("a", "b"), whole)
    content, generator, refused = whole.read_bytes(), random.Random(0), 0
    for _ in range(800):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 1, 4))):
            changed[generator.randrange(min(len(content), 600))] ^= 1 << generator.randrange(8)
        damaged.write_bytes(changed)
        try:
            with open_checkpoint(str(damaged)) as opened:
                for info in opened.tensors:
                    assert tuple(opened.read(info).shape) == info.shape
        except CheckpointError as error:
            refused += 1
            assert len(str(error)) < 2000
    assert refused > 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b"GGML" + b[4:], "does not begin with GGUF"),
        (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "has version 1"),
        (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "is big-endian"),
        (lambda b: b[:8] + struct.pack("<Q", 1 << 60) + b[16:], "ends within its header|dimensions|of type|no text"),
        (lambda b: b[:16] + struct.pack("<Q", 1 << 60) + b[24:], "ends within its header|unknown type"),
        (lambda b: b"", "is empty"),
        (lambda b: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_what_is_no_gguf_is_refused(tmp_path, change, message):
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": np.ones((2, 32), np.float32)})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(path))


def test_a_gguf_that_shrinks_after_it_was_opened_is_told_not_read(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": np.ones((64, 128), np.float32)})
    opened = open_checkpoint(str(path))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="became shorter since it was opened"):
        opened.read(opened.tensors[0])


def test_without_the_package_gguf_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": np.ones((2, 32), np.float32)})
    for module in [m for m in sys.modules if m == "gguf" or m.startswith("gguf.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"m\.gguf needs the package gguf: `pip install gguf`"):
        open_checkpoint(str(path))


def test_the_embedded_gguf_and_its_checkpoint_hold_the_same_weights():
    from mxfp4_rl.tasks.embedded_model import ensure_embedded_model, find_embedded_gguf

    with open_checkpoint(str(find_embedded_gguf())) as packed, open_checkpoint(str(ensure_embedded_model())) as plain:
        assert packed.note == "weights are dequantised from Q4_1: what is measured comes on top of that error"
        theirs, ours = linear_weights(packed)[0], {w.name: w for w in linear_weights(plain)[0]}
        assert len(theirs) == len(ours) == 210
        heads = {"q_proj": packed.config["num_attention_heads"], "k_proj": packed.config["num_key_value_heads"]}
        for weight in theirs:
            other = ours[weight.name]
            assert (weight.kind, weight.layer, weight.axis) == (other.kind, other.layer, other.axis)
            a, b = packed.read(weight.info).bfloat16(), plain.read(other.info)
            if weight.kind in heads:  # rows permuted for llama.cpp's rotary layout: two interleaved halves a head
                assert not torch.equal(a, b)
                a = a.unflatten(0, (heads[weight.kind], -1, 2)).transpose(1, 2).flatten(0, 2)
            assert torch.equal(a, b), weight.name


# --------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the download: set .result to a folder or an exception; .calls records what was asked for."""
    import huggingface_hub

    class Hub:
        result, calls = None, []

        def __call__(self, *args, **kwargs):
            self.calls.append((args, kwargs))
            if isinstance(self.result, Exception):
                raise self.result
            return str(self.result)

    stand_in = Hub()
    stand_in.calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    return stand_in


def http_error(kind):
    import httpx

    return kind("said the hub", response=httpx.Response(404, request=httpx.Request("GET", "https://hub/x")))


def test_a_hub_name_downloads_config_and_safetensors_only(tmp_path, hub):
    from huggingface_hub.utils import filter_repo_objects

    write_shards(tmp_path, {LAYER: torch.ones(2, 32)}, config={"model_type": "qwen2"})
    hub.result = tmp_path
    with open_checkpoint("org/some.model-1", revision="v2") as opened:
        assert opened.source == "org/some.model-1" and opened.config == {"model_type": "qwen2"}
        assert torch.equal(opened.read(opened.tensors[0]), torch.ones(2, 32))
    ((args, kwargs),) = hub.calls
    assert args == ("org/some.model-1",) and kwargs["revision"] == "v2"
    offered = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    others = [
        "README.md",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/model.safetensors",
        "tokenizer.json",
        "m.gguf",
    ]
    patterns = {key: kwargs[key] for key in ("allow_patterns", "ignore_patterns")}
    assert sorted(filter_repo_objects(offered + others, **patterns)) == sorted(offered)


def test_a_local_folder_goes_before_the_hub(tmp_path, hub, monkeypatch):
    write_shards(tmp_path / "org" / "name", tensors(LAYER))
    monkeypatch.chdir(tmp_path)
    assert len(open_checkpoint("org/name").tensors) == 1 and not hub.calls
    with pytest.raises(CheckpointError, match=r"revision 'main' is for models on the hub .*leave it out"):
        open_checkpoint("org/name", revision="main")


@pytest.mark.parametrize("source", ["~nobody-of-this-name/model", "foo/bar/baz", "./folder", "-x"])
def test_what_cannot_be_a_hub_name_is_never_looked_up(source, hub):
    with pytest.raises(CheckpointError, match=r"give the full path|no such file or folder"):
        open_checkpoint(source)
    assert not hub.calls


def test_what_the_hub_answers_is_told_with_the_fix(tmp_path, hub):
    from huggingface_hub import errors

    hub.result = tmp_path
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"org/name has no .safetensors on the hub"):
        open_checkpoint("org/name")
    for error, message in [
        (errors.LocalEntryNotFoundError("offline"), r"org/name is neither a local path nor reachable on the hub \(offline\)"),
        (http_error(errors.RepositoryNotFoundError), r"neither a local path nor reachable on the hub \(said the hub"),
        (http_error(errors.GatedRepoError), r"org/name is gated: accept its terms"),
        (http_error(errors.RevisionNotFoundError), r"org/name has no revision None on the hub"),
        (http_error(errors.HfHubHTTPError), r"cannot download org/name from the hub: HfHubHTTPError: said the hub"),
        (OSError(28, "No space left on device"), r"cannot download org/name from the hub: OSError: .*No space left"),
    ]:
        hub.result = error
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint("org/name")


def test_a_cached_snapshot_works_offline_and_nothing_cached_is_told(tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    write_shards(snapshot, tensors("model.layers.0.mlp.up_proj.weight"), tensors(LAYER), config={"model_type": "llama"})
    blob = repository / "blobs" / "b"
    blob.parent.mkdir()
    (snapshot / "model-00002-of-00002.safetensors").rename(blob)  # the cache's snapshots are links to blobs
    (snapshot / "model-00002-of-00002.safetensors").symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    partial = tmp_path / "hub" / "models--org--partial" / "snapshots" / ("b" * 40)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{}")
    (partial.parents[1] / "refs").mkdir()
    (partial.parents[1] / "refs" / "main").write_text("b" * 40)
    code = """if True:
        from mxfp4_rl.analysis.checkpoint import CheckpointError, open_checkpoint
        for name in ("org/name", "org/partial", "org/absent"):
            try:
                with open_checkpoint(name) as opened:
                    print(len(opened.tensors), [tuple(opened.read(info).shape) for info in opened.tensors], opened.config)
            except CheckpointError as error:
                print(error)
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {key: value for key, value in environment.items() if key not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    whole, missing, absent = result.stdout.splitlines()
    assert whole == "2 [(4, 32), (4, 32)] {'model_type': 'llama'}"
    assert "org/partial" in missing and "safetensors" in missing
    assert "org/absent is neither a local path nor reachable on the hub" in absent and "HF_HUB_OFFLINE" in absent


# ---------------------------------------------------------------------------------------------- which weights are Linear

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
GQA = SIZES | dict(num_key_value_heads=1, head_dim=16)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
DENSE = {
    "LlamaConfig": GQA,
    "Qwen2Config": GQA,
    "Qwen3Config": GQA,
    "MistralConfig": GQA,
    "Phi3Config": GQA | dict(pad_token_id=0),
    "GemmaConfig": GQA,
    "Gemma2Config": GQA,
    "Gemma3TextConfig": GQA,
    "Qwen3_5TextConfig": GQA,
    "CohereConfig": GQA | dict(use_qk_norm=True),
    "GPTNeoXConfig": SIZES,
    "GPTBigCodeConfig": dict(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=40),
    "OPTConfig": dict(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    ),
    "MambaConfig": dict(vocab_size=96, hidden_size=32, num_hidden_layers=2),
}


def save_tiny(config_class, folder, **sizes):
    config = getattr(transformers, config_class)(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("config_class", DENSE)
def test_a_dense_model_gives_exactly_the_layers_that_training_converts(tmp_path, config_class):
    model = save_tiny(config_class, tmp_path, **DENSE[config_class])
    with open_checkpoint(str(tmp_path)) as opened:
        weights, left_out = linear_weights(opened)
        expected = plan(model, ModelRecipe(weight=QuantRecipe())).converted
        assert {w.name for w in weights} == set(expected) and len(weights) == len(expected)
        assert len(weights) + len(left_out) == len(opened.tensors)
        modules = dict(model.named_modules())
        for weight in weights:
            assert weight.axis == -1 and weight.info.shape[weight.axis] == modules[weight.name].in_features
            assert weight.layer in (0, 1, None) and (weight.layer is None) == (
                ".layers." not in weight.name and ".h." not in weight.name
            )
            assert torch.equal(opened.read(weight.info), modules[weight.name].weight)


def test_falcons_own_linear_class_counts_as_linear(tmp_path):
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = save_tiny("FalconConfig", tmp_path, **sizes)
    weights, _ = linear_weights(open_checkpoint(str(tmp_path)))
    output = model.get_output_embeddings()
    assert {w.name for w in weights} == {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output}


@pytest.mark.parametrize("with_config", [True, False])
def test_gpt2_contracts_the_first_axis(tmp_path, with_config):
    from transformers.pytorch_utils import Conv1D

    model = save_tiny("GPT2Config", tmp_path, vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=40)
    if not with_config:
        (tmp_path / "config.json").unlink()
    weights, left_out = linear_weights(open_checkpoint(str(tmp_path)))
    assert {w.name for w in weights} == {n for n, m in model.named_modules() if isinstance(m, Conv1D)}
    assert {w.axis for w in weights} == {0} and {w.layer for w in weights} == {0, 1}
    assert Counter(w.kind for w in weights) == {"c_attn": 2, "attn.c_proj": 2, "c_fc": 2, "mlp.c_proj": 2}
    assert left_out["transformer.wte.weight"] == left_out["transformer.wpe.weight"] == "embedding"


def test_gpt_bigcode_has_gpt2s_names_and_contracts_the_last(tmp_path):
    save_tiny("GPTBigCodeConfig", tmp_path, **DENSE["GPTBigCodeConfig"])
    (tmp_path / "config.json").unlink()
    weights, _ = linear_weights(open_checkpoint(str(tmp_path)))
    assert {w.axis for w in weights} == {-1} and len(weights) == 8


MOE = {
    "Qwen3MoeConfig": GQA | EXPERTS | dict(num_experts=4),
    "MixtralConfig": GQA | dict(num_local_experts=4),
    "DeepseekV3Config": SIZES | MLA | EXPERTS | dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1),
    "Qwen2MoeConfig": GQA | EXPERTS | dict(num_experts=4, shared_expert_intermediate_size=48),
    "GptOssConfig": GQA | dict(num_local_experts=4),
    "Llama4TextConfig": GQA | dict(num_local_experts=4, intermediate_size_mlp=64, interleave_moe_layer_step=1),
    "GraniteMoeConfig": GQA | dict(num_local_experts=4),
}


@pytest.mark.parametrize("config_class", MOE)
def test_experts_are_found_saved_one_by_one_or_fused_and_contract_the_right_axis(tmp_path, config_class):
    model = save_tiny(config_class, tmp_path, **MOE[config_class])
    config = model.config
    expert_size = getattr(config, "moe_intermediate_size", config.intermediate_size)
    fused = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for opened in (open_checkpoint(str(tmp_path)), listed(fused, config.to_dict())):
        weights, left_out = linear_weights(opened)
        experts = [w for w in weights if w.kind.startswith("experts.") or w.kind in ("input_linear", "output_linear")]
        count = {"down": 0, "up": 0}
        for weight in experts:
            which = "down" if weight.kind.endswith(("down_proj", "output_linear")) else "up"
            inputs = expert_size if which == "down" else config.hidden_size
            assert weight.info.shape[weight.axis] == inputs, weight
            count[which] += weight.info.elements
        layers = 1 if config_class == "DeepseekV3Config" else 2
        assert count["down"] == layers * 4 * 32 * expert_size and count["up"] == 2 * count["down"]
        # Everything else that is Linear, except for routers.
        others = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n and "router" not in n}
        others -= {n for n in others if n.rsplit(".", 1)[-1] in ("gate", "shared_expert_gate")}
        assert {w.name for w in weights} - {w.name for w in experts} == others
        assert "router" in left_out.values()


@pytest.mark.parametrize(
    ("gate_up", "down", "config", "axis"),
    [
        ((4, 96, 32), (4, 32, 48), {}, -1),
        ((4, 32, 96), (4, 48, 32), {}, -2),
        ((4, 32, 96), (4, 48, 32), {"model_type": "qwen3_vl_moe"}, -2),  # as on the hub; transformers' own order is the other
        ((4, 96, 32), (4, 32, 48), {"model_type": "gpt_oss"}, -1),  # what the file holds, not what the type suggests
        ((4, 64, 32), (4, 32, 32), {}, -1),  # square down_proj, as gpt-oss's
        ((4, 32, 64), (4, 32, 32), {}, -2),
        ((4, 32, 32), (4, 32, 16), {}, -1),  # square gate_up_proj
        ((4, 32, 32), (4, 16, 32), {}, -2),
    ],
)
def test_shapes_tell_how_fused_experts_lie(gate_up, down, config, axis):
    names = {"model.layers.0.mlp.experts.gate_up_proj": gate_up, "model.layers.0.mlp.experts.down_proj": down}
    weights, _ = linear_weights(listed(names, config))
    assert [(w.kind, w.axis) for w in weights] == [("experts.gate_up_proj", axis), ("experts.down_proj", axis)]


def test_fused_experts_of_unknown_orientation_are_left_out_not_guessed():
    names = {
        LAYER: (32, 32),
        "model.layers.0.mlp.experts.down_proj": (4, 32, 32),
        "model.layers.0.mlp.experts.up_proj": (4, 48, 32),
    }
    weights, left_out = linear_weights(listed(names))
    assert [w.name for w in weights] == [LAYER.removesuffix(".weight")]
    assert set(left_out.values()) == {"experts in a fused tensor whose orientation neither shapes nor model_type tell"}
    weights, left_out = linear_weights(listed(names, {"hidden_size": 32}))
    assert [(w.kind, w.axis) for w in weights[1:]] == [("experts.up_proj", -1)] and len(left_out) == 1
    # 2I rows that are not twice down_proj's columns: neither layout.
    names = {LAYER: (32, 32), "l.mlp.experts.gate_up_proj": (4, 90, 32), "l.mlp.experts.down_proj": (4, 32, 48)}
    assert len(linear_weights(listed(names))[1]) == 2


def test_kinds_and_layers_of_names_out_of_the_ordinary():
    names = {
        "model.layers.3.block_sparse_moe.experts.7.w1.weight": ("experts.gate_proj", 3),
        "model.layers.3.block_sparse_moe.experts.7.w2.weight": ("experts.down_proj", 3),
        "model.layers.3.block_sparse_moe.experts.7.w3.weight": ("experts.up_proj", 3),
        "model.layers.11.mlp.shared_experts.down_proj.weight": ("shared_experts.down_proj", 11),
        "model.layers.11.mlp.shared_expert.down_proj.weight": ("shared_experts.down_proj", 11),
        "model.layers.4.self_attn.kv_a_proj_with_mqa.weight": ("kv_a_proj_with_mqa", 4),
        "model.layers.4.self_attn.q_proj.base_layer.weight": ("q_proj", 4),
        "gpt_neox.layers.5.attention.dense.weight": ("attention.dense", 5),
        "model.layers.6.feed_forward.w2.weight": ("w2", 6),
        "visual.blocks.2.attn.qkv.weight": ("qkv", 2),
        "visual.merger.mlp.0.weight": ("mlp.0", None),
        "multi_modal_projector.linear_1.weight": ("linear_1", None),
    }
    weights, left_out = linear_weights(listed(dict.fromkeys(names, (32, 64))))
    assert {w.info.name: (w.kind, w.layer) for w in weights} == names and not left_out


def test_what_is_no_linear_weight_is_left_out_with_the_reason():
    names = {
        LAYER: ((32, 32), None),
        "model.embed_tokens.weight": ((96, 32), "embedding"),
        "model.embed_tokens_per_layer.weight": ((96, 32), "embedding"),
        "shared.weight": ((96, 32), "embedding"),
        "lm_head.weight": ((96, 32), "output head"),
        "output.weight": ((90, 32), "output head"),
        "embed_out.weight": ((90, 32), "output head"),
        "model.layers.0.mlp.gate.weight": ((4, 32), "router"),
        "model.layers.0.mlp.shared_expert_gate.weight": ((1, 32), "router"),
        "model.layers.0.mlp.router.weight": ((4, 32), "router"),
        "model.layers.0.block_sparse_moe.router.layer.weight": ((4, 32), "router"),
        "model.layers.0.mlp.experts.gate_up_proj_bias": ((4, 64), "bias"),
        "model.layers.0.self_attn.q_proj.bias": ((32,), "bias"),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ((32, 8), "bias"),
        "model.layers.0.self_attn.q_proj.lora_A.weight": ((8, 32), "LoRA adapter"),
        "model.layers.0.input_layernorm.weight": ((32,), "norm"),
        "model.layers.0.self_attn.q_norm.weight": ((4, 8), "norm"),
        "transformer.h.0.ln_1.weight": ((32,), "norm"),
        "model.layers.0.self_attn.sinks": ((4,), "one-dimensional (scale, bias or other vector)"),
        "model.layers.0.linear_attn.conv1d.weight": ((32, 1, 4), "convolution"),
        "visual.patch_embed.proj.weight": ((32, 3, 2, 14, 14), "5-dimensional, not experts (convolution or table)"),
        "model.layers.0.mixer.A_log": ((32, 16), "not a Linear layer's weight (a parameter or buffer of its own)"),
        "model.layers.0.mlp.down_proj.weight": ((0, 32), "empty"),
        "model.layers.1.mlp.down_proj.weight": (
            (32, 32),
            "beyond the model's 1 layers (multi-token prediction, which training does not load)",
        ),
        "model.layers.1.shared_head.head.weight": ((90, 32), "output head"),
        "mtp.fc.weight": ((32, 64), "multi-token prediction, which training does not load"),
    }
    checkpoint = listed({n: shape for n, (shape, _) in names.items()}, {"vocab_size": 96, "num_hidden_layers": 1})
    weights, left_out = linear_weights(checkpoint)
    assert [w.info.name for w in weights] == [LAYER]
    assert left_out == {name: reason for name, (_, reason) in names.items() if reason}


def test_a_models_text_part_is_what_its_configuration_counts():
    names = {f"model.language_model.layers.{i}.mlp.up_proj.weight": (64, 32) for i in range(3)}
    names |= {f"model.visual.blocks.{i}.mlp.up_proj.weight": (64, 32) for i in range(5)}
    weights, left_out = linear_weights(listed(names, {"text_config": {"num_hidden_layers": 2}}))
    assert len(weights) == 2 + 5 and list(left_out) == ["model.language_model.layers.2.mlp.up_proj.weight"]


def qwen_names(layers, experts=0):
    names = {"model.embed_tokens.weight": (96, 32), "model.norm.weight": (32,), "lm_head.weight": (96, 32)}
    for layer in range(layers):
        start = f"model.layers.{layer}"
        names |= {f"{start}.self_attn.{p}_proj.weight": (32, 32) for p in "qkvo"}
        names |= {f"{start}.{norm}.weight": (32,) for norm in ("input_layernorm", "post_attention_layernorm")}
        owners = [f"{start}.mlp.experts.{e}" for e in range(experts)] or [f"{start}.mlp"]
        names |= {f"{owner}.{p}_proj.weight": (32, 32) for owner in owners for p in ("gate", "up", "down")}
        if experts:
            names[f"{start}.mlp.gate.weight"] = (experts, 32)
    return names


def test_the_papers_tensor_counts():
    dense, _ = linear_weights(listed(qwen_names(36)))
    assert len(dense) == 252  # Qwen2.5-3B
    experts, left_out = linear_weights(listed(qwen_names(48, experts=128)))
    assert len(experts) == 18_624  # Qwen3-30B-A3B
    assert Counter(left_out.values()) == {"norm": 97, "router": 48, "embedding": 1, "output head": 1}


# ------------------------------------------------------------------------------------------------ already quantised


def quantised_checkpoint(kind):
    base = "model.layers.0.self_attn.q_proj"
    stored = {
        "FP8": {f"{base}.weight": ("F8_E4M3", (32, 32)), f"{base}.weight_scale_inv": ("F32", (1, 1))},
        "GPTQ": {f"{base}.qweight": ("I32", (4, 32)), f"{base}.qzeros": ("I32", (1, 4)), f"{base}.scales": ("F16", (1, 32))},
        "AWQ": {f"{base}.qweight": ("I32", (32, 4)), f"{base}.scales": ("F16", (1, 32))},
        "bitsandbytes": {f"{base}.weight": ("U8", (512, 1)), f"{base}.weight.absmax": ("F32", (16,))},
        "compressed-tensors": {f"{base}.weight_packed": ("I32", (32, 4)), f"{base}.weight_scale": ("BF16", (32, 1))},
        "MXFP4": {
            "model.layers.0.mlp.experts.gate_up_proj_blocks": ("U8", (4, 64, 1, 16)),
            "model.layers.0.mlp.experts.gate_up_proj_scales": ("U8", (4, 64, 1)),
        },
    }[kind]
    infos = [TensorInfo(name, shape, dtype, Path("x")) for name, (dtype, shape) in stored.items()]
    method = {"GPTQ": "gptq", "AWQ": "awq", "bitsandbytes": "bitsandbytes"}.get(kind)
    return Checkpoint("some/model", [], infos, {"quantization_config": {"quant_method": method}} if method else {}, None)


@pytest.mark.parametrize("kind", ["FP8", "GPTQ", "AWQ", "bitsandbytes", "compressed-tensors", "MXFP4"])
def test_already_quantised_weights_are_named_and_never_measured(kind):
    checkpoint = quantised_checkpoint(kind)
    with pytest.raises(CheckpointError, match=r"some/model holds no Linear weight to measure"):
        linear_weights(checkpoint)
    checkpoint.tensors.append(TensorInfo(LAYER.replace("q_proj", "o_proj"), (32, 32), "BF16", Path("x")))
    weights, left_out = linear_weights(checkpoint)
    assert [w.kind for w in weights] == ["o_proj"]
    reasons = {left_out[info.name] for info in checkpoint.tensors[:1]}
    assert reasons == {f"already quantised ({kind}): give the BF16 checkpoint"}
    assert all(reason.startswith("already quantised") for reason in left_out.values())


def test_an_fp8_file_opens_and_says_what_it_is(tmp_path):
    weight = torch.randn(32, 32).to(torch.float8_e4m3fn)
    save_file({LAYER: weight, LAYER + "_scale_inv": torch.ones(1, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2 already quantised \(FP8"):
        linear_weights(open_checkpoint(str(tmp_path)))


def test_a_lora_adapter_alone_is_told(tmp_path):
    save_file(tensors("base_model.model.layers.0.q_proj.lora_A.weight"), tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no Linear weight to measure.*1 LoRA adapter"):
        linear_weights(open_checkpoint(str(tmp_path)))


# --------------------------------------------------------------------------------------------------- llama.cpp's names


def gguf_weights(names, **config):
    weights, left_out = linear_weights(listed(names, config, format="gguf", dtype="F32"))
    return {w.info.name: w for w in weights}, left_out


def test_gguf_names_become_llamas():
    expected = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_qkv": "self_attn.qkv_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    }
    weights, _ = gguf_weights({f"blk.12.{part}.weight": (64, 32) for part in expected})
    assert {n: w.name for n, w in weights.items()} == {
        f"blk.12.{p}.weight": f"model.layers.12.{e}" for p, e in expected.items()
    }
    assert {(w.layer, w.axis) for w in weights.values()} == {(12, -1)}
    assert weights["blk.12.ffn_gate_shexp.weight"].kind == "shared_experts.gate_proj"


def test_gguf_experts_are_expert_output_input(tmp_path):
    up = np.random.randn(4, 16, 32).astype(np.float32)  # as llama.cpp stacks them: experts, outputs, inputs
    stored = {
        "blk.0.ffn_up_exps.weight": up,
        "blk.0.ffn_down_exps.weight": np.ones((4, 32, 16), np.float32),
        "blk.0.ffn_gate_inp.weight": np.ones((4, 32), np.float32),
        "token_embd.weight": np.ones((96, 32), np.float32),
        "output.weight": np.ones((96, 32), np.float32),
    }
    with open_checkpoint(str(write_gguf(tmp_path / "m.gguf", stored))) as opened:
        (first, second), left_out = linear_weights(opened)
        assert (first.name, first.kind, first.axis) == ("model.layers.0.mlp.experts.up_proj", "experts.up_proj", -1)
        assert torch.equal(opened.read(first.info), torch.from_numpy(up)) and second.kind == "experts.down_proj"
    assert left_out == {"blk.0.ffn_gate_inp.weight": "router", "token_embd.weight": "embedding", "output.weight": "output head"}


def test_gguf_integers_are_no_weights(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": np.ones((2, 32), np.int8)})
    with pytest.raises(CheckpointError, match=r"1 not floating point \(I8\)"):
        linear_weights(open_checkpoint(str(path)))


def test_gguf_names_with_a_twist():
    weights, left_out = gguf_weights(
        {
            "blk.0.ffn_up.weight": (128, 32),  # Phi-3: gate and up in one
            "blk.0.ffn_down.weight": (32, 64),
            "blk.1.ffn_up.weight": (128, 32),  # no gate at all (GPT-2, Falcon)
            "blk.1.ffn_down.weight": (32, 128),
            "blk.2.ffn_gate.3.weight": (64, 32),  # Mixtral's first GGUFs
            "blk.3.attn_k_b.weight": (4, 16, 8),  # DeepSeek: kv_b_proj in halves, k_b's transposed a head
            "blk.3.attn_v_b.weight": (4, 8, 16),
            "blk.4.attn_kv_b.weight": (64, 16),
            "blk.4.attn_k_b.weight": (4, 16, 8),
            "blk.4.ssm_conv1d.weight": (64, 4),
            "blk.4.attn_norm.weight": (32,),
            "blk.4.attn_q.bias": (32,),
            "blk.5.nextn.eh_proj.weight": (32, 64),
            "blk.5.attn_q.weight": (32, 32),
            "blk.4.something_new.weight": (32, 32),
            "v.blk.0.attn_q.weight": (32, 32),
            "rope_freqs.weight": (16,),
        },
        num_hidden_layers=5,
    )
    assert {n: (w.kind, w.axis) for n, w in weights.items()} == {
        "blk.0.ffn_up.weight": ("gate_up_proj", -1),
        "blk.0.ffn_down.weight": ("down_proj", -1),
        "blk.1.ffn_up.weight": ("up_proj", -1),
        "blk.1.ffn_down.weight": ("down_proj", -1),
        "blk.2.ffn_gate.3.weight": ("experts.gate_proj", -1),
        "blk.3.attn_k_b.weight": ("k_b_proj", -2),
        "blk.3.attn_v_b.weight": ("v_b_proj", -1),
        "blk.4.attn_kv_b.weight": ("kv_b_proj", -1),
    }
    assert weights["blk.2.ffn_gate.3.weight"].name == "model.layers.2.mlp.experts.3.gate_proj"
    beyond, unknown = "beyond the model's 5 layers", "not a projection of a decoder layer"
    reasons = {
        "blk.4.attn_k_b.weight": "a copy of a part of kv_b_proj",
        "blk.4.ssm_conv1d.weight": "convolution",
        "blk.4.attn_norm.weight": "norm",
        "blk.4.attn_q.bias": "bias",
        "blk.5.nextn.eh_proj.weight": beyond,
        "blk.5.attn_q.weight": beyond,
        "blk.4.something_new.weight": unknown,
        "v.blk.0.attn_q.weight": unknown,
        "rope_freqs.weight": "one-dimensional",
    }
    assert left_out.keys() == reasons.keys()
    assert all(re.match(re.escape(reason), left_out[name]) for name, reason in reasons.items())


def test_every_name_gguf_knows_is_classified_without_a_guess():
    """A layer tensor of gguf's own list is a projection, or is left out for a reason; none raises."""
    names = {name.format(bid=0) + ".weight": (32, 32) for name in gguf.constants.TENSOR_NAMES.values()}
    weights, left_out = gguf_weights(names)
    assert weights.keys() | left_out.keys() == names.keys() and not weights.keys() & left_out.keys()
    assert all(name.startswith("blk.0.") for name in weights)
    for name in names:
        if re.search(r"norm|embd|gate_inp|conv|router|lerp|bias", name):
            assert name in left_out or name.startswith("blk.0.shortconv"), name


def test_float64_weights_are_weights(tmp_path):
    write_shards(tmp_path, {"model.layers.0.mlp.up_proj.weight": torch.randn(4, 64, dtype=torch.float64)})
    with open_checkpoint(str(tmp_path)) as checkpoint:
        weights, left_out = linear_weights(checkpoint)
        assert [w.kind for w in weights] == ["up_proj"] and not left_out
        assert checkpoint.read(weights[0].info).dtype == torch.float64
