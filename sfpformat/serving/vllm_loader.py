"""The loader of ``--load-format sfp`` for vLLM. Imports vLLM."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from vllm.config.vllm import get_current_vllm_config_or_none
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ..errors import MismatchError, OptionError, SfpWarning
from ..names import listed
from ..torch import safe_open
from ..torch.lazy_tensor import lazy_weights
from .sources import file_of
from .unfilled import Marks
from .vllm import QUANTIZATION

_OPTIONS = {"strict": True, "threads": None, "engine": None, "keep": 0}


class SfpModelLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM need not be installed
    """Loads the weights of a folder, file, index, URL or repository on the hub.

    Each process decodes only what vLLM's loaders of parameters keep, on the CPU.
    ``--model-loader-extra-config`` takes ``strict`` (true: parameters that no tensor has filled raise an
    error; false: they are a warning), ``threads`` and ``engine`` as in `sfpformat.open`, and, with
    ``--quantization sfp``, ``keep``: the maximum bytes of decoded weights to keep for later calls (0).
    """

    def __init__(self, load_config: Any) -> None:
        """Checks the options.

        Raises:
            OptionError: ``model_loader_extra_config`` has other options.
        """
        super().__init__(load_config)
        given = load_config.model_loader_extra_config
        if not isinstance(given, Mapping) or given.keys() - _OPTIONS.keys():
            raise OptionError(
                f"model_loader_extra_config is {given!r}; the load format sfp has {listed(sorted(_OPTIONS))}"
            )
        self.options = {**_OPTIONS, **given}
        if not isinstance(self.options["strict"], bool):
            raise OptionError(f"strict is {self.options['strict']!r}, must be true or false")
        keep = self.options["keep"]
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 0:
            raise OptionError(f"keep is {keep!r}, must be a number of bytes, 0 or more")

    def download_model(self, model_config: Any) -> None:
        """Fetches a repository into the cache of the hub; checks that other sources can be opened.

        Raises:
            OptionError: there is no such folder or repository, or it has no `.sfp` model.
            InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused.
            OSError: the file cannot be read.
        """
        self._open(model_config).close()

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """Makes a model and fills it, as vLLM does; then reports the layers that stay compressed.

        Warns:
            SfpWarning: as `load_weights` and `SfpQuantizationConfig.report`.

        Raises:
            OptionError: ``keep`` is given, but no layer stays compressed; or as `load_weights`.
            MismatchError: as `load_weights`.
        """
        config = vllm_config.quant_config
        stay_compressed = config is not None and config.get_name() == QUANTIZATION
        if self.options["keep"] and not stay_compressed:
            raise OptionError("model_loader_extra_config: keep has no effect without --quantization sfp")
        model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        if stay_compressed:
            config.report()
        return model

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Fills the parameters of a model.

        Args:
            model: a model of vLLM, whose parameters have memory but no values.
            model_config: vLLM's configuration; used are ``model``, ``revision`` and ``quantization``.

        Warns:
            SfpWarning: tensors of the file are not used; or parameters are not filled, if not ``strict``; or
                the model does not report which parameters it has filled.

        Raises:
            MismatchError: parameters are not filled. The model must not be used.
            OptionError: as `download_model`; or the model takes weights from further sources.
            InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused.
            OSError: the file cannot be read.
        """
        kind = type(model).__name__
        further = [str(one.model_or_path) for one in getattr(model, "secondary_weights", ())]
        if further:
            raise OptionError(
                f"{kind} also takes weights from {listed(further)}; load format sfp has one source"
            )
        used: set[str] = set()
        marks = Marks(model)
        with self._open(model_config) as file:
            found = model.load_weights(lazy_weights(file, used=used))
            unused = sorted(set(file) - used)
        missing = [one.name for one in marks.unfilled()]
        if found is None:
            _warn(f"{kind} does not report which parameters it has filled, so that few can be checked")
        else:
            missing += self._unfilled(model, set(found), model_config.quantization)
        self._require_filled(kind, missing, unused)
        if unused and not _has_other_parts():
            _warn(f"{kind} does not use tensors of {model_config.model}: {listed(unused)}")

    def _open(self, model_config: Any) -> Any:
        where = file_of(model_config.model, model_config.revision, self.load_config.download_dir)
        return safe_open(where, threads=self.options["threads"], engine=self.options["engine"])

    def _unfilled(self, model: nn.Module, found: set[str], quantization: str | None) -> list[str]:
        """Returns the names of parameters without values. vLLM's check exempts all linear layers.

        Args:
            model: the model.
            found: the names of the parameters that were filled, as ``load_weights`` reports them.
            quantization: the method of vLLM, whose rule says which parameters no checkpoint has.
        """
        missing = sorted({name for name, _ in model.named_parameters()} - found)
        if missing and quantization not in (None, QUANTIZATION):
            try:
                DefaultModelLoader.track_weights_loading(self, model, found, quantized=True)
                missing = []
            except ValueError:
                missing = sorted(set(missing) - found)  # vLLM has added those that need no tensor
        return missing

    def _require_filled(self, kind: str, missing: list[str], unused: list[str]) -> None:
        """Raises an error, or warns if not ``strict``, if parameters of a model have no values."""
        if not missing:
            return
        words = f"no tensor of the file fills parameters of {kind}: {listed(missing)}"
        if self.options["strict"]:
            more = f". Tensors that are not used: {listed(unused)}" if unused else ""
            raise MismatchError(f"{words}{more}", missing, unused)
        _warn(f"{words}. Their values are arbitrary")


def _has_other_parts() -> bool:
    """Whether other processes hold other layers or experts, so that some tensors are not for this one."""
    config = get_current_vllm_config_or_none()
    if config is None:
        return False
    parallel = config.parallel_config
    return bool(parallel.pipeline_parallel_size > 1 or parallel.enable_expert_parallel)


def _warn(words: str) -> None:
    warnings.warn(SfpWarning(words), stacklevel=4)
