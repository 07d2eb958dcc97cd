"""Folders with an `.sfp` file in transformers' own classes, pipelines, sentence-transformers and peft."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from sfpformat.cli import main as sfp
from sfpformat.errors import InvalidFileError, MismatchError, OptionError, SfpWarning
from sfpformat.hf import from_pretrained, save_pretrained
from sfpformat.io.safetensors import SafetensorsError
from sfpformat.torch import SfpLinear, load_file, save_file

from ..torch.test_files import assert_same
from .test_folders import IDS, SMALL, bert, llama, logits, mixtral, tokenizer

AutoLM: Any = transformers.AutoModelForCausalLM


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(llama(), tmp_path / "m", tokenizer())
    return tmp_path / "m"


@pytest.mark.parametrize("shard", [None, 8_000])
@pytest.mark.parametrize("make", [llama, mixtral])
def test_classes_of_transformers_load_the_folder_bit_for_bit(
    make: Any, shard: int | None, tmp_path: Path
) -> None:
    model = make()
    save_pretrained(model, tmp_path / "m", max_shard_size=shard)
    for kind in (AutoLM, type(model)):
        back = kind.from_pretrained(tmp_path / "m")
        assert_same(back.state_dict(), model.state_dict())
        assert torch.equal(logits(back), logits(model))
        assert back.name_or_path == back.config.name_or_path == str(tmp_path / "m")
        assert back.generation_config.to_dict() == model.generation_config.to_dict()
        assert back.dtype == model.dtype
        assert not back.training


def test_arguments_of_transformers_have_their_effect(folder: Path) -> None:
    back, info = AutoLM.from_pretrained(
        str(folder),
        dtype=torch.float32,
        attn_implementation="eager",
        device_map="cpu",
        hidden_act="gelu",
        output_loading_info=True,
    )
    assert back.dtype == torch.float32
    assert back.config._attn_implementation == "eager"
    assert back.config.hidden_act == "gelu"
    assert not info["missing_keys"]
    inside = AutoLM.from_pretrained(folder.parent, subfolder="m")
    assert_same(inside.state_dict(), llama().state_dict())


def test_a_class_without_the_head_ignores_its_weights_as_transformers_does(tmp_path: Path) -> None:
    model = llama(tied=False)
    save_pretrained(model, tmp_path / "m")
    back = transformers.AutoModel.from_pretrained(tmp_path / "m")
    assert_same(back.state_dict(), model.model.state_dict())


def test_missing_weights_raise_and_are_random_only_if_asked_for(folder: Path) -> None:
    auto = transformers.AutoModelForSequenceClassification
    with pytest.raises(
        MismatchError, match=r"model\.sfp: .*missing in the file: 'score\.weight'.*strict=False"
    ) as caught:
        auto.from_pretrained(folder)
    assert caught.value.missing == ("score.weight",)
    with pytest.warns(SfpWarning, match=r"score\.weight.*random"):
        model = auto.from_pretrained(folder, strict=False)
    assert_same(model.model.state_dict(), llama().model.state_dict())


def test_shapes_that_differ_raise(folder: Path) -> None:
    with pytest.raises(
        MismatchError, match=r"model\.sfp: .*'[\w.]+' is \[48, 32\] in the file, \[50, 32\] in the model"
    ):
        AutoLM.from_pretrained(folder, intermediate_size=50)


def test_weights_in_other_formats_and_errors_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no file named model\.safetensors found"):
        AutoLM.from_pretrained(folder, use_safetensors=True)
    with pytest.raises(OSError, match=r"no file named model\.fp16\.safetensors"):
        AutoLM.from_pretrained(folder, variant="fp16")
    with pytest.raises(OptionError, match=r"dispatch_model"):
        AutoLM.from_pretrained(folder, device_map={"": "disk"})
    other = llama(seed=1)
    other.save_pretrained(tmp_path / "both")
    (folder / "model.sfp").rename(tmp_path / "both" / "model.sfp")
    assert_same(AutoLM.from_pretrained(tmp_path / "both").state_dict(), other.state_dict())
    with pytest.raises(OSError, match="no file named"):
        AutoLM.from_pretrained(folder)


def test_a_damaged_file_is_named_and_two_models_are_refused(folder: Path) -> None:
    data = bytearray((folder / "model.sfp").read_bytes())
    data[200] ^= 1
    (folder / "model.sfp").write_bytes(data)
    words = rf"R-[A-Z]+-\d+\] in '{folder / 'model.sfp'}': "
    for load in (AutoLM.from_pretrained, from_pretrained, compressed):
        with pytest.raises(InvalidFileError, match=words):
            load(folder)
    (folder / "other.sfp").write_bytes(data)
    with pytest.raises(OptionError, match=r"model\.sfp.*other\.sfp"):
        AutoLM.from_pretrained(folder)


def compressed(folder: Path) -> Any:
    return from_pretrained(folder, stay_compressed=True)


def test_a_model_that_lacks_a_tensor_or_has_a_damaged_index_is_named(folder: Path) -> None:
    path = folder / "model.sfp"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    for load in (AutoLM.from_pretrained, from_pretrained, compressed):
        with pytest.raises(MismatchError, match=rf"{path}: .*missing in the file: '{name}'") as caught:
            load(folder)
        assert caught.value.missing == (name,)
    path.unlink()
    (folder / "model.sfp.index.json").write_text("{")
    with pytest.raises(SafetensorsError, match=r"model\.sfp\.index\.json: the index is not valid JSON"):
        AutoLM.from_pretrained(folder)


def test_a_folder_without_configuration_is_refused(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(OptionError, match=r"has no config\.json"):
        # The default configuration of this class has 7 billion weights.
        transformers.LlamaForCausalLM.from_pretrained(folder)
    back: Any = transformers.LlamaForCausalLM.from_pretrained(folder, config=config)
    assert torch.equal(logits(back), logits(llama()))


def test_a_configuration_without_architecture_is_named_and_auto_classes_need_none(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": None}))
    with pytest.raises(OptionError, match=rf"config\.json of {folder} names 0 architectures.*'cls'"):
        from_pretrained(folder)
    assert torch.equal(logits(AutoLM.from_pretrained(folder)), logits(llama()))
    assert torch.equal(logits(from_pretrained(folder, cls=AutoLM)), logits(llama()))


def test_arguments_of_this_package_are_checked_and_refused_for_other_folders(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="strict is 'no', must be True or False"):
        AutoLM.from_pretrained(folder, strict="no")
    with pytest.raises(OptionError, match=r"argument of sfpformat\.hf\.from_pretrained"):
        AutoLM.from_pretrained(folder, stay_compressed=True)
    llama().save_pretrained(tmp_path / "dense")
    for name in ("strict", "stay_compressed"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            AutoLM.from_pretrained(tmp_path / "dense", **{name: False})


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        ({"torch_dtype": "float16"}, "pass dtype"),
        ({"token": "hf_x"}, "HF_TOKEN"),
        ({"local_files_only": True}, "HF_HUB_OFFLINE=1"),
        ({"subfolder": "m", "stay_compressed": True}, "path of the folder"),
        ({"dtype": None}, "torch has no dtype None; pass one"),
    ],
)
def test_arguments_that_would_have_no_effect_raise_and_say_what_does(
    words: dict[str, Any], instead: str, folder: Path
) -> None:
    with pytest.raises(OptionError, match=instead):
        from_pretrained(folder, **words)


def test_without_the_import_the_folder_is_refused_instead_of_random_weights(folder: Path) -> None:
    code = """
import sys, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except OSError as error:
    print(error)
import sfpformat.hf, importlib
importlib.reload(sfpformat.hf)  # wraps once
print(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).dtype)
print(transformers.PreTrainedModel.from_pretrained.__wrapped__.__module__)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    refused, dtype, wrapped = run.stdout.splitlines()
    assert "no file named model.safetensors" in refused
    assert (dtype, wrapped) == ("torch.bfloat16", "transformers.modeling_utils")


def test_a_pipeline_takes_the_path_of_the_folder(folder: Path) -> None:
    pipe = transformers.pipeline("text-generation", model=str(folder))
    again = transformers.pipeline("text-generation", model=from_pretrained(folder), tokenizer=tokenizer())
    assert pipe("a b", do_sample=False) == again("a b", do_sample=False)
    assert pipe.model.name_or_path == str(folder)


def test_sentence_transformers_loads_a_packed_folder_with_the_same_embeddings(tmp_path: Path) -> None:
    library: Any = pytest.importorskip("sentence_transformers")
    modules: Any = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    bert().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    parts = [modules.Transformer(str(tmp_path / "base")), modules.Pooling(SMALL["hidden_size"])]
    folder = tmp_path / "m"
    library.SentenceTransformer(modules=parts, device="cpu").save(str(folder))
    sentences = ["a b c", "d", "e f a"]
    expected = library.SentenceTransformer(str(folder), device="cpu").encode(sentences)
    assert sfp(["pack", str(folder), "-o", str(folder / "model.sfp")]) == 0
    (folder / "model.safetensors").unlink()
    back = library.SentenceTransformer(str(folder), device="cpu")
    assert (back.encode(sentences) == expected).all()
    back[0].auto_model = from_pretrained(folder, stay_compressed=True)
    assert any(isinstance(module, SfpLinear) for module in back.modules())
    assert (back.encode(sentences) == expected).all()


# --------------------------------------------------------------------------------------------------- peft


def adapted(model: Any) -> Any:
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a deprecated property
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)


def trained(model: Any) -> Any:
    """Trains the adapters for three steps. Returns the model."""
    model.train()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=10.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


def test_adapters_of_peft_train_and_merge_on_compressed_layers_as_on_dense_ones(tmp_path: Path) -> None:
    model = llama(tied=False, dtype=torch.float32)
    save_pretrained(model, tmp_path / "m")
    before = logits(model)
    results = []
    for compressed in (False, True):
        some = trained(adapted(from_pretrained(tmp_path / "m", stay_compressed=compressed)))
        assert any(isinstance(module, SfpLinear) for module in some.modules()) == compressed
        adapters = {name: one.clone() for name, one in some.named_parameters() if one.requires_grad}
        outputs = logits(some)
        merged = some.merge_and_unload()
        assert torch.allclose(logits(merged), outputs, atol=1e-4)
        results.append((adapters, outputs, logits(merged)))
    dense, packed = results
    assert not torch.allclose(dense[1], before, atol=1e-3)
    assert_same(packed[0], dense[0])
    assert torch.equal(packed[1], dense[1])
    assert torch.equal(packed[2], dense[2])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for a deprecated property
def test_peft_loads_an_adapter_whose_base_model_is_the_folder(folder: Path, tmp_path: Path) -> None:
    model = trained(adapted(AutoLM.from_pretrained(folder)))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    expected = logits(model)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    base = from_pretrained(folder, stay_compressed=True)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
