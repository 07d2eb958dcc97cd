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

from sfpformat.hf import save_pretrained

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


def test_other_files_of_a_repository_do_not_hide_its_model_and_failed_downloads_raise(
    server: FileServer, hub: Hub, tmp_path: Path
) -> None:
    save_pretrained(llama(), tmp_path / "m")
    (tmp_path / "m" / "2_Dense").mkdir()  # as in models of sentence-transformers
    for name in ("2_Dense/model.safetensors", "optimizer.bin"):
        (tmp_path / "m" / name).touch()
    hub.commit("team/parts", tmp_path / "m")
    (tmp_path / "below" / "step").mkdir(parents=True)
    for name in ("config.json", "step/model.sfp"):
        (tmp_path / "below" / name).write_bytes((tmp_path / "m" / Path(name).name).read_bytes())
    hub.commit("team/below", tmp_path / "below")
    (tmp_path / "m" / "model.sfp").write_bytes(b"lost")
    commit = hub.commit("team/lost", tmp_path / "m")
    (hub.folder / hub.repositories["team/lost"].commits[commit]["model.sfp"].sha256).unlink()
    code = """
import transformers, sfpformat.hf
for name in ("team/parts", "team/below", "team/lost"):
    try:
        print(type(transformers.AutoModelForCausalLM.from_pretrained(name)).__name__)
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()))
"""
    out, errors = process(server, tmp_path, "-c", code)
    expected = [
        "LlamaForCausalLM",
        "OSError team/below does not appear to have a file named",
        "RemoteError the .sfp model of the repository team/lost cannot be fetched: .*",
    ]
    lines = out.splitlines()
    assert len(lines) == len(expected), errors
    for line, words in zip(lines, expected, strict=True):
        assert re.match(words, line), line
    assert not list((tmp_path / "cache").rglob("step")), "no model in the folder, so nothing is fetched"
