"""The options of the encoder. Each has a default. For None, the encoder chooses by measured estimates."""

from .presets import PRESETS, options_by_name, require_options
from .quantisers import BITS, SCALES, WEIGHTED, Exact, Lossless, LossyQuantiser, Quantiser, Table, Uniform
from .tensor import CODINGS, MASKS, ZEROS, ImportanceOptions, Options

__all__ = [
    "BITS",
    "CODINGS",
    "MASKS",
    "PRESETS",
    "SCALES",
    "WEIGHTED",
    "ZEROS",
    "Exact",
    "ImportanceOptions",
    "Lossless",
    "LossyQuantiser",
    "Options",
    "Quantiser",
    "Table",
    "Uniform",
    "options_by_name",
    "require_options",
]
