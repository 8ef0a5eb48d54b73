"""An OpenAI-compatible server over composed caches. `kvgraph serve` starts it; `app.create_app` is the application."""
