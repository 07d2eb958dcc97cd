"""What a new user does with a hub: packs a model folder, pushes it, loads it by name and by URL, generates.

``python -m tests.support.hub_walk FOLDER`` prints what it found as JSON. Its environment names the hub
(`hub_server.settings`). The folder has a model in ``dense``, as transformers writes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download

import sfpformat
import sfpformat.hf
from sfpformat.cli import main as sfp

IDS = torch.arange(24).reshape(2, 12)


def push(folder: Path) -> str:
    """Packs the folder, removes the dense weights, and pushes it. Returns the commit."""
    assert sfp(["pack", str(folder), "-o", str(folder / "model.sfp")]) == 0
    (folder / "model.safetensors").unlink()
    api = HfApi()
    api.create_repo("team/small")
    commit = api.upload_folder(repo_id="team/small", folder_path=folder).oid
    api.create_tag("team/small", tag="v1")
    return str(commit)


def generated(model: Any) -> list[list[int]]:
    """Returns what a model generates."""
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0)
    return [[int(one) for one in row] for row in tokens]


def main() -> None:
    """Runs the command."""
    folder = Path(sys.argv[1])
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense")
    expected = generated(dense)
    commit = push(folder / "dense")
    packed = (folder / "dense" / "model.sfp").read_bytes()
    downloaded = Path(hf_hub_download("team/small", "model.sfp", revision="v1")).read_bytes() == packed

    # The branch moves while the file is open, and later loads see the new model.
    name = "model.norm.weight"
    with sfpformat.open("hf://team/small") as file:
        with torch.no_grad():
            dense.model.norm.weight.zero_()
        sfpformat.hf.save_pretrained(dense, folder / "second")
        HfApi().upload_folder(repo_id="team/small", folder_path=folder / "second")
        kept = bool((file.get_tensor(name) != 0).all())
    with sfpformat.open("hf://team/small/model.sfp") as file:
        moved = bool((file.get_tensor(name) == 0).all())

    own, auto = sfpformat.hf.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained
    models = {
        "own, tag": own("team/small", revision="v1"),
        "own, commit": own("team/small", revision=commit),
        "own, URL": own("hf://team/small@v1"),
        "own, URL of a commit": own(f"hf://team/small@{commit}", stay_compressed=True),
        "transformers, tag": auto("team/small", revision="v1"),
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained("team/small", revision="v1")
    pipe = transformers.pipeline("text-generation", model="team/small", revision="v1")
    found = {
        "commit": commit,
        "downloaded": downloaded,
        "kept": kept,
        "moved": moved,
        "wrong": [words for words, model in models.items() if generated(model) != expected],
        "names": [model.name_or_path for model in models.values()],
        "now": generated(own("team/small")) != expected,
        "template": tokenizer.chat_template,
        "text": pipe("a b", do_sample=False)[0]["generated_text"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
