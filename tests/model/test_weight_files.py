"""The headers of weights against the configuration, before anything is built: damage and nonsense cost nothing."""

import json
import shutil
import struct
import time
from pathlib import Path

import pytest
from tests.model_folders import save_model

from longfit.errors import ModelError
from longfit.model.load import load
from longfit.model.weight_files import read_headers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("weight_files") / "base")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1,000,000,000"),
        ({"num_hidden_layers": 9_999}, "says 9,999 layers, the weights have 2"),
        ({"num_attention_heads": 10**9}, "num_attention_heads = 1,000,000,000"),
        ({"vocab_size": 10**10}, "vocab_size = 10,000,000,000"),
        ({"vocab_size": 10**8}, r"shape \[258, 64\], config.json describes \[100000000, 64\]"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": -64}, "model"),
        ({"hidden_act": "unheard of"}, "unheard of"),
        ({"rope_parameters": {"rope_type": "unheard of"}}, "unheard of"),
        ({"model_type": "unheard of"}, "unheard of"),
        ({"model_type": "bert"}, "bert"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
    ],
)
def test_a_configuration_of_another_model_is_refused_at_once(folder: Path, values: dict, told: str) -> None:
    change_config(folder, **values)
    began = time.monotonic()
    with pytest.raises(ModelError, match=told) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("length", [0, 7, 8, 100, 3000, -1])
def test_weights_cut_short_are_named(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"model\.safetensors: "):
        load(folder)


def test_bytes_too_many_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ModelError, match=r"model\.safetensors: has .* its header describes"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_offsets", [8, 16]),
        ("data_offsets", [0, 2**63]),
        ("data_offsets", ["a", "b"]),
        ("data_offsets", [0, 16, 16]),
        ("shape", [2**62, 4]),
        ("shape", [-1, -2]),
        ("dtype", "F7"),
        ("dtype", None),
    ],
)
def test_a_tensor_that_lies_elsewhere_is_refused(folder: Path, key: str, value: object) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"][key] = value
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    with pytest.raises(ModelError, match=r"model\.safetensors: "):
        read_headers(folder)


def test_a_shard_that_is_missing_elsewhere_or_misnamed_is_refused(folder: Path) -> None:
    whole = folder / "model.safetensors"
    whole.rename(folder / "part.safetensors")
    names = list(read_headers_of(folder / "part.safetensors"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}))
    load(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*names, "one.more"], "part.safetensors")}))
    with pytest.raises(ModelError, match=r"first 'one\.more'"):
        load(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../part.safetensors")}))
    with pytest.raises(ModelError, match="not a file name"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"gone\.safetensors: is named by"):
        load(folder)
    index.write_text("[" * 100_000)
    with pytest.raises(ModelError, match="nested too deeply"):
        load(folder)


def read_headers_of(path: Path) -> dict[str, object]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return {name: entry for name, entry in json.loads(raw[8 : 8 + length]).items() if name != "__metadata__"}
