"""``sfp learn`` on tiny models of transformers with a tokenizer of words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import sfpformat
from sfpformat.cli import main
from sfpformat.errors import OptionError
from sfpformat.pruning.texts import read_texts, text_data

from ..support.pruning_transformers import made

WORDS = [f"w{i}" for i in range(35)]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.utils.logging.enable_progress_bar()


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
    assert found["output_bytes"] == target.stat().st_size
    if measure == "Spearman":
        assert found["dense"] == pytest.approx(1)
        assert -1 <= found["pruned_as_learned_loaded_from_the_file"] < 1
    else:
        assert 1 < found["dense"] < 200
    with sfpformat.open(target) as file:
        masked = [entry for entry in map(file.entry, file) if entry.importance is not None]
    assert len(masked) > 5
    assert main(words) == 0
    assert measure in capsys.readouterr().out


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
    assert main(resumed) == 0
    assert steps == [*range(12), 10, 11]
    assert json.loads(capsys.readouterr().out)["held_out_learned"] == whole["held_out_learned"]
    assert (tmp_path / "resumed.sfp").read_bytes() == (tmp_path / "whole.sfp").read_bytes()


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
        (odd, [], "no language model"),
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
