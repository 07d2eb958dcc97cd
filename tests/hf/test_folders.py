"""Folders of models: written and loaded with real models of transformers, tiny and of random weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from huggingface_hub import constants

from sfpformat import Options, Uniform
from sfpformat.errors import MismatchError, OptionError, SfpWarning
from sfpformat.hf import from_pretrained, save_pretrained
from sfpformat.torch import SfpLinear, compress_model, load, load_file, safe_open, save, save_file

from ..torch.test_files import assert_same

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(24).reshape(2, 12)
TEXT = "a b c d e f"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Disables progress bars."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def llama(*, tied: bool = True, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied, dtype=dtype)
    model = transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    model.generation_config.max_new_tokens = 7
    return model


def bert(kind: Any = transformers.BertModel, **words: Any) -> Any:
    torch.manual_seed(0)
    return kind(transformers.BertConfig(**SMALL, **words)).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {"[UNK]": 0, **{c: i + 1 for i, c in enumerate(TEXT.split())}}
    words = Tokenizer(models.WordLevel(ids, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    out = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]")
    out.chat_template = "{{ messages[0]['content'] }}"
    return out


def adapted_by_peft(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a deprecated property
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found = model(IDS)
    out: torch.Tensor = found.logits if "logits" in found else found.last_hidden_state
    return out


MODELS = {
    "tied": llama,
    "not tied": lambda: llama(tied=False, dtype=torch.float32),
    "encoder": bert,
    "experts, whose weights transformers converts": mixtral,
}


@pytest.mark.parametrize("shard", [None, 8_000])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_from_its_folder_bit_for_bit(name: str, shard: int | None, tmp_path: Path) -> None:
    model = MODELS[name]()
    save_pretrained(model, tmp_path / "m", max_shard_size=shard)
    files = {path.name for path in (tmp_path / "m").iterdir()}
    assert ("model.sfp.index.json" in files) == (shard is not None)
    assert not any("safetensors" in file for file in files)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    back = from_pretrained(tmp_path / "m")
    assert type(back) is type(model)
    assert not back.training
    assert back.dtype == model.dtype
    assert_same(back.state_dict(), model.state_dict())
    assert torch.equal(logits(back), logits(model))
    assert back.name_or_path == back.config.name_or_path == str(tmp_path / "m")
    if back.can_generate():
        assert back.generation_config.to_dict() == model.generation_config.to_dict()


def test_ties_tokenizer_and_chat_template_come_back(tmp_path: Path) -> None:
    model, words = llama(), tokenizer()
    save_pretrained(model, tmp_path / "m", words)
    back = from_pretrained(tmp_path / "m")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert again(TEXT)["input_ids"] == words(TEXT)["input_ids"]
    assert again.chat_template == words.chat_template
    pipe = transformers.pipeline("text-generation", model=back, tokenizer=again)
    assert pipe("a b", do_sample=False)[0]["generated_text"].startswith("a b")


def test_options_masks_and_any_name_of_a_tie_are_taken(tmp_path: Path) -> None:
    model = llama()
    name = "model.layers.0.mlp.up_proj.weight"
    mask = torch.arange(48 * 32).reshape(48, 32) % 2 == 0
    options = {name: Options(Uniform(bits=4)), "lm_head.weight": Options(Uniform(bits=6))}
    save_pretrained(model, tmp_path / "m", options=options, masks={name: mask})
    state = load_file(tmp_path / "m" / "model.sfp")
    tied = next(one for one in ("lm_head.weight", "model.embed_tokens.weight") if one in state)
    for one, bits, masks in ((name, 4, {name: mask}), (tied, 6, None)):
        data = save({one: model.state_dict()[one]}, options=Options(Uniform(bits=bits)), masks=masks)
        assert torch.equal(state[one], load(data)[one])
    back = dict(from_pretrained(tmp_path / "m").state_dict())
    assert_same(back | state, back)


def test_layers_stay_compressed_and_train_and_merge_an_adapter(tmp_path: Path) -> None:
    model = llama(tied=False, dtype=torch.float32)
    save_pretrained(model, tmp_path / "m")
    back = from_pretrained(tmp_path / "m", stay_compressed=True)
    assert any(isinstance(module, SfpLinear) for module in back.modules())
    assert torch.equal(logits(back), logits(model))
    assert back.generation_config.max_new_tokens == 7
    adapted = adapted_by_peft(back)
    before = logits(adapted)
    merged = adapted.merge_and_unload()
    assert torch.allclose(logits(merged), before, atol=1e-4)
    save_pretrained(merged, tmp_path / "merged")
    assert torch.equal(logits(from_pretrained(tmp_path / "merged")), logits(merged))


def test_a_compressed_model_is_saved(tmp_path: Path) -> None:
    model = llama()
    before = logits(model)
    compress_model(model)
    save_pretrained(model, tmp_path / "m")
    assert torch.equal(logits(from_pretrained(tmp_path / "m")), before)


def test_another_class_is_taken_and_its_missing_weights_raise(tmp_path: Path) -> None:
    save_pretrained(bert(), tmp_path / "m")
    auto = transformers.AutoModelForSequenceClassification
    with pytest.raises(MismatchError, match=r"classifier\.weight") as caught:
        from_pretrained(tmp_path / "m", cls=auto)
    assert "classifier.bias" in caught.value.missing
    with pytest.warns(SfpWarning, match="random"):
        model = from_pretrained(tmp_path / "m", cls=auto, strict=False)
    assert_same(dict(model.bert.state_dict()), dict(bert().state_dict()))
    with pytest.raises(OptionError, match="has no class for models of 'bert'"):
        from_pretrained(tmp_path / "m", cls=transformers.AutoModelForSpeechSeq2Seq)


def test_weights_that_the_class_lacks_raise(tmp_path: Path) -> None:
    save_pretrained(bert(transformers.BertForMaskedLM), tmp_path / "m")
    with pytest.raises(MismatchError, match="unexpected in the file") as caught:
        from_pretrained(tmp_path / "m", cls=transformers.BertModel)
    assert any(name.startswith("cls.") for name in caught.value.unexpected)


def test_shapes_that_differ_raise(tmp_path: Path) -> None:
    save_pretrained(bert(), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 50}))
    with pytest.raises(
        MismatchError,
        match=r"model\.sfp: .*intermediate\.dense\.bias' is \[48\] in the file, \[50\] in the model",
    ):
        from_pretrained(tmp_path / "m")
    with pytest.raises(MismatchError, match="shapes do not fit"):
        from_pretrained(tmp_path / "m", strict=False)


@pytest.mark.parametrize("dtype", ["auto", torch.float32, "float16"])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_dtype_is_that_of_the_configuration_or_that_of_the_call(
    dtype: Any, compressed: bool, tmp_path: Path
) -> None:
    save_pretrained(llama(), tmp_path / "m")
    expected = {"auto": torch.bfloat16, "float16": torch.float16}.get(dtype, dtype)
    assert from_pretrained(tmp_path / "m", dtype=dtype, stay_compressed=compressed).dtype == expected


def test_without_a_dtype_in_the_configuration_the_file_decides(tmp_path: Path) -> None:
    save_pretrained(llama(), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    assert from_pretrained(tmp_path / "m").dtype == torch.bfloat16
    assert from_pretrained(tmp_path / "m", stay_compressed=True).dtype == torch.bfloat16


def test_accelerate_takes_an_open_file_as_a_state_dict(tmp_path: Path) -> None:
    model = llama(tied=False)
    save_pretrained(model, tmp_path / "m")
    with accelerate.init_empty_weights():
        empty = transformers.LlamaForCausalLM(model.config).eval()
    empty.to(torch.bfloat16)
    empty.model.rotary_emb = model.model.rotary_emb  # its buffers are in no file
    with safe_open(tmp_path / "m") as file:
        accelerate.cpu_offload(empty, torch.device("cpu"), state_dict=file)
        assert all(parameter.is_meta for parameter in empty.parameters())
        assert torch.equal(logits(empty), logits(model))
        assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_slice_says_what_it_is_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(5, 4).half()
    path = tmp_path / "m.sfp"
    path.write_bytes(save({"w": tensor, "n": torch.arange(3)}))
    with safe_open(path) as file:
        part = file.slices()["w"]
        with monkeypatch.context() as patch:
            patch.setattr(type(part), "__getitem__", None)
            assert (part.dtype, part.shape, part.ndim, part.numel()) == (torch.float16, (5, 4), 2, 20)
            assert part.device == torch.device("cpu")
            assert part.is_floating_point()
            assert not file.slices()["n"].is_floating_point()
        assert torch.equal(part.to(torch.float32), tensor.float())
        assert torch.equal(file["w"], tensor)
        assert_same(dict(file.items()), file.get_tensors())
        assert [one.shape for one in file.values()] == [file[name].shape for name in file]


# ------------------------------------------------------------------------------------------------ folders


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(llama(), tmp_path / "m")
    before = {path: path.read_bytes() for path in (tmp_path / "m").iterdir()}

    def fail(*args: Any, **words: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sfpformat.hf.saving.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(llama(seed=1), tmp_path / "m")
    assert {path: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_second_save_replaces_the_first_with_all_its_shards(tmp_path: Path) -> None:
    save_pretrained(llama(), tmp_path / "m", max_shard_size=8_000)
    other = llama(seed=1)
    save_pretrained(other, tmp_path / "m")
    assert [path.name for path in sorted((tmp_path / "m").glob("*.sfp*"))] == ["model.sfp"]
    assert_same(from_pretrained(tmp_path / "m").state_dict(), other.state_dict())


def test_a_folder_with_other_weights_is_not_written(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "m")
    with pytest.raises(OptionError, match=r"model\.safetensors"):
        save_pretrained(llama(), tmp_path / "m")


def test_arguments_of_saving_that_cannot_be_used_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    with pytest.raises(OptionError, match="max_shard_size is 0, must be at least 1 byte"):
        save_pretrained(llama(), tmp_path / "m", max_shard_size=0)
    with pytest.raises(OptionError, match="'tok' is no tokenizer"):
        save_pretrained(llama(), tmp_path / "m", "tok")
    assert not list(tmp_path.iterdir())


def test_adapters_are_not_written_as_a_model(tmp_path: Path) -> None:
    adapted = adapted_by_peft(llama())
    with pytest.raises(OptionError, match="merge"):
        save_pretrained(adapted, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_weights_spread_over_processes_are_refused(tmp_path: Path) -> None:
    code = """
import sys, torch
from torch.distributed.fsdp import fully_shard
from torch.distributed import init_process_group
from torch.testing._internal.distributed.fake_pg import FakeStore
from tests.hf.test_folders import llama
from sfpformat.hf import save_pretrained
init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
model = llama()
fully_shard(model)
save_pretrained(model, sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=False
    )
    assert "OptionError: processes hold only parts of 'model.embed_tokens.weight'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_needs_no_right_to_write_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m"
    target.mkdir()
    written: list[Path] = []

    def spy(tensors: Any, path: Path, *args: Any, **words: Any) -> None:
        written.append(path)
        save_file(tensors, path, *args, **words)

    monkeypatch.setattr("sfpformat.hf.saving.save_file", spy)
    save_pretrained(llama(), target)
    assert all(target in path.parents for path in written)
    assert written
    assert all(path.is_file() for path in target.iterdir())  # the temporary folder is gone


def test_an_unknown_name_raises_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'lm_heat\.weight' is no tensor"):
        save_pretrained(llama(), tmp_path / "m", options={"lm_heat.weight": Options()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing/folder/here", "there is no folder"),
        ("./missing", "there is no folder"),
        ("a b", "not the id of a repository"),
    ],
)
def test_a_missing_folder_is_named(source: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        from_pretrained(source)


def test_a_folder_without_configuration_or_weights_is_named(tmp_path: Path) -> None:
    save_pretrained(llama(), tmp_path / "m")
    with pytest.raises(OptionError, match="is a file"):
        from_pretrained(tmp_path / "m" / "model.sfp")
    with pytest.raises(OptionError, match="has no revision"):
        from_pretrained(tmp_path / "m", revision="v1")
    with pytest.raises(OptionError, match="has no dtype 'float99'"):
        from_pretrained(tmp_path / "m", dtype="float99")
    with pytest.raises(OptionError, match="stay_compressed=True has no"):
        from_pretrained(tmp_path / "m", stay_compressed=True, device_map="cpu")
    with pytest.raises(OptionError, match="no argument 'state_dict'"):
        from_pretrained(tmp_path / "m", state_dict={})
    (tmp_path / "m" / "model.sfp").unlink()
    with pytest.raises(OptionError, match=r"has no \.sfp file"):
        from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(OptionError, match=r"has no config\.json"):
        from_pretrained(tmp_path / "m")


def test_a_repository_in_the_cache_of_the_hub_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, commit = llama(), "0" * 40
    repository = tmp_path / "hub" / "models--team--small"
    save_pretrained(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        back = from_pretrained("team/small", revision=revision)
        assert_same(back.state_dict(), model.state_dict())
        assert back.name_or_path == "team/small"
    shutil.rmtree(repository)
    with pytest.raises(Exception, match=r"(?i)offline|cannot find|locate"):
        from_pretrained("team/small")
