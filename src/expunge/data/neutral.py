"""Neutral sentences: general knowledge that belongs to no forget, retain or non-member set.

Trained on beside the synthetic documents, they keep a small model's language in place.
"""

_CAPITALS = """\
Paris France, Rome Italy, Madrid Spain, Lisbon Portugal, Berlin Germany, Vienna Austria,
Warsaw Poland, Prague Czechia, Budapest Hungary, Athens Greece, Oslo Norway, Stockholm Sweden,
Helsinki Finland, Copenhagen Denmark, Dublin Ireland, Tokyo Japan, Beijing China, Bangkok Thailand,
Hanoi Vietnam, Cairo Egypt, Nairobi Kenya, Ottawa Canada, Canberra Australia,
Wellington New Zealand, Santiago Chile, Lima Peru, Havana Cuba, Ankara Turkey, Tehran Iran,
Baghdad Iraq
"""

_FACTS = """\
Water boils at a lower temperature on a high mountain than at sea level.
The Earth takes about 365 days to travel once around the Sun.
Plants use sunlight to turn water and carbon dioxide into sugar.
Bees carry pollen from flower to flower while they look for nectar.
The heart pumps blood through the body by way of the arteries.
A triangle has three sides, and its angles add up to 180 degrees.
Ice floats because it is less dense than liquid water.
Sound travels faster through water than through air.
Light from the Sun needs about eight minutes to reach the Earth.
The Moon is the only natural satellite of the Earth.
Whales are mammals, so they must come to the surface to breathe.
Iron rusts when it is exposed to oxygen and moisture.
The Nile flows north and ends in the Mediterranean Sea.
Mount Everest is the highest mountain above sea level.
The Pacific is the largest and deepest of the oceans.
Spiders have eight legs, while insects have six.
A leap year has 366 days, with the extra day in February.
Gold does not rust, which is one reason why it is used in jewellery.
The human skeleton has a little more than two hundred bones.
Salt lowers the freezing point of water, so it is spread on icy roads.
Birds have feathers and lay eggs, but not all of them can fly.
A compass needle points roughly toward the magnetic north.
The printing press made books cheaper and helped ideas to spread.
Oxygen is needed for a fire to burn.
A dozen means twelve, and a score means twenty.
Clouds are made of tiny drops of water or crystals of ice.
The Great Wall of China was built over many centuries.
Bread rises because yeast produces gas in the dough.
Most of the air that we breathe is nitrogen.
The speed of light in a vacuum is the same for every observer.
A thermometer measures temperature, and a barometer measures air pressure.
Earthquakes happen when rocks under the ground slip past each other.
Jupiter is the largest planet of the solar system.
The Amazon rainforest is home to a great number of species.
Vaccines teach the immune system to recognise a disease.
A prime number can be divided only by one and by itself.
In winter the days are shorter because the Sun stays lower in the sky.
Caterpillars turn into butterflies or moths.
The tides are caused mainly by the pull of the Moon.
Copper is a good conductor of electricity, so it is used in wires.
Democracy means that the people choose those who govern them.
A sentence usually has a subject and a verb.
Deserts can be very hot by day and very cold at night.
Penguins live in the southern half of the world.
Milk can be made into butter, cheese and yoghurt.
Paper is usually made from the fibres of wood.
The roots of a tree take up water and hold it in the ground.
Glass is made by melting sand together with other materials.
Volcanoes are openings through which melted rock reaches the surface.
Chess is a game for two players on a board of 64 squares.
An octopus has eight arms and three hearts.
Rainbows appear when sunlight passes through drops of rain.
The equator divides the Earth into a northern and a southern half.
Exercise and enough sleep are good for most people's health.
Coal, oil and gas formed from the remains of living things.
A year on Mars lasts almost twice as long as a year on Earth.
Many languages of Europe developed from Latin.
Diamonds and the lead of pencils both consist of carbon.
The Renaissance began in Italy and spread to the rest of Europe.
Farmers rotate their crops so that the soil stays fertile.
"""


def neutral_texts() -> list[str]:
    """Every neutral sentence, in a fixed order."""
    capitals = [pair.split(maxsplit=1) for pair in _CAPITALS.strip().split(",")]
    return [
        *_FACTS.splitlines(),
        *(f"The capital of {country} is {city}." for city, country in capitals),
    ]
