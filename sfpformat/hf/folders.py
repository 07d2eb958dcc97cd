"""Folders of models: finds the folder, and the class of its model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import transformers

from ..errors import OptionError
from ..io.paths import INDEX_SUFFIX, SUFFIX, model_location, models_in
from ..io.remote.location import Location, OpenFile, location_of
from ..io.remote.source import read_whole
from ..names import quoted

# Files of a repository that a model needs. All others, such as weights in other formats, are not fetched.
PATTERNS = (f"*{SUFFIX}", f"*{SUFFIX}{INDEX_SUFFIX}", "*.json", "*.txt", "*.model", "*.jinja")

# The greatest length of a configuration behind a URL.
_MOST_BYTES = 10_000_000

Source = str | os.PathLike[str] | Location | OpenFile


def folder_of(source: Source, revision: str | None = None, cache: str | None = None) -> Path:
    """Returns the folder of a model. Fetches that of a repository on the hub into the cache of the hub.

    Args:
        source: path of a folder, or the id of a repository, such as ``"organisation/name"``.
        revision: branch, tag or commit of the repository.
        cache: folder of the cache; None is that of the hub.

    Raises:
        OptionError: there is no such folder, and the source is not the id of a repository, or
            huggingface_hub is not installed; or a revision is given for a folder; or the repository has no
            `.sfp` file.
        Exception: an exception of huggingface_hub: the repository cannot be fetched.
    """
    path = Path(cast(str, source))
    if path.is_dir():
        if revision is not None:
            raise OptionError(f"{path} is a folder, which has no revision {quoted(revision)}")
        return path
    if path.exists():
        raise OptionError(f"{path} is a file; give its folder, which has the config.json")
    words = str(source)
    if not isinstance(source, str) or words.startswith((".", "/", "~")) or words.count("/") > 1:
        raise OptionError(f"there is no folder {path}")
    try:
        from huggingface_hub import snapshot_download  # an optional package
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError:
        raise OptionError(
            f"there is no folder {path}; to fetch a repository, install huggingface_hub: "
            "pip install 'sfpformat[hub]'"
        ) from None
    try:
        found = snapshot_download(words, revision=revision, cache_dir=cache, allow_patterns=list(PATTERNS))
    except HFValidationError as error:
        raise OptionError(f"there is no folder {path}, and it is not the id of a repository") from error
    if not models_in(Path(found)):
        raise OptionError(f"the repository {words} has no {SUFFIX} file at revision {revision or 'main'}")
    return Path(found)


@contextmanager
def model_folder(source: Source, revision: str | None = None) -> Iterator[tuple[Path, Path | Location]]:
    """Finds the folder of a model. Yields a local folder with its configurations, and its weights.

    Of a folder behind a URL, only the configurations are fetched. The weights are read by ranges.

    Args:
        source: path of a folder, id of a repository, or URL of a folder.
        revision: branch, tag or commit of a repository.

    Raises:
        OptionError, Exception: as for `folder_of`; or a revision is given for a URL.
        RemoteError, OSError: the server refuses, or has no configuration.
    """
    location = location_of(source)
    if location is None:
        folder = folder_of(source, revision)
        yield folder, folder
        return
    if revision is not None:
        raise OptionError(f"{location}: a URL names its revision itself: hf://organisation/name@{revision}")
    with TemporaryDirectory() as name:
        data, config = read_whole(location.inside("config.json"), _MOST_BYTES)
        (Path(name) / "config.json").write_bytes(data)
        with suppress(FileNotFoundError):
            data, _ = read_whole(config.with_name("generation_config.json"), _MOST_BYTES)
            (Path(name) / "generation_config.json").write_bytes(data)
        yield Path(name), _weights_beside(config)


def _weights_beside(config: Location) -> Location:
    """Returns the location of the only model in the folder of a configuration.

    HTTP cannot list folders: there, it is the index or the file that `save_pretrained` writes.
    """
    if not config.is_http:
        return model_location(config.folder())
    index = config.with_name(f"model{SUFFIX}{INDEX_SUFFIX}")
    try:
        read_whole(index, 0)
    except FileNotFoundError:
        return config.with_name(f"model{SUFFIX}")
    return index


def require_config(folder: Path) -> None:
    """Checks that a folder has the configuration of its model.

    Raises:
        OptionError: it has none.
    """
    if not (folder / "config.json").is_file():
        raise OptionError(f"{folder} has no config.json; save_pretrained writes it")


def config_of(folder: Path) -> Any:
    """Returns the configuration of the model in a folder.

    Raises:
        OptionError: the folder has no ``config.json``, or transformers does not know its model type.
    """
    require_config(folder)
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise OptionError(f"{folder / 'config.json'}: {error}") from error


def class_of(config: Any, wanted: Any = None) -> Any:
    """Returns the class of a model.

    Args:
        config: its configuration.
        wanted: a class of a model or an ``AutoModel…`` class; None takes the class that the configuration
            names.

    Raises:
        OptionError: transformers has no such class, or the ``AutoModel…`` class does not know the model type.
    """
    if wanted is None:
        names = config.architectures or []
        if len(names) != 1:
            raise OptionError(
                f"the config.json of {config.name_or_path} names {len(names)} architectures, must name one; "
                "pass the class of the model as 'cls'"
            )
        found = getattr(transformers, names[0], None)
        if found is None:
            raise OptionError(f"transformers has no class {quoted(names[0])}; pass the class as 'cls'")
        return found
    mapping = getattr(wanted, "_model_mapping", None)
    if mapping is None:
        return wanted
    try:
        found = mapping[type(config)]
    except KeyError:
        raise OptionError(f"{wanted.__name__} has no class for models of {config.model_type!r}") from None
    if isinstance(found, (list, tuple)):  # several classes of one model type
        named = [one for one in found if one.__name__ in (config.architectures or [])]
        return (named or list(found))[0]
    return found
