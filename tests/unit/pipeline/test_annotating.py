"""Roll-outs as annotations in Grafana."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from repo_manager.errors import RolloutUndoneError
from repo_manager.pipeline.annotating import annotated
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.result import Rollout
from repo_manager.settings import Settings, load_settings

OPTIONS = RolloutOptions()


class Grafana:
    def __init__(self) -> None:
        self.status = 200
        self.asked: list[tuple[str, str | None, dict[str, Any]]] = []
        grafana = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                grafana.asked.append((self.path, self.headers["Authorization"], body))
                self.send_response(grafana.status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def settings(self) -> Settings:
        return Settings(grafana=f"http://127.0.0.1:{self.server.server_port}/grafana", grafana_token="glsa_123456789")


@pytest.fixture
def grafana() -> Iterator[Grafana]:
    served = Grafana()
    yield served
    served.server.shutdown()
    served.server.server_close()


def _rollout(*, changed: bool = True) -> Rollout:
    return Rollout("digits", 2, "k8s://models/rel", (), (), 1, changed, False, None, 1.0, ())


def test_a_roll_out_is_a_span_with_tags(grafana: Grafana) -> None:
    told: list[str] = []
    with annotated(grafana.settings, "deploy", "digits:2", OPTIONS, told.append) as done:
        done.append(_rollout())
    ((path, token, body),) = grafana.asked
    assert (path, token) == ("/grafana/api/annotations", "Bearer glsa_123456789")
    assert body["tags"] == ["repo-manager", "deploy", "digits", "done"]
    assert body["text"] == "deploy digits:2 on k8s://models/rel"
    assert 0 < body["time"] <= body["timeEnd"]
    assert told == []


def test_a_failure_is_marked_and_goes_on(grafana: Grafana) -> None:
    with (
        pytest.raises(RolloutUndoneError),
        annotated(grafana.settings, "deploy", "digits:2", OPTIONS, lambda _: None),
    ):
        raise RolloutUndoneError("it failed")
    assert grafana.asked[0][2]["tags"] == ["repo-manager", "deploy", "digits", "failed"]


def test_what_changes_nothing_is_not_marked(grafana: Grafana) -> None:
    for options, changed, settings in (
        (RolloutOptions(dry_run=True), True, grafana.settings),
        (OPTIONS, False, grafana.settings),
        (OPTIONS, True, Settings()),
    ):
        with annotated(settings, "deploy", "digits:2", options, lambda _: None) as done:
            done.append(_rollout(changed=changed))
    assert grafana.asked == []


def test_a_grafana_that_refuses_or_is_away_ends_no_roll_out(grafana: Grafana) -> None:
    told: list[str] = []
    grafana.status = 403
    away = Settings(grafana="http://127.0.0.1:9")
    wrong = Settings(grafana="ftp://grafana")
    for settings in (grafana.settings, away, wrong):
        with annotated(settings, "rollback", "digits", OPTIONS, told.append) as done:
            done.append(_rollout())
    assert ["did not take the annotation (403)" in told[0], "no annotation" in told[1], "no annotation" in told[2]] == [
        True
    ] * 3


def test_the_settings_name_it() -> None:
    found = load_settings(
        {"REPO_MANAGER_GRAFANA": "https://g", "REPO_MANAGER_GRAFANA_TOKEN": "secret", "HOME": "/none"}
    )
    assert (found.grafana, found.grafana_token) == ("https://g", "secret")
    assert "secret" not in repr(found)
