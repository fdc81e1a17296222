"""GGUF as a source: the same tensors as transformers' own loader, one at a time; damaged files are named."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from transformers import AutoModelForCausalLM

from longfit.errors import ModelError
from longfit.model import gguf
from longfit.model.load import load, load_report


def test_magic_bytes_decide(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "b.gguf").write_bytes(b"GG")
    assert gguf.is_gguf(tmp_path / "a.bin")
    assert not gguf.is_gguf(tmp_path / "b.gguf")
    assert not gguf.is_gguf(tmp_path)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.F32, GGMLQuantizationType.F16])
def test_a_lazy_tensor_unpacks_in_slices_what_gguf_unpacks_at_once(tmp_path: Path, kind, monkeypatch) -> None:
    values = np.random.default_rng(0).standard_normal((37, 64), dtype=np.float32)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor

    reader = GGUFReader(tmp_path / "x.gguf")
    expected = torch.tensor(dequantize(reader.tensors[0].data, kind).astype(np.float32))
    lazy = gguf.LazyTensor(reader.tensors[0], TensorProcessor(config={}))
    gone = weakref.ref(reader)
    del reader
    assert gone() is None  # the vocabulary must not stay in memory with the tensor
    monkeypatch.setattr(gguf, "SLICE_ELEMENTS", 5 * 64)
    assert torch.equal(lazy[...], expected)
    lazy[...].zero_()  # a copy, never the file


@pytest.mark.model
def test_the_demo_model_equals_transformers_own_loader(demo_gguf: Path) -> None:
    ours, tokenizer = load(demo_gguf, quant="none", dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name, dtype=torch.bfloat16)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name
    assert ours.config.max_position_embeddings == 8192
    assert tokenizer.eos_token_id is not None
    assert load_report(ours).half_bytes == load_report(ours).total_bytes


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(8))
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        load(path)
