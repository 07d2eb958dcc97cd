"""What of a batch is padding: which labels, outputs and layers' inputs count.

Rules: padding is what the batch's mask says (`unpadded`), and labels of `IGNORED` do not count. An output
counts if the loss would be taken of it. An input of a layer counts if it is no padding; in a causal model
also nothing counts that comes after a row's last label, since no later output is looked at.
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

# Items of a batch that are padding masks -> whether padding is False or 0 in them, as transformers has it,
# or True, as torch's own layers have it.
_MASKS = {"attention_mask": False, "key_padding_mask": True, "src_key_padding_mask": True}


def unpadded(batch: Any) -> Tensor | None:
    """The padding mask of a batch, from ``attention_mask`` or from torch's ``key_padding_mask``.

    Returns:
        bool [batch, positions], False for padding; None where the batch has no such mask. A mask of another
        rank says which positions see each other, and nothing of padding.
    """
    if isinstance(batch, Mapping):
        for name, padding in _MASKS.items():
            mask = batch.get(name)
            if isinstance(mask, Tensor) and mask.dim() == 2:
                return (mask != 0) ^ padding
    return None


def _of_decoder(batch: Any) -> Tensor | None:
    """The padding mask of what a decoder sees."""
    mask = batch.get("decoder_attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    return _up_to_last_label(batch)


def _token_labels(batch: Any) -> Tensor | None:
    """The labels of a batch that has one for each token: whole numbers [batch, positions]."""
    labels = labels_of(batch)
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return labels
    return None


def _up_to_last_label(batch: Any) -> Tensor | None:
    """True up to each row's last label that counts: bool [batch, positions]."""
    labels = _token_labels(batch)
    if labels is None:
        return None
    return (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0


def counted_labels(labels: Any, mask: Tensor | None, kind: Kind) -> Any:
    """Labels with `IGNORED` where the mask has padding, if there is one for each position of the mask."""
    if mask is None or kind is Kind.SEQ2SEQ or not isinstance(labels, Tensor):
        return labels
    if labels.shape != mask.shape or labels.is_floating_point():
        return labels
    return labels.masked_fill(~mask.to(labels.device), IGNORED)


def counted_outputs(outputs: Tensor, batch: Any, mask: Tensor | None, kind: Kind) -> Tensor | None:
    """Which outputs count: bool of their shape without the last dimension; None where all do.

    Args:
        outputs: [..., classes].
        batch: that they are of; labels need not be there.
        mask: of padding, as `unpadded` gives it.
        kind: of the model.

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
                "give a Task whose unpadded gives a mask of their shape"
            )
        mask = None  # an output for each row, or no padding
    counted = None if mask is None else mask.to(outputs.device)
    labels = labels_of(batch)
    if not isinstance(labels, Tensor) or labels.shape != leading or labels.is_floating_point():
        return counted
    by_label = labels.to(outputs.device) != IGNORED
    if kind is Kind.CAUSAL and by_label.dim() > 1:
        by_label = torch.cat([by_label[:, 1:], torch.zeros_like(by_label[:, :1])], 1)
    return by_label if counted is None else counted & by_label


class CountedInputs:
    """The inputs of layers that are no padding, while batches go through a model.

    Raises (all methods): OptionError, as `counted_outputs`.
    """

    def __init__(self, module: nn.Module) -> None:
        """Args:
        module: the model, which has the layers.
        """
        self._kind = kind_of(module)
        self._encoder = _encoder_of(module) if self._kind is Kind.SEQ2SEQ else None
        self._encoding = set(self._encoder.modules()) if self._encoder is not None else set()
        self._encoded: Tensor | None = None
        self._mask: Tensor | None = None
        self._decoder_mask: Tensor | None = None
        self._unmatched: dict[str, tuple[int, ...]] = {}

    def take(self, batch: Any, mask: Tensor | None) -> None:
        """Takes up the batch that goes through the model next.

        Args:
            batch: as the loader gives it.
            mask: its padding mask, as `unpadded` gives it.
        """
        self._encoded = None
        self._mask = mask
        if self._kind is Kind.CAUSAL:
            seen = _up_to_last_label(batch)
            if seen is not None and (mask is None or mask.shape == seen.shape):
                self._mask = seen if mask is None else seen & mask.to(seen.device)
        self._decoder_mask = _of_decoder(batch) if self._kind is Kind.SEQ2SEQ else self._mask

    def of(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        """The inputs of a layer that count, detached.

        Args:
            name: of the layer's weight, for the warning of `watching`.
            layer: that takes ``x``.
            x: [..., columns].

        Returns:
            float32 [inputs, columns].
        """
        x = x.detach()
        mask = self._mask if self._sees_encoder(layer, x) else self._decoder_mask
        return (x if mask is None else self._matched(name, x, mask)).reshape(-1, x.shape[-1]).float()

    def _sees_encoder(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether a layer's inputs are the encoder's positions: it is in the encoder or takes its output."""
        if self._encoder is None or layer in self._encoding:
            return True
        seen = self._encoded
        return seen is not None and x.data_ptr() == seen.data_ptr() and x.shape == seen.shape

    def _matched(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        """The inputs without padding; all, where there is none, or where the mask does not fit them."""
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
        if x.numel() != rows * x.shape[-1]:  # one input a row, such as a pooled one, is no padding
            self._unmatched.setdefault(name, tuple(x.shape))
        return x

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, the encoder's output is known. Afterwards warns of inputs that no mask fitted."""

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
                f"padding counts among the inputs of {listed(list(self._unmatched))}: their shape, such as "
                f"{list(first)}, does not fit the padding mask"
            )


def _encoder_of(module: nn.Module) -> nn.Module | None:
    """The encoder of a model of both, as transformers gives it."""
    for part in module.modules():
        get = getattr(part, "get_encoder", None)
        if callable(get):
            found = get()
            return found if isinstance(found, nn.Module) and found is not part else None
    return None
