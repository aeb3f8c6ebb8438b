from __future__ import annotations

from repo_manager.loadtest.worker.recorder import Recorder


def test_a_slice_ends_at_once_and_is_handed_on_when_asked():
    found = []
    recorder = Recorder(100, found.append)
    recorder.begin(0)
    recorder.add([5, 7], 50)
    recorder.add([9], 250)  # two slices ended before it
    assert found == []
    assert recorder.kept_since_ns == 100
    recorder.hand_over()
    assert [(piece.index, piece.latencies.count, piece.length_ns) for piece in found] == [(0, 2, 100), (1, 0, 100)]
    assert recorder.kept_since_ns is None
    recorder.finish(260)
    recorder.hand_over()
    assert (found[-1].index, found[-1].latencies.total_ns, found[-1].length_ns) == (2, 9, 60)
