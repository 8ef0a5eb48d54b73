"""The settings of a server, from flags, KVGRAPH_* environment variables and a TOML file, in this order of precedence."""

from __future__ import annotations

import logging
import os
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveInt,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from kvgraph import methods
from kvgraph.data.chat import check_template
from kvgraph.errors import KVGraphError, StoreError
from kvgraph.places import StorePlace, places_of
from kvgraph.store.codecs.registry import parse as parse_codec
from kvgraph.units import parse_size

log = logging.getLogger("kvgraph.server")

Size = Annotated[int, BeforeValidator(lambda size: parse_size(size) if isinstance(size, str) else size), Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _places(given: Any) -> Any:
    """Folders and URLs of a store, of a text or a list of texts. Raises ValueError."""
    try:
        listed = places_of(given) if isinstance(given, str) else [given] if isinstance(given, Path) else given
        if not isinstance(listed, list | tuple) or not all(isinstance(p, str | Path | StorePlace) for p in listed):
            raise ValueError("it must be a folder or a URL, or a list of them")
        return [p if isinstance(p, StorePlace) else StorePlace(_expanded(str(p))) for p in listed]
    except StoreError as error:
        raise ValueError(str(error)) from None


def _place(given: Any) -> Any:
    """A file or a URL, of a text. Raises ValueError."""
    if given is None:
        return None
    listed = _places(given)
    if len(listed) > 1:
        raise ValueError("it must be one file, or the URL of a Postgres")
    return listed[0] if listed else None


Shown = Annotated[StorePlace, PlainSerializer(str)]  # no dump of the settings has a password


class SettingsError(KVGraphError, ValueError):
    """A setting is unknown or wrong; the message names it and where it came from."""


class APIKey(BaseModel):
    """A credential, and the tenant it belongs to. Tenants share no cached KV, segments or graphs."""

    model_config = ConfigDict(extra="forbid")

    key: Annotated[SecretStr, Field(min_length=8)]
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    requests_per_minute: PositiveInt | None = None
    concurrent: PositiveInt | None = None


class Settings(BaseSettings):
    """All settings of `kvgraph serve`; `kvgraph serve --help` explains the common ones."""

    model_config = SettingsConfigDict(env_prefix="KVGRAPH_", env_nested_delimiter="__", extra="forbid")

    model: str
    adapter: str | None = None  # a LoRA adapter to merge into the model
    served_name: str | None = None  # the model's name for clients; default: the last part of its name
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8771
    dtype: str = "auto"
    quantize: str | None = None  # int8 or int4
    device: str = "cpu"
    store: Annotated[list[Shown], NoDecode, BeforeValidator(_places)] = []  # folders and URLs, fastest first
    store_size: Size | None = None  # the limit of each of its folders; least recently used records go first
    codec: str = "raw"  # how records are kept
    # Of segments and graphs: a file, or the URL of a Postgres; default: library.sqlite in the store's first folder
    library: Annotated[Shown | None, BeforeValidator(_place)] = None
    kv_budget: Size | None = None
    host_budget: Size | None = None  # pinned host memory of a GPU's server for copies of its records; none by default
    max_step_tokens: PositiveInt | None = None
    allow_untested: bool = False

    method: str | None = None  # default: the first method that the model declares tuning for, else full
    chat_template: Path | None = None  # a Jinja file that replaces the model's
    chat_template_kwargs: dict[str, Any] = {}  # of the template; a request's own win
    document_template: str | None = None  # default: the chat template's own place, else "{title}\n{text}\n\n"
    unknown_fields: Literal["report", "refuse"] = "report"  # of a request; report: in its usage, and in the log
    overflow: Literal["refuse", "drop"] = "refuse"  # drop: leave out the last documents until the request fits

    shadow: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of requests that are compared with `full`
    cors_origins: list[str] = []  # web pages that may use the API: "https://example.org", or "*" for all
    api_keys: list[APIKey] = []  # none: everybody may ask, as one tenant
    default_max_tokens: PositiveInt = 512
    max_choices: PositiveInt = 16
    max_documents: PositiveInt = 1000
    max_edges: PositiveInt = 4096  # of a request, also when a name stands for them
    max_segments: PositiveInt = 100_000  # stored by a tenant
    max_graphs: PositiveInt = 10_000  # stored by a tenant
    max_graph_edges: PositiveInt = 200_000  # of a stored graph
    max_tenant_edges: PositiveInt = 10_000_000  # of all graphs of a tenant, each place of a segment counted as one
    max_request_bytes: Size = 8 << 20
    max_body_bytes: Size = 256 << 20  # bodies of all requests being read or answered; beyond it 429
    body_timeout: Seconds = 60.0  # how long a client may take to send a request's body
    max_kept_bytes: Size = 64 << 20  # responses kept of a tenant, in memory; the oldest go first
    max_pending: PositiveInt = 256  # requests in work or waiting; more get 429
    timeout: Seconds = 600.0  # a request may take
    grace: Seconds = 30.0  # requests in work get on shutdown
    log_format: Literal["text", "json"] = "text"
    otlp_endpoint: str | None = None  # where traces go; needs kvgraph[otel]

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str | None) -> str | None:
        if value is not None:
            methods.parse(value)
        return value

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, value: str) -> str:
        try:
            parse_codec(value)
        except StoreError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("chat_template")
    @classmethod
    def _at_home(cls, value: Path | None) -> Path | None:
        return None if value is None else Path(_expanded(str(value)))

    @field_validator("model")
    @classmethod
    def _model_at_home(cls, value: str) -> str:
        return _expanded(value)

    @field_validator("document_template")
    @classmethod
    def _usable_template(cls, value: str | None) -> str | None:
        return value if value is None else check_template(value)

    @field_validator("api_keys")
    @classmethod
    def _each_once(cls, value: list[APIKey]) -> list[APIKey]:
        if len({key.key.get_secret_value() for key in value}) < len(value):
            raise ValueError("a key is given twice")
        return value

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.served_name or Path(self.model).name or self.model

    @property
    def folder(self) -> Path | None:
        """The first folder among the store's places."""
        return next((Path(place.text) for place in self.store if not place.is_url), None)

    @classmethod
    def load(cls, config: Path | None = None, **flags: Any) -> Settings:
        """The settings of flags (those that aren't None), the environment, and a TOML file. Raises SettingsError."""

        class Sourced(cls):  # type: ignore[valid-type, misc]
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                variables = env_settings.env_vars  # type: ignore[attr-defined]
                env_settings.env_vars = _without_service_links(variables)  # type: ignore[attr-defined]
                file = [] if config is None else [TomlConfigSettingsSource(settings_cls, config)]
                return (init_settings, env_settings, *file)

        given = {name: value for name, value in flags.items() if value is not None}
        _check_names(cls)
        try:
            config = None if config is None else Path(_expanded(str(config)))
            if config is not None:
                tomllib.loads(config.read_text(encoding="utf-8"))  # its errors say less when they come from below
        except (OSError, ValueError) as error:
            raise SettingsError(f"can't read the configuration file {config}: {error}") from None
        try:
            return Sourced(**given)
        except ValidationError as error:
            raise SettingsError(_explained(error, given, config)) from None
        except ValueError as error:  # a variable that should hold JSON
            raise SettingsError(f"the environment can't be read: {error}") from None


def _expanded(path: str) -> str:
    """The path with the home folder for a ~ at its beginning, as a shell would have it. Raises ValueError."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise ValueError(f"{path!r} is in a home folder, but there is none") from None


def _without_service_links(variables: Mapping[str, str | None]) -> dict[str, str | None]:
    """The environment without what Kubernetes puts there for a service named kvgraph: KVGRAPH_PORT=tcp://10.0.0.1:80."""
    port = variables.get("kvgraph_port")
    if port is None or not port.startswith(("tcp://", "udp://")):
        return dict(variables)
    log.warning("KVGRAPH_PORT is %s, which Kubernetes sets for a service named kvgraph; it is ignored", port[:50])
    return {name: value for name, value in variables.items() if name != "kvgraph_port"}


def _check_names(settings: type[BaseSettings]) -> None:
    """Raise SettingsError for a variable that is nearly a setting: KVGRAPH_API_KEY would leave a server open to all."""
    known = {f"KVGRAPH_{name.upper()}" for name in settings.model_fields}
    for name in map(str.upper, os.environ):
        ours = name.startswith("KVGRAPH_") and name.partition("__")[0] not in known
        if ours and (meant := get_close_matches(name, known, 1, cutoff=0.9)):
            raise SettingsError(f"{name} isn't a setting; did you mean {meant[0]}?")


def _explained(error: ValidationError, flags: dict[str, Any], config: Path | None) -> str:
    """The first thing that is wrong and where it was said, in one line; never a secret's value."""
    first = error.errors(include_input=False, include_url=False)[0]
    path = ".".join(map(str, first["loc"]))
    name = str(first["loc"][0]) if first["loc"] else ""
    variable = f"KVGRAPH_{name.upper()}"
    if first["type"] == "missing" and path == name:
        return f"there is no {name}; give --{name}, {variable}, or {name} in a configuration file"
    if name in flags:
        where = f"--{name.replace('_', '-')}"
    elif any(key.upper().partition("__")[0] == variable for key in os.environ):
        where = variable
    else:
        where = str(config) if config is not None else "?"
    reason = f"there is no such setting{_nearest(name)}" if first["type"] == "extra_forbidden" else first["msg"]
    return f"setting {path} ({where}): {reason}"


def _nearest(name: str) -> str:
    meant = get_close_matches(name, Settings.model_fields, 1)
    return f"; did you mean {meant[0]}?" if meant else ""
