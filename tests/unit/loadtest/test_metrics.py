from __future__ import annotations

import http.server
import threading

import pytest

from repo_manager.loadtest.metrics import MetricsSource, parse_metrics

TEXT = """# HELP nv_energy_consumption GPU energy consumption in joules since the Triton Server started
nv_energy_consumption{{gpu_uuid="GPU-a"}} {energy}
nv_energy_consumption{{gpu_uuid="GPU-b"}} {energy}
nv_gpu_utilization{{gpu_uuid="GPU-a"}} 0.5
nv_gpu_power_usage{{gpu_uuid="GPU-a"}} 100.0
nv_gpu_power_usage{{gpu_uuid="GPU-b"}} 50.0
nv_inference_count{{model="m",version="1"}} 7
"""


@pytest.fixture
def pages():
    """A server of metrics whose next page a test sets."""
    state = {"text": ""}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(state["text"].encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/metrics", state
    server.shutdown()
    thread.join()
    server.server_close()


def test_energy_is_summed_over_gpus_and_divided_by_inferences(pages):
    url, state = pages
    source = MetricsSource(url)
    for energy, inferences in ((1000.0, 50), (1006.0, 90), (1020.0, 250)):
        state["text"] = TEXT.format(energy=energy)
        source.sample(inferences)
    use = source.use()
    assert use.energy_j == pytest.approx(40.0)
    assert use.energy_per_inference_j == pytest.approx(0.2)
    assert use.power_w == pytest.approx(150.0)
    assert use.utilization == pytest.approx(0.5)
    assert use.memory_used_bytes is None
    assert len(use.missing) == 1
    assert "nv_gpu_memory_used_bytes" in use.missing[0]
    assert source.use(1).energy_j == pytest.approx(28.0)


def test_no_metrics_are_said_to_be_missing(pages):
    url, _ = pages
    source = MetricsSource(url)
    source.sample(1)
    assert len(source.use().missing) == 4
    absent = MetricsSource("http://127.0.0.1:9/metrics")
    absent.sample(1)
    assert "no metrics at" in absent.use().missing[0]


def test_odd_lines_do_no_harm():
    assert parse_metrics("nv_gpu_utilization NaNa\nnv_gpu_utilization 1e-1 123\n\n# x\n}{") == {
        "nv_gpu_utilization": [0.1]
    }
