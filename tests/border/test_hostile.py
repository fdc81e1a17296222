"""Files made to hurt: nothing in them is executed, nothing outside their folder is read or written, none hangs."""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.model_folders import save_model

import longfit
from longfit.cli.app import main
from longfit.errors import LongfitError, ModelError
from longfit.model.save import load_adapter, save_adapter


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", num_hidden_layers=1)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def code_of_its_own(model: Path, flag: Path) -> None:
    (model / "evil.py").write_text(f"from pathlib import Path\nPath({str(flag)!r}).touch()\n")
    change(
        model / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    )


def tokenizer_of_its_own(model: Path, flag: Path) -> None:
    (model / "evil.py").write_text(f"from pathlib import Path\nPath({str(flag)!r}).touch()\n")
    change(
        model / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}
    )  # fmt: skip
    (model / "tokenizer.json").unlink()


def pickled_weights(model: Path, flag: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Touches(flag)))


def weights_by_another_name(model: Path, flag: Path) -> None:
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Touches(flag)))
    change(model / "config.json", transformers_weights="adapter_model.bin")


def adapter_inside(model: Path, flag: Path) -> None:
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Touches(flag)))
    (model / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "elsewhere", "target_modules": ["q_proj"]})
    )


def shard_elsewhere(model: Path, flag: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "elsewhere.safetensors")
    names = {"model.norm.weight": "../elsewhere.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("hurt", "said"),
    [
        (code_of_its_own, "custom code"),
        (tokenizer_of_its_own, "tokenizer"),
        (pickled_weights, r"model: has no model\.safetensors, .* reads no pickled weights"),
        (weights_by_another_name, "transformers_weights"),
        (adapter_inside, r"adapter_config\.json beside its weights"),
        (shard_elsewhere, "is not a file name"),
    ],
)
def test_a_model_folder_executes_nothing_and_names_no_other_place(
    model: Path, tmp_path: Path, hurt: Callable[[Path, Path], None], said: str
) -> None:
    hurt(model, tmp_path / "flag")
    with pytest.raises(ModelError, match=said):
        longfit.load(model, quant="none", dtype=torch.float32)
    assert not (tmp_path / "flag").exists()


def test_files_that_a_tokenizers_settings_name_are_not_opened(model: Path) -> None:
    elsewhere = ("vocab_file", "tokenizer_file", "special_tokens_map_file", "added_tokens_file", "chat_template_file")
    change(model / "tokenizer_config.json", **dict.fromkeys(elsewhere, "/dev/zero"))
    _, tokenizer = longfit.load(model, quant="none", dtype=torch.float32)
    assert len(tokenizer) == 258


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_an_adapters_expressions_are_not_matched_for_ever(model: Path, tmp_path: Path, key: str) -> None:
    base, tokenizer = longfit.load(model, quant="none", dtype=torch.float32)
    folder = save_adapter(longfit.add_adapters(base, rank=2), tokenizer, tmp_path / "adapter")
    endless = r"([a-z0-9_.]+)+\s"  # 2^n tries for a name of n characters
    change(folder / "adapter_config.json", **{key: endless if key == "target_modules" else {endless: 2}})
    with pytest.raises(ModelError, match=f"{key} has the expression .* repeats a repetition"):
        load_adapter(longfit.load(model, quant="none", dtype=torch.float32)[0], folder)


def test_a_pickled_adapter_is_not_read(model: Path, tmp_path: Path) -> None:
    base, tokenizer = longfit.load(model, quant="none", dtype=torch.float32)
    folder = save_adapter(longfit.add_adapters(base, rank=2), tokenizer, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Touches(tmp_path / "flag")))
    with pytest.raises(ModelError, match="no pickled adapters"):
        load_adapter(longfit.load(model, quant="none", dtype=torch.float32)[0], folder)
    assert not (tmp_path / "flag").exists()


def test_an_expression_that_a_tokenizer_gives_up_is_the_models_fault(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change(model / "tokenizer.json", pre_tokenizer=split)
    (tmp_path / "text.txt").write_text("a" * 1000 + "b")
    assert main(["data", str(tmp_path / "text.txt"), "--model", str(model), "--context", "64"]) == 2
    said = capfd.readouterr().err.replace("\n", " ")
    assert f"{model}: a text, with this tokenizer, cannot be read" in said
    assert "bug in longfit" not in said


def test_nothing_is_unpacked_beside_an_archive_and_no_link_of_it_is_followed(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret " * 20)
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        archive.writestr("../../evil.txt", "evil " * 20)
        archive.writestr("/evil.txt", "evil " * 20)
    with tarfile.open(folder / "t.tar", "w") as tar:
        for name, kind in (
            ("link.txt", tarfile.SYMTYPE),
            ("hard.txt", tarfile.LNKTYPE),
            ("pipe.txt", tarfile.FIFOTYPE),
        ):
            item = tarfile.TarInfo(name)
            item.type, item.linkname = kind, "../../secret.txt"
            tar.addfile(item)
        item = tarfile.TarInfo("../../evil2.txt")
        item.size = 100
        tar.addfile(item, io.BytesIO(b"plain words " * 9))
    before = sorted(tmp_path.rglob("*"))
    code = main(["data", str(folder), "--model", str(model), "--context", "64"])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "secret" not in out + err
    assert not Path("/evil.txt").exists()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_of_a_data_folder_is_told_or_read_never_walked_in_circles(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("plain words " * 9)
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "zero.txt").symlink_to("/dev/zero")
    assert main(["data", str(tmp_path / "data"), "--model", str(model), "--context", "64", "--json"]) == 0
    told = capfd.readouterr().out
    assert "symbolic link to a folder" in told
    assert "broken link or special file" in told


def test_an_error_names_its_file_even_where_its_name_is_an_attack(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evil = tmp_path / "\x1b]0;owned\x07\u202e.jsonl"
    evil.write_text('{"text": 1}\n')
    with pytest.raises(LongfitError):
        longfit.load(evil)
    assert main(["eval", str(evil), "ppl", "--data", str(evil)]) == 2
    out, err = capfd.readouterr()
    assert "\x1b" not in out + err
    assert "\u202e" not in out + err
