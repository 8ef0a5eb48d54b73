"""The one prompt policy: a prompt depends on the item, the task and the model, never on the method."""

from __future__ import annotations

from typing import Any

from kvgraph.data import chat
from kvgraph.data.chat import ChatError, Prompt
from kvgraph.data.task import Item, Task
from kvgraph.edges import named_edges
from kvgraph.graph import Edge

LINKS = "links"  # the edges of an item's own data


def build(task: Task, item: Item, tokenizer: Any) -> Prompt:
    """Instruction, documents, question: in the model's chat template if it has one, else one after the other.

    In a chat, the instruction is the system message, and documents and question are the user's message. If the template
    refuses or drops system messages, the instruction stands before the question. Documents are written as the task
    says, even if the template has its own form for them: these forms number the documents, which would change a
    document's text, and its KV, with its rank.
    """
    instruction, question = task.instruction.strip(), task.question.format(question=item.question)
    if not getattr(tokenizer, "chat_template", None):
        return chat.plain(tokenizer, f"{instruction}\n\n", item.documents, question, task.document)
    user = {"role": "user", "content": question}
    if not instruction:
        return _chat(tokenizer, [user], task, item)
    try:
        prompt = _chat(tokenizer, [{"role": "system", "content": instruction}, user], task, item)
        if instruction in "".join((*prompt.prefix, prompt.query)):
            return prompt
    except ChatError:
        pass
    return _chat(tokenizer, [{"role": "user", "content": f"{instruction}\n\n{question}"}], task, item)


def _chat(tokenizer: Any, messages: list[dict[str, str]], task: Task, item: Item) -> Prompt:
    return chat.chat(tokenizer, messages, item.documents, template=task.document)


def edges_of(item: Item, spec: str) -> tuple[Edge, ...]:
    """The item's own edges for "links", else those that `kvgraph.edges.named_edges` makes for its documents."""
    return item.links if spec == LINKS else named_edges(spec, [""] * len(item.documents))
