"""`kvgraph serve`: the OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvgraph import garbage
from kvgraph.cli.common import HostBudget, ServedPlaces, library_without_password, parse_size, unescaped
from kvgraph.errors import KVGraphError


def serve(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of a Hugging Face causal LM, or a GGUF file.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="A LoRA adapter in PEFT's format, merged while loading.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [default: 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one [default: 8771].")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="BITS", help="int8 or int4: quantise the model's matrices, on a CPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: cpu].")] = None,
    store: ServedPlaces = None,
    store_size: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="The limit of each of its folders [default: none]."),
    ] = None,
    codec: Annotated[str | None, typer.Option(help="How records are kept, as in `kvgraph ask` [default: raw].")] = None,
    library: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            callback=library_without_password,
            help="File, or URL of a Postgres, that keeps segments and graphs [default: library.sqlite in the store's first "
            "folder].",
        ),
    ] = None,
    kv_budget: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="KV held in memory [default: half of the free memory]."),
    ] = None,
    host_budget: HostBudget = None,
    method: Annotated[
        str | None,
        typer.Option(help="For requests without one [default: the first the model declares tuning for, else full]."),
    ] = None,
    served_name: Annotated[
        str | None, typer.Option(help="The model's name for clients [default: the last part of its name].")
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file, instead of the model's template.")] = None,
    document_template: Annotated[
        str | None, typer.Option(help=r"How to write a document, such as '{title}\n{text}\n\n'.")
    ] = None,
    overflow: Annotated[
        str | None, typer.Option(help="If documents don't fit: refuse, or drop the last ones [default: refuse].")
    ] = None,
    allow_untested: Annotated[
        bool | None, typer.Option("--allow-untested", help="Accept model types that kvgraph isn't tested on.")
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that answer, each with the model and a memory of its own; needs Ray."),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json [default: text].")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with these and further settings.", envvar="KVGRAPH_CONFIG")
    ] = None,
) -> None:
    """Serve a model through OpenAI's API, with documents composed from their cached KV.

    Settings can also come from the environment (KVGRAPH_STORE=...) or a TOML file. Flags override the environment,
    which overrides the file. docs/reference/configuration.md lists all settings, including API keys and limits;
    examples/server.toml is an example. SIGTERM and Ctrl-C let running requests finish; a second one stops at once.

    \b
      kvgraph serve --model ./llama --store kv
      kvgraph serve --model ./llama --store kv --store redis://127.0.0.1:6379/0
      kvgraph serve --model ./llama --store kv --replicas 2
      open http://127.0.0.1:8771/            # the playground
      curl http://127.0.0.1:8771/v1/models
    """
    try:
        from kvgraph.server.serve import run
        from kvgraph.server.settings import Settings
    except ModuleNotFoundError as error:
        raise KVGraphError(f"the server needs {error.name}; install it with: pip install 'kvgraph[server]'") from None
    settings = Settings.load(
        config,
        model=model,
        adapter=adapter,
        host=host,
        port=port,
        dtype=dtype,
        quantize=quantize,
        device=device,
        store=store or None,
        store_size=store_size,
        codec=codec,
        library=library,
        kv_budget=kv_budget,
        host_budget=host_budget,
        method=method,
        served_name=served_name,
        chat_template=chat_template,
        document_template=None if document_template is None else unescaped(document_template),
        overflow=overflow,
        allow_untested=allow_untested,
        log_format=log_format,
    )
    if replicas is None:
        raise typer.Exit(run(settings))
    try:
        from kvgraph.cluster.serving import local_app
    except ModuleNotFoundError as error:
        raise KVGraphError(f"replicas need {error.name}; install it with: pip install 'kvgraph[ray]'") from None
    garbage.started()  # this process loads no model
    raise typer.Exit(run(settings, lambda given: local_app(given, replicas)))
