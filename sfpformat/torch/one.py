"""A file of one tensor: what it is called there, and how it is opened."""

from __future__ import annotations

import torch

from ..decode.reader import SfpFile
from ..errors import MismatchError, OptionError
from .tensors import missing_memory

# The tensor's name in its file.
NAME = "weight"


def opened(data: torch.Tensor) -> SfpFile:
    """The file, read on the processor; bytes on another device are copied there.

    Raises:
        MismatchError: there are no bytes.
        OptionError: their memory was freed.
        InvalidFileError, UnsupportedError, LimitError: they are damaged or refused.
    """
    if not data.numel():
        raise MismatchError("the layer has no weight yet; load_state_dict gives it one")
    reason = missing_memory(data)
    if reason is not None:
        raise OptionError(f"the layer's compressed weight {reason}")
    return SfpFile(data.detach().cpu().numpy().data, threads=torch.get_num_threads())
