from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from repo_manager.errors import ConfigError
from repo_manager.onnx_model.batch_axis import BatchAxis
from repo_manager.onnx_model.signature import Signature
from repo_manager.triton_config.compare import changed_fields, check_config, misfits, same_signature
from repo_manager.triton_config.config import ModelConfig, parse_config
from repo_manager.triton_config.derive import derive_config
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.triton_config.rules import check_rules
from repo_manager.triton_config.served_signature import config_dtype, triton_dtype
from repo_manager.types import Backend, Dim, TensorSpec

BATCHED = BatchAxis("batched", "it is")
UNBATCHED = BatchAxis("unbatched", "the first dimension is fixed")


def spec(name: str, dtype: str, *shape: Dim) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def signature(inputs: list[TensorSpec], outputs: list[TensorSpec]) -> Signature:
    return Signature(tuple(inputs), tuple(outputs), 17, 8, {"": 17})


IMAGE = signature([spec("x", "float32", "N", 3, 224, None)], [spec("y", "float16", "N", 10)])


def derive(
    sig: Signature, axis: BatchAxis = BATCHED, backend: Backend = Backend.ONNXRUNTIME, **options: Any
) -> ModelConfig:
    return derive_config("m", sig, axis, backend, ConfigOptions(**options))


def test_batched_dims_have_no_batch_axis() -> None:
    message = derive(IMAGE).message()
    assert message.max_batch_size == 8
    assert list(message.input[0].dims) == [3, 224, -1]
    assert list(message.output[0].dims) == [10]
    assert message.backend == "onnxruntime"
    assert message.platform == ""
    assert message.default_model_filename == ""
    assert message.HasField("dynamic_batching")
    assert message.instance_group[0].count == 1
    assert message.instance_group[0].kind == message.instance_group[0].KIND_AUTO


@pytest.mark.parametrize(("axis", "options"), [(UNBATCHED, {}), (BATCHED, {"max_batch_size": 0})])
def test_unbatched_dims_are_the_models(axis: BatchAxis, options: dict[str, Any]) -> None:
    config = derive(IMAGE, axis, **options)
    assert "max_batch_size: 0\n" in config.text
    assert list(config.message().input[0].dims) == [-1, 3, 224, -1]
    assert not config.message().HasField("dynamic_batching")


def test_a_scalar_per_sample_needs_a_reshape_and_a_true_scalar_must_not_have_one() -> None:
    batched = derive(signature([spec("x", "float32", "N")], [spec("y", "float32", "N")])).message()
    assert list(batched.input[0].dims) == [1]
    assert batched.input[0].HasField("reshape")
    assert not batched.input[0].reshape.shape
    plain = derive(signature([spec("x", "float32")], [spec("y", "float32")]), UNBATCHED).message()
    assert list(plain.output[0].dims) == [1]
    assert not plain.output[0].HasField("reshape")


def test_what_is_derived_passes_our_own_checks() -> None:
    for axis in (BATCHED, UNBATCHED):
        for sig in (IMAGE, signature([spec("x", "string", "N"), spec("b", "bool", "N", 2)], [spec("y", "int64", "N")])):
            config = derive(sig, axis)
            assert check_rules(config) == []
            assert check_config(config, sig) == []
            assert parse_config(config.text).message() == config.message()


def test_an_output_of_unknown_rank_is_a_scalar_to_the_backend() -> None:
    sig = signature([spec("x", "float32", 2)], [TensorSpec("y", "float32", None)])
    assert list(derive(sig, UNBATCHED).message().output[0].dims) == [1]
    with pytest.raises(ConfigError, match="'x' has no rank"):
        derive(signature([TensorSpec("x", "float32", None)], []), UNBATCHED)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (Backend.ONNXRUNTIME, "bfloat16"),
        (Backend.ONNXRUNTIME, "complex64"),
        (Backend.ONNXRUNTIME, "float8e4m3fn"),
        (Backend.TENSORRT, "string"),
        (Backend.TENSORRT, "float64"),
    ],
)
def test_a_type_that_triton_cannot_carry_names_tensor_and_type(backend: Backend, dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"'odd'.*{dtype}"):
        derive(signature([spec("odd", dtype, "N")], [spec("y", "float32", "N")]), backend=backend)


def test_type_names() -> None:
    assert (triton_dtype("string"), config_dtype("string")) == ("BYTES", "TYPE_STRING")
    assert (triton_dtype("float16"), config_dtype("bool")) == ("FP16", "TYPE_BOOL")
    with pytest.raises(ConfigError, match="complex64"):
        triton_dtype("complex64")


def test_names_with_odd_characters_survive() -> None:
    odd = 'a"b\\c\n/é:0'
    config = derive(signature([spec(odd, "float32", "N", 1)], [spec("serving_default:0", "float32", "N", 1)]))
    assert parse_config(config.text).message().input[0].name == odd


@pytest.mark.parametrize(
    ("sig", "axis", "options", "message"),
    [
        (IMAGE, UNBATCHED, {"max_batch_size": 4}, "first dimension is fixed"),
        (IMAGE, BATCHED, {"preferred_batch_sizes": (16,)}, "preferred batch size 16"),
        (IMAGE, BATCHED, {"model_filename": "../x"}, "plain file name"),
        (IMAGE, BATCHED, {"labels": {"z": ("a",)}}, "no such output"),
        (IMAGE, BATCHED, {"labels": {"y": ("a", "b")}}, "2 labels for 10"),
        (IMAGE, BATCHED, {"labels": {"y": ("a\nb",) * 10}}, "not one printable line"),
        (IMAGE, BATCHED, {"warmup": True}, "needs a size"),
        (IMAGE, BATCHED, {"warmup": True, "warmup_shapes": {"x": (3, 5, 5)}}, "does not fit"),
        (signature([spec("x", "float32", 0)], []), UNBATCHED, {}, "dimension of 0"),
        (signature([spec("", "float32", 1)], []), UNBATCHED, {}, "has no name"),
    ],
)
def test_contradictions_are_refused(sig: Signature, axis: BatchAxis, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        derive(sig, axis, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": -1},
        {"instance_count": 0},
        {"instance_kind": "tpu"},
        {"threads": -1},
        {"max_queue_delay_us": -1},
    ],
)
def test_options_out_of_range_are_refused(options: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ConfigOptions(**options)


def test_serving_options_reach_the_configuration() -> None:
    message = derive(
        IMAGE,
        max_batch_size=16,
        instance_count=2,
        instance_kind="gpu",
        preferred_batch_sizes=(8, 4),
        max_queue_delay_us=500,
        threads=0,
        parameters={"execution_mode": "1"},
        model_filename="net.onnx",
    ).message()
    assert message.instance_group[0].kind == message.instance_group[0].KIND_GPU
    assert list(message.dynamic_batching.preferred_batch_size) == [4, 8]
    assert message.dynamic_batching.max_queue_delay_microseconds == 500
    assert message.parameters["intra_op_thread_count"].string_value == "0"
    assert message.parameters["execution_mode"].string_value == "1"
    assert message.default_model_filename == "net.onnx"


def test_any_field_can_be_given() -> None:
    message = derive(
        IMAGE,
        max_batch_size=4,
        fields={"response_cache.enable": "true", "version_policy": "{ latest { num_versions: 2 } }"},
    ).message()
    assert message.response_cache.enable
    assert message.version_policy.latest.num_versions == 2
    with pytest.raises(ConfigError, match="no field 'respons_cache'"):
        derive(IMAGE, fields={"respons_cache.enable": "true"})


def test_without_batches_there_is_no_queue_to_wait_in() -> None:
    message = derive(IMAGE, max_batch_size=0, max_queue_delay_us=500).message()
    assert not message.HasField("dynamic_batching")


def test_backends_that_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match="GPUs only"):
        derive(IMAGE, backend=Backend.TENSORRT, instance_kind="cpu")
    with pytest.raises(ConfigError, match="threads"):
        derive(IMAGE, backend=Backend.TENSORRT, threads=1)
    assert derive(IMAGE, backend=Backend.TENSORRT_RTX).message().default_model_filename == "model.engine"


def test_labels_get_a_file_each() -> None:
    labels = tuple("abcdefghij")
    config = derive(IMAGE, labels={"y": labels})
    assert config.labels == {"labels_0_y.txt": labels}
    assert config.label_filenames == ("labels_0_y.txt",)


def test_warmup_uses_random_floats_and_zero_integers() -> None:
    sig = signature([spec("x", "float32", "N", None), spec("i", "int64", "N")], [spec("y", "float32", "N")])
    samples = derive(sig, warmup=True, warmup_shapes={"x": (7,)}).message().model_warmup
    assert [sample.batch_size for sample in samples] == [1, 8]
    assert samples[0].inputs["x"].random_data
    assert list(samples[0].inputs["x"].dims) == [7]
    assert samples[0].inputs["i"].zero_data
    single = derive(sig, UNBATCHED, warmup=True, warmup_shapes={"x": (1, 7), "i": (1,)}).message().model_warmup
    assert [sample.batch_size for sample in single] == [1]


def test_differences_between_signatures() -> None:
    base = derive(IMAGE)
    assert same_signature(base, derive(IMAGE, instance_count=4, threads=2)) == ()
    other = derive(
        signature([spec("x", "float16", "N", 3, 224, None)], [spec("z", "float16", "N", 10)]), max_batch_size=4
    )
    text = "\n".join(same_signature(base, other))
    for part in ("max_batch_size is 8", "'x' is TYPE_FP32", "'y' is only in the repository", "'z' is only in the new"):
        assert part in text
    assert same_signature(parse_config('backend: "onnxruntime" max_batch_size: 8'), base) == ()


FREE = 'backend: "tensorrt" max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: [ -1, 4 ] } '
FREE_OUTPUT = 'output { name: "y" data_type: TYPE_FP32 dims: [ -1, 2 ] }'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FREE + FREE_OUTPUT, ""),
        ((FREE + FREE_OUTPUT).replace("8", "2"), ""),
        (FREE.replace("-1", "7") + FREE_OUTPUT, ""),  # narrower
        (FREE.replace("[ -1, 4 ]", "-1 dims: 8 reshape { shape: [ -1, 4 ] }") + FREE_OUTPUT, ""),
        ((FREE + FREE_OUTPUT).replace("8", "0").replace("[ -1", "[ -1, -1"), ""),  # the batch axis is in the dims
        (FREE, ""),  # completed by the server
        (FREE + FREE_OUTPUT.replace("-1", "7"), "output 'y' is TYPE_FP32 [-1, 7, 2]"),  # exact, unlike inputs
        (FREE.replace("4", "5") + FREE_OUTPUT, "input 'x' is TYPE_FP32 [-1, -1, 5]"),
        (FREE.replace("FP32", "FP16") + FREE_OUTPUT, "input 'x' is TYPE_FP16"),
        (FREE.replace('"x"', '"z"') + FREE_OUTPUT, "input 'x' of the version is missing"),
        (FREE + FREE_OUTPUT.replace('"y"', '"z"'), "output 'z' is not among those of the version"),
        ((FREE + FREE_OUTPUT).replace("tensorrt", "onnxruntime"), "backend is 'onnxruntime'"),
    ],
)
def test_whether_a_version_fits_the_configuration_that_is_there_now(text: str, message: str) -> None:
    found = misfits(parse_config(text), parse_config(FREE + FREE_OUTPUT))
    assert message in "\n".join(found)
    assert bool(found) == bool(message)


def test_what_a_model_was_adopted_with_before_it_had_a_configuration_fits() -> None:
    assert misfits(parse_config(FREE + FREE_OUTPUT), parse_config("max_batch_size: 0")) == ()


def test_changed_fields() -> None:
    assert changed_fields(derive(IMAGE), derive(IMAGE, instance_count=2, threads=1)) == ("instance_group", "parameters")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('output { name: "y" data_type: TYPE_FP16 dims: [-1] }', "do not fit"),  # exact, unlike inputs
        ('output { name: "y" data_type: TYPE_FP32 dims: [10] }', "TYPE_FP16"),
        ('output { name: "q" data_type: TYPE_FP16 dims: [10] }', "not in the model"),
        ('input { name: "x" data_type: TYPE_FP32 dims: [3, 224] }', "do not fit"),
        ('input { name: "q" data_type: TYPE_FP32 dims: [3] }', "'x' are not listed"),
    ],
)
def test_a_configuration_that_does_not_fit_its_model(text: str, message: str) -> None:
    found = check_config(parse_config(f'backend: "onnxruntime" max_batch_size: 8 {text}'), IMAGE)
    assert any(message in problem.what for problem in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size: -1", "max_batch_size is -1"),
        ('input { name: "a" data_type: TYPE_FP32 }', "no dims"),
        ('input { name: "a" dims: 1 }', "no data_type"),
        ('input { name: "a" data_type: TYPE_FP32 dims: 0 }', "1 or more"),
        ('input { name: "a" data_type: TYPE_FP32 dims: 1 reshape { } }', "empty reshape"),
        ('max_batch_size: 1 input { name: "a" data_type: TYPE_FP32 dims: 2 reshape { } }', "different size"),
        ('output { name: "a" data_type: TYPE_FP32 dims: [2, -1, 6] reshape { shape: [-1, 12] } }', "different size"),
        (
            'output { name: "a" data_type: TYPE_FP32 dims: 1 } output { name: "a" data_type: TYPE_FP32 dims: 1 }',
            "twice",
        ),
        ("max_batch_size: 2 dynamic_batching { preferred_batch_size: 4 }", "preferred batch size 4"),
        ("instance_group { kind: KIND_CPU gpus: 0 }", "KIND_CPU"),
    ],
)
def test_tritons_own_rules(text: str, message: str) -> None:
    found = check_rules(parse_config('backend: "onnxruntime" ' + text))
    assert any(message in problem.what for problem in found), found


def test_a_legal_reshape_is_no_problem() -> None:
    text = 'output { name: "a" data_type: TYPE_FP32 dims: [2, 4, -1, 6] reshape { shape: [8, -1, 1, 6] } }'
    assert check_rules(parse_config('backend: "x" ' + text)) == []
