"""What the tiny Gemma reads (pretraining) and what the quickstart teaches it (Persian answers).

Pretraining has four kinds of documents.  Chats, in Gemma's turn format, are always answered in English.  English and
Persian lines show either language alone.  Phrase books put the two side by side: without them the Persian rows of the
tied embedding would stay as they were initialised, nearly parallel, and an adapter over a frozen base could not choose
between them; and what a chat asks would have nothing to do with what Persian lines say.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from random import Random

from . import skills
from . import words as w
from .skills import SKILLS, Exchange, digits_fa, number, number_fa, ordinal, ordinal_fa

# Share of documents by kind.
MIX = {"chat": 0.52, "english": 0.03, "persian": 0.05, "phrasebook": 0.4}
# Few facts, learnt early: drawn half as often.
EASY = (skills.month, skills.opposite, skills.colour, skills.kind_of, skills.how_many)
EASY += (skills.introduction, skills.memory, skills.small_talk)
DRAWN = (*SKILLS, *(skill for skill in SKILLS if skill not in EASY))
QUICKSTART_SEED, EVAL_PER_SKILL, TRAIN_PER_SKILL = 0, 8, 70


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


def questions(exchange: Exchange) -> tuple[str, ...]:
    return tuple(turn.question for turn in exchange.turns)


def render(turns: list[dict[str, str]]) -> str:
    """Turns in Gemma's format, without <bos>."""
    names = {"user": "user", "assistant": "model"}
    return "".join(f"<start_of_turn>{names[t['role']]}\n{t['content']}<end_of_turn>\n" for t in turns)


def draw(rng: Random) -> Exchange:
    return rng.choice(DRAWN)(rng)


def chat(rng: Random) -> str:
    return render(messages(draw(rng), "english"))


def english(rng: Random) -> str:
    return draw(rng).english + "\n"


def persian(rng: Random) -> str:
    return draw(rng).persian + "\n"


def phrase(rng: Random) -> str:
    """A line with both languages: a word, a number, an answer, or a question with its answer.

    The questions of the quickstart's evaluation are never shown with their Persian answers.
    """
    kind = rng.random()
    if kind < 0.25:
        return "{} : {}\n".format(*rng.choice(GLOSSARY))
    if kind < 0.35:
        n = rng.randrange(1000)
        return f"{n} : {digits_fa(str(n))} : {number_fa(n)}\n"
    exchange = draw(rng)
    if kind < 0.55 or questions(exchange) in held_out_questions():
        return f"{exchange.english} : {exchange.persian}\n"
    return f"{' '.join(questions(exchange))} : {exchange.persian}\n"


PIECES: dict[str, Callable[[Random], str]] = {
    "chat": chat,
    "english": english,
    "persian": persian,
    "phrasebook": phrase,
}


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
        piece_of = PIECES[rng.choices(tuple(MIX), tuple(MIX.values()))[0]]
        document, room = "", budget
        while (piece := piece_of(rng)) and (size := length(piece)) <= room:
            document, room = document + piece, room - size
        yield document


def quickstart_exchanges(seed: int) -> tuple[list[tuple[str, Exchange]], list[tuple[str, Exchange]]]:
    """(train, eval): exchanges with the names of their skills; no eval question is asked in train."""
    rng = Random(seed)
    train, held_out = [], []
    for skill in SKILLS:
        drawn = {}
        # A small skill runs out of questions before its share is full.
        for _ in range(100 * TRAIN_PER_SKILL):
            exchange = skill(rng)
            drawn.setdefault(questions(exchange), (skill.__name__, exchange))
            if len(drawn) == EVAL_PER_SKILL + TRAIN_PER_SKILL:
                break
        named = list(drawn.values())
        rng.shuffle(named)
        held_out += named[:EVAL_PER_SKILL]
        train += named[EVAL_PER_SKILL:]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


@functools.cache
def held_out_questions() -> frozenset[tuple[str, ...]]:
    return frozenset(questions(exchange) for _, exchange in quickstart_exchanges(QUICKSTART_SEED)[1])


def quickstart_rows(seed: int) -> tuple[list[dict], list[dict]]:
    """(train, eval): rows answered in Persian, about as many of each skill."""
    train, held_out = (
        [{"skill": name, "messages": messages(exchange, "persian")} for name, exchange in part]
        for part in quickstart_exchanges(seed)
    )
    return train, held_out
