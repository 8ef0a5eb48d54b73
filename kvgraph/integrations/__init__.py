"""kvgraph's server in other frameworks, one file each: LangChain, LlamaIndex, Open WebUI. Each is an optional extra."""
