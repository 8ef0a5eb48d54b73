"""KVLink's training (arXiv 2502.16002, section 4; the released titan_training_utils.py and optimizer.py)."""

from __future__ import annotations

from kvgraph.train.config import FULL, SELECTIVE, Component, Config, Stage

LLAMA = "meta-llama/Llama-3.2-{}-Instruct"
# The released mixtures, named by the data they omit: folders that `kvgraph data prepare` makes, and their weights.
MIXTURES: dict[str, dict[str, float]] = {
    "": {"text": 20, "tulu": 30, "sft-mem": 25, "qa": 10, "qa-mem": 10, "xsum": 5},
    "no-sum": {"text": 21.1, "tulu": 31.6, "sft-mem": 26.3, "qa": 10.5, "qa-mem": 10.5},
    "no-sft-mem": {"text": 26.7, "tulu": 40, "qa": 13.3, "qa-mem": 13.3, "xsum": 6.7},
    "qa-only": {"qa-mem": 100},
}
FOLDERS = {"text": "fineweb-text", "tulu": "tulu", "sft-mem": "daring-anteater-mem", "xsum": "xsum"}
PLAIN = ("text", "tulu", "qa")  # trained as one ordinary prompt, so that the model remains a language model
QA = ("qa-2wiki", "qa-trivia")


def kvlink(links: int = 5, size: str = "1B", without: str = "") -> Config:
    """KVLink: documents encoded alone, each followed by 0, 1 or 5 link tokens, which are reserved ids of Llama 3.

    size: of Llama 3.2, "1B" or "3B". without: a key of MIXTURES. For another model, set links and slots to add rows, and
    use "kvlink" as the method.
    """
    components = []
    for name, weight in MIXTURES[without].items():
        method = "full" if name in PLAIN else f"kvlink-llama3-{links}"
        parts = QA if name.startswith("qa") else (FOLDERS[name],)
        components += [
            Component(name if len(parts) == 1 else f"{name}-{part.removeprefix('qa-')}", part, (method,), weight / len(parts))
            for part in parts
        ]  # fmt: skip
    return Config(
        name="-".join(filter(None, ("kvlink", size.lower(), str(links), without))),
        model=LLAMA.format(size),
        data="data",
        stages=(Stage(tuple(components), steps=600 if without == "qa-only" else 6000),),
        batch=64,
        length=4096,
        lr=5e-6,
        warmup=0.1,
        betas=(0.9, 0.999),
        checkpointing=SELECTIVE if size == "1B" else FULL,
        evaluate_every=100 if without == "qa-only" else 500,
        save_every=500,
        keep=2,
    )
