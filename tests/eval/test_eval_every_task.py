"""Every task runs on its data to the end, killed on the way, and leaves what an unbroken run leaves."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import pytest
import test_eval_tasks_edges as edges
import test_eval_tasks_more as more
import test_eval_tasks_qa as qa
import torch
from test_eval_run import lasting, lines
from test_eval_tasks_more import small  # noqa: F401  (a fixture)

from kvgraph import Engine
from kvgraph.data.items import Data, read
from kvgraph.data.tasks import TASKS, get
from kvgraph.demo import write_model
from kvgraph.eval.run import evaluate
from soak import some

ITEMS = 3


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    torch.set_num_threads(1)  # a forked process can't use the threads of its parent
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return Engine.load(folder, dtype="float32", check=False)


def data_of(name: str, small: dict[str, Path], tmp_path: Path) -> Data:  # noqa: F811
    """A few items with the beginning of a few documents; where there are fewer records, the first ones again."""
    if get(name).generate is not None:
        data = read(get(name), "generated", ITEMS)
    elif name in qa.QA:
        if name == "multihop-rag":
            source = qa.write_json(tmp_path / "MultiHopRAG.json", qa.MULTIHOP)
        elif name.startswith("block-"):
            source = qa.write_json(tmp_path / "dataset.json", [qa.BLOCK])
        else:
            source = qa.sample(name)
        data = read(get(name), source, ITEMS)
    elif name == "linked-docs":
        data = read(get(name), edges.documentation(tmp_path / "docs"), ITEMS)
    elif name in edges.SAMPLES:
        data = read(get(name), edges.sample(name), ITEMS)
    elif name in small:
        data = read(get(name), small[name], ITEMS)
    else:
        path = more.DATA / next(path for task, path in more.SAMPLES if task.name == name)
        if not path.exists():
            pytest.skip(f"no real input: {path} is missing; set KVGRAPH_DATA to the folder that has it")
        data = read(get(name), path, ITEMS)
    enough = islice(cycle(data.items), ITEMS)
    short = (replace(qa.shortened(item), id=f"{i}-{item.id}", links=()) for i, item in enumerate(enough))
    return data._replace(items=tuple(short))


@pytest.mark.filterwarnings("ignore:this model doesn't declare tuning", "ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", some(TASKS, 4))
def test_a_killed_run_ends_as_an_unbroken_one(engine, tmp_path, small, name):  # noqa: F811
    data = data_of(name, small, tmp_path)

    def run(out: Path) -> None:
        evaluate(engine, get(name), "block", data.items, out, data=data, max_tokens=4, window=1, progress=False)

    run(tmp_path / "whole")
    broken = tmp_path / "broken"
    child = os.fork()
    if child == 0:
        try:
            run(broken)
        finally:
            os._exit(0)
    until = time.monotonic() + 60
    while not ((broken / "results.jsonl").exists() and lines(broken)) and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done = len(lines(broken))
    assert done >= 1
    run(broken)
    assert len(lines(broken)) == ITEMS
    assert lasting(broken) == lasting(tmp_path / "whole")
    assert not any("error" in line for line in lines(broken))
