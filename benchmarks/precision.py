"""How far logits move in bf16 and fp16: composed, and in a plain forward, both compared with a float32 forward.

There is one tiny random model per family. The difference of next-token logits is given in standard deviations, the largest over
the gate's cases. The composed column should be like the plain one: it is the same 16-bit rounding in another order.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.common import arguments, median, report
from kvgraph import Engine, models
from kvgraph.checks.gate import _plans

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
import families


def main() -> None:
    args = arguments(__doc__, draws=3)
    rows = []
    for name, make in families.FAMILIES.items():
        row = {"family": name}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            exact = models.wrap(make())
            model = models.wrap(make().to(dtype).to(args.device))
            engine = Engine(model, kv_budget=1 << 28)
            composed, plain = [], []
            for seed in range(args.draws):
                pairs = []
                for _, _, plan in _plans(model, seed):
                    if plan is None:
                        continue
                    d = plan.dense()
                    problem = tuple(map(torch.from_numpy, (d.tokens, d.positions, d.visible)))
                    truth, theirs = exact.dense(*problem)[-1], model.dense(*problem)[-1].cpu()
                    pairs.append([float((x - truth).abs().max() / truth.std()) for x in (engine.logits(plan), theirs)])
                composed.append(max(p[0] for p in pairs))
                plain.append(max(p[1] for p in pairs))
            short = str(dtype).removeprefix("torch.")
            row |= {f"{short} composed": median(composed), f"{short} plain": median(plain)}
        rows.append(row)
    report("Worst logit difference from a float32 forward, in standard deviations", rows, args)


if __name__ == "__main__":
    main()
