"""One line an event, with the id of its request, and never a secret."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from kvgraph import Engine
from serving import ANNA, BEN, KEYS, SECRETS, Process, application, error, metrics, serving


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_3", True), ("", False), ("a" * 129, False), ("a b", False)])
def test_a_request_has_an_id(live, given, kept):
    server = live()
    back = httpx.get(f"{server.url}/health", headers={"X-Request-ID": given}).headers["X-Request-ID"]
    assert back == given if kept else re.fullmatch("[0-9a-f]{32}", back)


def test_logs_are_json_with_ids_and_tell_no_secret(folder, tmp_path):
    prompt, document = SECRETS[:2]
    config = tmp_path / "server.toml"
    config.write_text("".join(f'[[api_keys]]\nkey = "{k["key"]}"\ntenant = "{k["tenant"]}"\n' for k in KEYS))
    with Process(folder, "--config", config, "--log-format", "json", KVGRAPH_MAX_REQUEST_BYTES="2000") as server:
        body = {
            "model": folder.name,
            "prompt": prompt,
            "max_tokens": 3,
            "ignore_eos": True,
            "documents": [{"text": document}],
        }

        def post(payload: Any, **headers: str) -> int:
            content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            headers = {"Content-Type": "application/json", **headers}
            return httpx.post(f"{server.url}/v1/completions", content=content, headers=headers).status_code

        assert post(body, **ANNA, **{"X-Request-ID": "mine"}) == 200
        assert post({**body, "stream": True}, **BEN) == 200
        assert post(body, Authorization=f"Bearer {SECRETS[4]}") == 401
        assert post({**body, "kvgraph": {"edges": [[prompt, document]]}}, **ANNA) == 400
        assert post({**body, "temperature": prompt}, **ANNA) == 400
        assert post(f'{{"prompt": "{prompt}"'.encode(), **ANNA) == 400
        assert post({**body, "prompt": prompt * 1000}, **ANNA) == 413
        assert httpx.get(f"{server.url}/%0aFORGED?key={SECRETS[2]}").status_code == 404
        with server.connect() as connection:
            connection.sendall(f"GET {prompt}\r\n\r\n".encode())
            assert b"400" in connection.recv(1000)
        assert server.stop() == 0
    lines = [json.loads(line) for line in server.said().splitlines()]
    assert not [secret for secret in SECRETS if secret in server.said()]
    requests = [line for line in lines if line["logger"] == "kvgraph.access" and line["path"] != "/ready"]
    assert [r["status"] for r in requests] == [200, 200, 401, 400, 400, 400, 413, 404]
    mine = requests[0]
    assert (mine["request_id"], mine["tenant"], mine["method"], mine["path"]) == (
        *("mine", "anna", "POST", "/v1/completions"),
    )
    assert mine["generated"] == 3 and mine["computed"] > 0 and 0 < mine["ttft"] <= mine["seconds"]
    assert requests[1]["tenant"] == "ben" and requests[2]["error"] == "invalid_api_key"
    assert requests[-1]["path"] == "/%0aFORGED"
    assert len({r["request_id"] for r in requests}) == len(requests)


def test_what_nobody_expected_is_a_500_with_an_id_and_in_the_log(model, caplog):
    app = application(Engine(model, kv_budget=1 << 28))

    @app.get("/broken")
    def broken() -> None:
        raise ZeroDivisionError("inside")

    with serving(app) as url:
        answer = httpx.get(f"{url}/broken", headers={"X-Request-ID": "the-one"})
        assert error(answer, 500)["type"] == "server_error" and "inside" not in answer.text
        assert answer.headers["X-Request-ID"] == "the-one"
        assert metrics(url)['kvgraph_http_requests_total{method="GET",route="/broken",status="5xx"}'] == 1
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]
