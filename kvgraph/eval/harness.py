"""lm-evaluation-harness over kvgraph: its tasks, with any method. Needs the extra `kvgraph[lm-eval]`.

    python -m kvgraph.eval.harness run --model kvgraph --model_args pretrained=./llama,method=block --tasks ...

takes the same arguments as `lm_eval`. A context is cut into segments at blank lines, where the harness separates
few-shot examples; the text after the last one is the query. Tokens are those of the whole text, so `full` gives the
scores of the harness's own `hf` model, and repeated examples are computed once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from kvgraph import methods
from kvgraph.edges import named_edges
from kvgraph.engine.engine import Engine
from kvgraph.engine.request import Request
from kvgraph.engine.result import Result
from kvgraph.engine.sampling import SamplingParams
from kvgraph.errors import KVGraphError
from kvgraph.graph import ContextGraph
from kvgraph.progress import Progress

WINDOW = 32  # requests in the scheduler at once
BLANK_LINES = re.compile(r"\n\n+")


@register_model("kvgraph")
class KVGraphLM(TemplateLM):
    """A model for the harness. Arguments are those of `--model_args`.

    pretrained: folder or hub name. method: as in `kvgraph ask --method`, the model's default unless given. edges: as in `--edges`, for methods that read
    them. store: a folder that keeps KV between runs. adapter: a LoRA adapter to merge. max_gen_toks: tokens of an answer when the task doesn't say.
    """

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        edges: str = "",
        store: str | None = None,
        adapter: str | None = None,
        dtype: str = "auto",
        quantize: str | None = None,
        device: str | None = None,  # the harness itself asks for cuda:0, which counts only if there is one
        max_gen_toks: int = 256,
        batch_size: Any = None,  # the harness passes it; the scheduler batches by itself
        max_batch_size: Any = None,
    ):
        super().__init__()
        device = str(device) if device and torch.cuda.is_available() else "cpu"
        self.engine = Engine.load(
            pretrained, adapter=adapter, dtype=str(dtype), quantize=quantize, device=device, store=store
        )
        if self.engine.model.tokenizer is None:
            raise KVGraphError(f"{pretrained} has no tokenizer, but the harness works on text; give a model with one")
        self.method = methods.resolve(method, self.engine.model.tuned_for)
        self.edges, self.max_gen_toks = edges, max_gen_toks
        self.tokenizer = self.engine.model.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """Positions the model has."""
        return self.engine.model.limit

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids as the harness's `hf` model makes them: special tokens are added, but BOS never twice."""
        return self._encoded(string, add_special_tokens)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The model's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the model's limit."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owner: list[int] = []
        for i, (text,) in enumerate(request.args for request in requests):
            for window in utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (score, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True):
            totals[i] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers. Unsupported sampling arguments are an error."""

        def prepared(instance: Instance) -> Request:
            context, wanted = instance.args
            options = normalize_gen_kwargs(wanted, self.max_gen_toks)
            most, sample = options.pop("max_gen_toks"), options.pop("do_sample")
            until = handle_stop_sequences(options.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
            drawn = {f: options.pop(f) for f in ("temperature", "top_k", "top_p", "min_p") if f in options}
            penalty = options.pop("repetition_penalty", 1.0)
            if options:
                raise KVGraphError(
                    f"generation argument {min(options)!r} isn't supported; leave it out of the task's gen_kwargs"
                )
            params = SamplingParams(
                max_tokens=most,
                stop=tuple(filter(None, until)),
                repetition_penalty=penalty,
                **(drawn if sample else {}),  # without sampling, `hf` ignores them too
            )
            encoded = self._encoded(context)
            ids = encoded["input_ids"]
            graph = self._graph(ids, self._cuts(context, encoded), keep=self.max_length - most)
            return self.engine.prepare(self.engine.plan(graph, self.method), params)

        answers = [""] * len(requests)
        for i, result in self._run("generating", requests, prepared, disable_tqdm):
            answers[i] = result.text
            self.cache_hook.add_partial("generate_until", requests[i].args, result.text)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        def prepared(request: tuple[tuple[str, str], list[int], list[int]]) -> Request:
            texts, context, answer = request
            cuts = self._cuts(texts[0], self._encoded(texts[0])) if texts else []
            graph = self._graph(context, cuts, keep=self.max_length + 1 - len(answer))
            return self.engine.prepare_score(graph, answer, self.method)

        scores = [(0.0, False)] * len(requests)
        for i, result in self._run("scoring", requests, prepared, disable_tqdm):
            scores[i] = (float(result.scores.double().sum()), result.greedy)
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], scores[i])
        return scores

    def _run(
        self, what: str, items: Sequence[Any], prepared: Callable[[Any], Request], quiet: bool
    ) -> Iterator[tuple[int, Result]]:
        """(index of the item, its result) as they end, with a window of requests in the engine at once."""
        with (
            Progress(what, len(items), enabled=False if quiet else None) as bar,
            closing(self.engine.run(map(prepared, items), in_flight=WINDOW)) as outcomes,
        ):
            for i, outcome in outcomes:
                if isinstance(outcome, KVGraphError):
                    raise outcome
                bar.advance(1)
                yield i, outcome

    def _encoded(self, text: str, special: bool | None = None) -> Any:
        if special is None and text.startswith(self.tokenizer.decode(self.prefix_token_id)):
            special = False
        more = {} if special is None else {"add_special_tokens": special}
        return self.tokenizer(text, return_offsets_mapping=True, **more)

    def _cuts(self, text: str, encoded: Any) -> list[int]:
        """Token indices at which segments begin: the first tokens that lie completely after blank lines."""
        starts = [a for a, _ in encoded["offset_mapping"]]
        cuts = []
        for blank in BLANK_LINES.finditer(text.rstrip()):
            cuts.append(next((i for i, start in enumerate(starts) if start >= blank.end()), len(starts)))
        return cuts

    def _graph(self, ids: list[int], cuts: Sequence[int], keep: int) -> ContextGraph:
        """The segments and the query (never empty) of the last `keep` tokens."""
        if keep < 1:
            raise KVGraphError(f"the answer alone fills the model's {self.max_length} positions; ask for fewer tokens")
        gone = max(0, len(ids) - keep)
        inside = sorted({cut - gone for cut in cuts if 0 < cut - gone < len(ids) - gone})
        *segments, query = [ids[gone:][a:b] for a, b in pairwise([0, *inside, len(ids) - gone])]
        names = [f"doc {i}" for i in range(len(segments))]
        return ContextGraph(segments, query, edges=named_edges(self.edges, names))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
