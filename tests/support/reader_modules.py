"""The modules of the pure-Python reader, found by their folders, so that a moved module stays among them."""

from __future__ import annotations

from pathlib import PurePosixPath

from .clauses import ROOT

_FOLDERS = ("coding", "container", "decode")
_FILES = ("deltas/reading.py", "engines/reference.py", "limits.py")
# Modules of these folders that the pure-Python reader of one file does not use.
_OTHERS = {
    *("classes", "counts", "exact_encoding", "magnitudes"),  # for the encoder
    *("device_batches", "fast_path"),  # for other engines
    # For several files, and for processes.
    *("array_memory", "delta_maps", "opening", "pickling", "shard_index", "shards"),
    "prefetch",  # for files behind URLs
}


def reader_modules() -> tuple[str, ...]:
    """Returns the names of the modules in the package ``sfpformat``, such as ``container.chunk``.

    Raises:
        LookupError: a module that is left out no longer exists.
    """
    package = ROOT / "sfpformat"
    paths = [path for folder in _FOLDERS for path in sorted((package / folder).rglob("*.py"))]
    stale = _OTHERS - {path.stem for path in paths}
    if stale:
        raise LookupError(f"no module is called {', '.join(sorted(stale))}")
    paths = [path for path in paths if path.stem not in {*_OTHERS, "__init__"}]
    paths += [package / file for file in _FILES]
    names = (PurePosixPath(path.relative_to(package).as_posix()).with_suffix("") for path in paths)
    return tuple(".".join(name.parts) for name in names)
