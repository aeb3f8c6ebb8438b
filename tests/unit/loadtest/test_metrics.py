# ruff: noqa: N802  # the management library's own names
from __future__ import annotations

import http.server
import threading

import pytest

from repo_manager.loadtest.gpu import MetricsSource, Nvml, is_local, open_nvml, parse_metrics

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
    state = {"text": "", "asked": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state["asked"] += 1
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
    (missing,) = source.use().missing
    assert all(name in missing for name in ("nv_gpu_utilization", "nv_gpu_power_usage", "nv_energy_consumption"))
    assert "not known to be on this machine" in missing
    absent = MetricsSource("http://127.0.0.1:9/metrics")
    absent.sample(1)
    assert "no metrics at" in absent.use().missing[0]


def test_a_page_without_gpus_is_asked_for_once(pages):
    url, state = pages
    state["text"] = 'nv_inference_count{model="m",version="1"} 7\n'
    source = MetricsSource(url)
    assert source.tells
    for _ in range(3):
        source.sample(1)
    source.reset()
    source.sample(2)
    assert not source.tells
    assert state["asked"] == 1
    assert "nv_gpu_utilization" in source.use().missing[0]


class Library:
    """Behaves as libnvidia-ml: results go to where a pointer points, a code is returned."""

    def __init__(self, gpus: int = 2, lacking: str = "") -> None:
        self.gpus, self.lacking, self.millijoules, self.is_open = gpus, lacking, 5_000, True

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = self.gpus
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, energy):
        energy._obj.value = self.millijoules * handle.value
        return 3 if self.lacking == "energy" and handle.value == 2 else 0

    def nvmlDeviceGetPowerUsage(self, handle, power):
        power._obj.value = 70_000
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.used = 1 << 30
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle, busy):
        busy._obj.gpu = 40 * handle.value
        return 0

    def nvmlShutdown(self):
        self.is_open = False


def test_nvml_fills_in_what_the_servers_metrics_lack(pages):
    url, state = pages
    state["text"] = 'nv_gpu_utilization{gpu_uuid="GPU-a"} 0.25\n'
    library = Library()
    source = MetricsSource(url, Nvml(library))
    source.sample(10)
    library.millijoules = 9_000
    source.sample(50)
    use = source.use()
    assert use.utilization == 0.25  # the server's own, where there is one
    assert use.energy_j == pytest.approx(4.0 + 8.0)
    assert use.energy_per_inference_j == pytest.approx(12.0 / 40)
    assert use.power_w == pytest.approx(140.0)
    assert use.memory_used_bytes == 2 << 30
    assert use.missing == ()
    assert "from NVML, over all 2 GPUs" in use.source
    assert "utilisation" not in use.source


def test_nvml_alone_is_enough_where_the_server_has_no_metrics():
    source = MetricsSource("http://127.0.0.1:9/metrics", Nvml(Library()))
    source.sample(0)
    source.sample(10)
    use = source.use()
    assert use.utilization == pytest.approx(0.6)
    assert use.energy_j == 0.0
    assert "no metrics at" in use.missing[0]


def test_a_gpu_that_does_not_tell_its_energy_makes_the_sum_unknown(pages):
    source = MetricsSource(pages[0], Nvml(Library(lacking="energy")))
    source.sample(0)
    source.sample(10)
    assert source.use().energy_j is None
    assert "does not tell it for every GPU" in source.use().missing[0]
    assert source.use().power_w == pytest.approx(140.0)


def test_this_machine_is_told_from_others():
    assert is_local("127.0.0.1")
    assert is_local("localhost")
    assert not is_local("192.0.2.1")  # RFC 5737: nobody's address
    assert not is_local("no-such-host.invalid")


def test_where_there_is_no_driver_that_is_said():
    nvml = open_nvml()
    if isinstance(nvml, str):
        assert "libnvidia-ml" in nvml
    else:
        assert nvml.gpus > 0
        nvml.close()


def test_odd_lines_do_no_harm():
    assert parse_metrics("nv_gpu_utilization NaNa\nnv_gpu_utilization 1e-1 123\n\n# x\n}{") == {
        "nv_gpu_utilization": [0.1]
    }
