"""Named options, and the options of the tensors of a file by their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ..errors import OptionError, UnknownPresetError
from ..names import require_known, unknown_name
from .tensor import Options

# One code per stream, codewords that fit an 8-bit look-up table, and residuals of whole bytes. Segments are
# parts of rows, and short, so that a chunk has work for many lanes.
_GPU = Options(mantissa_bits=0, trim=False, group=1, codes=1, code_limit=8, segment_near=512)


class _Presets(Mapping[str, Options]):
    """Read-only mapping: name of a preset -> options. The error for an unknown name lists the presets."""

    def __init__(self, presets: dict[str, Options]) -> None:
        self._presets = presets

    def __getitem__(self, name: str) -> Options:
        """Returns the options of a preset.

        Raises:
            UnknownPresetError: there is no preset of that name.
        """
        if name not in self._presets:
            raise UnknownPresetError(f"{unknown_name(name, self, 'preset')}; choose from {', '.join(self)}")
        return self._presets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._presets)

    def __len__(self) -> int:
        return len(self._presets)

    def __repr__(self) -> str:
        return f"PRESETS({', '.join(self)})"


PRESETS: Mapping[str, Options] = _Presets(
    {
        "default": Options(),
        # Class = exponent: residuals of 8 bits (BF16) or 24 (F32) are whole bytes. Windows of seven
        # exponents, which vector registers decode. Where windows do not fit, one code per stream: one
        # look-up table to build and to keep in the cache. Long segments: less overhead per segment.
        "speed": Options(mantissa_bits=0, group=1, codes=1, window=3, segment=3072),
        # The class includes two mantissa bits.
        "size": Options(mantissa_bits=2, codes=16),
        # For decoding on a GPU.
        "gpu": _GPU,
        # For matrix products on a GPU without decoding, if weights are quantised to 8 magnitudes.
        "fused": _GPU.but(fixed_width=True),
    }
)


def require_options(options: object, what: str) -> Options:
    """Checks the type of the caller's options, and returns them.

    Args:
        options: `Options`, or None for lossless.
        what: name of the argument in messages, such as ``the options of 'w'``.

    Raises:
        OptionError: ``options`` has another type.
    """
    if options is None:
        return Options()
    if not isinstance(options, Options):
        given = f", {options!r}," if isinstance(options, (str, int, float)) else ""
        hint = f"; pass PRESETS[{options!r}]" if isinstance(options, str) and options in PRESETS else ""
        raise OptionError(f"{what}: a {type(options).__name__}{given} is not Options{hint}")
    return options


def options_by_name(
    options: Options | Mapping[str, Options] | None, names: Iterable[str]
) -> dict[str, Options]:
    """Returns the options of each tensor.

    Args:
        options: one `Options` for all tensors, or name -> `Options`. None is lossless. Tensors that the
            mapping does not name are lossless, too.
        names: the names of all tensors.

    Raises:
        OptionError: a key is not the name of a tensor, or a value is not `Options`.
    """
    names = list(names)
    if not isinstance(options, Mapping):
        return dict.fromkeys(names, require_options(options, "options"))
    require_known(options, names, "options")
    chosen = {name: require_options(given, f"the options of {name!r}") for name, given in options.items()}
    return {name: chosen.get(name) or Options() for name in names}
