"""States of sequences and ragged batches, as in the native backend (beside model.py, in Triton's stub process).

Triton hands a Python backend the control tensors of a sequence and the initial state. It neither keeps a state between
requests nor makes batch inputs for it. Both are done here, as `backend_input_collector.cc` and `sequence_state.cc` do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Batches", "SequenceStates"]

Array = np.ndarray[Any, Any]
_START, _END = 1, 2  # TRITONSERVER_REQUEST_FLAG_SEQUENCE_START and _END of tritonserver.h
_DEFAULT_IDLE_S = 1.0
_FORGOTTEN_AFTER_S = 60.0
_DTYPES = {"TYPE_INT32": np.dtype(np.int32), "TYPE_FP32": np.dtype(np.float32)}


class SequenceStates:
    """The states of live sequences. An instance sees each from its start to its end.

    Args:
        config: configuration of the model, as parsed JSON.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        batching = config.get("sequence_batching") or {}
        self.pairs = tuple((state["input_name"], state["output_name"]) for state in batching.get("state") or ())
        # Triton leaves a state without initial_state uninitialised (core, sequence_state.cc). Zeros are at least the
        # same every time.
        self._unset = {state["input_name"] for state in batching.get("state") or () if not state.get("initial_state")}
        idle_us = int(batching.get("max_sequence_idle_microseconds") or 0)
        # Triton's reaper ends an idle sequence without telling the backend (core, sequence_batch_scheduler.cc). A
        # request may wait longer than that in a queue.
        self._kept_s = max(_FORGOTTEN_AFTER_S, 10 * (idle_us / 1e6 or _DEFAULT_IDLE_S))
        self._states: dict[Any, tuple[float, dict[str, Array]]] = {}

    @property
    def outputs(self) -> tuple[str, ...]:
        """The model's outputs for states."""
        return tuple(output for _, output in self.pairs)

    def give(self, request: Any, feed: dict[str, Array]) -> None:
        """Put the sequence's states into a feed. At its start the initial ones from Triton's request stay."""
        if request.flags() & _START:
            self._states.pop(request.correlation_id(), None)
        found = self._states.get(request.correlation_id())
        if found is not None:
            feed.update(found[1])
            return
        for name in self._unset & feed.keys():
            feed[name] = np.zeros_like(feed[name])

    def take(self, request: Any, outputs: Mapping[str, Array]) -> None:
        """Keep the model's new states for the sequence's next request."""
        sequence, now = request.correlation_id(), time.monotonic()
        if not sequence:
            return  # an empty slot of the direct strategy
        if request.flags() & _END:
            self._states.pop(sequence, None)
            return
        # Copied: the outputs of a batch share one array, and the next batch may reuse it.
        self._states[sequence] = (now, {name: outputs[output].copy() for name, output in self.pairs})
        oldest = next(iter(self._states))
        while now - self._states[oldest][0] > self._kept_s:
            del self._states[oldest]
            oldest = next(iter(self._states))


class Batches:
    """Requests as one batch: ragged inputs joined flat, others along the batch axis, with batch inputs and outputs.

    Args:
        config: configuration of the model, as parsed JSON.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._batched = bool(config.get("max_batch_size"))
        self._ragged = {entry["name"] for entry in config.get("input") or () if entry.get("allow_ragged_batch")}
        self._made = tuple(config.get("batch_input") or ())
        self._scattered = {
            name: entry["source_input"][0]
            for entry in config.get("batch_output") or ()
            for name in entry["target_name"]
        }
        self.needed = bool(self._ragged or self._made or self._scattered)

    def key(self, feed: Mapping[str, Array]) -> tuple[Any, ...]:
        """Return the key two requests must share to run as one."""
        return tuple((name, feed[name].shape[1:]) for name in sorted(feed.keys() - self._ragged))

    def joined(self, feeds: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        """Return the model's inputs for a batch of requests."""
        feed = {}
        for name in feeds[0]:
            arrays = [each[name] for each in feeds]
            if name in self._ragged:
                feed[name] = np.concatenate([array.ravel() for array in arrays])
            else:
                feed[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        for entry in self._made:
            shapes = [each[entry["source_input"][0]].shape for each in feeds]
            made = _batch_input(entry.get("kind", ""), shapes).astype(_DTYPES[entry["data_type"]])
            feed.update(dict.fromkeys(entry["target_name"], made))
        return feed

    def parted(self, outputs: Mapping[str, Array], feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Return each request's part of a batch's outputs.

        Raises:
            ValueError: an output has another number of rows than the batch.
        """
        parts: list[dict[str, Array]] = [{} for _ in feeds]
        sizes = [next(iter(each.values())).shape[0] if self._batched else 1 for each in feeds]
        for name, array in outputs.items():
            start = 0
            for part, size, feed in zip(parts, sizes, feeds, strict=True):
                if name in self._scattered:
                    shape = feed[self._scattered[name]].shape
                    count = int(np.prod(shape))
                    part[name] = array.reshape(-1)[start : start + count].reshape(shape)
                    start += count
                elif not self._batched:
                    part[name] = array
                elif array.ndim == 0 or array.shape[0] != sum(sizes):
                    raise ValueError(f"output '{name}' has shape {list(array.shape)} for a batch of {sum(sizes)}")
                else:
                    part[name] = array[start : start + size]
                    start += size
        return parts


def _batch_input(kind: str, shapes: Sequence[tuple[int, ...]]) -> Array:
    """Return a batch input for requests whose source inputs have these shapes, the batch axis first."""
    counts = np.array([int(np.prod(shape)) for shape in shapes])
    if kind == "BATCH_ACCUMULATED_ELEMENT_COUNT":
        return np.cumsum(counts)
    if kind == "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO":
        return np.concatenate([[0], np.cumsum(counts)])
    if kind == "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE":
        return np.zeros(int(counts.max()))
    if kind == "BATCH_ITEM_SHAPE":
        return np.concatenate([np.tile(shape[1:], (shape[0], 1)) for shape in shapes])
    if kind == "BATCH_ITEM_SHAPE_FLATTEN":
        return np.concatenate([np.tile(shape[1:], shape[0]) for shape in shapes])
    return counts  # BATCH_ELEMENT_COUNT, the default (`BatchInput.Kind`, model_config.proto)
