"""What a server is told: flags, environment, file, their precedence, and what is said when something is wrong."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import SecretStr

from kvgraph.cli import common, main
from kvgraph.server.settings import APIKey, Settings, SettingsError

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/server.toml"
SECRET = "short-1"  # too short for a key, and nobody's business


@pytest.fixture
def file(tmp_path):
    """A configuration file with a text: file("port = 1")."""

    def write(text: str) -> Path:
        path = tmp_path / "server.toml"
        path.write_text(text)
        return path

    return write


def test_flags_win_over_the_environment_which_wins_over_the_file(file, monkeypatch):
    config = file('model = "file"\nport = 1\nhost = "file"\n')
    monkeypatch.setenv("KVGRAPH_PORT", "2")
    monkeypatch.setenv("KVGRAPH_HOST", "environment")
    settings = Settings.load(config, port=3, host=None)
    assert (settings.port, settings.host, settings.model) == (3, "environment", "file")
    assert (settings.grace, settings.store) == (30, [])


def test_keys_come_from_a_file_or_from_json(file, monkeypatch):
    config = file('model = "m"\n[[api_keys]]\nkey = "long-enough"\ntenant = "a"\nconcurrent = 3\n')
    assert Settings.load(config).api_keys == [APIKey(key=SecretStr("long-enough"), tenant="a", concurrent=3)]
    monkeypatch.setenv("KVGRAPH_API_KEYS", '[{"key": "another-one", "tenant": "b"}]')
    assert [key.tenant for key in Settings.load(config).api_keys] == ["b"]
    assert "another-one" not in repr(Settings.load(config))


def test_sizes_are_written_as_people_write_them(file):
    settings = Settings.load(file('model = "m"\nkv_budget = "4GiB"\nmax_request_bytes = "1MB"\nstore_size = 5000\n'))
    assert (settings.kv_budget, settings.max_request_bytes, settings.store_size) == (4 << 30, 1_000_000, 5000)


@pytest.mark.parametrize(("text", "size"), [("4G", 4 << 30), ("4GiB", 4 << 30), ("4GB", 4 * 10**9), ("4000", 4000)])
def test_a_size_means_the_same_in_a_flag_a_variable_and_a_file(text, size, monkeypatch, file):
    assert common.parse_size(text) == size
    assert Settings.load(file(f'model = "m"\nkv_budget = "{text}"\n')).kv_budget == size
    monkeypatch.setenv("KVGRAPH_KV_BUDGET", text)
    assert Settings.load(file('model = "m"\n')).kv_budget == size
    monkeypatch.setenv("KVGRAPH_KV_BUDGET", "4 Gs")
    with pytest.raises(SettingsError, match="KVGRAPH_KV_BUDGET.*'4 Gs' isn't a size"):
        Settings.load(file('model = "m"\n'))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no model; give --model, KVGRAPH_MODEL, or model in a configuration file"),
        ('model = "m"\nport = "x"', "setting port ({file}): "),
        ('model = "m"\nprot = 1', "setting prot ({file}): there is no such setting; did you mean port?"),
        ('model = "m"\ntimeout = inf', "setting timeout ({file}): "),
        ('model = "m"\ngrace = nan', "setting grace ({file}): "),
        ('model = "m"\nmax_request_bytes = 0', "setting max_request_bytes ({file}): "),
        ('model = "m"\nmethod = "magic"', "setting method ({file}): "),
        ('model = "m"\ndocument_template = "{nothing}"', "setting document_template ({file}): "),
        ('model = "m"\noverflow = "explode"', "setting overflow ({file}): "),
        ('model = "m"\napi_keys = [{key = "short-1", tenant = "a"}]', "setting api_keys.0.key ({file}): "),
        ('model = "m"\napi_keys = [{key = "short-1 ", tenant = "/"}]', "setting api_keys.0.tenant ({file}): "),
        ('model = "m"\napi_keys = [{key = "short-1 "}]', "setting api_keys.0.tenant ({file}): "),
        (
            'model = "m"\napi_keys = [{key = "short-1 ", tenant = "a"}, {key = "short-1 ", tenant = "b"}]',
            "setting api_keys ({file}): Value error, a key is given twice",
        ),
        ("model = ", "can't read the configuration file {file}: "),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(file, text, said):
    path = file(text)
    with pytest.raises(SettingsError) as error:
        Settings.load(path)
    message = str(error.value)
    assert message.startswith(said.format(file=path)) and "\n" not in message and SECRET not in message


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("KVGRAPH_PORT", "70000", "setting port (KVGRAPH_PORT): "),
        ("KVGRAPH_API_KEYS", f"[{SECRET}", "the environment can't be read: "),
        ("KVGRAPH_API_KEYS", f'[{{"key": "{SECRET}", "tenant": "a"}}]', "setting api_keys.0.key (KVGRAPH_API_KEYS): "),
        (
            "KVGRAPH_API_KEY",
            f'[{{"key": "{SECRET}"}}]',
            "KVGRAPH_API_KEY isn't a setting; did you mean KVGRAPH_API_KEYS?",
        ),
    ],
)
def test_what_is_wrong_in_the_environment_is_said_in_one_line(monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as error:
        Settings.load(model="m")
    message = str(error.value)
    assert message.startswith(said) and "\n" not in message and SECRET not in message


def test_what_is_wrong_on_the_command_line_names_the_flag(capsys, tmp_path):
    for flags, said in (
        (["--port", "-1"], "setting port (--port): "),
        (["--log-format", "xml"], "setting log_format (--log-format): "),
        (["--config", str(tmp_path / "none.toml")], "can't read the configuration file"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--model", "m", *flags])
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 1 and len(lines) == 1 and lines[0].startswith(f"kvgraph: {said}")


def test_the_documented_settings_are_those_there_are():
    section = (ROOT / "docs/reference/configuration.md").read_text()
    documented = {name: default.strip() for name, default in re.findall(r"^\| `(\w+)` \|([^|]*)\|", section, re.M)}
    assert set(documented) == set(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        if not field.is_required() and field.default not in (None, []):
            given = tomllib.loads(f"{name} = {documented[name].strip('`')}")
            assert getattr(Settings(model="m", **given), name) == field.default, name


def test_the_example_is_valid_and_so_is_what_it_leaves_out():
    settings = Settings.load(EXAMPLE)
    assert settings.api_keys and str(settings.folder) == "kv-store"
    everything = tomllib.loads(re.sub(r"^# (?=\w+ = )", "", EXAMPLE.read_text(), flags=re.M))
    assert set(everything) == set(Settings.model_fields) - {"allow_untested"}
    Settings(**everything)


KUBERNETES = {  # what it sets in every container beside a service named kvgraph
    "KVGRAPH_SERVICE_HOST": "10.0.0.1",
    "KVGRAPH_SERVICE_PORT": "8771",
    "KVGRAPH_SERVICE_PORT_HTTP": "8771",
    "KVGRAPH_PORT": "tcp://10.0.0.1:8771",
    "KVGRAPH_PORT_8771_TCP": "tcp://10.0.0.1:8771",
    "KVGRAPH_PORT_8771_TCP_PROTO": "tcp",
    "KVGRAPH_PORT_8771_TCP_PORT": "8771",
    "KVGRAPH_PORT_8771_TCP_ADDR": "10.0.0.1",
}


def test_a_kubernetes_service_named_kvgraph_is_no_setting(monkeypatch, caplog):
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    assert Settings.load(model="m").port == 8771 and "KVGRAPH_PORT is tcp://10.0.0.1:8771" in caplog.text
    assert Settings.load(model="m", port=9).port == 9
    monkeypatch.setenv("KVGRAPH_PORT", "tcp")
    with pytest.raises(SettingsError, match="port"):
        Settings.load(model="m")


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KVGRAPH_STORE", "~/kv")
    config = tmp_path / "server.toml"
    config.write_text('model = "~/m"\nchat_template = "~/t.jinja"\n')
    for settings in (Settings.load(config), Settings.load(Path("~/server.toml"))):
        assert settings.folder == tmp_path / "kv" and settings.chat_template == tmp_path / "t.jinja"
        assert settings.model == str(tmp_path / "m")
    assert Settings.load(model="a~b").model == "a~b"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user that the system doesn't know
    with pytest.raises(SettingsError, match=r"setting store \(KVGRAPH_STORE\): .*there is none"):
        Settings.load(model="m")
