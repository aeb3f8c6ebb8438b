"""Triton's `onnxruntime` backend on top of its Python backend (no repo_manager here: it runs in Triton's stub).

It serves the repositories of the native C++ backend unchanged. For speed, a single request runs on its own shared
memory. The requests of a batch are joined by one copy into a lasting buffer. Values common to all requests are read
from Python once. Small answers, and the memory of small runs, are kept and filled again.
"""

from __future__ import annotations

import asyncio
import gc
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from backend_io import ConfigMismatch, check, complete, needs_completion, tensors_of  # type: ignore[import-not-found]  # copied beside this file from triton_config/
from rm_ort_arrays import array_of, check_passable, tensor_of  # type: ignore[import-not-found]  # beside this file

Array = np.ndarray[Any, Any]
_KEPT_BUFFERS = 8


class TritonPythonModel:
    """One instance of one version of one model."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in inputs, outputs and batching where the configuration leaves them out."""
        config = auto_complete_model_config.as_dict()
        if not needs_completion(config):
            return auto_complete_model_config  # avoids importing ONNX Runtime: this step delays every load
        from rm_ort_session import open_session  # type: ignore[import-not-found]  # beside this file, in the stub

        try:
            session = open_session(Path(pb_utils.get_model_dir()), config, "CPU", 0)
            complete(config, tensors_of(session.get_inputs()), tensors_of(session.get_outputs()))
        except ConfigMismatch as exc:
            raise pb_utils.TritonModelException(str(exc)) from None
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session and check the configuration against it."""
        from rm_ort_batches import Batches, SequenceStates  # type: ignore[import-not-found]  # beside this file
        from rm_ort_kept import BoundRuns, KeptAnswers  # type: ignore[import-not-found]  # beside this file
        from rm_ort_session import new_run_options, open_session

        config = json.loads(args["model_config"])
        check_passable(config)
        folder = Path(args["model_repository"]) / args["model_version"]
        kind, device = args["model_instance_kind"], int(args["model_instance_device_id"])
        try:
            session = open_session(folder, config, kind, device)
            inputs = tensors_of(session.get_inputs())
            optional = tensors_of(session.get_overridable_initializers())
            outputs = tensors_of(session.get_outputs())
            check(config, inputs, optional, outputs)
        except ConfigMismatch as exc:
            raise pb_utils.TritonModelException(str(exc)) from None
        fed = {**inputs, **optional}
        # The public method checks the names on every call, but check() has done this once. Without options, each call
        # creates some. An instance runs one call at a time, so it needs one set.
        self._run, self._run_options = session._sess.run, new_run_options()
        self._batched = bool(config.get("max_batch_size"))
        self._outputs = tuple(entry["name"] for entry in config["output"])
        self._scalar_inputs = {name for name, tensor in fed.items() if not tensor.dims}
        self._strings = {name for name, tensor in fed.items() if tensor.data_type == "TYPE_STRING"}
        self._output_shapes = {
            entry["name"]: [int(size) for size in entry["dims"]]
            for entry in config["output"]
            if not outputs[entry["name"]].dims
        }
        self._plain = not (self._scalar_inputs or self._strings or self._output_shapes)
        self._single = next(iter(fed)) if len(fed) == 1 and self._plain else None
        self._one_output = len(self._outputs) == 1
        self._is_simple = self._single is not None and self._one_output
        self._answers = KeptAnswers()
        self._bound = None
        if self._is_simple and kind == "CPU" and _is_fixed(outputs[self._outputs[0]].dims, self._batched):
            self._bound = BoundRuns(session, self._single, self._outputs[0], self._run_options, self._answers)
        self._buffers: dict[tuple[Any, ...], Array] = {}
        self._states, self._batches = SequenceStates(config), Batches(config)
        self._special = bool(self._states.pairs) or self._batches.needed
        # The stub asks this of every answer. asyncio's own function uses an abstract class: 1 % of a small request.
        asyncio.iscoroutine = types.CoroutineType.__instancecheck__  # type: ignore[assignment]  # native coroutines
        gc.collect()
        gc.freeze()  # the session and its modules live forever

    def finalize(self) -> None:
        """Give kept shared memory back, while the stub still has it."""
        if self._bound is not None:
            self._bound.clear()
        self._answers.clear()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request: with its outputs or with its own error."""
        if self._bound is not None:
            known: list[Any] | None = self._bound.answer(requests)
            if known is not None:
                return known
        if self._special:
            return self._execute_special(requests)
        if len(requests) == 1:
            return [self._answer_simple(requests[0]) if self._is_simple else self._answer(requests[0])]
        if self._is_simple and self._batched:
            answers = self._answer_alike(requests)
            if answers is not None:
                return answers
        responses: list[Any] = [None] * len(requests)
        groups: dict[tuple[Any, ...], list[tuple[int, dict[str, Array]]]] = {}
        for index, request in enumerate(requests):
            try:
                feed = self._read(request)
                groups.setdefault(self._group_of(request, feed), []).append((index, feed))
            except Exception as exc:  # noqa: BLE001 - a fault of one request becomes the error of this request
                responses[index] = _error(exc)
        for key, members in groups.items():
            joined = self._run_joined(key, members) if self._batched and len(members) > 1 else None
            for position, (index, feed) in enumerate(members):
                # If the joined run fails, run each request alone: a bad request must not fail the others.
                responses[index] = self._run_alone(index, key[0], feed) if joined is None else joined[position]
        return responses

    def _execute_special(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests Triton alone cannot batch, or whose states it does not keep."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[tuple[Any, ...], list[tuple[int, dict[str, Array]]]] = {}
        for index, request in enumerate(requests):
            try:
                feed = self._read(request)
                self._states.give(request, feed)
                groups.setdefault(self._batches.key(feed), []).append((index, feed))
            except Exception as exc:  # noqa: BLE001 - see execute
                responses[index] = _error(exc)
        for members in groups.values():
            if not self._batched or not self._run_special(requests, members, responses):
                for member in members:
                    self._run_special(requests, [member], responses)
        return responses

    def _run_special(
        self, requests: Sequence[Any], members: list[tuple[int, dict[str, Array]]], responses: list[Any]
    ) -> bool:
        """Run requests as one. Return whether they have their answers, the error of a single one included."""
        names = tuple(dict.fromkeys((*self._outputs, *self._states.outputs)))
        try:
            feeds = [feed for _, feed in members]
            arrays = self._run(names, self._batches.joined(feeds), self._run_options)
            parts = self._batches.parted(dict(zip(names, arrays, strict=True)), feeds)
            for (index, _), part in zip(members, parts, strict=True):
                self._states.take(requests[index], part)
                tensors = [self._tensor(name, part[name]) for name in self._wanted(requests[index])]
                responses[index] = pb_utils.InferenceResponse(tensors)
        except Exception as exc:  # noqa: BLE001 - see execute
            if len(members) > 1:
                return False
            responses[members[0][0]] = _error(exc)
        return True

    def _answer_simple(self, request: Any) -> Any:
        """Answer a request alone to a model of one input and one output: as `_answer`, in fewer steps."""
        try:
            array = array_of(request.inputs()[0])
            (result,) = self._run(self._outputs, {self._single: array}, self._run_options)
            response = self._answers.response(0, self._outputs[0], result)
            if self._bound is not None:
                self._bound.learn(1, array, result)
            return response
        except Exception as exc:  # noqa: BLE001 - see execute
            return _error(exc)

    def _answer_alike(self, requests: Sequence[Any]) -> list[Any] | None:
        """Run requests to a model of one input and one output as one. `None` when they differ, or it fails."""
        name = self._outputs[0]
        try:
            arrays = [array_of(request.inputs()[0]) for request in requests]
            sizes = [array.shape[0] for array in arrays]
            if len({array.shape[1:] for array in arrays}) > 1:
                return None
            joined = self._joined(str(self._single), arrays, sum(sizes))
            (whole,) = self._run(self._outputs, {self._single: joined}, self._run_options)
            if whole.ndim == 0 or whole.shape[0] != sum(sizes):
                return None
            if len(whole) == len(sizes):
                parts = [whole[place : place + 1] for place in range(len(whole))]
            else:
                parts = np.split(whole, np.cumsum(sizes)[:-1])
            responses = [self._answers.response(place, name, part) for place, part in enumerate(parts)]
            if self._bound is not None and len(set(sizes)) == 1:
                self._bound.learn(len(sizes), joined, whole)
            return responses
        except Exception:  # noqa: BLE001 - each request then runs alone and gets its own error
            return None

    def _answer(self, request: Any) -> Any:
        try:
            feed = self._read(request)
            outputs = self._wanted(request)
        except Exception as exc:  # noqa: BLE001 - see execute
            return _error(exc)
        return self._run_alone(0, outputs, feed)

    def _read(self, request: Any) -> dict[str, Array]:
        """Return the request's inputs: views of the shared memory they are in."""
        if self._single is not None:
            return {self._single: array_of(request.inputs()[0])}
        feed = {tensor.name(): array_of(tensor) for tensor in request.inputs()}
        if not self._plain:
            for name in self._strings & feed.keys():
                feed[name] = _decoded(feed[name])
            for name in self._scalar_inputs & feed.keys():
                feed[name] = feed[name].reshape(())
        return feed

    def _wanted(self, request: Any) -> tuple[str, ...]:
        """Return the outputs a request asks for, those of the model in the model's order."""
        if self._one_output:
            return self._outputs
        wanted = set(request.requested_output_names())
        return tuple(name for name in self._outputs if name in wanted) or self._outputs

    def _group_of(self, request: Any, feed: dict[str, Array]) -> tuple[Any, ...]:
        """Return the key two requests must share to run as one."""
        if self._single is not None:
            return self._wanted(request), feed[self._single].shape[1:]
        return self._wanted(request), *((name, feed[name].shape[1:]) for name in sorted(feed))

    def _run_alone(self, place: int, outputs: tuple[str, ...], feed: dict[str, Array]) -> Any:
        """Answer the request at `place` of the batch by a run of its own."""
        try:
            arrays = self._run(outputs, feed, self._run_options)
            if self._plain:
                return self._response(place, outputs, arrays)
            return pb_utils.InferenceResponse([self._tensor(*pair) for pair in zip(outputs, arrays, strict=True)])
        except Exception as exc:  # noqa: BLE001 - see execute
            return _error(exc)

    def _response(self, place: int, outputs: tuple[str, ...], arrays: Sequence[Array]) -> Any:
        """Return the response to the request at `place` of the batch."""
        if self._one_output:
            return self._answers.response(place, outputs[0], arrays[0])
        tensors = [self._answers.tensor(place, *pair) for pair in zip(outputs, arrays, strict=True)]
        return pb_utils.InferenceResponse(tensors)

    def _run_joined(self, key: tuple[Any, ...], members: list[tuple[int, dict[str, Array]]]) -> list[Any] | None:
        """Run requests of the same shape as one. `None` when the run fails or its outputs cannot be parted."""
        outputs = key[0]
        first = members[0][1]
        sizes = [next(iter(feed.values())).shape[0] for _, feed in members]
        total = sum(sizes)
        try:
            feed = {name: self._joined(name, [each[name] for _, each in members], total) for name in first}
            arrays = self._run(outputs, feed, self._run_options)
            if any(array.ndim == 0 or array.shape[0] != total for array in arrays):
                return None
            responses, start = [], 0
            for (place, _), size in zip(members, sizes, strict=True):
                end = start + size
                responses.append(self._response(place, outputs, [array[start:end] for array in arrays]))
                start = end
            return responses
        except Exception:  # noqa: BLE001 - each member then runs alone and gets its own error
            return None

    def _joined(self, name: str, arrays: list[Array], total: int) -> Array:
        """Join along the batch axis, in a buffer kept for the next batch."""
        first = arrays[0]
        if first.dtype == np.object_:
            return np.concatenate(arrays)
        key = (name, first.shape[1:], first.dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape[0] < total:
            if len(self._buffers) >= _KEPT_BUFFERS:
                self._buffers.clear()
            buffer = self._buffers[key] = np.empty((total, *first.shape[1:]), first.dtype)
        return np.concatenate(arrays, out=buffer[:total])

    def _tensor(self, name: str, array: Any) -> Any:
        shape = self._output_shapes.get(name)
        # ONNX scalars have no axes. Triton gives them one axis of length 1.
        return tensor_of(name, np.asarray(array) if shape is None else np.asarray(array).reshape(shape))


def _is_fixed(dims: Sequence[int], batched: bool) -> bool:
    """Return whether every size of an output but the batch's is known."""
    return all(size >= 0 for size in dims[batched:])


def _decoded(array: Array) -> Array:
    """Return bytes as text for ONNX Runtime."""
    text = np.empty(array.size, np.object_)
    text[:] = [item.decode() if isinstance(item, bytes) else item for item in array.ravel()]
    return text.reshape(array.shape)


def _error(exc: Exception) -> Any:
    """Return a response with the reason."""
    message = str(exc) or type(exc).__name__
    code = pb_utils.TritonError.INVALID_ARG if "INVALID_ARGUMENT" in message else pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnx runtime error: {message}", code))
