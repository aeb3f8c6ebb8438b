"""Configurations in the shapes of public repositories: nothing is refused, and an edit and its undoing lose nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from repo_manager.repository.configuration import change_config
from repo_manager.repository.verify import verify
from repo_manager.triton_config.config import parse_config
from repo_manager.triton_config.problems import Severity

IO = """input [ { name: "IN" data_type: TYPE_FP32 dims: [ -1, 4 ] } ]
output [ { name: "OUT" data_type: TYPE_FP32 dims: 4 } ]"""
SHAPES = {
    "sequence with controls": f"""# Who keeps the state
backend: "mine"  # ours
max_batch_size: 8
{IO}
sequence_batching {{
  max_sequence_idle_microseconds: 5000000
  oldest {{ max_candidate_sequences: 4, preferred_batch_size: [ 4, 8 ] }}
  control_input [
    {{ name: "START"; control [ {{ kind: CONTROL_SEQUENCE_START; fp32_false_true: [ 0, 1 ] }} ] }},
    {{ name: "CORRID"; control [ {{ kind: CONTROL_SEQUENCE_CORRID; data_type: TYPE_STRING }} ] }}
  ]
  state [ {{ input_name: "S_IN" output_name: "S_OUT" data_type: TYPE_INT32 dims: [ -1 ]
             initial_state: {{ data_type: TYPE_INT32 dims: [ 1 ] zero_data: true name: "first" }} }} ]
}}
""",
    "decoupled Python with parameters": f"""name: "m"
backend: 'python'
{IO}
model_transaction_policy {{ decoupled: True }}
instance_group [{{ kind: KIND_CPU, count: 2 }}]
parameters: {{ key: "EXECUTION_ENV_PATH", value: {{ string_value: "$$TRITON_MODEL_DIRECTORY/env.tar.gz" }} }}
parameters {{ key: "FORCE_CPU_ONLY_INPUT_TENSORS" value {{ string_value: "no" }} }}
""",
    "queues, cache and rate limiter": f"""backend: "mine"
max_batch_size: 16
{IO}
dynamic_batching {{
  priority_levels: 2 default_priority_level: 2
  default_queue_policy {{ timeout_action: REJECT default_timeout_microseconds: 100 allow_timeout_override: true }}
  priority_queue_policy {{ key: 1 value {{ max_queue_size: 16 }} }}
}}
response_cache {{ enable: true }}
instance_group {{ count: 1 kind: KIND_CPU rate_limiter {{ resources [ {{ name: "R1" count: 2 }} ] priority: 2 }} }}
""",
    "ragged with batch inputs": """backend: "mine"
max_batch_size: 4
input { name: "IN" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }
input { name: "MASK" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
output { name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } }
batch_input [ { kind: BATCH_ACCUMULATED_ELEMENT_COUNT target_name: "IDX" data_type: TYPE_FP32 source_input: "IN" } ]
batch_output { kind: BATCH_SCATTER_WITH_INPUT_SHAPE target_name: "OUT" source_input: "IN" }
""",
    "a graph with optimisation and warm-up": f"""platform: "tensorflow_savedmodel"
max_batch_size: 0
{IO}
version_policy: {{ specific: {{ versions: [1] }} }}
optimization {{ execution_accelerators {{ gpu_execution_accelerator: [ {{ name: "tensorrt"
  parameters {{ key: "precision_mode" value: "FP16" }} }} ] }} cuda {{ graphs: true }} }}
model_warmup [ {{ name: "w" batch_size: 0
  inputs {{ key: "IN" value {{ data_type: TYPE_FP32 dims: [ 2, 4 ] zero_data: true }} }} }} ]
cc_model_filenames [ {{ key: "8.0" value: "a" }}, {{ key: "9.0" value: "b" }} ]
""",
    "what a backend completes, in old spelling": """backend: "dali"
max_batch_size: 256; parameters < key: "num_threads" value: < string_value: "12" > >
""",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_refused_and_nothing_is_lost(tmp_path: Path, shape: str) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    for name in ("model.py", "model.savedmodel", "model.dali"):
        (tmp_path / "m" / "1" / name).write_text("x")
    (tmp_path / "m" / "env.tar.gz").write_bytes(b"")
    path = tmp_path / "m" / "config.pbtxt"
    path.write_text(SHAPES[shape])
    before = parse_config(SHAPES[shape]).message()
    assert [str(each) for each in verify(tmp_path, models=False) if each.severity is Severity.ERROR] == []
    change_config(tmp_path, "m", {"parameters.zz": "1"})
    changed = parse_config(path.read_text()).message()
    assert changed.parameters["zz"].string_value == "1"
    del changed.parameters["zz"]
    assert changed == before
    assert all(line in path.read_text() for line in SHAPES[shape].splitlines() if "#" in line)
    change_config(tmp_path, "m", {"parameters.zz": None})
    assert parse_config(path.read_text()).message() == before


def test_files_of_gpu_kinds_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    for name, content in (("model.plan", "x"), ("sm75.plan", "x"), ("empty.plan", "")):
        (tmp_path / "m" / "1" / name).write_text(content)
    by_gpu = (("7.5", "sm75.plan"), ("8.0", "none.plan"), ("8.6", "none.plan"), ("9.0", "empty.plan"))
    entries = "".join(f'cc_model_filenames {{ key: "{key}" value: "{file}" }}\n' for key, file in by_gpu)
    (tmp_path / "m" / "config.pbtxt").write_text(f'backend: "tensorrt"\n{IO}{entries}')
    said = [
        "empty.plan is empty, and GPUs of compute capability 9.0 serve it",
        "none.plan is missing, and GPUs of compute capability 8.0, 8.6 serve it",
    ]
    found = [each for each in verify(tmp_path, models=False) if each.rule == "model-file-missing"]
    assert sorted(f"{each.where.removeprefix('m/1/')} {each.what}" for each in found) == said
    assert {each.severity for each in found} == {Severity.WARNING}
    changed = change_config(tmp_path, "m", {"parameters.zz": "1"}, dry_run=True).problems
    assert sorted(each.what for each in changed if each.rule == "model-file-missing") == [
        f"version 1: {each}" for each in said
    ]
