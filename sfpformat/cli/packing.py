"""`pack_shard`: packs one shard of a checkpoint, in any process of any machine that shares the folders."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace

from ..encode.packed_shard import PackedShard
from ..errors import OptionError
from ..io.threads import thread_count
from .console import progress
from .errors import CommandError
from .model_files import open_model
from .pack import prepared
from .pack_files import pack_file
from .pack_shards import finish_shards, pack_one


def shard_count(src: str | os.PathLike[str]) -> int:
    """Returns the number of files of a safetensors checkpoint: an index, a folder, or a file.

    Raises:
        OptionError: it is not a safetensors checkpoint.
        OSError: it cannot be read.
    """
    try:
        with open_model(src, kind="safetensors") as model:
            return len(model.files)
    except CommandError as error:
        raise OptionError(str(error)) from error


def pack_shard(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    options: str | Sequence[str] = (),
    *,
    number: int,
    threads: int | None = None,
) -> PackedShard:
    """Packs one file of a safetensors checkpoint, with the bytes of ``sfp pack SRC -o DST OPTIONS``.

    Call it once for each number, in any order, in processes of any machines that share the two folders. The
    call that finds all shards finished gives them their final names, and writes the index last; until then,
    an older model of the same name stays. It is idempotent while the model is incomplete: a finished shard is
    accepted, an interrupted one is resumed, and ``sfp pack`` with the same options accepts the finished ones.

    Options that share over the model, such as ``--scope model`` and ``--budget``, read the whole checkpoint
    in each call.

    Examples::

        numbers = range(1, shard_count("checkpoint/") + 1)
        call = joblib.delayed(pack_shard)
        joblib.Parallel(4)(call("checkpoint/", "out/m.sfp", "--bits 4", number=n) for n in numbers)

        for n in numbers[rank::world]:  # torchrun, Slurm
            pack_shard("checkpoint/", "out/m.sfp", "--bits 4", number=n)

    Args:
        src: the checkpoint: an index, or a folder.
        dst: the path of the model, such as ``out/m.sfp``, for ``out/m-00001-of-0000N.sfp`` and
            ``out/m.sfp.index.json``.
        options: options of ``sfp pack``, as a string or as words.
        number: the number of the shard, from 1.
        threads: the greatest number of threads; None uses the available cores. The bytes do not depend on it.

    Raises:
        OptionError: an option is wrong, or there is no shard of this number.
        LockedFileError: another process is writing this shard.
        OSError: a file cannot be read or written. Finished shards are kept.
    """
    from . import parsed  # lazy: the command imports its subcommands when they are used

    thread_count(threads)
    words = shlex.split(options) if isinstance(options, str) else list(options)
    if isinstance(number, bool) or not isinstance(number, int):
        raise OptionError(f"number is {number!r}, must be the number of a shard, from 1")
    try:
        args = parsed(["pack", os.fspath(src), "-o", os.fspath(dst), *words])
        refused = [name for name in ("single", "dry_run", "verify", "json") if getattr(args, name)]
        if refused or args.jobs > 1:
            raise OptionError(f"pack_shard has no option --{(*refused, 'jobs')[0].replace('_', '-')}")
        with prepared(args, number) as found, progress(0, "", show=False) as silent:
            job = replace(found.job, threads=threads)
            path = found.outputs[number - 1]
            if len(found.outputs) == 1:
                names = list(job.model.specs)
                resumed = pack_file(job, names, job.model.metadata(), path, silent)
                return PackedShard(str(path), len(names), resumed, False)
            names = job.model.names_in(list(job.model.files)[number - 1])
            stem = found.target.with_suffix("")
            resumed = pack_one(job, stem, number, silent)
            return PackedShard(str(path), len(names), resumed, finish_shards(job, stem))
    except CommandError as error:
        raise OptionError(str(error)) from error
