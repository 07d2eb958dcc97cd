"""Finds the file of a model that an inference engine names: a path, a URL, or a repository on the hub."""

from __future__ import annotations

from pathlib import Path

from ..io.paths import INDEX_SUFFIX, SUFFIX, dense_weights_in, models_in


def file_of(source: str, revision: str | None = None, cache: str | None = None) -> Path | str:
    """Returns what `sfpformat.torch.safe_open` opens. Fetches a repository on the hub into the cache.

    Args:
        source: path of a folder, an `.sfp` file or an index; a URL of a file; or the id of a repository.
        revision: branch, tag or commit of the repository. Engines pass one for folders, too: ignored there.
        cache: folder to which repositories are fetched; None is that of the hub.

    Raises:
        OptionError: there is no such folder, and the source is not the id of a repository, or
            huggingface_hub is not installed.
        Exception: an exception of huggingface_hub: the repository cannot be fetched.
    """
    path = Path(source)
    if "://" in source:
        return source
    if path.exists() or source.endswith((SUFFIX, SUFFIX + INDEX_SUFFIX)):
        return path
    from ..hf.folders import folder_of  # lazy: imports transformers

    return folder_of(source, revision, cache)


def has_sfp_file(source: str) -> bool:
    """Whether a path or URL names an `.sfp` file or an index, or a folder with one and no dense weights."""
    if source.endswith((SUFFIX, SUFFIX + INDEX_SUFFIX)):
        return True
    folder = Path(source)
    return folder.is_dir() and bool(models_in(folder)) and not dense_weights_in(folder)
