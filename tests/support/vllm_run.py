"""Generates tokens with vLLM itself, on the CPU, and prints them as JSON: ``vllm_run.py FOLDER OPTIONS``.

Options are JSON: arguments of ``vllm.LLM``. Also prints the bytes of the model's parameters and buffers.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(folder: str, options: dict[str, Any]) -> None:
    """Loads a model and generates."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    from vllm import LLM, SamplingParams

    engine: Any = LLM(
        folder, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, max_num_seqs=2, **options
    )
    settings = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [1, 5, 9]}, {"prompt_token_ids": list(range(20, 44))}]
    out = []
    for one in engine.generate(prompts, settings, use_tqdm=False):
        best = one.outputs[0]
        out.append([list(best.token_ids), [next(iter(step.values())).logprob for step in best.logprobs]])
    print("RESULT", json.dumps({"tokens": out, "bytes": engine.apply_model(count_bytes)}))


def count_bytes(model: Any) -> int:
    """The bytes of a model's parameters and buffers; memory that several share counts once."""
    found = {one.untyped_storage().data_ptr(): one.nbytes for one in (*model.parameters(), *model.buffers())}
    return sum(found.values())


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
