"""Texts in which features are looked for: the one that comes with the package, and those that a person gives."""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

from tl_circuits.errors import PromptError

_FOLDER = Path(__file__).parent / "text"
_GENRES = ("facts", "stories", "dialogue", "languages", "code", "lists", "numbers")
_LONGEST = 4000  # characters; a longer passage, such as a file without empty lines, is cut
_EVERY = 17  # of the built-in world's additions, each seventeenth; and in such steps its questions are mixed
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def shipped_passages() -> list[str]:
    """The text that comes with the package: facts, stories, dialogue, several languages, code, lists and numbers.

    The kinds take turns, so that the beginning of the text is a fair sample of all of it.
    """
    ranked = []
    for genre in _GENRES:
        passages = list(_passages((_FOLDER / f"{genre}.txt").read_text(encoding="utf-8").splitlines(keepends=True)))
        ranked += [((i + 0.5) / len(passages), genre, text) for i, text in enumerate(passages)]
    return [text for _, _, text in sorted(ranked)]


def world_passages() -> list[str]:
    """Sentences of the built-in model's world; it knows no other words."""
    from tl_circuits.dictionaries.builtin import world

    # Each city once in a question of two steps and twice with its state: more often, one city would be all examples.
    two_hop = [
        world.two_hop(city, world.PROPERTIES[n % len(world.PROPERTIES)]) for n, city in enumerate(world.STATE_OF)
    ]
    cities = world.states_of_cities()
    n = len(world.PHRASINGS)
    facts = [
        *two_hop,
        *cities[0::n],
        *cities[n - 1 :: n],
        *world.properties_of_states(),
        *world.opposites(),
        *world.translations(),
        *world.additions()[::_EVERY],
    ]
    return [f"{fact.prompt} {fact.answer} ." for start in range(_EVERY) for fact in facts[start::_EVERY]]


def file_passages(path: Path) -> Iterator[str]:
    """The passages of a text file, read as they are asked for. Empty lines stand between passages.

    Args:
        path: the file, in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        PromptError: if there is no such file, or it is in another encoding.
    """
    if not path.is_file():
        raise PromptError(f"there is no text file {path}.")
    with path.open("rb") as file:
        head = file.read(4)
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    try:
        with path.open(encoding=encoding) as lines:
            yield from _passages(lines)
    except UnicodeError as error:
        raise PromptError(
            f"the text {path} is not in UTF-8 ({error.reason if isinstance(error, UnicodeDecodeError) else error}). "
            "Convert it, for example with: iconv -f latin1 -t utf-8"
        ) from error


def _passages(lines: Iterable[str]) -> Iterator[str]:
    held = ""
    for line in lines:
        if held and (not line.strip() or len(held) + len(line) > _LONGEST):
            yield held.rstrip("\n")
            held = ""
        while len(line) > _LONGEST:
            yield line[:_LONGEST]
            line = line[_LONGEST:]
        if line.strip():
            held += line
    if held:
        yield held.rstrip("\n")
