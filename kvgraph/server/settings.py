"""What a server is told: by flags, KVGRAPH_* environment variables and a TOML file, in this order of precedence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, PositiveInt, SecretStr, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from kvgraph import methods
from kvgraph.chat import check_template
from kvgraph.errors import KVGraphError


Size = Annotated[ByteSize, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


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
    """Everything `kvgraph serve` can be told; `kvgraph serve --help` explains the common ones."""

    model_config = SettingsConfigDict(env_prefix="KVGRAPH_", env_nested_delimiter="__", extra="forbid")

    model: str
    served_name: str | None = None  # what clients call it; default: the folder's or hub's last name
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8771
    dtype: str = "auto"
    device: str = "cpu"
    store: Path | None = None
    store_size: Size | None = None  # the store's limit; least recently used records go first
    kv_budget: Size | None = None
    max_step_tokens: PositiveInt | None = None
    allow_untested: bool = False

    method: str | None = None  # default: the first method that the model declares tuning for, else full
    chat_template: Path | None = None  # a Jinja file that replaces the model's
    document_template: str | None = None  # default: the chat template's own place, else "{title}\n{text}\n\n"
    overflow: Literal["refuse", "drop"] = "refuse"  # drop: leave out the last documents until the request fits

    api_keys: list[APIKey] = []  # none: everybody may ask, as one tenant
    default_max_tokens: PositiveInt = 512
    max_choices: PositiveInt = 16
    max_documents: PositiveInt = 1000
    max_edges: PositiveInt = 4096  # given one by one; edges by name may be more
    max_segments: PositiveInt = 100_000  # stored by a tenant
    max_graph_edges: PositiveInt = 200_000  # of a stored graph
    max_request_bytes: Size = ByteSize(8 << 20)
    max_body_bytes: Size = ByteSize(256 << 20)  # bodies of all requests being read or answered; beyond it 429
    body_timeout: Seconds = 60.0  # how long a client may take to send a request's body
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

    @field_validator("document_template")
    @classmethod
    def _usable_template(cls, value: str | None) -> str | None:
        return value if value is None else check_template(value)

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.served_name or Path(self.model).name or self.model

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
                file = [] if config is None else [TomlConfigSettingsSource(settings_cls, config)]
                return (init_settings, env_settings, *file)

        if config is not None and not config.is_file():
            raise SettingsError(f"there is no configuration file {config}")
        try:
            return Sourced(**{name: value for name, value in flags.items() if value is not None})
        except ValueError as error:
            raise SettingsError(_first(error)) from None


def _first(error: ValueError) -> str:
    """The first thing that is wrong, in one line; never a secret's value."""
    details = getattr(error, "errors", None)
    if details is None:
        return f"the configuration can't be read: {error}"
    first = details(include_input=False)[0]
    return f"setting {'.'.join(map(str, first['loc'])) or '?'}: {first['msg']}"
