"""Compressed models in other libraries: transformers, peft, accelerate and safetensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from sfpformat import OptionError
from sfpformat.torch import SfpEmbedding, SfpLinear, compress_model, decompress_model

from ..support.untyped import untyped
from .test_files import assert_same, bits
from .test_models import state

pytestmark = [
    # Warnings of these libraries about small models and about themselves.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
IDS = torch.arange(2, 20)[None]


def gpt2() -> Any:
    """A model with layers of transformers' own kind, `Conv1D`, and a tie."""
    config = transformers.GPT2Config(
        vocab_size=128,
        n_positions=64,
        n_embd=48,
        n_layer=1,
        n_head=4,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
        **ENDS,
    )
    return transformers.GPT2LMHeadModel(config)


def llama(tied: bool = False) -> Any:
    """A model with two embeddings, or one that is also the head."""
    config = transformers.LlamaConfig(
        vocab_size=128,
        num_hidden_layers=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **SIZES,
        **ENDS,
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> Any:
    """An encoder-decoder model whose embedding has four names."""
    config = untyped(transformers.T5Config)(
        vocab_size=128,
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_layers=1,
        num_heads=4,
        dropout_rate=0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "llama": llama,
    "llama, tied": lambda: llama(tied=True),
    "t5": t5,
}
of_each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Disables progress bars and reports."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_progress_bar()


def both(make: Callable[[], Any]) -> tuple[Any, Any]:
    """A dense model, and a compressed one of the same weights."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().eval())
    dense, model = models
    compress_model(model)
    return dense, model


def logits(model: Any) -> bytes:
    """The bits of a model's outputs."""
    words = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return bits(model(input_ids=IDS, **words).logits)


def loaded(model: Any, folder: Path) -> Any:
    """Loads a model of the same class from a folder with transformers."""
    return type(model).from_pretrained(folder).eval()


# ---------------------------------------------------------------------------------------- transformers


@of_each_model
def test_compressed_models_compute_and_generate_the_same_as_dense_ones(make: Callable[[], Any]) -> None:
    dense, model = both(make)
    assert logits(model) == logits(dense)
    words = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **words), dense.generate(IDS, **words))


@of_each_model
def test_save_pretrained_writes_dense_weights_that_load_bit_for_bit(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    dense, model = both(make)
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    for folder in ("own", "given"):
        assert_same(state(loaded(model, tmp_path / folder)), state(dense))
    assert type(model.get_input_embeddings()) is SfpEmbedding


def test_copies_pickles_and_parts_save_dense_weights_too(tmp_path: Path) -> None:
    dense, model = both(llama)
    torch.save(copy.deepcopy(model), tmp_path / "pickle")
    model = torch.load(tmp_path / "pickle", weights_only=False)
    model.save_pretrained(tmp_path / "whole")
    assert_same(state(loaded(model, tmp_path / "whole")), state(dense))
    model.model.save_pretrained(tmp_path / "part")
    assert_same(state(loaded(model.model, tmp_path / "part")), state(dense.model))
    decompress_model(model)
    assert "save_pretrained" not in {**vars(model), **vars(model.model)}


def test_bytes_saved_by_other_tools_are_refused_instead_of_random_weights(
    tmp_path: Path,
) -> None:
    _, model = both(llama)
    type(model).save_pretrained(model, tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loaded(model, tmp_path)


@of_each_model
def test_embeddings_are_tied_and_resized_as_in_the_dense_model(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    dense, model = both(make)
    model.tie_weights()
    assert logits(model) == logits(dense)
    for size, words in ((140, {}), (100, {"mean_resizing": False})):
        for one in (dense, model):
            torch.manual_seed(1)
            one.resize_token_embeddings(size, **words)
        assert logits(model) == logits(dense)
        assert model.get_input_embeddings().weight.shape == (size, 48)
    assert type(model.get_input_embeddings()) is SfpEmbedding
    model.save_pretrained(tmp_path)
    assert logits(loaded(model, tmp_path)) == logits(dense)


@of_each_model
def test_gradient_checkpointing_returns_the_gradients_of_the_dense_model(make: Callable[[], Any]) -> None:
    gradients = []
    dense, model = both(make)
    compressed = {name for name, _ in dense.named_parameters()} - {
        name for name, _ in model.named_parameters()
    }
    assert compressed
    for one in (dense, model):
        one.train()
        one.gradient_checkpointing_enable()
        one.enable_input_require_grads()
        one(input_ids=IDS, labels=IDS).loss.backward()
        found = {name: p.grad for name, p in one.named_parameters() if name not in compressed}
        gradients.append({name: gradient for name, gradient in found.items() if gradient is not None})
    assert len(gradients[1]) > 1
    assert_same(gradients[1], gradients[0])


# ------------------------------------------------------------------------------------------------ peft


def adapted(model: Any, **words: Any) -> Any:
    """A model with LoRA, trained for two steps."""
    torch.manual_seed(3)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **words)).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


ADAPTERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "all linear layers": (llama, {"target_modules": "all-linear"}),
    "BF16": (lambda: llama().bfloat16(), {"target_modules": ["q_proj", "down_proj"]}),
    "DoRA": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "PiSSA, which writes to the weights": (
        llama,
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, DoRA": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding, tied": (lambda: llama(tied=True), {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "some tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}),
    "Conv1D and a tied embedding": (gpt2, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
}


@pytest.mark.filterwarnings("ignore")  # of peft, about ties and embeddings
@pytest.mark.parametrize(("make", "words"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_train_and_merge_to_the_same_weights_as_in_the_dense_model(
    make: Callable[[], Any], words: dict[str, Any], tmp_path: Path
) -> None:
    dense, model = (adapted(one, **copy.deepcopy(words)) for one in both(make))
    before = logits(dense)
    assert logits(model) == before
    for safe in (False, True):
        for one in (dense, model):
            one.merge_adapter(safe_merge=safe)
        assert logits(model) == logits(dense)
        for one in (dense, model):
            one.unmerge_adapter()
        assert logits(model) == logits(dense)
    dense, model = dense.merge_and_unload(), model.merge_and_unload()
    assert logits(model) == logits(dense)
    assert any(isinstance(module, (SfpLinear, SfpEmbedding)) for module in model.modules())
    assert model.config.tie_word_embeddings == dense.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    assert_same(state(loaded(model, tmp_path)), state(dense))
    decompress_model(model)
    assert_same(state(model), state(dense))


@pytest.mark.filterwarnings("ignore")  # of peft, about ties and embeddings
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_adapters_of_a_compressed_model_fit_the_dense_one(target: str, tmp_path: Path) -> None:
    dense, model = both(llama)
    model = adapted(model, target_modules=[target])
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert not any(tensor.dtype == torch.uint8 for tensor in saved.values())
    assert logits(peft.PeftModel.from_pretrained(dense, tmp_path).eval()) == logits(model)


@pytest.mark.parametrize(("name", "layer"), [("lm_head", "lm_head"), ("mlp", "model.layers.0.mlp.down_proj")])
def test_modules_to_save_are_refused_while_compressed_and_train_when_dense(name: str, layer: str) -> None:
    words: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": [name]}
    dense, model = both(llama)
    with pytest.raises(OptionError, match=f"modules_to_save would train a copy of layer {layer!r}"):
        adapted(model, **words)
    dense, model = both(llama)
    for path, module in list(model.named_modules()):
        if path.endswith(name):
            decompress_model(module)
    dense, model = adapted(dense, **words), adapted(model, **words)
    assert logits(model) == logits(dense)
    assert logits(model.merge_and_unload()) == logits(dense.merge_and_unload())


@pytest.mark.parametrize("words", [{}, {"modules_to_save": ["lm_head"]}])
def test_existing_adapters_stay_dense_and_train(words: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = adapted(llama(), target_modules=["q_proj", "embed_tokens"], **words)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    before = logits(model)
    report = compress_model(model, choose=lambda name, module: True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    assert logits(model) == before
    assert any(name.endswith("base_layer") for name in report.layers)
    assert not any("lora_" in name or "modules_to_save" in name for name in report.layers)


# -------------------------------------------------------------------------- accelerate and safetensors


@pytest.mark.parametrize("tied", [False, True])
def test_accelerate_moves_saves_and_loads_compressed_models(tied: bool, tmp_path: Path) -> None:
    dense, model = both(lambda: llama(tied))
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        accelerate.load_checkpoint_in_model(dense, tmp_path)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.lm_head.weight)
    nn.init.zeros_(other.model.layers[0].self_attn.q_proj.weight)
    accelerate.load_checkpoint_in_model(other, tmp_path)
    assert logits(other) == logits(model)
    assert logits(accelerate.cpu_offload(other, execution_device=torch.device("cpu"))) == logits(model)


@pytest.mark.parametrize("tied", [False, True])
def test_safetensors_files_of_compressed_models_load_into_compressed_models_only(
    tied: bool, tmp_path: Path
) -> None:
    dense, model = both(lambda: llama(tied))
    safetensors.torch.save_model(model, str(tmp_path / "m"))
    other = copy.deepcopy(model)
    nn.init.zeros_(other.lm_head.weight)
    unequal: Any = safetensors.torch.load_model(other, tmp_path / "m")
    assert unequal == (set(), [])
    assert logits(other) == logits(model)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="size mismatch"):
            safetensors.torch.load_model(dense, tmp_path / "m", strict=strict)
