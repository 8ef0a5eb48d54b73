#!/usr/bin/env bash
# Encode a folder or JSON Lines corpus once, then ask: the second question computes no document.
#   examples/encode_and_ask.sh MODEL CORPUS "QUESTION"
set -euo pipefail
model=$1 corpus=$2 question=$3
store=${KVGRAPH_STORE:-kv}

kvgraph encode "$model" "$corpus" --method block --store "$store" --dry-run
kvgraph encode "$model" "$corpus" --method block --store "$store"
kvgraph ask "$model" "$question" --documents "$corpus" --method block --store "$store" --max-tokens 64
kvgraph store stats --store "$store"
