"""Stand-ins for the parts of vLLM 0.33 that `sfpformat.torch.weight_sync` uses, with the same signatures.

`tests/torch/test_vllm.py` compares the signatures with vLLM where it is installed.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import nn

I = TypeVar("I")  # noqa: E741
U = TypeVar("U")


class WeightTransferInitInfo(ABC):  # noqa: B024
    """What a worker needs before the first update."""


class WeightTransferUpdateInfo(ABC):  # noqa: B024
    """An update."""


@dataclass
class TrainerInitInfo:
    """What a trainer needs."""

    backend: ClassVar[str]
    rank: int = field(kw_only=True)

    @property
    def is_sender(self) -> bool:
        """Whether this process sends."""
        return self.rank == 0


class WeightTransferEngine(ABC, Generic[I, U]):
    """The engine of a worker."""

    init_info_cls: type[Any]
    update_info_cls: type[Any]

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module) -> None:
        self.config, self.vllm_config, self.device, self.model = config, vllm_config, device, model
        self.model_config = vllm_config

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        """Returns typed information."""
        return self.init_info_cls(**init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        """Returns typed information."""
        return self.update_info_cls(**update_dict)

    @abstractmethod
    def init_transfer_engine(self, init_info: Any) -> None:
        """Initialises the engine."""

    @abstractmethod
    def start_weight_update(self) -> None:
        """Starts an update."""

    @abstractmethod
    def finish_weight_update(self) -> None:
        """Ends an update."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receives weights."""
        self.receive_weights(self.parse_update_info(update_info))

    @abstractmethod
    def receive_weights(self, update_info: Any) -> None:
        """Receives weights."""

    @abstractmethod
    def shutdown(self) -> None:
        """Releases resources."""


class WeightSource(ABC):
    """The weights of a trainer."""

    @property
    @abstractmethod
    def metadata(self) -> list[Any]:
        """Every parameter."""

    def owned_names(self, rank: int) -> list[str]:
        """Names of the parameters of a process."""
        return [one[0] for one in self.metadata]

    def implements_iter_full(self) -> bool:
        """Whether `iter_full` exists."""
        return type(self).iter_full is not WeightSource.iter_full

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields names and whole tensors."""
        raise NotImplementedError


class TrainerWeightTransferEngine(ABC, Generic[I]):
    """The engine of a trainer."""

    init_info_cls: type[Any]

    def __init__(
        self, *, client: Any, source: WeightSource | None = None, is_sender: bool = True, rank: int = 0
    ) -> None:
        self.client, self.source, self.is_sender, self.rank = client, source, is_sender, rank

    @classmethod
    @abstractmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: WeightSource | None = None) -> Self:
        """Initialises trainer and workers."""

    @abstractmethod
    def send_weights(self) -> None:
        """Sends the weights."""

    def shutdown(self) -> None:
        """Releases resources."""


class _Registry:
    _registry: ClassVar[dict[str, Callable[[], type]]]

    @classmethod
    def register_engine(
        cls, name: str, module_path_or_cls: str | type, class_name: str | None = None
    ) -> None:
        """Registers an engine by the module and name of its class."""
        import importlib

        if name in cls._registry:
            raise ValueError(f"'{name}' is already registered.")
        assert isinstance(module_path_or_cls, str)
        assert class_name is not None
        module, attribute = module_path_or_cls, class_name
        cls._registry[name] = lambda: getattr(importlib.import_module(module), attribute)


class WeightTransferEngineFactory(_Registry):
    """The engines of workers."""

    _registry: ClassVar[dict[str, Callable[[], type]]] = {}

    @classmethod
    def create_engine(cls, config: Any, vllm_config: Any, device: torch.device, model: nn.Module) -> Any:
        """Returns an engine."""
        kind: Any = cls._registry[config]()
        return kind(config, vllm_config, device, model)


class WeightTransferTrainerFactory(_Registry):
    """The engines of trainers."""

    _registry: ClassVar[dict[str, Callable[[], type]]] = {}

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: WeightSource | None = None) -> Any:
        """Returns an engine that can send."""
        kind: Any = cls._registry[init_info.backend]()
        return kind.trainer_init(init_info=init_info, client=client, source=source)


class CheckpointWeightPatch(NamedTuple):
    """Changed elements of a tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


def load_checkpoint_weight_patches(
    model: nn.Module,
    patches: Iterable[CheckpointWeightPatch],
    *,
    max_chunk_bytes: int = 512 << 20,
    validate_unique_indices: bool = True,
) -> set[str]:
    """Writes elements through the loader of the model: NaN stands for elements that stay, as in vLLM."""
    weights = []
    for patch in patches:
        assert patch.indices is not None
        whole = torch.full(patch.shape, torch.nan, dtype=patch.dtype)
        whole.view(-1)[patch.indices] = patch.values
        weights.append((patch.name, whole))
    with torch.no_grad():
        loader: Any = model
        return set(loader.load_weights(weights, keep_nan=True))


def initialize_layerwise_reload(model: Any) -> None:
    """Prepares a model for whole weights."""
    model.reloading = True


def finalize_layerwise_reload(model: Any, model_config: Any) -> None:
    """Ends the loading of whole weights."""
    model.reloading = False


_PLACES = {
    "vllm.distributed.weight_transfer.base": (
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
        TrainerInitInfo,
        WeightTransferEngine,
        TrainerWeightTransferEngine,
        WeightSource,
    ),
    "vllm.distributed.weight_transfer.factory": (WeightTransferEngineFactory, WeightTransferTrainerFactory),
    "vllm.model_executor.model_loader.checkpoint_weight_patch": (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    ),
    "vllm.model_executor.model_loader.reload": (initialize_layerwise_reload, finalize_layerwise_reload),
}


def modules() -> dict[str, ModuleType]:
    """The modules of the stand-in, by name, for ``sys.modules``."""
    out: dict[str, ModuleType] = {}
    for name, members in _PLACES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            out.setdefault(path, ModuleType(path))
        for member in members:
            setattr(out[name], member.__name__, member)
    for each in out.values():
        each.__path__ = []
    return out


def forget_engines() -> None:
    """Removes the engines that were made from the stand-in."""
    sys.modules.pop("sfpformat.torch.weight_sync.vllm_engine", None)
    for kind in (WeightTransferEngineFactory, WeightTransferTrainerFactory):
        kind._registry.clear()
