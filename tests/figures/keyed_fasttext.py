"""fastText beside keyed tables: trained on the same lines, and quantised to a given size.

``python -m tests.figures.keyed --fasttext`` calls this module. It needs the package ``fasttext``; the wheels
``fasttext-wheel`` and ``fasttext-numpy2-wheel`` need no compiler.
"""

from __future__ import annotations

import importlib
import re
import tempfile
import time
from pathlib import Path
from typing import Any

_WORD = re.compile(r"\w+")
_SETTINGS = {"lr": 0.5, "epoch": 5, "thread": 1, "verbose": 0}  # one thread: the same model each time
_DIMENSIONS, _BYTES = 10, 16.0  # bytes of a feature in a quantised file, about
_ATTEMPTS = 4  # to reach the size
Lines = list[tuple[str, str]]


def fasttext(train: Lines, test: Lines, size: int) -> list[tuple[str, int, float]]:
    """Returns the name, the bytes and the accuracy of fastText's model, and of it quantised to a size.

    The model has the words and the word n-grams of the linear classifier. Product quantisation keeps the
    features of the greatest norms (`cutoff`) and trains them again (`retrain`).
    """
    try:
        package: Any = importlib.import_module("fasttext")
    except ImportError:
        print("fastText: left out, because it is not installed (pip install --no-deps fasttext-numpy2-wheel)")
        return []
    with tempfile.TemporaryDirectory() as folder:
        given, stored = Path(folder, "train.txt"), Path(folder, "model.bin")
        given.write_text("".join(f"__label__{label} {_words(line)}\n" for line, label in train), "utf-8")
        start = time.process_time()
        model = package.train_supervised(
            str(given), dim=_DIMENSIONS, wordNgrams=3, minCount=1, bucket=2_000_000, **_SETTINGS
        )
        seconds = time.process_time() - start
        model.save_model(str(stored))
        found = [(f"fastText, trained in {seconds:.0f} s", stored.stat().st_size, _accuracy(model, test))]
        cutoff, best = int(size / _BYTES), 0
        for _ in range(_ATTEMPTS):
            model = package.load_model(str(stored))
            model.quantize(str(given), cutoff=cutoff, retrain=True, qnorm=True, **_SETTINGS)
            model.save_model(str(Path(folder, "model.ftz")))
            best = Path(folder, "model.ftz").stat().st_size
            if 0.97 * size <= best <= size:
                break
            cutoff = int(cutoff * 0.99 * size / best)
        lines = [_words(line) for line, _ in test]
        start = time.process_time()
        model.predict(lines)
        speed = len(lines) / (time.process_time() - start)
        name = f"fastText, quantised, {cutoff:,} features, {speed:,.0f} lines a second"
        return [*found, (name, best, _accuracy(model, test))]


def _words(line: str) -> str:
    return " ".join(_WORD.findall(line.lower()))


def _accuracy(model: Any, test: Lines) -> float:
    """Returns the share of lines whose label is found."""
    labels, _ = model.predict([_words(line) for line, _ in test])
    right = sum(found[0] == f"__label__{label}" for found, (_, label) in zip(labels, test, strict=True))
    return float(right / len(test))
