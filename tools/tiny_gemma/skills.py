"""What the tiny Gemma is taught to do.  A skill is a function that draws one question with both of its answers.

English answers are for pretraining, Persian ones for the quickstart.  Each skill asks in several ways.
"""

from random import Random
from typing import NamedTuple

from . import words as w


class Exchange(NamedTuple):
    """One question with its English and its Persian answer; `before` is what was said earlier in the chat."""

    question: str
    english: str
    persian: str
    before: tuple["Exchange", ...] = ()

    @property
    def turns(self) -> tuple["Exchange", ...]:
        return (*self.before, self)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def number(n: int) -> str:
    """0 to 999 in English: 347 is three hundred and forty-seven."""
    if n < 20:
        return w.UNITS[n]
    if n < 100:
        return w.TENS[n // 10 - 2] + (f"-{w.UNITS[n % 10]}" if n % 10 else "")
    return f"{w.UNITS[n // 100]} hundred" + (f" and {number(n % 100)}" if n % 100 else "")


def number_fa(n: int) -> str:
    """0 to 999 in Persian: 347 is سیصد و چهل و هفت."""
    if n < 20:
        return w.UNITS_FA[n]
    if n < 100:
        return w.TENS_FA[n // 10 - 2] + (f" و {w.UNITS_FA[n % 10]}" if n % 10 else "")
    return w.HUNDREDS_FA[n // 100 - 1] + (f" و {number_fa(n % 100)}" if n % 100 else "")


def digits_fa(text: str) -> str:
    return text.translate(str.maketrans("0123456789", "۰۱۲۳۴۵۶۷۸۹"))


def ordinal(n: int) -> str:
    """1 to 31 in English."""
    if n <= 20:
        return w.ORDINALS[n - 1]
    return "thirtieth" if n == 30 else f"{w.TENS[n // 10 - 2]}-{w.ORDINALS[n % 10 - 1]}"


def ordinal_fa(n: int) -> str:
    """1 to 31 in Persian; سی takes a zero-width non-joiner, سه becomes سو."""
    if n == 1:
        return "اول"
    cardinal = number_fa(n)
    if cardinal.endswith("سه"):
        return cardinal[:-2] + "سوم"
    return cardinal + ("‌ام" if n == 30 else "م")


def two(rng: Random, table: tuple) -> list:
    return rng.sample(table, 2)


def ask(rng: Random, *ways: str) -> str:
    return rng.choice(ways)


# --- Numbers ---


def in_words(rng: Random) -> Exchange:
    n = rng.randrange(100) if rng.random() < 0.4 else rng.randrange(100, 1000)
    way = ask(rng, "What is {} in words?", "Write {} in words.", "How do you say the number {}?", "Say {} in words.")
    return Exchange(way.format(n), f"It is {number(n)}.", f"می‌شود {number_fa(n)}.")


def add(rng: Random) -> Exchange:
    total = rng.randrange(21)
    a = rng.randrange(total + 1)
    b = total - a
    way = ask(
        rng, "What is {} plus {}?", "How much is {} plus {}?", "Add {} and {}.", "What do you get if you add {} and {}?"
    )
    return Exchange(
        way.format(number(a), number(b)),
        f"{capital(number(a))} plus {number(b)} is {number(total)}.",
        f"{number_fa(a)} به‌علاوهٔ {number_fa(b)} می‌شود {number_fa(total)}.",
    )


def subtract(rng: Random) -> Exchange:
    a = rng.randrange(11)
    b = rng.randrange(a + 1)
    way = ask(rng, "What is {a} minus {b}?", "How much is {a} minus {b}?", "Take {b} away from {a}.")
    return Exchange(
        way.format(a=number(a), b=number(b)),
        f"{capital(number(a))} minus {number(b)} is {number(a - b)}.",
        f"{number_fa(a)} منهای {number_fa(b)} می‌شود {number_fa(a - b)}.",
    )


def compare(rng: Random) -> Exchange:
    a, b = rng.sample(range(21), 2)
    low, high = sorted((a, b))
    if rng.random() < 0.5:
        way = ask(rng, "Which is bigger, {} or {}?", "Which number is bigger, {} or {}?", "Which is more, {} or {}?")
        english = f"{capital(number(high))} is bigger than {number(low)}."
        persian = f"{number_fa(high)} از {number_fa(low)} بزرگ‌تر است."
    else:
        way = ask(rng, "Which is smaller, {} or {}?", "Which number is smaller, {} or {}?", "Which is less, {} or {}?")
        english = f"{capital(number(low))} is smaller than {number(high)}."
        persian = f"{number_fa(low)} از {number_fa(high)} کوچک‌تر است."
    return Exchange(way.format(number(a), number(b)), english, persian)


def count(rng: Random) -> Exchange:
    low = rng.randrange(17)
    high = low + rng.randint(2, 4)
    if rng.random() < 0.3 and low > 0:
        way, numbers = ask(rng, "Count down from {} to {}.", "Count backwards from {} to {}."), range(high, low - 1, -1)
    else:
        way, numbers = ask(rng, "Count from {} to {}.", "Please count from {} to {}."), range(low, high + 1)
    return Exchange(
        way.format(number(numbers[0]), number(numbers[-1])),
        capital(", ".join(map(number, numbers))) + ".",
        "، ".join(map(number_fa, numbers)) + ".",
    )


def together(rng: Random) -> Exchange:
    (name, name_fa), (other, other_fa) = two(rng, w.NAMES)
    _, plural, thing_fa = rng.choice(w.THINGS)
    total = rng.randint(4, 10)
    a = rng.randint(2, total - 2)
    way = ask(rng, "How many {} do they have?", "How many {} do they have together?", "How many {} is that together?")
    return Exchange(
        f"{name} has {number(a)} {plural} and {other} has {number(total - a)}. {way.format(plural)}",
        f"{name} and {other} have {number(total)} {plural}.",
        f"{name_fa} و {other_fa} {number_fa(total)} {thing_fa} دارند.",
    )


def left_over(rng: Random) -> Exchange:
    name, name_fa = rng.choice(w.NAMES)
    one, plural, thing_fa = rng.choice(w.THINGS)
    a = rng.randint(3, 10)
    b = rng.randint(1, a - 1)
    lost = ask(rng, "loses", "sells", "gives away")
    way = ask(rng, "How many {p} are left?", "How many {p} does {n} have now?", "How many {p} does {n} have left?")
    return Exchange(
        f"{name} has {number(a)} {plural} and {lost} {number(b)}. {way.format(p=plural, n=name)}",
        f"{name} has {number(a - b)} {one if a - b == 1 else plural} left.",
        f"برای {name_fa} {number_fa(a - b)} {thing_fa} مانده است.",
    )


# --- The calendar and the clock ---


def weekday(rng: Random) -> Exchange:
    i = rng.randrange(7)
    (before, before_fa), (day, day_fa), (after, after_fa) = (w.WEEKDAYS[(i + d) % 7] for d in (-1, 0, 1))
    kind = rng.randrange(4)
    if kind == 0:
        way = ask(rng, "Which day comes after {}?", "What day comes after {}?", "What is the day after {}?")
        return Exchange(way.format(day), f"{after} comes after {day}.", f"بعد از {day_fa} {after_fa} است.")
    if kind == 1:
        way = ask(rng, "Which day comes before {}?", "What day comes before {}?", "What is the day before {}?")
        return Exchange(way.format(day), f"{before} comes before {day}.", f"پیش از {day_fa} {before_fa} است.")
    start = ask(rng, "Today is {}.", "It is {} today.", "It is {}.").format(day)
    if kind == 2:
        way = ask(rng, "What day is tomorrow?", "Which day is tomorrow?", "And tomorrow?")
        return Exchange(f"{start} {way}", f"Tomorrow is {after}.", f"فردا {after_fa} است.")
    way = ask(rng, "What day was yesterday?", "Which day was yesterday?", "And yesterday?")
    return Exchange(f"{start} {way}", f"Yesterday was {before}.", f"دیروز {before_fa} بود.")


def month(rng: Random) -> Exchange:
    i = rng.randrange(12)
    (before, before_fa, _), (name, name_fa, days), (after, after_fa, _) = (w.MONTHS[(i + d) % 12] for d in (-1, 0, 1))
    kind = rng.randrange(4)
    if kind == 0:
        way = ask(rng, "Which month comes after {}?", "What month comes after {}?", "What is the month after {}?")
        return Exchange(way.format(name), f"{after} comes after {name}.", f"بعد از {name_fa} {after_fa} است.")
    if kind == 1:
        way = ask(rng, "Which month comes before {}?", "What month comes before {}?", "What is the month before {}?")
        return Exchange(way.format(name), f"{before} comes before {name}.", f"پیش از {name_fa} {before_fa} است.")
    if kind == 2:
        way = ask(rng, "Which is the {} month of the year?", "What is the {} month of the year?", "Name the {} month.")
        first_fa = ordinal_fa(i + 1) + "ین"
        return Exchange(
            way.format(ordinal(i + 1)),
            f"{name} is the {ordinal(i + 1)} month of the year.",
            f"{name_fa} {first_fa} ماه سال است.",
        )
    way = ask(rng, "How many days does {} have?", "How many days are there in {}?", "How long is {}?")
    return Exchange(way.format(name), f"{name} has {number(days)} days.", f"{name_fa} {number_fa(days)} روز دارد.")


def date(rng: Random) -> Exchange:
    i = rng.randrange(12)
    name, name_fa, days = w.MONTHS[i]
    day = rng.randint(1, days)
    if rng.random() < 0.6:
        way = ask(rng, "What is {} {} in words?", "Write {} {} in words.", "How do you say the date {} {}?")
        return Exchange(
            way.format(day, name), f"It is the {ordinal(day)} of {name}.", f"می‌شود {ordinal_fa(day)} {name_fa}."
        )
    way = ask(rng, "Which date comes after {} {}?", "What is the day after {} {}?", "What is the next day after {} {}?")
    # Not after 28 February: that depends on the year.
    day = min(day, 27) if i == 1 else day
    after, after_name, after_fa = (1, *w.MONTHS[(i + 1) % 12][:2]) if day == days else (day + 1, name, name_fa)
    return Exchange(
        way.format(day, name),
        f"The next day is the {ordinal(after)} of {after_name}.",
        f"روز بعد {ordinal_fa(after)} {after_fa} است.",
    )


def clock(rng: Random) -> Exchange:
    hour, minute = rng.randint(1, 12), rng.randrange(0, 60, 5)
    past, to = number(hour), number(hour % 12 + 1)
    past_fa, to_fa = number_fa(hour), number_fa(hour % 12 + 1)
    if minute == 0:
        english, persian = f"{past} o'clock", past_fa
    elif minute == 15:
        english, persian = f"quarter past {past}", f"{past_fa} و ربع"
    elif minute == 30:
        english, persian = f"half past {past}", f"{past_fa} و نیم"
    elif minute == 45:
        english, persian = f"quarter to {to}", f"یک ربع به {to_fa}"
    elif minute < 30:
        english, persian = f"{number(minute)} past {past}", f"{past_fa} و {number_fa(minute)} دقیقه"
    else:
        english, persian = f"{number(60 - minute)} to {to}", f"{number_fa(60 - minute)} دقیقه به {to_fa}"
    way = ask(
        rng,
        "The clock shows {}. What time is it?",
        "What time is {} in words?",
        "How do you say the time {}?",
        "My watch says {}. What time is it?",
    )
    return Exchange(way.format(f"{hour}:{minute:02}"), f"It is {english}.", f"ساعت {persian} است.")


# --- The world ---


def opposite(rng: Random) -> Exchange:
    (word, word_fa), (other, other_fa) = rng.sample(rng.choice(w.OPPOSITES), 2)
    way = ask(
        rng,
        "What is the opposite of {}?",
        "Which word is the opposite of {}?",
        "Tell me the opposite of {}.",
        "Give me the opposite of {}.",
    )
    return Exchange(way.format(word), f"The opposite of {word} is {other}.", f"متضاد {word_fa}، {other_fa} است.")


def colour(rng: Random) -> Exchange:
    thing, thing_fa, name = rng.choice(w.COLOURED)
    way = ask(
        rng, "What colour is {}?", "Which colour is {}?", "Tell me the colour of {}.", "What is the colour of {}?"
    )
    return Exchange(way.format(thing), f"{capital(thing)} is {name}.", f"{thing_fa} {w.COLOURS[name]} است.")


def kind_of(rng: Random) -> Exchange:
    kind = rng.choice(tuple(w.KINDS))
    kind_fa, members = w.KINDS[kind]
    member, member_fa = rng.choice(members)
    other = rng.choice([k for k in w.KINDS if k != kind])
    first, second = rng.sample((kind, other), 2)
    way = ask(rng, "What is {m}?", "What kind of thing is {m}?", "Is {m} {a} or {b}?", "What is {m}, {a} or {b}?")
    return Exchange(
        way.format(m=member, a=first, b=second), f"{capital(member)} is {kind}.", f"{member_fa} یک {kind_fa} است."
    )


def how_many(rng: Random) -> Exchange:
    what, english, persian = rng.choice(w.HOW_MANY)
    way = ask(rng, "How many {}?", "Tell me, how many {}?", "Please tell me: how many {}?", "I ask you: how many {}?")
    return Exchange(way.format(what), english, persian)


# --- People ---


def whereabouts(rng: Random) -> Exchange:
    people, places = two(rng, w.NAMES), two(rng, w.PLACES)
    who = rng.randrange(2)
    (name, name_fa), (place, place_fa) = people[who], places[who]
    first, second = (f"{p[0]} is in the {q[0]}" for p, q in zip(people, places, strict=True))
    return Exchange(
        ask(rng, f"{first} and {second}. Where is {name}?", f"{first}. {second}. Where is {name} now?"),
        f"{name} is in the {place}.",
        f"{name_fa} در {place_fa} است.",
    )


def likes(rng: Random) -> Exchange:
    people, liked = two(rng, w.NAMES), two(rng, w.LIKED)
    who = rng.randrange(2)
    (name, name_fa), (thing, thing_fa) = people[who], liked[who]
    first, second = (f"{p[0]} likes {q[0]}" for p, q in zip(people, liked, strict=True))
    if rng.random() < 0.5:
        question = ask(rng, f"What does {name} like?", f"So what does {name} like?")
    else:
        question = ask(rng, f"Who likes {thing}?", f"So who likes {thing}?")
    return Exchange(f"{first} and {second}. {question}", f"{name} likes {thing}.", f"{name_fa} {thing_fa} دوست دارد.")


def belongs(rng: Random) -> Exchange:
    people, (thing, thing_fa) = two(rng, w.NAMES), rng.choice(w.BELONGINGS)
    hues = two(rng, tuple(w.COLOURS.items()))
    who = rng.randrange(2)
    (name, name_fa), (hue, hue_fa) = people[who], hues[who]
    first, second = (f"{p[0]}'s {thing} is {h[0]}" for p, h in zip(people, hues, strict=True))
    return Exchange(
        f"{first} and {second}. {ask(rng, 'What', 'Which')} colour is {name}'s {thing}?",
        f"{name}'s {thing} is {hue}.",
        f"{thing_fa} {name_fa} {hue_fa} است.",
    )


def goes(rng: Random) -> Exchange:
    (name, name_fa), (place, place_fa) = rng.choice(w.NAMES), rng.choice(w.PLACES)
    (day, day_fa) = rng.choice(w.WEEKDAYS)
    question = ask(
        rng,
        f"When does {name} go to the {place}?",
        f"On which day does {name} go to the {place}?",
        f"Where does {name} go on {day}?",
        f"What does {name} do on {day}?",
    )
    return Exchange(
        f"{name} goes to the {place} on {day}. {question}",
        f"{name} goes to the {place} on {day}.",
        f"{name_fa} {day_fa} به {place_fa} می‌رود.",
    )


def introduction(rng: Random) -> Exchange:
    name, name_fa = rng.choice(w.NAMES)
    greeting = ask(rng, "Hello!", "Hi!", "Good day!")
    way = ask(rng, "My name is {}.", "I am {}.", "You can call me {}.", "People call me {}.")
    return Exchange(
        f"{greeting} {way.format(name)}",
        f"Hello {name}! Nice to meet you.",
        f"سلام {name_fa}! از آشنایی با شما خوشوقتم.",
    )


def memory(rng: Random) -> Exchange:
    name, name_fa = rng.choice(w.NAMES)
    meeting = introduction(rng)
    while name not in meeting.question:
        meeting = introduction(rng)
    return Exchange(
        ask(rng, "What is my name?", "Do you remember my name?", "Who am I?", "Do you know my name?"),
        f"Your name is {name}.",
        f"نام شما {name_fa} است.",
        before=(meeting,),
    )


def small_talk(rng: Random) -> Exchange:
    ways, english, persian = rng.choice(w.SMALL_TALK)
    return Exchange(rng.choice(ways), english, persian)


SKILLS = (
    in_words,
    add,
    subtract,
    compare,
    count,
    together,
    left_over,
    weekday,
    month,
    date,
    clock,
    opposite,
    colour,
    kind_of,
    how_many,
    whereabouts,
    likes,
    belongs,
    goes,
    introduction,
    memory,
    small_talk,
)
