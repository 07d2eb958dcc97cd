"""``sfp learn`` on tiny models of transformers with a tokenizer of words."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sfpformat
import sfpformat.numpy
from sfpformat.cli import main
from sfpformat.cli.console import progress
from sfpformat.errors import OptionError
from sfpformat.pruning.launch import launched
from sfpformat.pruning.texts import read_texts, text_data

from ..support.pruning_transformers import saved, text


@pytest.fixture(autouse=True)
def quiet() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize(
    ("name", "kind", "measure"),
    [
        ("LlamaForCausalLM", "causal", "perplexity"),
        ("BertForMaskedLM", "masked", "perplexity"),
        ("BertModel", "encoder", "Spearman"),
    ],
)
def test_learn_prunes_a_model_writes_it_and_measures_the_written_file(
    name: str, kind: str, measure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data, target = saved(name, tmp_path / "model"), text(tmp_path), tmp_path / "pruned.sfp"
    words = ["learn", str(folder), "--data", str(data), "--sparsity", "0.5", "-o", str(target)]
    words += ["--steps", "3", "--window", "16", "--batch", "2", "--calibration", "4"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["measure"], found["steps"]) == (kind, measure, 3)
    assert found["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert found["held_out_learned"] <= found["held_out_start"]
    assert found["start_losses"][found["start"]] == min(found["start_losses"].values())
    assert found["output_bytes"] == target.stat().st_size
    if measure == "Spearman":
        assert found["dense"] == pytest.approx(1)
        assert -1 <= found["pruned_as_learned"] < 1
    else:
        assert 1 < found["dense"] < 200
    with sfpformat.open(target) as file:
        masked = [entry for entry in map(file.entry, file) if entry.importance is not None]
    assert len(masked) > 5
    assert main(words) == 0
    assert measure in capsys.readouterr().out


def test_learn_keeps_a_pattern_and_is_not_worse_than_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data, target = saved("LlamaForCausalLM", tmp_path / "model"), text(tmp_path), tmp_path / "out.sfp"
    words = ["learn", str(folder), "--data", str(data), "--pattern", "2:4", "-o", str(target), "--json"]
    assert main([*words, "--steps", "3", "--window", "16", "--calibration", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sparsity"] == 0.5
    assert found["held_out_learned"] <= found["held_out_start"]
    loaded = sfpformat.numpy.load_file(target)
    with sfpformat.open(target) as file:
        masked = [name for name in file if file.entry(name).importance is not None]
    assert len(masked) > 5
    for name in masked:
        assert ((loaded[name].reshape(-1, 4) != 0).sum(1) == 2).all(), name
    for wrong in ("2", "2:4:8", "a:b", "4:4"):
        words[words.index("--pattern") + 1] = wrong
        assert main(words) == 2
    assert "must keep at least 1 and fewer than all" in capsys.readouterr().err


def test_an_interrupted_run_resumes_from_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfpformat.pruning.hierarchy import Learner

    folder, data = saved("LlamaForCausalLM", tmp_path / "model"), text(tmp_path)
    words = ["learn", str(folder), "--data", str(data), "--sparsity", "0.5", "--steps", "12", "--json"]
    words += ["--window", "16", "--calibration", "4"]
    assert main([*words, "-o", str(tmp_path / "whole.sfp")]) == 0
    whole = json.loads(capsys.readouterr().out)
    state, steps = tmp_path / "state.pt", []
    learn = Learner.learn

    def stopping(self: Learner, batch: Any) -> float:
        steps.append(self.step)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return learn(self, batch)

    monkeypatch.setattr(Learner, "learn", stopping)
    resumed = [*words, "--resume", str(state), "-o", str(tmp_path / "resumed.sfp")]
    assert main(resumed) == 130
    assert state.exists()
    assert (tmp_path / "state.pt.statistics").exists()
    capsys.readouterr()
    assert main(resumed) == 0
    assert steps == [*range(12), 10, 11]
    printed = capsys.readouterr()
    assert f"sfp: {state}.statistics: resumed at window 4\n" in printed.err
    assert f"sfp: {state}: resumed at step 10\n" in printed.err
    phases = ("reading", "statistics", "learning", "writing resumed.sfp", "measuring")
    lines = [line for line in printed.err.splitlines() if "resumed at" not in line]
    assert len(lines) == 2 * len(phases)  # the start and the end of each phase
    for number, phase in enumerate(phases):
        assert lines[2 * number].startswith(f"sfp: {phase}")
        assert lines[2 * number].endswith(" ...")
        assert lines[2 * number + 1].endswith(" s")
    assert json.loads(printed.out)["held_out_learned"] == whole["held_out_learned"]
    assert (tmp_path / "resumed.sfp").read_bytes() == (tmp_path / "whole.sfp").read_bytes()
    data.write_text(data.read_text().replace("w1 ", "w2 "))
    assert main(resumed) == 2
    assert f"{state}.statistics is a checkpoint of a run with other data" in capsys.readouterr().err


def test_progress_without_a_terminal_prints_a_line_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 10.0, 31.0, 40.0, 62.0, 63.0])
    monkeypatch.setattr("sfpformat.cli.console.time.monotonic", lambda: next(now))
    with progress(3, "learning", steps=True, lines=True) as shown:
        shown.advance(1)
        shown.advance(1)
        shown.at("step 3")
        shown.advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "sfp: learning ...",
        "sfp: learning: 2 of 3 after 31 s",
        "sfp: learning: 3 of 3, step 3 after 62 s",
        "sfp: learning: 63 s",
    ]
    with progress(3, "packing"):
        pass
    assert capsys.readouterr().err == ""


def test_wrong_arguments_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    (tmp_path / "text.txt").write_text("one\n")
    program = """
import json, sys
from sfpformat.cli import main
from sfpformat.cli.console import progress
for words in json.load(sys.stdin):
    assert main(words) == 2
assert not {"torch", "transformers"} & set(sys.modules)
"""
    usual = {"--data": str(tmp_path / "text.txt"), "--sparsity": "0.5", "-o": str(tmp_path / "out.sfp")}
    wrong = {
        "--sparsity is 60.0": {"--sparsity": "60"},
        "--minutes is 0.0": {"--minutes": "0"},
        "missing.txt": {"--data": "missing.txt"},
        "sfp learn' writes .sfp": {"-o": "out.bin"},
        "there is no folder": {"-o": str(tmp_path / "no" / "out.sfp")},
        f"no{os.sep}s.pt: there is no folder": {"--resume": str(tmp_path / "no" / "s.pt")},
        "--steps is 0": {"--steps": "0"},
    }
    commands = [
        ["learn", str(tmp_path), *(word for pair in {**usual, **more}.items() for word in pair)]
        for more in wrong.values()
    ]
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(wrong)
    for told, line in zip(wrong, lines, strict=True):
        assert told in line


def test_a_missing_cuda_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(OptionError, match="finds no CUDA device on this machine; use cpu"), launched("cuda"):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(OptionError, match=r"process 1 .* there is 1; start fewer"), launched("cuda"):
        pass


def test_wrong_arguments_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, data = saved("LlamaForCausalLM", tmp_path / "model"), text(tmp_path)
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text(json.dumps({"architectures": ["BertForTokenClassification"]}))
    target = str(tmp_path / "out.sfp")
    for model, more, told in (
        (tmp_path, [], "config.json"),
        (folder, ["--sparsity", "1.5"], "between 0 and 1"),
        (folder, ["--steps", "0"], "--steps"),
        (folder, ["--minutes", "-1"], "--minutes"),
        (folder, ["-o", str(tmp_path / "out.safetensors")], ".sfp"),
        (folder, ["--window", "4096"], "windows of 4096 tokens"),
        (odd, [], "neither a language model nor an encoder"),
    ):
        words = ["learn", str(model), "--data", str(data), "--sparsity", "0.5", "-o", target, *more]
        assert main(words) == 2
        assert told in capsys.readouterr().err
    assert not Path(target).exists()


def test_texts_are_read_from_jsonl_lines_and_whole_files(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one"}\n\n{"text": "two", "n": 3}\n')
    plain = tmp_path / "b.py"
    plain.write_text("three\nfour\n")
    assert list(read_texts([lines, plain])) == ["one", "two", "three\nfour\n"]
    for wrong in ("not json\n", '{"body": "x"}\n', "[1]\n"):
        lines.write_text(wrong)
        with pytest.raises(OptionError, match="line 1"):
            list(read_texts([lines]))
    plain.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="UTF-8"):
        list(read_texts([plain]))


def test_training_calibration_and_test_windows_do_not_overlap(tmp_path: Path) -> None:
    folder = saved("LlamaForCausalLM", tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = text_data([text(tmp_path).read_text()], tokenizer, "causal", window=16, batch=1)
    parts = [
        {tuple(row.tolist()) for batch in part for row in batch["input_ids"]}
        for part in (data.learned_from, data.held_out, data.evaluated)
    ]
    sizes = [len(part) for part in (data.learned_from, data.held_out, data.evaluated)]
    assert sizes[0] > 5 * sizes[1] >= 5 * sizes[2] > 0
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_two_processes_of_torchrun_write_the_file_of_one(tmp_path: Path) -> None:
    folder, data = saved("LlamaForCausalLM", tmp_path / "model"), text(tmp_path)
    words = ["learn", str(folder), "--data", str(data), "--sparsity", "0.5", "--steps", "6", "--json"]
    words += ["--window", "16", "--calibration", "5"]
    assert main([*words, "--batches", "2", "-o", str(tmp_path / "one.sfp")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "sfpformat.cli", *words, "-o", str(tmp_path / "two.sfp")]
    done = subprocess.run([*launcher, *program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2  # one process prints
    assert (tmp_path / "two.sfp").read_bytes() == (tmp_path / "one.sfp").read_bytes()


def test_an_error_of_one_process_ends_all_with_the_same_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.learn_command_group", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found = json.loads(done.stdout)
    codes = {name: [rank["code"] for rank in ranks] for name, ranks in found.items()}
    assert codes == {
        "interrupted": [130, 130],
        "resumed": [0, 0],
        "no data": [2, 2],
        "no memory": [2, 2],
        "disk full": [2, 2],
        "gone": [2, 9],
    }
    told = {name: [rank["stderr"] for rank in ranks] for name, ranks in found.items()}
    other = "sfp: error: process {} of 2 failed; see the error on that process\n"
    assert "state.pt: resumed at step 10\n" in told["resumed"][0]
    assert told["resumed"][1] == ""
    assert told["no data"][0].endswith(other.format(1))
    assert "No such file" in told["no data"][1]
    assert told["no memory"][1] == "sfp: error: not enough memory\n"
    assert "process 0 of 2 received nothing" in told["no memory"][0]
    assert told["disk full"][0].endswith("sfp: error: full.sfp: No space left on device\n")
    assert told["disk full"][1] == other.format(0)
    assert all(rank["seconds"] < 60 for ranks in found.values() for rank in ranks)
    assert (tmp_path / "resumed.sfp").read_bytes() == (tmp_path / "whole.sfp").read_bytes()
    assert not (tmp_path / "full.sfp").exists()


def test_batches_must_divide_among_the_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfpformat.cli.errors import CommandError
    from sfpformat.cli.learn import _require

    (tmp_path / "config.json").write_text("{}")
    args = argparse.Namespace(
        folder=tmp_path, output="a.sfp", sparsity=0.5, data=[], batches=3, minutes=None, steps=1, window=2
    )
    args.batch = args.calibration = args.threads = 1
    args.pattern = None
    _require(args, 3)
    with pytest.raises(CommandError, match="multiple of 2, the number of processes"):
        _require(args, 2)
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["learn", str(tmp_path), "--data", "a", "--sparsity", "0.5", "-o", "a.sfp"]) == 2
    assert "WORLD_SIZE is 'two'" in capsys.readouterr().err
