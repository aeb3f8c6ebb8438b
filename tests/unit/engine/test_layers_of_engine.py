"""Layer lists: TensorRT-RTX's from recorded logs; the older wordings composed from their published forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from repo_manager.engine.evidence import read_evidence
from repo_manager.engine.layers import EngineLayer, layers_from_inspector, layers_from_log
from repo_manager.errors import ModelError

LOGS = Path(__file__).parents[2] / "data" / "build_logs"


def recorded(name: str) -> list[str]:
    """The messages of a recorded log: each starts with `[SEVERITY] ` at the start of a line."""
    messages: list[str] = []
    for line in (LOGS / name).read_text(encoding="utf-8").split("\n"):
        severity, separator, text = line.partition("] ")
        if separator and severity in {"[VERBOSE", "[INFO", "[WARNING", "[ERROR"}:
            messages.append(text)
        else:
            messages[-1] += "\n" + line
    return messages


def by_node(layers: tuple[EngineLayer, ...]) -> dict[str, EngineLayer]:
    return {node: layer for layer in layers if layer.is_matrix_math for node in layer.nodes}


VERSIONS = ["1.7.1.116", "1.4.0.76"]
RECORDED = [(v, p, d) for v in VERSIONS for p, d in (("fp32", "float32"), ("fp16", "float16"))]


@pytest.mark.parametrize(("version", "precision", "dtype"), [*RECORDED, ("1.7.1.116", "int8", "int8")])
def test_recorded_rtx_logs_give_every_weighted_layer_and_its_type(version: str, precision: str, dtype: str) -> None:
    layers = by_node(layers_from_log(recorded(f"tensorrt_rtx-{version}-{precision}.log")))
    for node in ("conv1", "conv2", "fc"):
        assert layers[node].inputs[0] == dtype, node
        assert layers[node].tactic == "", "TensorRT-RTX chooses kernels on the user's GPU"


def test_fused_nodes_are_all_listed() -> None:
    layers = by_node(layers_from_log(recorded("tensorrt_rtx-1.7.1.116-fp32.log")))
    assert layers["conv1"] == layers["relu1"]


def test_weights_and_scales_are_told_from_data() -> None:
    conv = by_node(layers_from_log(recorded("tensorrt_rtx-1.7.1.116-int8.log")))["conv1"]
    assert conv.inputs == ("int8",)
    assert conv.constants[0] == "int8"


def test_a_log_without_a_list_has_no_layers() -> None:
    assert layers_from_log(["Parsing node: conv1 [Conv]", "Engine generation completed in 1 seconds."]) == ()


def test_the_last_list_counts() -> None:
    first = "Layers:\nName: a, LayerType: gemm, Inputs: [], Outputs: [], TacticName: t1, StreamId: 0, Metadata: "
    second = first.replace("Name: a", "Name: b")
    assert [layer.name for layer in layers_from_log([first, second])] == ["b"]


@pytest.mark.parametrize(
    ("shape", "name"), [("[Half(-8,256,10,19)]", "x"), (" (Half[-1,128,43,77])", "x"), ("[Half(1,2)]", "(Unnamed 1)")]
)
def test_tensorrt_8_lines(shape: str, name: str) -> None:
    line = (
        f"Engine Layer Information:\nLayer(CaskConvolution): Conv_0 + Relu_1, Tactic: 0x0a, {name}{shape} -> y{shape}"
    )
    (layer,) = layers_from_log([line])
    assert layer.nodes == ("Conv_0", "Relu_1")
    assert (layer.inputs, layer.outputs) == (("float16",), ("float16",))
    assert layer.tactic == "", "a number is no kernel's name"
    assert layer.is_matrix_math


def test_tensorrt_10_lines_with_weights_and_a_kernel() -> None:
    tensor = "{ Name: %s, Location: Device, Dimensions: [1,32,4,4], Format/Datatype: Row major Int8 format }"
    line = (
        f"Layers:\nName: w + c, LayerType: CaskConvolution, Inputs: [ {tensor % 'x'}], Outputs: [ {tensor % 'y'}], "
        'ParameterType: Convolution, Groups: 1, Weights: {"Type": "Int8", "Count": 9}, HasSparseWeights: 1, '
        "TacticName: sm80_xmma_fprop_sparse, TacticValue: 0x0a, StreamId: 0, Metadata: [ONNX Layer: c]"
    )
    (layer,) = layers_from_log([line])
    assert layer == EngineLayer(
        "w + c", "CaskConvolution", ("c",), ("int8",), ("int8",), ("int8",), "sm80_xmma_fprop_sparse"
    )


@pytest.mark.parametrize("separator", ["\x1e", "\x1f", ""])
def test_node_names_may_hold_brackets_and_commas(separator: str) -> None:
    metadata = f"[ONNX Layer: /a[0]/Conv, x]{separator}[ONNX Layer: b]"
    line = (
        f"Layers:\nName: n, LayerType: gemm, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata: {metadata}"
    )
    (layer,) = layers_from_log([line])
    assert layer.nodes == ("/a[0]/Conv, x", "b")


def test_the_inspectors_json() -> None:
    entry = {
        "Name": "c + r", "LayerType": "CaskConvolution", "TacticName": "sm80_spmma", "Weights": {"Type": "Half"},
        "Inputs": [{"Name": "x", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
        "Outputs": [{"Name": "y", "Datatype": "BFloat16"}], "Metadata": "[ONNX Layer: c]\x1e[ONNX Layer: r]",
    }  # fmt: skip
    (layer,) = layers_from_inspector(json.dumps({"Layers": [entry]}))
    assert layer == EngineLayer(
        "c + r", "CaskConvolution", ("c", "r"), ("float16",), ("float16",), ("bfloat16",), "sm80_spmma"
    )


@pytest.mark.parametrize(("text", "match"), [("{", "cannot be read"), ('{"Layers": ["c"]}', "layer names only")])
def test_other_answers_of_the_inspector_are_errors(text: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        layers_from_inspector(text)


@pytest.mark.parametrize("name", sorted(path.name for path in LOGS.glob("tensorrt_rtx-*.log")))
def test_no_recorded_builder_without_a_gpu_speaks_of_sparse_kernels(name: str) -> None:
    assert not read_evidence(recorded(name)).reported


@pytest.mark.parametrize(
    ("name", "eligible", "first", "last", "chosen"),
    [
        ("tensorrt-8-issue-1403.log", 1, "Conv_0", "Conv_0", ()),
        ("tensorrt-8.4.2.4-pytorch-issue-1340.log", 0, None, None, ()),
        ("tensorrt-8-issue-2169.log", 50, "Conv_22", "Gemm_725", ()),
        ("tensorrt-8-issue-4054-beginning.log", 14, "MatMul_401", "Conv_629 + Add_635 + Relu_636", None),
    ],
)
def test_published_logs_of_tensorrt_8_are_read(
    name: str, eligible: int, first: str | None, last: str | None, chosen: tuple[str, ...] | None
) -> None:
    evidence = read_evidence((LOGS / name).read_text(encoding="utf-8").splitlines())
    assert evidence.reported
    assert evidence.eligible is not None
    assert (evidence.eligible_count, len(evidence.eligible)) == (eligible, eligible)
    assert (evidence.eligible[0], evidence.eligible[-1]) == (first, last) if first else not evidence.eligible
    assert evidence.chosen == chosen


@pytest.mark.parametrize(("weights", "sparse"), [("dense", set()), ("sparse", {"conv_221", "conv_228", "conv_235"})])
def test_a_log_of_tensorrt_8_gives_types_and_the_names_of_the_kernels_that_were_timed(
    weights: str, sparse: set[str]
) -> None:
    messages = recorded(f"tensorrt-8.6.0-h200-resnext101-fp16-{weights}.log")
    layers = by_node(layers_from_log(messages))
    assert {layer.inputs[0] for layer in layers.values()} == {"float16"}
    assert {node for node, layer in layers.items() if "sparse" in layer.tactic and node.startswith("conv")} == sparse
    if weights == "dense":  # the other build took this layer's times from the cache, which holds numbers alone
        assert layers["conv_0"].tactic.startswith("sm90_xmma_fprop_image_first_layer")
    assert layers["conv_8"].tactic == "", "a CaskGemmConvolution's number is its own layer's"
    evidence = read_evidence(messages)
    assert (evidence.eligible_count, evidence.chosen_count) == ((11, 3) if sparse else (0, 0))
