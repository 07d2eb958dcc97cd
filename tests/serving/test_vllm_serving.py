"""vLLM itself generates on the CPU: the same tokens from `.sfp` as from safetensors. Needs vLLM for CPUs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sfpformat.torch import load_file, save_file

from ..support.clauses import ROOT
from .test_vllm_linear import IMPORTS_VLLM

pytestmark = pytest.mark.skipif(not IMPORTS_VLLM, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small Llama with safetensors, and with the same weights as `.sfp`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,  # padded to 512
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        max_position_embeddings=64,
    )
    model: Any = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    dense, packed = (tmp_path_factory.mktemp(name) for name in ("dense", "packed"))
    model.to(torch.bfloat16).save_pretrained(dense)
    for path in dense.glob("*.json"):
        shutil.copy(path, packed)
    save_file(dict(model.state_dict()), packed / "model.sfp")
    return dense, packed


def run(folder: Path, **options: Any) -> dict[str, Any]:
    """What the engine generates in a process of its own."""
    program = ROOT / "tests" / "support" / "vllm_run.py"
    done = subprocess.run(
        [sys.executable, str(program), str(folder), json.dumps(options)], capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return found


@pytest.fixture(scope="module")
def theirs(folders: tuple[Path, Path]) -> dict[str, Any]:
    """What vLLM generates from safetensors."""
    return run(folders[0])


def test_the_load_format_gives_the_tokens_and_probabilities_of_safetensors(
    folders: tuple[Path, Path], theirs: dict[str, Any]
) -> None:
    assert run(folders[1], load_format="sfp")["tokens"] == theirs["tokens"]


def test_compressed_layers_give_the_tokens_of_dense_ones_in_less_memory(
    folders: tuple[Path, Path], theirs: dict[str, Any]
) -> None:
    packed = folders[1]
    mine = run(packed, load_format="sfp", quantization="sfp")
    assert [tokens for tokens, _ in mine["tokens"]] == [tokens for tokens, _ in theirs["tokens"]]
    for (_, one), (_, other) in zip(mine["tokens"], theirs["tokens"], strict=True):
        assert one == pytest.approx(other, abs=0.1)  # sums in another order
    weights = load_file(packed / "model.sfp")
    embedding = weights["model.embed_tokens.weight"].nbytes
    layers = sum(one.nbytes for name, one in weights.items() if one.dim() == 2) - embedding
    assert mine["bytes"][0] < 0.72 * layers + 1.2 * embedding
