"""Classifying tensors of real checkpoints as weights, and the reasons for others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sfpformat
import sfpformat.numpy
from sfpformat.dtypes import DTYPES, of_numpy
from sfpformat.encode.weights import Kind, has_values_beyond, not_weights
from sfpformat.io.atomic import replacing
from sfpformat.io.safetensors import TensorSpec, write_tensors

from ..cli.test_main import error_of, make, run
from ..cli.test_pack import Capture, assert_bits, packed

S, C, B, N, U = Kind.STORAGE, Kind.COMPANION, Kind.BIAS, Kind.NORM, Kind.BUFFER
SHAPE = (128, 64)

# Kind of checkpoint -> its tensors: name, dtype, and why it is not a weight, or None for a weight. Names and
# dtypes are those that the packages named in the module write.
CHECKPOINTS: dict[str, list[tuple[str, str, Kind | None]]] = {
    "Llama": [
        ("model.embed_tokens.weight", "BF16", None),
        ("model.layers.0.input_layernorm.weight", "BF16", N),
        ("model.layers.0.post_attention_layernorm.weight", "BF16", N),
        ("model.layers.0.self_attn.q_proj.weight", "BF16", None),
        ("model.layers.0.self_attn.q_proj.bias", "BF16", B),
        ("model.layers.0.self_attn.q_norm.weight", "BF16", N),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", U),
        ("model.layers.0.mlp.gate_proj.weight", "BF16", None),
        ("model.norm.weight", "BF16", N),
        ("lm_head.weight", "BF16", None),
    ],
    "GPT-2": [
        ("wte.weight", "F32", None),
        ("wpe.weight", "F32", None),
        ("h.0.ln_1.weight", "F32", N),
        ("h.0.attn.bias", "F32", B),  # the causal mask
        ("h.0.attn.masked_bias", "F32", U),
        ("h.0.attn.c_attn.weight", "F32", None),
        ("h.0.mlp.c_fc.weight", "F32", None),
        ("ln_f.weight", "F32", N),
    ],
    "BERT, CLIP, Swin, ResNet, FLUX": [
        ("embeddings.word_embeddings.weight", "F32", None),
        ("embeddings.position_ids", "I64", U),
        ("embeddings.LayerNorm.weight", "F32", N),
        ("text_model.attn_mask", "F32", U),
        ("visual.positional_embedding", "F32", None),
        ("visual.proj", "F32", None),
        ("layers.0.blocks.1.attn_mask", "F32", U),
        ("layers.0.blocks.1.attn.relative_position_bias_table", "F32", B),
        ("layers.0.blocks.1.attn.relative_position_index", "I64", U),
        ("layers.0.blocks.1.attn.relative_coords_table", "F32", U),
        ("layer1.0.bn1.weight", "F32", N),
        ("layer1.0.bn1.running_mean", "F32", U),
        ("layer1.0.bn1.running_var", "F32", U),
        ("layer1.0.conv1.weight", "F32", None),
        ("double_blocks.0.img_mod.lin.weight", "BF16", None),
        ("transformer_blocks.0.norm1.linear.weight", "BF16", None),  # a matrix inside of a normalisation
        ("transformer_blocks.0.scale_shift_table", "BF16", N),
        ("blocks.0.modulation", "BF16", N),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "F32", None),
        ("pos_encoder.pe", "F32", U),
        ("encoder.mel_filters", "F32", U),
        ("conv.weight_mask", "F32", U),  # of torch.nn.utils.prune
        ("conv.weight_orig", "F32", None),
        ("layers.0.A", "F32", None),
        ("layers.0.B", "F32", None),
    ],
    "GPTQ": [
        ("model.layers.0.mlp.up_proj.qweight", "I32", S),
        ("model.layers.0.mlp.up_proj.qzeros", "I32", C),
        ("model.layers.0.mlp.up_proj.scales", "F16", C),
        ("model.layers.0.mlp.up_proj.g_idx", "I32", C),
        ("model.layers.0.mlp.up_proj.bias", "F16", B),
        ("lm_head.weight", "F16", None),
    ],
    "AWQ": [
        ("model.layers.0.mlp.up_proj.qweight", "I32", S),
        ("model.layers.0.mlp.up_proj.qzeros", "I32", C),
        ("model.layers.0.mlp.up_proj.scales", "F16", C),
        ("model.embed_tokens.weight", "F16", None),
    ],
    "Marlin": [("l.B", "I32", None), ("l.s", "F16", C), ("l.workspace", "I32", C)],
    "bitsandbytes, 8 bits": [("l.weight", "I8", None), ("l.SCB", "F32", C), ("l.weight_format", "U8", C)],
    "bitsandbytes, 4 bits": [
        ("l.weight", "U8", None),
        ("l.weight.absmax", "U8", C),
        ("l.weight.nested_absmax", "F32", C),
        ("l.weight.nested_quant_map", "F32", C),
        ("l.weight.quant_map", "F32", C),
        ("l.weight.quant_state.bitsandbytes__nf4", "U8", C),
        ("experts.gate_up_proj", "U8", None),
        ("experts.gate_up_proj.absmax", "F32", C),
    ],
    "bitsandbytes, 4 bits kept as BF16": [
        ("l.weight", "BF16", S),
        ("l.weight.absmax", "F32", C),
        ("l.weight.quant_map", "F32", C),
        ("l.weight.quant_state.bitsandbytes__fp4", "U8", C),
        ("m.weight", "BF16", None),
    ],
    "compressed-tensors, packed": [
        ("l.weight_packed", "I32", S),
        ("l.weight_scale", "BF16", C),
        ("l.weight_zero_point", "I32", C),
        ("l.weight_g_idx", "I32", C),
        ("l.weight_shape", "I64", C),
    ],
    "compressed-tensors, FP8": [
        ("l.weight", "F8_E4M3", S),
        ("l.weight_scale", "BF16", C),
        ("l.input_scale", "BF16", C),
        ("self_attn.k_scale", "F32", C),
        ("m.weight", "BF16", None),
    ],
    "compressed-tensors, INT8": [("l.weight", "I8", None), ("l.weight_scale", "BF16", C)],
    "compressed-tensors, sparse": [
        ("l.weight.compressed", "BF16", S),
        ("l.weight.bitmask", "U8", C),
        ("l.weight.row_offsets", "I64", C),
        ("l.weight.shape", "I64", None),
    ],
    "NVFP4": [
        ("l.weight_packed", "U8", S),
        ("l.weight_scale", "F8_E4M3", C),
        ("l.weight_global_scale", "F32", C),
        ("l.input_global_scale", "F32", C),
    ],
    "NVFP4 of ModelOpt": [
        ("l.weight", "U8", None),
        ("l.weight_scale", "F8_E4M3", C),
        ("l.weight_scale_2", "F32", C),
        ("l.input_scale", "F32", C),
        ("l.pre_quant_scale", "BF16", C),
    ],
    "DeepSeek-V3": [
        ("model.layers.3.mlp.experts.0.down_proj.weight", "F8_E4M3", S),
        ("model.layers.3.mlp.experts.0.down_proj.weight_scale_inv", "F32", C),
        ("model.layers.3.mlp.gate.weight", "BF16", None),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "F32", B),
        ("model.layers.3.self_attn.kv_a_layernorm.weight", "BF16", N),
        ("model.layers.4.mlp.up_proj.weight", "F8_E4M3", S),  # its scale is in another shard
    ],
    "DeepSeek-V3, converted": [("l.weight", "F8_E4M3", S), ("l.scale", "F32", C), ("m.scale", "F32", None)],
    "FP8 experts": [
        ("mlp.experts.gate_up_proj", "F8_E4M3", S),
        ("mlp.experts.gate_up_proj_scale_inv", "F32", C),
        ("mlp.experts.gate_up_proj_activation_scale", "F32", C),
        ("mlp.experts.down_proj", "F8_E5M2", S),
        ("mlp.experts.down_proj_scale", "BF16", C),
    ],
    "FP8 of ComfyUI": [
        ("blocks.0.attn.weight", "F8_E4M3", S),
        ("blocks.0.attn.scale_weight", "F32", C),
        ("blocks.0.attn.scale_input", "F32", C),
    ],
    "FP8 alone": [("l.weight", "F8_E4M3", None), ("l.bias", "F8_E4M3", B), ("m.weight", "F8_E5M2", None)],
    "gpt-oss": [
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "U8", S),
        ("model.layers.0.mlp.experts.gate_up_proj_scales", "U8", C),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", "BF16", B),
        ("model.layers.0.mlp.router.weight", "BF16", None),
        ("block.0.mlp.mlp1_weight.blocks", "U8", S),
        ("block.0.mlp.mlp1_weight.scales", "U8", C),
    ],
    "HQQ": [("l.W_q", "U8", S), ("l.scale", "F16", C), ("l.zero", "F16", C), ("l.nbits", "I32", C)],
    "HQQ, seen as floats": [("l.W_q", "F16", S), ("l.scale", "F16", C), ("l.zero", "F16", C)],
    "quanto": [
        ("l.weight._data", "F8_E4M3", S),
        ("l.weight._scale", "BF16", C),
        ("l.weight._shift", "BF16", C),
        ("l.input_scale", "BF16", C),
    ],
    "torchao": [
        ("l._weight_qdata", "I8", S),
        ("l._weight_scale", "BF16", C),
        ("l._weight_zero_point", "BF16", C),
        ("l._weight_scale_and_zero", "BF16", C),
    ],
    "MLX": [("l.weight", "U32", None), ("l.scales", "F16", C), ("l.biases", "F16", C), ("l.bias", "F16", B)],
    "AQLM": [("l.codes", "I16", S), ("l.codebooks", "F16", C), ("l.scales", "F16", C)],
    "VPTQ": [
        ("l.indices", "F16", S),
        ("l.centroids.weight", "F16", C),
        ("l.res_centroids.weight", "F16", C),
        ("l.weight_scale", "F16", C),
        ("l.weight_bias", "F16", C),
        ("l.perm", "U16", C),
    ],
    "EETQ, Quark, HIGGS, FP-Quant, EXL3": [
        ("a.weight", "I8", None),
        ("a.weight_scales", "F16", C),
        ("b.weight_quantizer.scale", "F32", C),
        ("b.weight_quantizer.zero_point", "F32", C),
        ("c.weight", "U8", None),
        ("c.scales", "F16", C),
        ("c.tables2", "F16", C),
        ("d.qweight", "U8", S),
        ("d.forward_hadamard_matrix", "BF16", C),
        ("d.dqweight", "BF16", C),
        ("e.trellis", "I16", S),
        ("e.suh", "F16", C),
        ("e.svh", "F16", C),
    ],
    "Nunchaku": [
        ("l.qweight", "I8", S),
        ("l.wscales", "BF16", C),
        ("l.smooth_factor", "BF16", C),
        ("l.proj_down", "BF16", C),
        ("l.bias", "BF16", B),
    ],
    "names without dots": [("weight", "I8", None), ("scales", "F16", C), ("bias", "F16", B), ("w", "F32", C)],
}


def specs(tensors: list[tuple[str, str, Kind | None]]) -> list[TensorSpec]:
    """The tensors of a checkpoint, all of one shape."""
    return [TensorSpec(name, DTYPES[dtype], SHAPE) for name, dtype, _ in tensors]


@pytest.mark.parametrize("tensors", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_parts_of_quantised_weights_buffers_biases_and_gains_are_excluded_from_weights(
    tensors: list[tuple[str, str, Kind | None]],
) -> None:
    found = {name: reason.kind for name, reason in not_weights(specs(tensors)).items()}
    assert found == {name: kind for name, _, kind in tensors if kind is not None}
    backwards = {name: reason.kind for name, reason in not_weights(specs(tensors[::-1])).items()}
    assert backwards == found


def test_every_reason_names_its_evidence() -> None:
    tensors = [
        t for name in ("GPTQ", "DeepSeek-V3", "bitsandbytes, 4 bits kept as BF16") for t in CHECKPOINTS[name]
    ]
    words = {name: reason.because for name, reason in not_weights(specs(tensors)).items()}
    up = "model.layers.0.mlp.up_proj"
    assert words[f"{up}.qweight"] == "named 'qweight'"
    assert words[f"{up}.scales"] == f"beside '{up}.qweight' of I32"
    down = "model.layers.3.mlp.experts.0.down_proj.weight"
    assert words[down] == f"F8_E4M3 with '{down}_scale_inv'"
    assert words["model.layers.4.mlp.up_proj.weight"] == f"F8_E4M3, as '{down}', which has a scale"
    assert words["l.weight"] == "with 'l.weight.absmax'"


def test_many_tensors_are_classified_in_linear_time() -> None:
    kinds = ("F8_E4M3", "I8", "F32")
    many = [TensorSpec(f"q_{i}_weight_scale_x", DTYPES[kinds[i % 3]], SHAPE) for i in range(10_000)]
    deep = [TensorSpec(f"{'a_' * 500}scale{i}", DTYPES["F8_E4M3"], SHAPE) for i in range(100)]
    start = time.process_time()
    not_weights([*many, *deep])
    assert time.process_time() - start < 10


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.is_float], ids=lambda d: d.name)
def test_values_that_are_not_finite_are_found_at_any_position(dtype: Any) -> None:
    assert dtype.nonfinite is not None
    bits = np.arange(3 << 20, dtype=np.uint64) % dtype.nonfinite
    array = bits.astype(dtype.pattern).view(dtype.numpy).reshape(3, -1)
    assert not has_values_beyond(array, float32=False)
    for place in (0, 1 << 20, array.size - 1):
        for sign in (0, 1 << (dtype.bits - 1)):
            one = array.copy()
            one.reshape(-1).view(dtype.pattern)[place] = dtype.nonfinite | sign
            assert has_values_beyond(one, float32=False)
            assert has_values_beyond(one, float32=True)
    assert not has_values_beyond(array[:0], float32=True)
    assert not has_values_beyond(np.array(1, dtype.numpy), float32=True)


def test_values_outside_float32_are_found_if_they_would_be_quantised() -> None:
    greatest = np.finfo(np.float32).max.astype(np.float64)
    for value, beyond in ((greatest, False), (-1e39, True), (greatest * (1 + 2.0**-25), False)):
        array = np.array([0, value])
        assert has_values_beyond(array, float32=True) is beyond
        assert not has_values_beyond(array, float32=False)


# --------------------------------------------------------------------------------------------- the command

rng = np.random.default_rng(5)


def large(dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """A tensor large enough for options that change values, if it is a weight."""
    return rng.standard_normal((80, 80)).astype(dtype)


LOSSY = ("--bits 4", "--prune 0.5", "--prune 0.5 --scope model", "--budget 4", "--table 8", "--dtype BF16")


@pytest.mark.parametrize("words", LOSSY)
def test_scales_and_masks_stay_lossless_beside_weights_that_change(
    words: str, tmp_path: Path, capsys: Capture
) -> None:
    arrays = {
        "a.qweight": rng.integers(-9, 9, (80, 80), dtype=np.int32),
        "a.scales": large(np.float16),
        "attn_mask": np.triu(np.full((77, 77), -np.inf, np.float32), 1),
        "table": np.where(large() > 2, np.nan, large()).astype(np.float32),
        "head.weight": large(),
        "head.bias": np.ones(3, np.float32),
    }
    with packed(tmp_path, *words.split(), "--verify", arrays=arrays) as sfp:
        for name, array in arrays.items():
            if name == "head.weight":
                assert (sfp.get_tensor(name).astype(np.float32) != array).any()
            else:
                assert_bits(sfp.get_tensor(name), array)
    out, err = capsys.readouterr()
    assert err == ""
    for line in (
        "1 lossless, scales, zero points or tables of quantised weights: 'a.scales'",
        "1 lossless, buffers: 'attn_mask'",
        "1 lossless, with infinities, NaNs or values beyond float32: 'table'",
        "1 lossless, not float: 'a.qweight'",
        "1 lossless, of rank below 2, or small: 'head.bias'",
    ):
        assert line in out.splitlines()


def test_a_lossless_pack_lists_no_reasons(tmp_path: Path, capsys: Capture) -> None:
    with packed(tmp_path, "--json", arrays={"a.scales": large(), "w": large()}):
        assert json.loads(capsys.readouterr().out)["lossless"] == []


def test_json_lists_a_reason_for_every_lossless_tensor(tmp_path: Path, capsys: Capture) -> None:
    arrays = {
        **{"a.weight": rng.integers(0, 9, (80, 80), np.uint8), "a.scales": large(), "ids": np.arange(3)},
        **{"b.weight": large(ml_dtypes.float8_e4m3fn).astype(np.float16), "kept": large(), "undone": large()},
        **{f"norm{i}.weight": large() for i in range(5)},
    }
    words = "--bits 4 --json --keep kept --like undone --lossless --like b* --prune 0.5"
    with packed(tmp_path, *words.split(), arrays=arrays) as sfp:
        told = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["lossless"]}
        changed = {name for name in sfp if name not in told}
    assert changed == {"b.weight"}
    assert {name: entry["kind"] for name, entry in told.items()} == {
        "a.weight": "not_float",
        "a.scales": "companion",
        "ids": "not_float",
        "kept": "asked",
        "undone": "asked",
        **{f"norm{i}.weight": "norm" for i in range(5)},
    }
    assert told["a.scales"]["because"] == "beside 'a.weight' of U8"
    assert told["undone"]["because"] == "--like 'undone' --lossless"
    assert told["ids"]["because"] == "I64 [3]"


def test_the_summary_shows_three_names_for_each_reason(tmp_path: Path, capsys: Capture) -> None:
    arrays = {"w": large(), **{f"norm{i}.weight": large() for i in range(50)}}
    with packed(tmp_path, "--bits", "4", arrays=arrays):
        out = capsys.readouterr().out
    assert "50 lossless, gains of normalisation layers: 'norm0.weight', " in out
    assert "and 47 more\n" in out


def test_a_like_rule_on_a_lossless_tensor_applies_with_a_warning(tmp_path: Path, capsys: Capture) -> None:
    arrays = {"a.qweight": rng.integers(0, 9, (80, 80), np.int32), "a.scales": large(), "w": large()}
    with packed(tmp_path, "--like", "a.*", "--bits", "4", arrays=arrays) as sfp:
        assert sfp.info("a.scales").quantiser == "uniform"
        assert_bits(sfp.get_tensor("w"), arrays["w"])
    assert capsys.readouterr().err == (
        "sfp: warning: --like 'a.*' changes parts of weights that are already quantised (1): 'a.scales'; "
        "to exclude them, use --keep\n"
    )
    with packed(tmp_path, "--keep", "*.scales", "--like", "*", "--bits", "4", arrays=arrays) as sfp:
        assert_bits(sfp.get_tensor("a.scales"), arrays["a.scales"])
    assert capsys.readouterr().err == ""


def test_a_like_rule_that_quantises_infinities_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: Capture
) -> None:
    arrays = {"a": large(), "mask": np.full((80, 80), -np.inf, np.float32)}
    source = make(tmp_path / "m.safetensors", arrays)
    words = ("--like", "m*", "--bits", "4")
    told = error_of(capsys, "pack", source, "-o", tmp_path / "m.sfp", *words)
    assert "tensor 'mask' has infinities, NaNs or values beyond float32" in told
    assert "--keep 'mask'" in told
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    assert run("pack", source, "-o", tmp_path / "m.sfp", "--keep", "mask", *words[:1], "*", *words[2:]) == 0


def test_a_like_rule_prunes_infinities_last(tmp_path: Path) -> None:
    arrays = {"table": np.where(np.arange(6400) % 2, np.inf, 1).astype(np.float32).reshape(80, 80)}
    with packed(tmp_path, "--like", "table", "--prune", "0.5", arrays=arrays) as sfp:
        assert_bits(sfp.get_tensor("table"), np.where(arrays["table"] == 1, np.float32(0), arrays["table"]))


def test_a_threshold_over_the_model_counts_only_prunable_tensors(tmp_path: Path) -> None:
    arrays = {"a": large(), "b.norm.weight": large() / 1000, "c": np.full((80, 80), np.nan, np.float32)}
    with packed(tmp_path, "--prune", "0.25", "--scope", "model", arrays=arrays) as sfp:
        assert np.count_nonzero(sfp.get_tensor("a") == 0) == 1600
        assert np.count_nonzero(sfp.get_tensor("b.norm.weight") == 0) == 0


def test_options_that_match_no_weights_pack_losslessly_with_a_warning(
    tmp_path: Path, capsys: Capture
) -> None:
    arrays = {"a.qweight": rng.integers(0, 9, (80, 80), np.int32), "a.scales": large(), "a.bias": large()}
    with packed(tmp_path, "--bits", "4", "--verify", arrays=arrays) as sfp:
        assert_bits(sfp.get_tensor("a.scales"), arrays["a.scales"])
    assert capsys.readouterr().err == (
        "sfp: warning: --bits has no effect: every large float tensor is excluded: scales, zero points or "
        "tables of quantised weights (1), biases (1); to change them, use --like GLOB\n"
    )


def test_fp8_with_scales_stays_lossless_and_without_is_quantised(tmp_path: Path) -> None:
    fp8 = large(ml_dtypes.float8_e4m3fn)
    for scales in ({}, {"a.weight_scale_inv": np.ones((1, 1), np.float32)}):
        folder = tmp_path / str(len(scales))
        folder.mkdir()
        source = folder / "m.safetensors"
        write_safetensors(source, {"a.weight": fp8, **scales, "w": large()})
        assert run("pack", source, "-o", folder / "m.sfp", "--bits", "3") == 0
        with sfpformat.open(folder / "m.sfp") as sfp:
            same = sfp.get_tensor("a.weight").tobytes() == fp8.tobytes()
            assert same is bool(scales)


def write_safetensors(path: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Writes a safetensors file with dtypes that numpy does not have."""
    dtypes = {name: of_numpy(array.dtype) for name, array in arrays.items()}
    described = [TensorSpec(name, dtype, arrays[name].shape) for name, dtype in dtypes.items() if dtype]
    with replacing(path) as file:
        write_tensors(file, described, {}, iter(arrays.values()))


# ------------------------------------------------------------------------------------------------- Python

FOUR_BITS = sfpformat.Options(sfpformat.Uniform(bits=4))


def state() -> dict[str, np.ndarray[Any, Any]]:
    """A model with one weight and every kind of tensor that stays lossless."""
    return {
        "a.qweight": rng.integers(0, 9, (80, 80), np.int32),
        "a.scales": large(np.float16),
        "b.weight": large(),
        "b.bias": np.ones(80, np.float32),
        "norm.weight": large(),
        "mask": np.full((80, 80), -np.inf, np.float32),
        "table": np.where(large() > 2, np.nan, large()).astype(np.float32),
        "f64": np.full((80, 80), 1e300),
    }


def test_options_for_weights_returns_only_weights() -> None:
    chosen = sfpformat.numpy.options_for_weights(state(), FOUR_BITS)
    assert chosen == {"b.weight": FOUR_BITS}
    with sfpformat.open(sfpformat.numpy.save(state(), options=chosen)) as file:
        assert file.info("b.weight").quantiser == "uniform"
        assert file.info("a.scales").quantiser != "uniform"


@pytest.mark.parametrize(
    "door", ["numpy save", "numpy save_file", "torch save", "torch save_file", "save_model"]
)
def test_lossy_options_for_all_warn_of_quantised_weights(door: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import sfpformat.torch as t

    arrays = {name: array for name, array in state().items() if name not in ("mask", "table", "f64")}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    module = torch.nn.Module()
    module.a = torch.nn.Module()
    module.a.register_buffer("qweight", tensors["a.qweight"])
    module.a.register_buffer("scales", tensors["a.scales"])
    path = tmp_path / "m.sfp"
    write = {
        "numpy save": lambda o: sfpformat.numpy.save(arrays, options=o),
        "numpy save_file": lambda o: sfpformat.numpy.save_file(arrays, path, options=o),
        "torch save": lambda o: t.save(tensors, options=o),
        "torch save_file": lambda o: t.save_file(tensors, path, options=o),
        "save_model": lambda o: t.save_model(module, path, options=o),
    }[door]
    with pytest.warns(
        sfpformat.SfpWarning, match=r"already quantised weights \(1\): 'a.scales'; options_for_weights"
    ):
        write(FOUR_BITS)
    write(sfpformat.Options())
    write({"a.scales": FOUR_BITS})


def test_torch_gives_the_same_options_for_weights_as_numpy() -> None:
    torch = pytest.importorskip("torch")
    import sfpformat.torch as t

    tensors = {name: torch.from_numpy(array) for name, array in state().items()}
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float64):
        tensors[f"w{dtype}"] = torch.ones(80, 80).to(dtype)
    expected = {"b.weight", *(name for name in tensors if name.startswith("wtorch"))}
    assert set(t.options_for_weights(tensors, FOUR_BITS)) == expected
    assert set(t.options_for_weights({"m": torch.ones(80, 80, device="meta")}, FOUR_BITS)) == {"m"}


def test_lossy_options_on_infinities_raise_with_the_tensor_and_a_remedy() -> None:
    with pytest.raises(
        sfpformat.OptionError, match=r"tensor 'mask': .* leave the tensor out of the lossy options"
    ):
        sfpformat.numpy.save({"mask": state()["mask"]}, options=FOUR_BITS)
