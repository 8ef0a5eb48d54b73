"""Which tokens key norm and SnapKV keep here, beside NVIDIA's kvpress on the same weights and tokens.

kvpress needs an older transformers, so it runs in an environment of its own:

    python3 -m venv kvp && kvp/bin/pip install kvpress "transformers<5.3"
    python -m benchmarks.kvpress_reference --python kvp/bin/python

A document is encoded alone, as `block` does, in a random Llama. A figure is the share of kept tokens, over layers and
heads, that both keep, and the largest difference between the keys of these.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("knorm", "snapkv")
KEEPS = (75, 50, 25)
WINDOW, KERNEL = 32, 5


def theirs(folder: Path) -> None:
    """In the other environment: write the keys that kvpress keeps."""
    import kvpress
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokens = torch.tensor([json.loads((folder / "tokens.json").read_text())])
    for name in NAMES:
        for keep in KEEPS:
            ratio = 1 - keep / 100
            press = (
                kvpress.KnormPress(ratio)
                if name == "knorm"
                else kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=KERNEL)
            )
            cache = DynamicCache()
            with torch.inference_mode(), press(model):
                model(tokens, past_key_values=cache)
            keys = {str(i): layer.keys[0].numpy() for i, layer in enumerate(cache.layers)}
            np.savez(folder / f"{name}-{keep}.npz", **keys)


def main() -> None:
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.common import SMALL, arguments, ids, report
    from kvgraph import ContextGraph, Engine, models

    args = arguments(__doc__, python="kvp/bin/python", length=800)
    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.1)).eval()
    tokens = ids(args.length, 1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf.save_pretrained(folder / "model")
        (folder / "tokens.json").write_text(json.dumps(tokens))
        subprocess.run([args.python, __file__, "theirs", name], check=True)
        model = models.wrap(hf)
        graph = ContextGraph([tokens], query=[5])
        for selection in NAMES:
            for keep in KEEPS:
                fields = f",window={WINDOW},kernel={KERNEL}" if selection == "snapkv" else ""
                with Engine(model, select=f"{selection}:keep={keep}{fields}") as engine:
                    engine.encode(graph, "block", progress=False)
                    record = engine.scheduler.memory.pooled(engine.keys(engine.plan(graph, "block"))[0])
                other = np.load(folder / f"{selection}-{keep}.npz")
                both, total, worst = 0, 0, 0.0
                for layer, keys in enumerate(record.keys):
                    for mine, his in zip(keys, torch.from_numpy(other[str(layer)]), strict=True):
                        # Both keep positions in order or by score: a key is found by its nearest.
                        distance, _ = torch.cdist(mine.float(), his, compute_mode="donot_use_mm_for_euclid_dist").min(1)
                        same = distance < 1e-2
                        both, total = both + int(same.sum()), total + len(his)
                        worst = max(worst, float(distance[same].max()))
                rows.append(
                    {
                        "selection": selection,
                        "keep %": keep,
                        "kept by both %": 100 * both / total,
                        "keys differ by": worst,
                    }
                )
    goals = {"kept by both, at least %": (min(float(row["kept by both %"]) for row in rows), "99 or more")}
    report(f"kvpress beside kvgraph, {args.length} tokens", rows, args, goals)


if __name__ == "__main__":
    if sys.argv[1:2] == ["theirs"]:
        theirs(Path(sys.argv[2]))
    else:
        main()
