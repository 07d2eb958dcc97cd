"""Measures the effect of quantisation and pruning on sentence embeddings of all-MiniLM-L6-v2 in `BertModel`.

``python -m tests.figures.embeddings`` writes the model losslessly, quantised, and pruned by magnitude, loads
each file with `load_model` into a `BertModel`, and prints the size of the file relative to the float32
tensors, and Spearman's correlation of the cosine similarities of 200 pairs of sentences with those of the
dense model. The sentences are first sentences of docstrings of the standard library; every second pair is of
neighbours in a source, the others are random. The correlation therefore shows how far similarities change,
not how good they are.

It asserts that without loss every bit of the embeddings equals that of the dense model, and that
`compress_model`, and transformers with slices of the file, give the same bits as `load_model` for every file.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sfpformat import Options, Uniform
from sfpformat.torch import compress_model, load_model, save_model

from .bert import Encoder, dense_model, empty_model, model_of_slices, sentence_pairs
from .masks import magnitude_mask

BITS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
SHARES = (0.3, 0.5, 0.7, 0.9)
# The error of the quantised survivors, in dB.
ERRORS = (-30.0, -20.0)
_LEAST_WEIGHTS = 10_000


def weight_names(model: nn.Module) -> list[str]:
    """The names of the weight matrices; all other tensors are unchanged."""
    return [name for name, p in model.named_parameters() if p.dim() == 2 and p.numel() >= _LEAST_WEIGHTS]


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns Spearman's correlation of two vectors; equal numbers are ranked by their place."""
    ranks = [np.argsort(np.argsort(numbers.double().numpy(), kind="stable")) for numbers in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


class Trial:
    """Files of one model, each loaded and compared with the dense model."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "model.sfp"
        self.dense = dense_model()
        self.names = weight_names(self.dense)
        pairs = sentence_pairs()
        self._encode = Encoder([text for pair in pairs for text in pair])
        self._vectors = self._encode(self.dense)
        self._raw = sum(p.nbytes for p in self.dense.parameters())

    def _similarities(self, vectors: torch.Tensor) -> torch.Tensor:
        return (vectors[0::2] * vectors[1::2]).sum(1)

    def line(self, label: str, options: Options | None = None, share: float = 0.0) -> str:
        """Writes the model, loads it, and returns a line of the comparison.

        Args:
            label: the beginning of the line.
            options: options of the matrices; None for lossless.
            share: the share of each matrix's weights that is pruned, by magnitude.
        """
        named = dict(self.dense.named_parameters())
        masks = {
            name: torch.from_numpy(magnitude_mask(named[name].detach().numpy(), share))
            for name in (self.names if share else ())
        }
        by_name = dict.fromkeys(self.names, options or Options())
        save_model(self.dense, self._path, options=by_name, masks=masks)
        loaded = empty_model()
        load_model(loaded, self._path)
        vectors = self._encode(loaded)
        if options is None and not share:
            assert torch.equal(vectors, self._vectors), "a lossless file changed an embedding"
        assert torch.equal(self._encode(model_of_slices(self._path)), vectors), "slices are something else"
        compress_model(loaded, self._path)
        assert torch.equal(self._encode(loaded), vectors), "a compressed layer computed something else"
        moved = spearman(self._similarities(vectors), self._similarities(self._vectors))
        size = self._path.stat().st_size / self._raw
        return f"{label:<34}{size:8.4f}{moved:12.5f}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        print(f"{'':<34}{'size':>8}{'Spearman':>12}")
        print(trial.line("lossless"), flush=True)
        for bits in BITS[::-1]:
            options = Options(Uniform(budget=bits))
            print(trial.line(f"{bits:g} bits a position", options), flush=True)
        for share in SHARES:
            for error in ERRORS:
                options = Options(Uniform(error_db=error))
                print(trial.line(f"{share:.0%} pruned, the rest at {error:g} dB", options, share), flush=True)


if __name__ == "__main__":
    main()
