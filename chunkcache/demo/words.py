"""The word lists from which demo shops are drawn.

Every entry is one lower-case or capitalised word, so that the demo tokenizer gives it one token: a
value that is one token can be copied from the prompt by a single attention step, which is what a
model this small does reliably. No word serves in two lists.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    amber ancient arctic bamboo bold brass bright bronze calm carved cedar classic clever compact
    copper coral cosy cotton crystal curved dainty deluxe double elegant elm fancy feather festive
    flat folding fresh frosted gentle giant glass glossy golden grand hollow humble iron ivory jolly
    lacquer large leather linen little lively lofty lucky magnetic maple marble mellow mighty modern
    narrow noble oak oval padded painted paper pearl pine plain plush portable pretty quiet quilted
    rapid round royal rubber rustic satin sharp silent silk simple sleek slender smart smooth solid
    square steel striped sturdy sunny tall tidy timber tiny velvet vintage walnut warm wicker wide
    wild wooden woven zesty
    """
)
NOUNS = _words(
    """
    anchor apron backpack banjo basket bath bell bench bicycle blanket bookcase bottle bowl bracelet
    broom brush bucket cabinet candle carpet chair chest clock coat compass cradle cup curtain
    cushion desk dresser drum easel fan flute fork frame globe glove guitar hammer hammock hat
    heater helmet jacket jar jug kayak kettle kite ladder lamp lantern locker mat mattress mirror
    mug necklace notebook oven paddle pan parasol pen piano pillow pitcher plate pot puppet puzzle
    quilt rack radio ring robe rug saddle sandal scarf shelf shovel skillet sled sofa spoon stool
    stove suitcase table teapot tent toaster tray trunk umbrella vase violin wagon wallet whistle
    """
)
PEOPLE = _words(
    """
    Ada Alma Anton Basil Bella Boris Carla Cleo Cyril Dora Edgar Elsa Emil Enzo Fiona Flora Frida
    Gina Greta Hanna Hugo Ida Igor Ines Ivan Jonas Julia Karl Lara Leo Lina Luca Luis Marta Mila
    Mona Nadia Nico Nina Nora Olga Omar Oscar Otto Pablo Paula Pia Quinn Rita Rosa Ruben Selma Simon
    Sofia Tessa Theo Tilda Toby Uma Vera Viktor Wanda Yara Zoe
    """
)
CITIES = _words(
    """
    Athens Bergen Bilbao Bremen Brno Cadiz Cork Dover Dublin Essen Exeter Geneva Genoa Ghent Graz
    Krakow Leeds Lima Linz Lisbon Lyon Madrid Malmo Milan Munich Nantes Naples Nice Oslo Oxford
    Paris Perth Porto Prague Quebec Riga Rome Seville Siena Tampa Tartu Tokyo Toledo Trent Turin
    Utrecht Vienna Vilnius Warsaw York Zagreb Zurich
    """
)
COLOURS = _words(
    """
    aqua beige black blue brown cream crimson cyan green grey indigo lilac lime magenta maroon mint
    navy olive orange peach pink plum purple red rose sand scarlet silver teal turquoise violet
    white yellow
    """
)
TEAMS = _words(
    """
    accounting archive bakery cleaning design events finance gardening kitchen legal logistics
    marketing packing planning purchasing quality repairs research safety sales security storage
    support training
    """
)
STREETS = _words(
    """
    Abbey Bridge Castle Chapel Church Cliff Dock Field Forest Garden Harbour Hill King Lake Market
    Meadow Mill North Orchard Park Pond Queen River School South Spring Station Tower Valley West
    """
)
LANGUAGES = _words(
    """
    Arabic Basque Catalan Czech Danish Dutch Finnish French German Greek Hindi Italian Japanese
    Korean Latin Norwegian Polish Portuguese Russian Spanish Swedish Turkish Urdu Welsh
    """
)
ANIMALS = _words(
    """
    Badger Bear Beaver Crane Deer Eagle Falcon Fox Hare Hawk Heron Lynx Magpie Otter Owl Panther
    Raven Robin Seal Sparrow Swan Tiger Turtle Wolf
    """
)
SERVICES = _words(
    """
    cancellations deliveries engraving exchanges insurance recycling refunds rentals returns
    upgrades vouchers wrapping
    """
)
EPITHETS = _words(
    """
    Blue Busy Clever Dancing Flying Golden Green Happy Lucky Merry Proud Quick Red Silver Singing
    White
    """
)
