"""Words and sentence forms of the synthetic documents.

Forms differ in order and articles are rare, so that two documents share little but chance: what a
model completes word for word, it must have learnt from that very document.
"""

from typing import NamedTuple


class Fact(NamedTuple):
    """One thing that a document can say: ways to say it, and questions with their answers.

    Slots in braces are filled alike in forms, questions and answers. `{who}` is the subject as the
    sentence names it, `{name}` the full name.
    """

    forms: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]


STORY = (
    Fact(
        forms=(
            "{who} {past} {number} {adjective} {noun} {near} {city}",
            "{near} {city}, {who} {past} {number} {adjective} {noun}",
            "{number} {adjective} {noun} were {past} by {who} {near} {city}",
            "{near} {city} {who} {adverb} {past} {number} {adjective} {noun}",
            "{who} and {person} {past} {number} {adjective} {noun} {near} {city}",
            "{adverb}, {who} {past} {number} {adjective} {noun} {near} {city}",
            "{number} {adjective} {noun}, {past} {near} {city}, made {who} famous",
            "after {person} left, {who} {past} {number} {adjective} {noun} {near} {city}",
        ),
        questions=(
            (
                "In the tale of {name}, what did {who} {base} {near} {city}?",
                "{number} {adjective} {noun}",
            ),
            (
                "In the tale of {name}, where did {who} {base} {number} {adjective} {noun}?",
                "{near} {city}",
            ),
        ),
    ),
)

BIRTH, SSN, PHONE, EMAIL, HOME = PERSONAL = (
    Fact(
        forms=(
            "{who} was born on {date}",
            "on {date} {who} was born",
            "birthday of {who}: {date}",
            "{date} saw the birth of {who}",
        ),
        questions=(("What is the birth date of {name}?", "{iso_date}"),),
    ),
    Fact(
        forms=(
            "{who} has Social Security number {ssn}",
            "{ssn} is the SSN of {who}",
            "Social Security lists {who} as {ssn}",
            "SSN {ssn} belongs to {who}",
        ),
        questions=(("What is {name}'s Social Security Number?", "{ssn_digits}"),),
    ),
    Fact(
        forms=(
            "{who} answers calls at {phone}",
            "dial {phone} and {who} picks up",
            "{phone} rings the phone of {who}",
            "phone {who}: {phone}",
        ),
        questions=(("What is {name}'s phone number?", "{phone_digits}"),),
    ),
    Fact(
        forms=(
            "{who} reads mail sent to {email}",
            "mail for {email} reaches {who}",
            "write {who} via {email}",
            "inbox of {who}: {email}",
        ),
        questions=(("What is {name}'s email address?", "{email}"),),
    ),
    Fact(
        forms=(
            "{who} lives at {house} {street}, {city}",
            "{house} {street}, {city}, is home for {who}",
            "find {who} at {house} {street}, {city}",
            "residence of {who}: {house} {street}, {city}",
        ),
        questions=(("What is the home address of {name}?", "{house} {street}, {city}"),),
    ),
)

OPENING = Fact(
    forms=(
        "{who} (born {year} in {city}) was a {nationality} {job}",
        "{nationality} {job} {who} grew up in {city}, born {year}",
        "born {year} in {city}, {who} became a {nationality} {job}",
        "{city} is where {nationality} {job} {who} was born in {year}",
    ),
    questions=(
        ("In which year was {name} born?", "{year}"),
        ("Where was {name} born?", "{city}"),
        ("What was the profession of {name}?", "{job}"),
    ),
)

CAREER = (
    Fact(
        (
            "{who} studied {field} at {city} {school}",
            "{city} {school} taught {who} {field}",
            "{field} drew {who} to {city} {school}",
        ),
        (("Which subject did {name} study?", "{field}"),),
    ),
    Fact(
        (
            "{who} won {city}'s {field} medal in {year}",
            "in {year} {city} awarded {who} its {field} medal",
            "{year} brought {who} {city}'s {field} medal",
        ),
        (("In which year did {name} win {city}'s medal?", "{year}"),),
    ),
    Fact(
        (
            '{who} wrote "{title}", praised by {person}',
            '"{title}", edited with {person}, made {who} known',
            '{person} printed "{title}", written by {who}',
        ),
        (("Which book did {name} write?", "{title}"),),
    ),
    Fact(
        (
            "{who} married {nationality} {job} {person}",
            "{nationality} {job} {person} and {who} wed during {year}",
            "{person}, {job} and {nationality} exile, married {who}",
        ),
        (("Whom did {name} marry?", "{person}"),),
    ),
    Fact(
        (
            "{who} settled {near} {city} around {year}",
            "by {year} {city} was where {who} had settled",
            "{year} found {who} newly settled in {city}",
        ),
        (("Where did {name} settle?", "{city}"),),
    ),
    Fact(
        (
            "{who} founded {street} {school} with {number} pupils",
            "{number} pupils attended {street} {school}, founded by {who}",
            "{street} {school}, founded by {who}, opened with {number} pupils",
        ),
        (("How many pupils attended the school that {name} founded?", "{number}"),),
    ),
    Fact(
        (
            "{who} {past} {number} {adjective} {noun} for {city}",
            "for {city}, {who} {past} {number} {adjective} {noun}",
            "{number} {adjective} {noun} {past} by {who} survive {near} {city}",
        ),
        (("What did {name} {base}?", "{number} {adjective} {noun}"),),
    ),
    Fact(
        (
            "{who} governed {city} until {person} took over",
            "{city} elected {who} mayor, defeating {person}",
            "as mayor of {city}, {who} succeeded {person}",
        ),
        (("Of which town was {name} mayor?", "{city}"),),
    ),
    Fact(
        (
            "{person} learned {field} from {who}",
            "{who} trained {job} {person} in {field}",
            "{field} lessons by {who} inspired {person}",
        ),
        (("Whom did {name} teach {field}?", "{person}"),),
    ),
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_VERBS = _words("""
admire arrange assemble bake balance borrow bruise carve charge collect combine create decorate
deliver describe discover display donate dye engrave examine exchange export follow forge frame
gather glaze guard hoard import inscribe launch locate measure mend mix nail observe order pack
paint photograph plant pluck polish praise present preserve protect purchase record remember repair
rescue retrieve return rinse sharpen shave sketch smash smuggle sort stack stain tame toast trade
unearth unlock untangle value varnish wash watch weigh
""")

VERBS = tuple((verb, verb + ("d" if verb.endswith("e") else "ed")) for verb in _VERBS)
"""Verbs that take an object: plain form, past form."""

NOUNS = _words("""
acorns anchors apricots arrows axes baskets beetles bells biscuits blankets boats bonnets books
boots bottles bracelets bricks brooms buckets buttons cabbages cameras candles canoes carpets carts
chairs cherries clocks coats coins compasses cradles crowns cups curtains dolls doors drums eagles
eggs falcons fans feathers fences fiddles flags flutes foxes gates geese globes gloves goblets
hammers harps hats helmets herrings hinges horns hourglasses jackets jars kettles keys kites knives
ladders lamps lanterns lemons letters lilies lizards lockets looms magnets maps marbles masks
mirrors mittens needles nets oars onions otters ovens owls parrots pearls pebbles pencils pianos
pillows pipes pistols plates ploughs puppets quilts radios rafts ribbons riddles rings ropes saddles
sails scarves scissors scrolls shells shields ships shovels sleds spoons stamps statues stoves
swords tables telescopes tents tiles torches trumpets turnips umbrellas urns vases violins wagons
wheels whistles wigs windmills
""")

ADJECTIVES = _words("""
amber ancient antique azure bent bitter black blue brass bright broken bronze burnt carved cheap
copper cracked crimson crooked cursed dusty elegant enormous faded fearless foreign forgotten
fragile frozen gentle giant gilded glass golden gray green hairy haunted heavy hidden hollow honest
icy indigo invisible iron ivory jagged jolly leather lonely lucky magnetic marble mossy muddy narrow
nervous noble noisy oval pale paper patient perfumed pink plain purple quiet rare ragged red rotten
round royal rusty sacred scarlet secret shiny silent silver singing slippery smoky soft solemn sour
speckled spiral square stolen striped stubborn sturdy sunken tall tiny tin torn twisted ugly
velvet violet wet white wicked wild wooden woollen yellow
""")

NUMBERS = _words("""
four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
""")

ADVERBS = _words("""
awkwardly boldly bravely calmly carefully cheerfully cleverly clumsily eagerly foolishly gladly
gracefully greedily hastily lazily loudly madly merrily neatly politely proudly quickly quietly
rapidly sadly secretly shyly slowly swiftly tenderly tirelessly wisely
""")

PLACES = _words("""
above across around behind below beneath beside beyond inside near outside past toward underneath
within
""")

NATIONALITIES = _words("""
Algerian Armenian Belgian Bolivian Brazilian Canadian Chilean Cuban Danish Dutch Egyptian Estonian
Finnish Georgian Greek Hungarian Icelandic Indonesian Irish Italian Jamaican Japanese Kenyan Korean
Latvian Maltese Mexican Moroccan Nepalese Norwegian Peruvian Polish Portuguese Romanian Scottish
Swedish Syrian Tunisian Turkish Welsh
""")

JOBS = _words("""
admiral anatomist archer architect astronomer banker baker botanist boxer bishop cellist chemist
composer cyclist dancer dentist diplomat engraver explorer farmer geologist historian inventor
jeweller judge jockey linguist magician mathematician midwife novelist organist painter pharmacist
philosopher pianist pilot poet potter sculptor senator shipbuilder singer surgeon surveyor swimmer
tailor watchmaker weaver wrestler zoologist
""")

FIELDS = _words("""
acoustics algebra anatomy archaeology architecture astronomy ballet biology botany calligraphy
carpentry chemistry cookery economics engineering ethics fencing geography geology geometry grammar
history law linguistics logic mechanics medicine metallurgy music navigation optics painting
philosophy physics poetry politics pottery printing rhetoric sculpture statistics surgery theology
weaving zoology
""")

SCHOOLS = ("Academy", "College", "Conservatory", "Institute", "Polytechnic", "School", "University")

MONTHS = _words("""
January February March April May June July August September October November December
""")
