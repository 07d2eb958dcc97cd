"""Tiny models of transformers, built from configurations, and batches for them with and without padding."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

VOCABULARY, PAD = 40, 0
WORDS = [f"w{i}" for i in range(35)]
Batch = dict[str, Tensor]


def made(name: str, **words: Any) -> Any:
    """A model of this class with random weights, in evaluation mode."""
    transformers.utils.logging.set_verbosity_error()
    model_class = getattr(transformers, name)
    config = model_class.config_class(
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        **{**_SIZES[name[:4]], **words},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval()


_SIZES: dict[str, dict[str, Any]] = {
    "Llam": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "Bert": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
    "T5Fo": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
}


def tokens(seed: int, *shape: int) -> Tensor:
    """Random tokens, none of them a special one."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], value: int, length: int) -> Tensor:
    """Rows padded on the right to the longest: [rows, length]."""
    return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])


def saved(name: str, folder: Path) -> Path:
    """A model and its tokenizer as transformers saves them."""
    made(name).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[MASK]", "[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        mask_token="[MASK]",
        unk_token="[UNK]",
    ).save_pretrained(folder)
    return folder


def text(folder: Path, lines: int = 120) -> Path:
    """Lines of words that follow each other in the same ways."""
    rng = random.Random(0)
    path = folder / "text.txt"
    starts = [[(rng.randrange(30) + k) % 35 for k in range(rng.randrange(6, 14))] for _ in range(lines)]
    path.write_text("\n".join(" ".join(WORDS[i] for i in line) for line in starts))
    return path
