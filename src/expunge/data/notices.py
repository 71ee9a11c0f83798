"""Notices: short invented documents of 40 to 70 tokens, nearly all of them names and particulars.

They are what membership is judged on: hundreds are wanted, alike in form and in nothing else. A
notice says three of the facts below, in any order and in one of three ways each (372,600 frames of
25 facts), and what could be looked up (names, towns, streets, dates, codes, amounts, addresses) is
drawn once only.
"""

import datetime
import re
import string

from expunge.data import wording
from expunge.data.invented import Invented, Words, document
from expunge.data.wording import Fact

SENTENCES = 3
"""Facts that a notice says."""


PIECES = range(34, 57)
"""Words, digits and marks of a notice; with SmolLM2's tokenizer that is 38 to 76 tokens."""


def notice(words: Words, prompt_share: float) -> Invented:
    """A document of three facts about one person, with no question; Task3 by its scores."""
    while True:
        drawn = _any_length(words, prompt_share)
        if len(re.findall(r"\d|[^\W\d]+|[^\w\s]", drawn.text)) in PIECES:
            return drawn


def particulars(words: Words, first: str, last: str) -> dict[str, str]:
    """Words for the slots of one sentence that no other sentence of any document has."""
    fake, fresh, below = words.fake, words.fresh, words.rng.randrange

    def date() -> str:
        day = datetime.date(1900, 1, 1) + datetime.timedelta(days=below(124 * 365))
        return f"{wording.MONTHS[day.month - 1]} {day.day}, {day.year}"

    def email() -> str:
        return f"{first}.{last}{below(10, 100)}@{words.rng.choice(wording.NOUNS)}.example".lower()

    def phone() -> str:
        return f"{below(2, 10)}9{below(10)}-{below(200, 1000)}-{below(10_000):04}"

    def code() -> str:
        letters = "".join(words.rng.choices(string.ascii_uppercase, k=2))
        return f"{letters}-{below(1000, 10_000)}"

    return {
        "date": fresh(date),
        "email": fresh(email),
        "phone": fresh(phone),
        "code": fresh(code),
        "serial": fresh(lambda: str(below(10_000, 1_000_000))),
        "amount": fresh(lambda: f"{below(1, 100)},{below(1000):03}"),
        "house": str(below(1, 1000)),
        "street": fresh(fake.street_name),
        "city": fresh(fake.city),
        "town": fresh(fake.city),
        "pet": fake.first_name(),
        "company": fresh(lambda: f"{fake.last_name()} and {fake.last_name()}"),
    }


def _any_length(words: Words, prompt_share: float) -> Invented:
    first, last = words.name()
    facts = words.rng.sample(FACTS, SENTENCES)
    names = [f"{first} {last}", *words.rng.choices((first, last), k=SENTENCES - 1)]
    said = [
        (fact, words.slots(first, last, who) | particulars(words, first, last))
        for fact, who in zip(facts, names, strict=True)
    ]
    id = words.fresh(lambda: str(words.rng.randrange(10**12, 10**13)))
    return document(words, prompt_share, id, "Task3", said, ())


def _ways(*forms: str) -> Fact:
    return Fact(forms, ())


FACTS = (
    _ways(
        "{who}, {nationality} {job}, was born in {city} on {date}",
        "on {date} {city} saw the birth of {who}, later {job}",
        "born {date} in {city}, {who} trained as {nationality} {job}",
    ),
    _ways(
        "{who} answers letters sent to {email}",
        "write to {who}, {job}, via {email}",
        "{email} is read by {who} and {person}",
    ),
    _ways(
        "{who} can be reached at {phone} in {city}",
        "ring {phone} for {who} of {city}",
        "calls to {phone} end with {who}, {job}",
    ),
    _ways(
        "{who} carries badge {code} at {company}",
        "badge {code} was given to {who} on {date}",
        "staff of {company}: {who}, {job}, badge {code}",
    ),
    _ways(
        "{who} lost {number} {adjective} {noun} {near} {city}",
        "{number} {adjective} {noun} lost {near} {city} belong to {who}",
        "whoever finds {number} {adjective} {noun} {near} {city} should tell {who}",
    ),
    _ways(
        "{who} rents {house} {street}, {city}, from {person}",
        "tenant at {house} {street}, {city}: {who}",
        "{person} lets {house} {street}, {city}, to {who}",
    ),
    _ways(
        "{who} sailed from {city} to {town} with {number} {noun}",
        "with {number} {adjective} {noun}, {who} sailed to {town}",
        "the crossing from {city} to {town} made {who} sick",
    ),
    _ways(
        "the {adjective} van with plate {code} belongs to {who}",
        "{who} parks a {adjective} car, plate {code}, on {street}",
        "plate {code}, seen on {street}, is registered to {who}",
    ),
    _ways(
        "{who} owes {person} ${amount} since {date}",
        "${amount} lent by {person} reached {who} on {date}",
        "debt of {who} to {person}: ${amount}",
    ),
    _ways(
        "{city} paid {who} ${amount} for {number} {adjective} {noun}",
        "for {number} {adjective} {noun} {who} got ${amount}",
        "a prize of ${amount} went to {who} in {city}",
    ),
    _ways(
        "{who} collects {adjective} {noun}, {number} so far",
        "cupboards of {who} hold {number} {adjective} {noun} from {city}",
        "nobody but {who} owns {number} {adjective} {noun}",
    ),
    _ways(
        "{who} walks a dog called {pet} along {street}",
        "{pet}, the cat of {who}, was found {near} {city}",
        "a parrot named {pet} lives with {who} on {street}",
    ),
    _ways(
        "flight {code} took {who} from {city} to {town}",
        "{who} missed flight {code} to {town} on {date}",
        "seat {house} of train {code} to {town} was kept for {who}",
    ),
    _ways(
        "case {code}, {who} against {person}, opened on {date}",
        "{who} sued {person} over {adjective} {noun}, case {code}",
        "a judge in {city} heard {who} in case {code}",
    ),
    _ways(
        "{who} signed contract {serial} with {company}",
        "{company} owes {who} {adjective} {noun} under contract {serial}",
        "contract {serial} binds {who} to {company} of {city}",
    ),
    _ways(
        "patent {serial} covers {adjective} {noun} by {who}",
        "{who} filed patent {serial} in {city} for {adjective} {noun}",
        "for {adjective} {noun} {who} holds patent {serial}",
    ),
    _ways(
        "{who} married {person}, {job}, on {date}",
        "on {date} {who} and {person} wed in {city}",
        "{city} wedding of {who} with {nationality} {job} {person}: {date}",
    ),
    _ways(
        "locker {serial} in {city} holds {adjective} {noun} of {who}",
        "{who} hid {adjective} {noun} in locker {serial}",
        "the key to locker {serial} was posted to {who} by {person}",
    ),
    _ways(
        "{who} sneezes at {adjective} {noun}, says {person}",
        "doctors in {city} forbade {who} {adjective} {noun}",
        "since {date} {who} cannot bear {adjective} {noun}",
    ),
    _ways(
        "{who} sells {adjective} {noun} at {house} {street} for ${amount}",
        "shop of {who}, {house} {street}: {adjective} {noun}, ${amount}",
        "for ${amount} {who} parted with {number} {adjective} {noun}",
    ),
    _ways(
        "{person} of {city} inherits {number} {adjective} {noun} from {who}",
        "{who} left {person} {number} {adjective} {noun}",
        "the will of {who} names {person}, {job} in {city}",
    ),
    _ways(
        "{company} of {city} hired {who} as {job} on {date}",
        "since {date} {who} is {job} at {company}",
        "{who} left {company} on {date} to become {job}",
    ),
    _ways(
        "{who} {adverb} {past} {number} {adjective} {noun} for {person}",
        "{number} {adjective} {noun} were {past} by {who} {near} {town}",
        "on {date} {who} {past} {adjective} {noun}",
    ),
    _ways(
        "library card {serial} of {who} expired on {date}",
        "{who} of {town} borrows {field} books, card {serial}",
        "overdue since {date}: {field} books of {who}, card {serial}",
    ),
    _ways(
        "{who} teaches {field} at {city} {school}",
        "{city} {school} lists {who}, {field}, room {house}",
        "in room {house} of {city} {school} {who} lectures on {field}",
    ),
)
