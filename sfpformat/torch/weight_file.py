"""Files that contain one tensor, the weight of a layer: the name of the tensor, and opening the file."""

from __future__ import annotations

import torch

from ..decode.reader import SfpFile
from ..errors import MismatchError, OptionError
from .tensors import missing_memory

# The name of the tensor in its file.
TENSOR_NAME = "weight"


def open_weight(data: torch.Tensor) -> SfpFile:
    """Opens the file in a uint8 vector. Bytes on another device are copied to the CPU.

    Raises:
        MismatchError: ``data`` is empty.
        OptionError: the memory of ``data`` was freed.
        InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
    """
    if not data.numel():
        raise MismatchError("the layer has no weight yet; call load_state_dict")
    reason = missing_memory(data)
    if reason is not None:
        raise OptionError(f"the layer's compressed weight {reason}")
    return SfpFile(data.detach().cpu().numpy().data, threads=torch.get_num_threads())
