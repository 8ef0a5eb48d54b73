#!/usr/bin/env bash
# The server without a client library: models, a chat over documents, a stream, a stored segment.
#   kvgraph serve --model MODEL    # in another terminal
#   examples/curl.sh               # KVGRAPH_URL: the server; KVGRAPH_KEY: an API key, if it has any
set -euo pipefail
url=${KVGRAPH_URL:-http://127.0.0.1:8771}

ask() { # METHOD PATH [JSON]
  curl --fail-with-body --silent --show-error --no-buffer --request "$1" "$url$2" \
    --header "Authorization: Bearer ${KVGRAPH_KEY:-none}" --header "Content-Type: application/json" ${3:+--data "$3"}
  echo
}

echo "== The model"
ask GET /v1/models
model=$(ask GET /v1/models | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')

echo "== A chat over two documents; the second reads the first"
ask POST /v1/chat/completions '{
  "model": "'"$model"'", "max_tokens": 16, "temperature": 0,
  "messages": [{"role": "user", "content": "Who kept the lighthouse?"}],
  "documents": [{"text": "The lighthouse stands on the north cape."}, {"text": "Its keeper was Jonas Brandt."}],
  "kvgraph": {"method": "graph-kv", "edges": [[0, 1]]}}'

echo "== A segment, stored and encoded ahead of time"
ask PUT /v1/segments '{"id": "example-cape", "title": "Cape", "text": "The lighthouse stands on the north cape."}'

echo "== A streamed answer that reads it"
ask POST /v1/chat/completions '{
  "model": "'"$model"'", "max_tokens": 8, "temperature": 0, "stream": true, "stream_options": {"include_usage": true},
  "messages": [{"role": "user", "content": "Where does the lighthouse stand?"}],
  "documents": [{"segment": "example-cape"}], "kvgraph": {"method": "block"}}'

echo "== And forgotten"
ask DELETE /v1/segments/example-cape
