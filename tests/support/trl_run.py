"""Trains tiny models with TRL itself on a CPU: ``python -m tests.support.trl_run FOLDER``.

`SFTTrainer` sends its weights with `WeightSyncCallback` into ``FOLDER/sft``, `AsyncGRPOTrainer` with
`DeltaWeightTransfer` into ``FOLDER/grpo``. Writes the trained weights to ``FOLDER/sft.pt`` and
``FOLDER/grpo.pt``, and the files that were sent to ``FOLDER/sent.json``.

Of `AsyncGRPOTrainer`, three things need a GPU or a server and are replaced: the name of the GPU, attention by
flash-attn, and the worker that makes rollouts.
"""

from __future__ import annotations

import json
import queue
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfpformat.torch.weight_sync import DeltaSender, DeltaWeightTransfer, WeightSyncCallback

STEPS = 3


def saved_model(folder: Path) -> Path:
    """Writes a tiny Llama and a tokenizer with six words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "a", "b", "c", "d"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    path = folder / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    fast.save_pretrained(path)
    return path


def options(folder: Path) -> dict[str, Any]:
    """Arguments of both trainers."""
    return {
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    }


def trained_by_sft(folder: Path, model_path: Path) -> list[Any]:
    """Trains with `SFTTrainer`. Returns number, wholeness and size of each file that was sent."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = LlamaForCausalLM.from_pretrained(model_path)
    callback = WeightSyncCallback(DeltaSender(folder / "sft", base=model_path))
    SFTTrainer(
        model=model,
        args=SFTConfig(**options(folder)),
        train_dataset=Dataset.from_dict({"text": ["a b c d a b"] * 8}),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        callbacks=[callback],
    ).train()
    torch.save(dict(model.named_parameters()), folder / "sft.pt")
    return [[sent.number, sent.whole, sent.nbytes] for sent in callback.sent]


class Rollouts:
    """A rollout worker that makes random samples: `RolloutWorkerProtocol` of TRL."""

    def __init__(self) -> None:
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        self.versions: list[int] = []

    def start(self) -> None:
        """Makes all samples."""
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        rng = np.random.default_rng(0)
        for number in range(40):
            sample = RolloutSample(
                prompt=[{"role": "user", "content": "a b"}],
                completion=[{"role": "assistant", "content": "c"}],
                input_ids=rng.integers(2, 6, 8),
                completion_mask=np.array([0, 0, 1, 1, 1, 1, 1, 1]),
                old_log_probs=np.full(8, -1.5, np.float32),
                advantage=1.0 if number % 2 else -1.0,
                model_version=self.versions[-1],
                group_id=number // 2,
                metrics={"reward": 1.0},
                enqueued_at=time.time(),
            )
            self.rollout_buffer.put(sample)

    def stop(self) -> None:
        """Does nothing."""

    def update_model_version(self, model_version: int) -> None:
        """Records the version."""
        self.versions.append(model_version)

    def check_health(self, stale_after_s: float) -> None:
        """Does nothing."""


def trained_by_grpo(folder: Path, model_path: Path) -> list[int]:
    """Trains with `AsyncGRPOTrainer`. Returns the versions that the rollout worker was told."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.async_grpo import async_grpo_trainer
    from trl.experimental.async_grpo.async_grpo_config import AsyncGRPOConfig

    async_grpo_trainer.get_peak_flops_per_device = lambda *_: 1e12
    worker = Rollouts()
    trainer = async_grpo_trainer.AsyncGRPOTrainer(
        model=str(model_path),
        args=AsyncGRPOConfig(**options(folder), token_budget=-1, vllm_server_timeout=5),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "a b"}]] * 8}),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        rollout_worker=worker,
        weight_transfer=DeltaWeightTransfer(folder / "grpo", base=model_path),
    )
    trainer.model.set_attn_implementation("sdpa")
    trainer.train()
    torch.save(dict(trainer.model.named_parameters()), folder / "grpo.pt")
    return worker.versions


def main() -> None:
    """The command."""
    folder = Path(sys.argv[1])
    model_path = folder / "model" if (folder / "model").exists() else saved_model(folder)
    found = {"sft": trained_by_sft(folder, model_path), "versions": trained_by_grpo(folder, model_path)}
    (folder / "sent.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
