"""Keyed tables of a linear text classifier: bytes per key, accuracy, look-ups a second.

``python -m tests.figures.keyed [--marisa] [--fasttext] [--pruned]`` trains a linear classifier on lines of
Python source: which package a line comes from, by word n-grams of up to three words. It prints

* sizes and accuracies beside a pickled dict of float32, the pickle of scikit-learn, a trie of keys
  (marisa-trie), and hashed features of the same size;
* variable beside fixed numbers of check bits of the same size: the mean error that unknown features cause;
* false matches of each class of magnitudes beside the predicted ones;
* accuracy against bits per key, for keys pruned by magnitude, by frequency and variance, by the curvature of
  the loss, and by an importance that is learned (`--pruned`: this alone);
* with ``--fasttext``: fastText, trained on the same lines and quantised to the same size.

The packages must be installed: torch, transformers, scipy, sympy, scikit-learn, numba, numpy, matplotlib.
"""

from __future__ import annotations

import importlib.util
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfpformat import KeyedTable, Table, Uniform
from sfpformat.keyed.keys import packed
from sfpformat.keyed.table import Found
from sfpformat.sklearn import curvature_importance, learned_importance, load, save

from .keyed_fasttext import fasttext

PACKAGES = ("torch", "transformers", "scipy", "sympy", "sklearn", "numba", "numpy", "matplotlib")
_LINES = 55_000  # of each package for training
_TESTED = 6_000
_LEARNED = 16_000  # for learning importances: of files that are in neither, a few lines of each
_LEAST = 20  # characters of a line
Lines = list[tuple[str, str]]
F32 = NDArray[np.float32]


def lines_of(packages: tuple[str, ...]) -> tuple[Lines, Lines, Lines]:
    """Returns lines with their package, for training, for testing and for learning: from different files."""
    chosen, sampled = random.Random(0), random.Random(2)
    found: tuple[Lines, Lines, Lines] = [], [], []
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        files = sorted(Path(spec.origin).parent.rglob("*.py"))
        chosen.shuffle(files)
        own: tuple[list[str], list[str]] = [], []
        others: list[list[str]] = []
        for i, path in enumerate(files):
            lines = (line.strip() for line in path.read_text("utf-8", "replace").splitlines())
            of_file = [line for line in lines if len(line) >= _LEAST]
            if i % 8 and len(own[0]) >= _LINES:
                others.append(of_file)
            else:
                own[i % 8 == 0].extend(of_file)
        for part, lines_, most in zip(found, own, (_LINES, _TESTED), strict=False):
            part.extend((line, package) for line in lines_[:most])
        each = -(-2 * _LEARNED // len(others))
        few = [line for of_file in others for line in sampled.sample(of_file, min(each, len(of_file)))]
        found[2].extend((line, package) for line in few[:_LEARNED])
    # Lines of all packages in turn, in the order of files: the last quarter has other files, of all packages.
    order = [i for _, i in sorted((i % _LEARNED, i) for i in range(len(found[2])))]
    return found[0], found[1], [found[2][i] for i in order]


class Task:
    """The trained model, and the test data as features.

    Attributes:
        keys: the features.
        weights: float32 [features, packages].
        frequency: in how many lines each feature occurs.
    """

    def __init__(self) -> None:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import SGDClassifier

        train, test, self.learned = lines_of(PACKAGES)
        random.Random(1).shuffle(train)
        self.train, self.test = train, test
        self.vectorizer = CountVectorizer(ngram_range=(1, 3), token_pattern=r"\w+", binary=True)
        start = time.perf_counter()
        features = self.vectorizer.fit_transform([line for line, _ in train])
        self.labels = np.array([package for _, package in train])
        self.classifier = SGDClassifier(
            loss="hinge", alpha=1e-6, max_iter=8, tol=None, random_state=0, average=True
        )
        self.classifier.fit(features, self.labels)
        self.seconds = time.perf_counter() - start
        self.keys = list(self.vectorizer.get_feature_names_out())
        self.weights = np.ascontiguousarray(self.classifier.coef_.T, np.float32)
        self.frequency = np.asarray(features.sum(axis=0)).reshape(-1)
        analyze = self.vectorizer.build_analyzer()
        self.features = [sorted(set(analyze(line))) for line, _ in test]
        self.owners = np.repeat(np.arange(len(test)), [len(own) for own in self.features])
        self.asked = packed([feature for own in self.features for feature in own])
        self.wanted = np.array([package for _, package in test])

    def accuracy(self, weights: F32) -> float:
        """Returns the share of lines whose package is found, given the weights of the test's features."""
        scores = np.zeros((len(self.wanted), weights.shape[1]))
        np.add.at(scores, self.owners, weights)
        scores += self.classifier.intercept_
        return float(np.mean(self.classifier.classes_[scores.argmax(axis=1)] == self.wanted))

    def exact(self) -> F32:
        """Returns the weights of all features of the test, from the model; zeros of unknown ones."""
        vocabulary = self.vectorizer.vocabulary_
        flat = [vocabulary.get(feature, -1) for own in self.features for feature in own]
        at = np.array(flat)
        return np.where((at >= 0)[:, None], self.weights[np.maximum(at, 0)], np.float32(0))

    @property
    def importance(self) -> NDArray[np.float64]:
        """How much each key changes scores: its frequency times the variance of its weights."""
        return np.asarray(self.frequency * self.weights.astype(np.float64).var(axis=1), np.float64)


def main() -> None:
    """Prints the figures."""
    task = Task()
    if "--pruned" in sys.argv:
        pruned(task, task.accuracy(task.exact()))
        return
    raw = sum(len(key.encode()) for key in task.keys)
    exact = task.accuracy(task.exact())
    outputs = task.weights.shape[1]
    plain = raw + task.weights.nbytes
    what = f"{len(task.keys):,} features, {outputs} packages, {len(task.train):,} lines"
    print(f"{what}; trained in {task.seconds:.0f} s")
    print(f"share of weights that are 0: {np.mean(task.weights == 0):.3f}")
    row("float32 and key strings", plain, task, exact, exact, plain)
    row(
        "pickled dict of float32",
        len(pickle.dumps(dict(zip(task.keys, task.weights, strict=True)))),
        task,
        exact,
        exact,
        plain,
    )
    row(
        "pickle of scikit-learn",
        len(pickle.dumps((task.vectorizer, task.classifier))),
        task,
        exact,
        exact,
        plain,
    )
    if "--marisa" in sys.argv:
        tries(task, exact, plain)
    best = tables(task, exact, plain)
    hashed(task, best, exact, plain)
    if "--fasttext" in sys.argv:
        predictions(task)
        for name, size, accuracy in fasttext(task.train, task.test, best):
            row(name, size, task, accuracy, exact, plain)
    checks(task)
    pruned(task, exact)


def row(name: str, size: float, task: Task, accuracy: float, exact: float, plain: float) -> None:
    """Prints a line of the table of sizes."""
    each, lost = size / len(task.keys), 100 * (accuracy - exact)
    print(f"{name}: {each:.2f} bytes per key, {plain / size:.1f}-fold, accuracy {accuracy:.4f} ({lost:+.2f})")


def tries(task: Task, exact: float, plain: float) -> None:
    """Prints the size of a trie of the keys with float32 weights beside it."""
    import marisa_trie

    trie = marisa_trie.Trie(task.keys)
    size = len(trie.tobytes())
    row("marisa-trie and float32", size + task.weights.nbytes, task, exact, exact, plain)
    asked = [feature for own in task.features for feature in own]
    start = time.perf_counter()
    for key in asked:
        trie.get(key)
    speed = len(asked) / (time.perf_counter() - start) / 1e6
    print(f"  keys alone {size / len(task.keys):.2f} bytes per key; {speed:.2f} M look-ups a second")


def tables(task: Task, exact: float, plain: float) -> int:
    """Prints keyed tables of several sizes. Returns the bytes of the smallest within 0.2 points."""
    best = 0
    for quantiser, keep in (
        (Uniform(error_db=-30), 1.0),
        (Uniform(error_db=-20), 1.0),
        (Uniform(error_db=-12), 1.0),
        (Table(centroids=4), 1.0),
        (Uniform(error_db=-20), 0.5),
        (Uniform(error_db=-12), 0.5),
        (Uniform(error_db=-8), 0.5),
    ):
        start = time.perf_counter()
        table = KeyedTable.build(
            task.keys,
            task.weights,
            quantiser=quantiser,
            importance=task.importance,
            keep=keep,
        )
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "table.sfp")
            table.write(path)
            size = path.stat().st_size
            opened = KeyedTable.open(path)
            opened.find(task.asked)
            start = time.perf_counter()
            found = opened.find(task.asked)
            speed = len(task.asked) / (time.perf_counter() - start)
        accuracy = task.accuracy(found.weights)
        row(
            f"keyed table, {quantiser.describe()}, {keep:.0%} of the keys", size, task, accuracy, exact, plain
        )
        parts = ", ".join(f"{part} {bits:.2f}" for part, bits in table.parts.items() if bits)
        print(f"  {len(table):,} keys stored, {table.bits_per_key:.2f} bits each ({parts})")
        print(f"  built in {seconds:.1f} s, {speed / 1e6:.1f} M look-ups a second")
        if accuracy >= exact - 0.002 and (not best or size < best):
            best = size
    return best


def predictions(task: Task) -> None:
    """Prints how many lines a second a model in a file answers, from text to label."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.sfp")
        save(path, task.vectorizer, task.classifier, quantiser=Uniform(error_db=-12))
        model, lines = load(path), [line for line, _ in task.test]
        model.predict(lines)
        start = time.process_time()
        accuracy = model.score(lines, task.wanted)
        speed = len(lines) / (time.process_time() - start)
        print(f"sfpformat.sklearn, -12 dB: accuracy {accuracy:.4f}, {speed:,.0f} lines a second")


def hashed(task: Task, size: int, exact: float, plain: float) -> None:
    """Prints the accuracy of hashed features whose weights, of 8 bits, take as many bytes."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import SGDClassifier

    buckets = size // task.weights.shape[1]
    vectorizer = HashingVectorizer(
        ngram_range=(1, 3),
        token_pattern=r"\w+",
        binary=True,
        n_features=buckets,
        norm=None,
        alternate_sign=False,
    )
    model = SGDClassifier(loss="hinge", alpha=1e-6, max_iter=8, tol=None, random_state=0, average=True)
    model.fit(vectorizer.transform([line for line, _ in task.train]), task.labels)
    step = np.abs(model.coef_).max() / 127
    model.coef_ = np.round(model.coef_ / step) * step
    accuracy = float(model.score(vectorizer.transform([line for line, _ in task.test]), task.wanted))
    row(
        f"hashed features, {buckets:,} buckets of {task.weights.shape[1]} bytes",
        size,
        task,
        accuracy,
        exact,
        plain,
    )


def strangers(count: int) -> Any:
    """Returns keys that no table has."""
    return packed([f"\x00stranger {i}" for i in range(count)])


def error_of(found: Found) -> float:
    """Returns the mean sum of the magnitudes that unknown keys get."""
    return float(np.abs(found.weights).sum(axis=1, dtype=np.float64).mean())


def checks(task: Task) -> None:
    """Prints errors by unknown features: variable beside fixed checks; and false matches of each class."""
    unknown = strangers(1_000_000)
    single = np.ascontiguousarray(task.weights[:, :1])
    chosen = Uniform(error_db=-20)
    for bits in (2, 4, 6, 8, 10):
        fixed = KeyedTable.build(task.keys, single, quantiser=chosen, check_bits=bits)
        size = fixed.bits_per_key
        variable = KeyedTable.build(task.keys, single, quantiser=chosen, bits_per_key=size)
        one, other = (error_of(table.find(unknown)) for table in (fixed, variable))
        print(f"{bits} check bits, {size:.2f} bits per key: mean error of unknown features {one:.3g}")
        print(
            f"  variable, {variable.bits_per_key:.2f} bits per key: {other:.3g} ({one / other:.2f}-fold less)"
        )
    table = KeyedTable.build(task.keys, single, quantiser=Table(centroids=8))
    predicted = table.false_matches()
    found = table.find(unknown)
    measured = np.abs(found.weights[:, 0])
    print("magnitude, check bits, false matches predicted and measured:")
    for m, centroid in enumerate(table.map.code.centroids.tolist()):
        own = [c for c in range(len(predicted)) if (table.map.code.levels.base + c) // 2 == m]
        share = float(np.mean(found.known & (measured == np.float32(centroid))))
        used = sorted({table.map.code.checks[c] for c in own if predicted[c]})
        print(f"  {centroid:.4f}, {used}: {predicted[own].sum():.3e}, {share:.3e}")


def importances(task: Task, keep: float) -> Iterator[tuple[str, NDArray[np.float64] | None]]:
    """Yields the importances of keys by which a share of them is kept."""
    yield "magnitude", None
    yield "frequency x variance", task.importance
    texts, labels = [line for line, _ in task.learned], [package for _, package in task.learned]
    model: Any = (task.vectorizer, task.classifier, texts, labels)
    training = [line for line, _ in task.train]
    yield "curvature (gradients)", curvature_importance(*model, training=training)
    start = time.process_time()
    found = learned_importance(*model, keep=keep, training=training)
    losses = (
        f"held-out loss {found.losses[0]:.4f} before, {min(found.losses):.4f} after {found.rounds} rounds"
    )
    print(f"learned in {time.process_time() - start:.0f} s: {losses}")
    yield "learned", found.importance


def pruned(task: Task, exact: float) -> None:
    """Prints accuracy against bits per key of the whole model, for shares of keys kept by each importance."""
    coarse = Uniform(error_db=-12)
    for keep in (1.0, 0.5, 0.25, 0.1, 0.05):
        for name, importance in importances(task, keep) if keep < 1 else (("all", None),):
            table = KeyedTable.build(
                task.keys, task.weights, quantiser=coarse, importance=importance, keep=keep
            )
            accuracy = task.accuracy(table.find(task.asked).weights)
            each, lost = 8 * table.nbytes / len(task.keys), 100 * (accuracy - exact)
            print(
                f"{keep:.0%} of the keys by {name}: {each:.2f} bits per key of the model, {lost:+.2f} points"
            )


if __name__ == "__main__":
    main()
