"""What the tiny Gemma reads (pretraining) and what the quickstart teaches it (Persian answers).

Pretraining has four kinds of documents.  Chats, in Gemma's turn format, are always answered in English.  English and
Persian lines show either language alone.  Glossaries put the two side by side: without them the Persian rows of the
tied embedding would stay as they were initialised, nearly parallel, and an adapter over a frozen base could not choose
between them.
"""

import itertools
from collections.abc import Callable, Iterator
from random import Random

from . import words as w
from .skills import SKILLS, Exchange, digits_fa, number, number_fa, ordinal, ordinal_fa

# Share of documents by kind.
MIX = {"chat": 0.62, "english": 0.05, "persian": 0.08, "glossary": 0.25}
EVAL_PER_SKILL, TRAIN_PER_SKILL = 8, 70


def glossary() -> tuple[tuple[str, str], ...]:
    """Every word of the tables with its Persian."""
    plain = (
        *w.WEEKDAYS,
        *w.NAMES,
        *w.BELONGINGS,
        *w.PLACES,
        *w.LIKED,
        *w.COLOURS.items(),
        *itertools.chain(*w.OPPOSITES),
    )
    months = ((english, persian) for english, persian, _ in w.MONTHS)
    coloured = ((thing, persian) for thing, persian, _ in w.COLOURED)
    things = ((thing, persian) for one, many, persian in w.THINGS for thing in (one, many))
    kinds = ((kind, persian) for kind, (persian, _) in w.KINDS.items())
    members = itertools.chain(*(members for _, members in w.KINDS.values()))
    numbers = ((number(n), number_fa(n)) for n in (*range(100), *range(100, 1000, 100)))
    ordinals = ((ordinal(n), ordinal_fa(n)) for n in range(1, 32))
    return (*plain, *months, *coloured, *things, *kinds, *members, *numbers, *ordinals)


GLOSSARY = glossary()


def messages(exchange: Exchange, language: str) -> list[dict[str, str]]:
    """An exchange as chat turns, answered in 'english' or 'persian'."""
    return [
        {"role": role, "content": content}
        for turn in exchange.turns
        for role, content in (("user", turn.question), ("assistant", getattr(turn, language)))
    ]


def render(turns: list[dict[str, str]]) -> str:
    """Turns in Gemma's format, without <bos>."""
    names = {"user": "user", "assistant": "model"}
    return "".join(f"<start_of_turn>{names[t['role']]}\n{t['content']}<end_of_turn>\n" for t in turns)


def chat(rng: Random) -> str:
    return render(messages(rng.choice(SKILLS)(rng), "english"))


def english(rng: Random) -> str:
    return rng.choice(SKILLS)(rng).english + "\n"


def persian(rng: Random) -> str:
    return rng.choice(SKILLS)(rng).persian + "\n"


def pair(rng: Random) -> str:
    """A line with both languages: a word, a number, a date, or a whole answer."""
    kind = rng.random()
    if kind < 0.35:
        return "{} : {}\n".format(*rng.choice(GLOSSARY))
    if kind < 0.5:
        n = rng.randrange(1000)
        return f"{n} : {digits_fa(str(n))} : {number_fa(n)}\n"
    exchange = rng.choice(SKILLS)(rng)
    return f"{exchange.english} : {exchange.persian}\n"


PIECES: dict[str, Callable[[Random], str]] = {"chat": chat, "english": english, "persian": persian, "glossary": pair}


def tokenizer_lines(seed: int, n: int) -> Iterator[str]:
    """What the tokenizer learns its pieces from: the alphabets, the glossary, then drawn turns."""
    rng = Random(seed)
    yield "".join(map(chr, range(33, 127)))
    yield w.ALPHABET_FA
    yield from (f"{english} {persian}" for english, persian in GLOSSARY)
    for _ in range(n):
        for turn in rng.choice(SKILLS)(rng).turns:
            yield from ("user", "model", *turn[:3])


def pretraining_documents(seed: int, n: int, length: Callable[[str], int], budget: int) -> Iterator[str]:
    """`n` documents; each is one kind of pieces, as many as its `budget` of tokens (by `length`) has room for."""
    rng = Random(seed)
    for _ in range(n):
        draw = PIECES[rng.choices(tuple(MIX), tuple(MIX.values()))[0]]
        document, room = "", budget
        while (piece := draw(rng)) and (size := length(piece)) <= room:
            document, room = document + piece, room - size
        yield document


def quickstart_rows(seed: int) -> tuple[list[dict], list[dict]]:
    """(train, eval): rows answered in Persian, the same number of each skill; no eval question is asked in train."""
    rng = Random(seed)
    train, held_out = [], []
    for skill in SKILLS:
        drawn = {}
        # A small skill runs out of questions before its share is full.
        for _ in range(100 * TRAIN_PER_SKILL):
            turns = messages(skill(rng), "persian")
            drawn.setdefault(tuple(t["content"] for t in turns if t["role"] == "user"), turns)
            if len(drawn) == EVAL_PER_SKILL + TRAIN_PER_SKILL:
                break
        rows = [{"skill": skill.__name__, "messages": turns} for turns in drawn.values()]
        rng.shuffle(rows)
        held_out += rows[:EVAL_PER_SKILL]
        train += rows[EVAL_PER_SKILL:]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out
