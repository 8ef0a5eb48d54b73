"""One word per thing: no two rooms of the package have a class of the same name."""

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "kvgraph"


def shared(sources: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names of classes that stand in several rooms, with these; of pairs (room, source). Nested classes count too."""
    rooms = defaultdict(set)
    for room, source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                rooms[node.name].add(room)
    return {name: sorted(found) for name, found in rooms.items() if len(found) > 1}


def test_no_class_has_the_name_of_another_rooms():
    files = [(path.relative_to(PACKAGE).parts[0], path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    assert len(files) > 100
    assert shared(files) == {}


def test_a_name_in_two_rooms_is_found():
    one, two = "class Step: ...", "def f():\n    class Step: ..."
    assert shared([("engine", one), ("train", two)]) == {"Step": ["engine", "train"]}
    assert shared([("engine", one), ("engine", two)]) == {}
