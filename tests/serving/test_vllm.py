"""vLLM's load format sfp: with stand-ins for vLLM 0.33, and with its own parameters where it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sfpformat import MismatchError, OptionError, Options, SfpWarning
from sfpformat.decode.jobs import jobs_of_range as real_jobs_of_range
from sfpformat.decode.shard_index import ShardIndex
from sfpformat.io.positional import PositionalFile
from sfpformat.serving import register_vllm_loader, register_vllm_quantization
from sfpformat.serving.vllm import ABSTRACT, INTERFACE, plugin
from sfpformat.torch import TorchSlice, safe_open, save_file

from ..support import vllm_layers_stand_in as layers_stand_in
from ..support import vllm_model_stand_in as stand_in
from ..support.signatures import parameters
from ..support.vllm_model_stand_in import IN, OUT, Model, checkpoint

LOADER, METHOD = "sfpformat.serving.vllm_loader", "sfpformat.serving.vllm_linear"


def vllm_folder() -> Path | None:
    """The folder of vLLM's source, without importing it."""
    found = find_spec("vllm")
    places = [] if found is None else list(found.submodule_search_locations or ())
    return Path(places[0]) if places else None


VLLM = vllm_folder()
needs_vllm = pytest.mark.skipif(VLLM is None, reason="vLLM is not installed")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in for vLLM, with the loader registered."""
    for name, module in layers_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        sys.modules["vllm.config.vllm"],
        "get_current_vllm_config_or_none",
        stand_in.get_current_vllm_config_or_none,
    )
    stand_in.LOADERS.clear()
    layers_stand_in.METHODS.clear()
    for name in (LOADER, METHOD):
        sys.modules.pop(name, None)
    register_vllm_loader()
    yield
    for name in (LOADER, METHOD):
        sys.modules.pop(name, None)
    stand_in.LOADERS.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model."""
    out = tmp_path_factory.mktemp("model")
    save_file(checkpoint(), out / "model.sfp")
    return out


def load(model: Model, source: Path | str, quantization: str | None = None, **options: Any) -> None:
    """What vLLM does with ``--load-format sfp``."""
    config = SimpleNamespace(load_format="sfp", model_loader_extra_config=options, download_dir=None)
    loader = stand_in.get_model_loader(config)
    named = SimpleNamespace(model=str(source), revision=None, quantization=quantization)
    loader.download_model(named)
    loader.load_weights(model, named)


def own_parameter(rank: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own `ModelWeightParameter`, from its source, with the rank of tensor parallelism given."""
    assert VLLM is not None
    distributed, logger, platforms = (
        ModuleType(f"vllm.{name}") for name in ("distributed", "logger", "platforms")
    )
    distributed.__dict__["get_tensor_model_parallel_rank"] = lambda: rank
    distributed.__dict__["get_tensor_model_parallel_world_size"] = lambda: 2
    logger.__dict__["init_logger"] = lambda name: None
    platforms.__dict__["current_platform"] = SimpleNamespace(use_sync_weight_loader=lambda: False)
    for module in (distributed, logger, platforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("parameters", VLLM / "model_executor" / "parameter.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made.ModelWeightParameter


def parameter(own: bool, rank: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of parameters."""
    if own:
        return own_parameter(rank, monkeypatch)
    monkeypatch.setattr(stand_in.ModelWeightParameter, "rank", rank)
    return stand_in.ModelWeightParameter


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts what is done: bytes read, elements of decoded segments, elements returned by slices."""
    counts = {"bytes": 0, "decoded": 0, "returned": 0}
    read, jobs, get = PositionalFile.read_into, real_jobs_of_range, TorchSlice.__getitem__

    def read_into(self: PositionalFile, view: memoryview, offset: int) -> int:
        size = read(self, view, offset)
        counts["bytes"] += size
        return size

    def jobs_of_range(entry: Any, out: Any, low: int, high: int) -> Any:
        counts["decoded"] += high - low
        return jobs(entry, out, low, high)

    def of_slice(self: TorchSlice, index: Any) -> torch.Tensor:
        out = get(self, index)
        counts["returned"] += out.numel()
        return out

    monkeypatch.setattr(PositionalFile, "read_into", read_into)
    monkeypatch.setattr("sfpformat.decode.selected_positions.jobs_of_range", jobs_of_range)
    monkeypatch.setattr(TorchSlice, "__getitem__", of_slice)
    return counts


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("own", [False, pytest.param(True, marks=needs_vllm)])
def test_each_rank_gets_its_parts_and_decodes_no_others(
    folder: Path, own: bool, rank: int, work: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(parameter(own, rank, monkeypatch), 2, rank)
    load(model, folder)
    assert model.has(checkpoint())
    mine = sum(one.numel() for one in model.parameters())
    assert work["returned"] == mine
    assert 2 * mine < 1.01 * sum(one.numel() for one in checkpoint().values())


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("name", "segment", "decoded"), [("q.weight", None, 0.5), ("o.weight", 256, 0.5), ("o.weight", None, 1)]
)
def test_a_rank_gets_half_of_a_weight_and_decodes_its_segments(
    tmp_path: Path,
    name: str,
    segment: int | None,
    decoded: float,
    rank: int,
    work: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = Options(segment=segment)
    save_file({name: checkpoint()[name]}, tmp_path / "model.sfp", options=options)
    with safe_open(tmp_path / "model.sfp") as file:
        entry = file.file.entry(name)
    chunk, stored = entry.stored_bytes / len(entry.chunks), entry.stored_bytes
    assert len(entry.chunks) >= 8
    start = (tmp_path / "model.sfp").stat().st_size - stored  # preamble, directory
    work.update(bytes=0, decoded=0, returned=0)
    model = Model(parameter(False, rank, monkeypatch), 2, rank)
    with pytest.warns(SfpWarning, match="no tensor of the file fills parameters of Model"):
        load(model, tmp_path, strict=False)
    assert work["returned"] == OUT * IN // 2
    assert work["decoded"] == OUT * IN * decoded  # half rows that are shorter than segments: all of them
    if name == "q.weight":  # by columns of the product: rows of the tensor, whole chunks
        assert work["bytes"] <= stored / 2 + chunk + 2 * start
    else:  # half of each row: a part of every chunk, whose checksum is of the whole chunk
        assert work["bytes"] <= stored + 2 * start


@pytest.mark.usefixtures("vllm")
def test_one_process_loads_folders_files_and_indices(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = checkpoint()
    names = list(weights)
    shards = {
        f"model-0000{n + 1}-of-00002.sfp": {name: weights[name] for name in names[n::2]} for n in range(2)
    }
    for path, some in shards.items():
        save_file(some, tmp_path / path)
    index = ShardIndex({name: path for path, some in shards.items() for name in some}, {})
    (tmp_path / "model.sfp.index.json").write_bytes(index.to_bytes())
    for source in (folder, folder / "model.sfp", tmp_path, tmp_path / "model.sfp.index.json"):
        model = Model(parameter(False, 0, monkeypatch), 1, 0)
        load(model, source)
        assert model.has(checkpoint())


@pytest.mark.usefixtures("vllm")
def test_parameters_that_no_tensor_fills_raise_an_error_with_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = checkpoint()
    weights["out.weight"] = weights.pop("o.weight")
    save_file(weights, tmp_path / "model.sfp")
    model = Model(parameter(False, 0, monkeypatch), 1, 0)
    with pytest.raises(
        MismatchError, match=r"fills parameters of Model: 'o\.weight'\. .*'out\.weight'"
    ) as found:
        load(model, tmp_path)
    assert (found.value.missing, found.value.unexpected) == (("o.weight",), ("out.weight",))
    with pytest.warns(SfpWarning) as warned:
        load(model, tmp_path, strict=False)
    texts = [str(one.message) for one in warned]
    assert "'o.weight'. Their values are arbitrary" in texts[0]
    assert "does not use tensors" in texts[1]
    model.reports = False
    with pytest.warns(SfpWarning) as warned:
        load(model, tmp_path)
    assert "Model does not report which parameters" in str(warned[0].message)


@pytest.mark.usefixtures("vllm")
def test_a_matrix_of_a_combined_layer_that_no_tensor_fills_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({name: one for name, one in checkpoint().items() if name != "v.weight"}, tmp_path / "a.sfp")
    model = Model(parameter(False, 0, monkeypatch), 1, 0)
    model.qkv.__dict__["output_partition_sizes"] = [OUT, OUT, OUT]
    load(model, folder)
    with pytest.raises(MismatchError, match=r"fills parameters of Model: 'qkv\.weight, rows 2048 to 3072'"):
        load(model, tmp_path / "a.sfp")
    with pytest.warns(SfpWarning, match="rows 2048 to 3072"):
        load(model, tmp_path / "a.sfp", strict=False)


@pytest.mark.usefixtures("vllm")
def test_compressed_layers_are_reported_and_keep_needs_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(parameter(False, 0, monkeypatch), 1, 0)
    reports: list[str] = []
    method = SimpleNamespace(get_name=lambda: "sfp", report=lambda: reports.append("done"))
    named = SimpleNamespace(model=str(folder), revision=None, quantization="sfp")

    def load_model(quantization: Any, keep: int) -> torch.nn.Module:
        extra = {"keep": keep}
        config = SimpleNamespace(load_format="sfp", model_loader_extra_config=extra, download_dir=None)
        whole = SimpleNamespace(quant_config=quantization, make=lambda: model)
        made: torch.nn.Module = stand_in.get_model_loader(config).load_model(whole, named)
        return made

    assert load_model(method, 1) is model
    assert reports == ["done"]
    for other in (None, SimpleNamespace(get_name=lambda: "fp8")):
        with pytest.raises(OptionError, match="keep has no effect without --quantization sfp"):
            load_model(other, 1)
        load_model(other, 0)
    assert reports == ["done"]
    model.register_parameter("k_scale", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(MismatchError, match="'k_scale'"):  # as without a method
        load_model(method, 0)


@pytest.mark.usefixtures("vllm")
def test_scales_of_quantised_models_may_be_missing_by_the_rule_of_vllm(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(parameter(False, 0, monkeypatch), 1, 0)
    model.register_parameter("k_scale", torch.nn.Parameter(torch.ones(1)))
    load(model, folder, quantization="fp8")
    with pytest.raises(MismatchError, match="'k_scale'"):
        load(model, folder)
    save_file({name: one for name, one in checkpoint().items() if name != "norm.weight"}, tmp_path / "a.sfp")
    with pytest.raises(MismatchError) as found:
        load(model, tmp_path / "a.sfp", quantization="fp8")
    assert found.value.missing == ("norm.weight",)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(("name", "value"), [("pipeline_parallel_size", 2), ("enable_expert_parallel", True)])
def test_tensors_for_other_processes_are_no_warning(
    tmp_path: Path, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({**checkpoint(), "x.weight": torch.ones(3)}, tmp_path / "model.sfp")
    model = Model(parameter(False, 0, monkeypatch), 1, 0)
    with pytest.warns(SfpWarning, match=r"does not use tensors of .*: 'x\.weight'"):
        load(model, tmp_path)
    monkeypatch.setattr(stand_in.PARALLEL, name, value)
    load(model, tmp_path)  # warnings are errors in the tests


@pytest.mark.usefixtures("vllm")
def test_other_options_sources_and_absent_files_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(parameter(False, 0, monkeypatch), 1, 0)
    with pytest.raises(OptionError, match=r"'speed'.*'engine', 'keep', 'strict'"):
        load(model, folder, speed=1)
    with pytest.raises(OptionError, match="strict is 1"):
        load(model, folder, strict=1)
    for keep in (-1, 0.5, True, "1GB"):
        with pytest.raises(OptionError, match=r"keep is .*, must be a number of bytes"):
            load(model, folder, keep=keep)
    with pytest.raises(OptionError, match=r"has no \.sfp file"):
        load(model, tmp_path)
    with pytest.raises(OptionError, match="no folder"):
        load(model, "./none")
    with pytest.raises(FileNotFoundError):
        load(model, tmp_path / "none.sfp")
    model.secondary_weights = (SimpleNamespace(model_or_path="team/audio"),)
    with pytest.raises(OptionError, match="also takes weights from 'team/audio'"):
        load(model, folder)


@pytest.mark.usefixtures("vllm")
def test_a_repository_in_the_download_folder_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--team--small"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).symlink_to(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = Model(parameter(False, 0, monkeypatch), 1, 0)
    config = SimpleNamespace(load_format="sfp", model_loader_extra_config={}, download_dir=str(tmp_path))
    named = SimpleNamespace(model="team/small", revision=None, quantization=None)
    stand_in.get_model_loader(config).load_weights(model, named)
    assert model.has(checkpoint())


@pytest.mark.usefixtures("vllm")
def test_loader_and_quantization_are_registered_once_and_by_the_entry_point() -> None:
    register_vllm_loader()
    plugin()
    register_vllm_quantization()
    assert stand_in.LOADERS["sfp"].__name__ == "SfpModelLoader"
    assert layers_stand_in.METHODS["sfp"].__name__ == "SfpQuantizationConfig"
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'sfpformat_loader = "sfpformat.serving.vllm:plugin"' in text


@pytest.mark.usefixtures("vllm")
def test_another_interface_of_vllm_is_a_warning_and_registers_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in.LOADERS.clear()
    methods = frozenset({"download_model", "load_weights", "unload"})
    monkeypatch.setattr(stand_in.BaseModelLoader, "__abstractmethods__", methods)
    with pytest.raises(MismatchError, match=r"interface of model loaders than 0\.33.*also has 'unload'"):
        register_vllm_loader()
    with pytest.warns(SfpWarning, match="unload"):
        plugin()
    assert not stand_in.LOADERS


def test_importing_the_package_imports_no_inference_engine() -> None:
    code = "import sys, sfpformat.serving; print({'vllm', 'sglang', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@needs_vllm
def test_the_stand_ins_have_the_signatures_of_vllm() -> None:
    assert VLLM is not None
    mine = parameters(Path(stand_in.__file__))
    for module, name, method, used in INTERFACE:
        path = VLLM.joinpath(*module.split(".")[1:])
        theirs = parameters(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
        what = f"{name}.{method}" if method else name
        assert set(used) <= set(theirs[what]), what
        assert mine[what] == theirs[what], what
    base = parameters(VLLM / "model_executor" / "model_loader" / "base_loader.py")
    for methods in ABSTRACT.values():
        assert {f"BaseModelLoader.{one}" for one in methods} <= base.keys()
