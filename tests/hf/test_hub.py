"""A model is pushed to a hub and loaded from it, by huggingface_hub and transformers themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.file_server import FileServer, serving
from ..support.hub_server import TOKEN, Hub, settings
from .test_folders import llama, tokenizer


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    (tmp_path / "hub").mkdir()
    return Hub(tmp_path / "hub")


@pytest.fixture
def server(hub: Hub) -> Iterator[FileServer]:
    with serving(hub.folder, hub.routes) as found:
        yield found


def process(server: FileServer, folder: Path, *words: str, token: str | None = None) -> tuple[str, str]:
    """Runs Python in an environment with the hub. Returns its output and its errors."""
    run = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **settings(server, folder / "cache", token)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return run.stdout, run.stderr


def test_a_packed_model_is_pushed_loaded_by_name_and_url_and_generates(
    server: FileServer, hub: Hub, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    out, errors = process(server, tmp_path, "-m", "tests.support.hub_walk", str(tmp_path), token=TOKEN)
    assert out, errors
    found = json.loads(out.splitlines()[-1])
    repository = hub.repositories["team/small"]
    assert found["commit"] == repository.refs["v1"]
    assert repository.commits[found["commit"]]["model.sfp"].large
    assert found["downloaded"]
    assert found["kept"]
    assert found["moved"]
    assert found["wrong"] == []
    assert found["names"] == [
        *["team/small"] * 2,
        "hf://team/small@v1",
        f"hf://team/small@{found['commit']}",
        "team/small",
    ]
    assert found["now"]
    assert found["template"] == tokenizer().chat_template
    assert found["text"].startswith("a b")


def test_repositories_without_model_access_or_revision_are_named(
    server: FileServer, hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    hub.commit("team/empty", tmp_path / "empty")
    hub.commit("team/secret", tmp_path / "empty")
    hub.repositories["team/secret"].private = True
    code = """
import sys, transformers
from sfpformat.hf import from_pretrained
calls = (
    lambda: from_pretrained("hf://team/secret"),
    lambda: from_pretrained("team/secret"),
    lambda: from_pretrained("hf://team/empty@v9"),
    lambda: from_pretrained("team/empty", revision="v9"),
    lambda: from_pretrained("hf://team/empty"),
    lambda: from_pretrained("team/empty"),
    lambda: transformers.AutoModelForCausalLM.from_pretrained("team/empty"),
    lambda: transformers.AutoModelForCausalLM.from_pretrained("team/secret"),
)
for call in calls:
    try:
        call()
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()))
"""
    out, errors = process(server, tmp_path, "-c", code)
    expected = [
        "PermissionError.*is private: log in.*hf://team/secret",
        "401",
        "FileNotFoundError.*no such revision.*hf://team/empty@v9",
        "Revision.?Not.?Found.*v9",
        "has no .sfp file",
        "OptionError the repository team/empty has no .sfp file at revision main",
        "OSError team/empty does not appear to have a file named",
        "OSError.*team/secret",
    ]
    lines = out.splitlines()
    assert len(lines) == len(expected), errors
    for line, words in zip(lines, expected, strict=True):
        assert re.search(words, line), line
