"""Memory that is kept between requests (beside model.py, in Triton's stub process).

A small model takes less time than the objects around it. A tensor asks NumPy for its type a dozen times. A response
and its tensors each take a block of shared memory. A run looks up its inputs and outputs by name. Kept objects only
get new contents.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from rm_ort_arrays import array_of, tensor_of  # type: ignore[import-not-found]  # beside this file

__all__ = ["BoundRuns", "KeptAnswers"]

Array = np.ndarray[Any, Any]
_MOST_TENSOR_BYTES = 16_384
_MOST_KEPT_BYTES = 262_144
_SLOT_BYTES = 512  # estimated size of an answer without its contents
_MOST_BOUND_BYTES = 65_536
_MOST_PLANS = 64


class _Slot:
    """A tensor, and a response with nothing else, for the contents of one answer after another.

    The stub copies a tensor into shared memory when it first sends it. From then on the tensor is that block, and the
    stub sends the block as it is. So whatever the block holds is the answer. This is safe because the stub takes its
    next requests only after the server has copied the answers to the last ones.
    """

    def __init__(self, name: str, array: Array) -> None:
        self._first = np.array(array, order="C")
        self.tensor = tensor_of(name, self._first)
        self.response = pb_utils.InferenceResponse([self.tensor])
        self.memory: memoryview | None = None

    def fill(self, array: Array) -> None:
        """Write contents where the stub takes them from: before it has sent the tensor once, that is not the block."""
        if self.memory is not None:
            self.memory[:] = array.tobytes()
            return
        address = np.from_dlpack(self.tensor).ctypes.data
        first = self._first
        if address == first.ctypes.data:
            first[...] = array
            return
        self.memory = memoryview((ctypes.c_ubyte * first.nbytes).from_address(address)).cast("B")
        self.memory[:] = array.tobytes()


class KeptAnswers:
    """Tensors and responses that are sent again and again, each time with other contents.

    Each place in a batch has its own for each output and shape, so that no two answers of a batch share one.
    """

    def __init__(self) -> None:
        self._slots: dict[tuple[str, int, tuple[int, ...]], _Slot] = {}
        self._bytes = 0
        self._passed_over: set[str] = set()  # outputs of a type without an array form in the stub

    def response(self, place: int, name: str, array: Array) -> Any:
        """Return a response with one output to the request at `place` of the batch.

        Args:
            place: place of the request in the batch, from 0.
            name: name of the response's only output.
            array: contents of the answer. Copied where the answer is kept (up to 16 KiB, no strings).
        """
        slot = self._filled(place, name, array)
        return pb_utils.InferenceResponse([tensor_of(name, array)]) if slot is None else slot.response

    def tensor(self, place: int, name: str, array: Array) -> Any:
        """Return an output of the response to the request at `place` of the batch.

        Args:
            place: place of the request in the batch, from 0.
            name: name of the output, perhaps one of several in the response.
            array: contents of this output. Copied where it is kept (up to 16 KiB, no strings).
        """
        slot = self._filled(place, name, array)
        return tensor_of(name, array) if slot is None else slot.tensor

    def sent(self, name: str, parts: Sequence[Array]) -> list[tuple[memoryview, Any]] | None:
        """Return (memory, response) for answers with these shapes. `None` unless all have been sent before.

        Args:
            name: name of the output all answers belong to.
            parts: answers in the order of the batch.
        """
        slots = [self._slots.get((name, place, part.shape)) for place, part in enumerate(parts)]
        found = [(slot.memory, slot.response) for slot in slots if slot is not None and slot.memory is not None]
        return found if len(found) == len(slots) else None

    def clear(self) -> None:
        """Give everything back."""
        self._slots.clear()
        self._bytes = 0

    def _filled(self, place: int, name: str, array: Array) -> _Slot | None:
        """Return the slot of an answer, with these contents in it. `None`: it is not kept."""
        key = (name, place, array.shape)
        slot = self._slots.get(key)
        if slot is not None:
            slot.fill(array)
            return slot
        if not 0 < array.nbytes <= _MOST_TENSOR_BYTES or array.dtype.hasobject or name in self._passed_over:
            return None
        size = array.nbytes + _SLOT_BYTES
        if self._bytes + size > _MOST_KEPT_BYTES:
            self.clear()
        slot = _Slot(name, array)
        try:
            slot.fill(array)
        except Exception:  # noqa: BLE001 - after any error, such a tensor is made for every answer
            self._passed_over.add(name)
            return None
        self._slots[key] = slot
        self._bytes += size
        return slot


class BoundRuns:
    """Runs of a model of one input and one output, from kept memory to kept answers.

    Args:
        session: an `onnxruntime.InferenceSession`, on the CPU.
        source: name of the model's only input.
        result: name of the output. Its shape depends on the input's shape only.
        run_options: an `onnxruntime.RunOptions`, passed to every run unchanged.
        answers: the kept answers of the model.
    """

    def __init__(self, session: Any, source: str, result: str, run_options: Any, answers: KeptAnswers) -> None:
        self._session, self._run, self._run_options = session, session._sess.run_with_iobinding, run_options
        self._source, self._result, self._answers = source, result, answers
        # Key: the shape of a single request, or number and shape of several. Value: a binding, its input, the copies to
        # make, the responses.
        self._plans: dict[tuple[Any, ...], tuple[Any, Array, list[tuple[memoryview, memoryview]], list[Any]]] = {}
        self._is_fit = True

    def answer(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer requests as one run. `None`: requests like these are not known, or the run failed.

        Every step of this counts for a small model, so it calls nothing of ours.

        Args:
            requests: the requests of a batch, as the stub hands them over.
        """
        try:
            if len(requests) == 1:
                array = array_of(requests[0].inputs()[0])
                plan = self._plans.get(array.shape)
                if plan is None:
                    return None
                binding, source, copies, responses = plan
                source[...] = array
            else:
                arrays = [array_of(request.inputs()[0]) for request in requests]
                shapes = [array.shape for array in arrays]
                plan = self._plans.get((len(shapes), shapes[0]))
                if plan is None or shapes.count(shapes[0]) < len(shapes):
                    return None
                binding, source, copies, responses = plan
                np.concatenate(arrays, out=source)
            self._run(binding, self._run_options)
        except Exception:  # noqa: BLE001 - the run without a binding finds the cause
            return None
        for memory, part in copies:
            memory[:] = part
        return [*responses]

    def learn(self, count: int, joined: Array, result: Array) -> None:
        """Prepare for the next requests like those that have just run without a binding.

        Args:
            count: number of requests, of equal shapes.
            joined: input of that run, joined along the first axis. Only its shape and type count.
            result: output of that run for all requests. Only its shape and type count.
        """
        key = joined.shape if count == 1 else (count, (joined.shape[0] // count, *joined.shape[1:]))
        if key in self._plans:
            self._is_fit = False  # the run works without a binding: the output's shape depends on more than the input's
            self._plans.clear()
        if not self._is_fit or joined.nbytes + result.nbytes > _MOST_BOUND_BYTES or not joined.nbytes:
            return
        source, target = np.empty(joined.shape, joined.dtype), np.empty(result.shape, result.dtype)
        parts = [target] if count == 1 else np.split(target, count)
        sent = self._answers.sent(self._result, parts)
        if sent is None:
            return
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        binding = self._session.io_binding()
        try:
            binding.bind_input(self._source, "cpu", 0, source.dtype, source.shape, source.ctypes.data)
            binding.bind_output(self._result, "cpu", 0, target.dtype, target.shape, target.ctypes.data)
            copies = [(memory, part.data.cast("B")) for (memory, _), part in zip(sent, parts, strict=True)]
        except Exception:  # noqa: BLE001 - after any error, such a model runs without a binding
            self._is_fit = False
            return
        self._plans[key] = (binding._iobinding, source, copies, [response for _, response in sent])

    def clear(self) -> None:
        """Give everything back."""
        self._plans.clear()
