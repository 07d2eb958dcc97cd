"""Padding of batches: excludes it from losses, divergences and statistics.

Rules: a label, output or input "counts" if it is included. The batch's padding mask defines the padding
(`unpadded`), and labels of `IGNORED` do not count. An output counts if the loss depends on it. An input of a
layer counts if it is not padding. In a causal model, inputs after a row's last label do not count either,
because the loss depends on no later output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, warn
from ..names import listed
from .batches import IGNORED, Kind, kind_of, labels_of

# Items of a batch that are padding masks -> the value for padding: False (or 0) in transformers, True in
# torch's own layers.
_MASKS = {"attention_mask": False, "key_padding_mask": True, "src_key_padding_mask": True}


def unpadded(batch: Any) -> Tensor | None:
    """Returns the padding mask of a batch, from ``attention_mask`` or torch's ``key_padding_mask``.

    Returns:
        bool [batch, positions], False for padding; None if the batch has no such mask. Masks of another rank
        are attention masks, not padding masks, and are ignored.
    """
    if isinstance(batch, Mapping):
        for name, padding in _MASKS.items():
            mask = batch.get(name)
            if isinstance(mask, Tensor) and mask.dim() == 2:
                return (mask != 0) ^ padding
    return None


def _of_decoder(batch: Any) -> Tensor | None:
    """Returns the padding mask of a decoder's inputs, or None if it is unknown."""
    mask = batch.get("decoder_attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    return _up_to_last_label(batch)


def _token_labels(batch: Any) -> Tensor | None:
    """Returns labels if there is one for each token: whole numbers [batch, positions]; else None."""
    labels = labels_of(batch)
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return labels
    return None


def _up_to_last_label(batch: Any) -> Tensor | None:
    """Returns a mask that is True up to each row's last label that counts: bool [batch, positions]."""
    labels = _token_labels(batch)
    if labels is None:
        return None
    return (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0


def counted_labels(labels: Any, mask: Tensor | None, kind: Kind) -> Any:
    """Returns labels with `IGNORED` at padding, if there is one label for each position of the mask."""
    if mask is None or kind is Kind.SEQ2SEQ or not isinstance(labels, Tensor):
        return labels
    if labels.shape != mask.shape or labels.is_floating_point():
        return labels
    return labels.masked_fill(~mask.to(labels.device), IGNORED)


def counted_outputs(outputs: Tensor, batch: Any, mask: Tensor | None, kind: Kind) -> Tensor | None:
    """Returns which outputs count: bool, their shape without the last dimension; None if all count.

    Args:
        outputs: [..., classes].
        batch: the batch of the outputs; labels are optional.
        mask: the padding mask from `unpadded`.
        kind: the kind of the model.

    Raises:
        OptionError: there is padding, but the mask has another shape than the outputs' positions.
    """
    leading = outputs.shape[:-1]
    if kind is Kind.SEQ2SEQ:
        mask = _of_decoder(batch)
        mask = mask if mask is None or mask.shape == leading else None
    elif mask is not None and mask.shape != leading:
        if len(leading) > 1 and not bool(mask.all()):
            raise OptionError(
                f"the padding mask {list(mask.shape)} does not fit the outputs' positions {list(leading)}; "
                "give a Task whose unpadded returns a mask of their shape"
            )
        mask = None  # one output for each row, or no padding
    counted = None if mask is None else mask.to(outputs.device)
    labels = labels_of(batch)
    if not isinstance(labels, Tensor) or labels.shape != leading or labels.is_floating_point():
        return counted
    by_label = labels.to(outputs.device) != IGNORED
    if kind is Kind.CAUSAL and by_label.dim() > 1:
        by_label = torch.cat([by_label[:, 1:], torch.zeros_like(by_label[:, :1])], 1)
    return by_label if counted is None else counted & by_label


class CountedInputs:
    """Selects the inputs of layers that count, while batches run through a model."""

    def __init__(self, module: nn.Module) -> None:
        """Args:
        module: the model that contains the layers.
        """
        self._kind = kind_of(module)
        self._encoder = _encoder_of(module) if self._kind is Kind.SEQ2SEQ else None
        self._encoding = set(self._encoder.modules()) if self._encoder is not None else set()
        self._encoded: Tensor | None = None
        self._mask: Tensor | None = None
        self._decoder_mask: Tensor | None = None
        self._unmatched: dict[str, tuple[int, ...]] = {}

    def take(self, batch: Any, mask: Tensor | None) -> None:
        """Sets the batch that runs through the model next.

        Args:
            batch: a batch from the loader.
            mask: its padding mask from `unpadded`.
        """
        self._encoded = None
        self._mask = mask
        if self._kind is Kind.CAUSAL:
            seen = _up_to_last_label(batch)
            if seen is not None and (mask is None or mask.shape == seen.shape):
                self._mask = seen if mask is None else seen & mask.to(seen.device)
        self._decoder_mask = _of_decoder(batch) if self._kind is Kind.SEQ2SEQ else self._mask

    def of(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        """Returns the inputs of a layer that count, detached.

        Args:
            name: name of the layer's weight, for the warning of `watching`.
            layer: the layer with the input ``x``.
            x: [..., columns].

        Returns:
            float32 [inputs, columns].
        """
        x = x.detach()
        mask = self._mask if self._sees_encoder(layer, x) else self._decoder_mask
        return (x if mask is None else self._matched(name, x, mask)).reshape(-1, x.shape[-1]).float()

    def _sees_encoder(self, layer: nn.Module, x: Tensor) -> bool:
        """Returns whether a layer's inputs have the encoder's positions; True if there is no encoder."""
        if self._encoder is None or layer in self._encoding:
            return True
        seen = self._encoded
        return seen is not None and x.data_ptr() == seen.data_ptr() and x.shape == seen.shape

    def _matched(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        """Returns the inputs without padding; all of them if there is none or the mask does not fit."""
        if bool(mask.all()):
            return x
        mask = mask.to(x.device)
        rows, length = mask.shape
        if x.dim() > 2 and x.shape[:2] == mask.shape:
            return x[mask]
        if x.dim() > 2 and x.shape[:2] == (length, rows):
            return x[mask.T]
        if x.dim() == 2 and len(x) == rows * length:
            return x[mask.flatten()]
        if x.numel() != rows * x.shape[-1]:  # one input a row, such as a pooled one, has no padding
            self._unmatched.setdefault(name, tuple(x.shape))
        return x

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context that records the encoder's output. At the end, warns of inputs without a fitting mask."""

        def see(encoder: nn.Module, args: Any, outputs: Any) -> None:
            found = outputs if isinstance(outputs, Tensor) else getattr(outputs, "last_hidden_state", None)
            if found is None and isinstance(outputs, tuple):
                found = outputs[0]
            self._encoded = found

        handle = None if self._encoder is None else self._encoder.register_forward_hook(see)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
        if self._unmatched:
            first = next(iter(self._unmatched.values()))
            warn(
                f"the statistics of {listed(list(self._unmatched))} include padding, because the shape of "
                f"their inputs, such as {list(first)}, does not fit the padding mask"
            )


def _encoder_of(module: nn.Module) -> nn.Module | None:
    """Returns the encoder of an encoder-decoder, from transformers' ``get_encoder``; None without one."""
    for part in module.modules():
        get = getattr(part, "get_encoder", None)
        if callable(get):
            found = get()
            return found if isinstance(found, nn.Module) and found is not part else None
    return None
