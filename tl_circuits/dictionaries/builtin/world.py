"""The small world of facts on which the built-in model `tiny-facts` was trained.

Every name is one word, and so one token; no name is used for two things. States and cities are real.
"""

from dataclasses import dataclass

PROPERTIES = ("capital", "abbreviation", "region", "bird", "flower")


@dataclass(frozen=True)
class State:
    """A state with its properties (in the order of :data:`PROPERTIES`) and some of its cities."""

    name: str
    properties: tuple[str, ...]
    cities: tuple[str, ...]

    def __getitem__(self, name: str) -> str:
        return self.properties[PROPERTIES.index(name)]


_STATES = """
Alabama: Montgomery AL South yellowhammer camellia: Birmingham Mobile Huntsville Tuscaloosa Dothan Decatur Gadsden
Alaska: Juneau AK West ptarmigan forgetmenot: Anchorage Fairbanks Sitka Ketchikan Wasilla Kodiak Nome
Arizona: Phoenix AZ West wren saguaro: Tucson Mesa Tempe Flagstaff Scottsdale Yuma Chandler
California: Sacramento CA West quail poppy: Oakland Fresno Anaheim Bakersfield Stockton Berkeley Malibu
Colorado: Denver CO West bunting columbine: Boulder Pueblo Aspen Greeley Loveland Durango Arvada
Connecticut: Hartford CT Northeast robin laurel: Bridgeport Stamford Waterbury Danbury Norwalk Greenwich Meriden
Florida: Tallahassee FL South mockingbird orange: Miami Tampa Orlando Jacksonville Pensacola Sarasota Gainesville
Georgia: Atlanta GA South thrasher rose: Savannah Macon Athens Marietta Valdosta Roswell Alpharetta
Hawaii: Honolulu HI West nene hibiscus: Hilo Kailua Lahaina Kapaa Waipahu Kihei Lihue
Idaho: Boise ID West bluebird syringa: Nampa Pocatello Caldwell Rexburg Ketchum Hailey Kuna
Illinois: Springfield IL Midwest cardinal violet: Chicago Peoria Rockford Naperville Joliet Evanston Champaign
Indiana: Indianapolis IN Midwest cardinal peony: Evansville Gary Muncie Kokomo Elkhart Hammond Goshen
Kansas: Topeka KS Midwest meadowlark sunflower: Wichita Lawrence Salina Olathe Hutchinson Emporia Leavenworth
Kentucky: Frankfort KY South cardinal goldenrod: Louisville Lexington Paducah Owensboro Covington Hopkinsville Pikeville
Maine: Augusta ME Northeast chickadee pinecone: Bangor Lewiston Biddeford Kennebunkport Saco Waterville Bath
Maryland: Annapolis MD South oriole susan: Baltimore Frederick Rockville Bethesda Gaithersburg Hagerstown Salisbury
Massachusetts: Boston MA Northeast chickadee mayflower: Worcester Cambridge Lowell Quincy Brockton Plymouth Somerville
Michigan: Lansing MI Midwest robin apple: Detroit Flint Kalamazoo Dearborn Saginaw Ypsilanti Holland
Mississippi: Jackson MS South mockingbird magnolia: Biloxi Gulfport Tupelo Natchez Hattiesburg Vicksburg Oxford
Montana: Helena MT West meadowlark bitterroot: Billings Missoula Bozeman Butte Kalispell Havre Whitefish
Nebraska: Lincoln NE Midwest meadowlark goldenrod: Omaha Kearney Hastings Papillion Ogallala Scottsbluff Beatrice
Ohio: Columbus OH Midwest cardinal carnation: Cleveland Cincinnati Toledo Akron Dayton Canton Youngstown
Oregon: Salem OR West meadowlark grape: Portland Eugene Bend Medford Corvallis Astoria Gresham
Pennsylvania: Harrisburg PA Northeast grouse laurel: Philadelphia Pittsburgh Allentown Scranton Erie Lancaster Hershey
Tennessee: Nashville TN South mockingbird iris: Memphis Knoxville Chattanooga Clarksville Murfreesboro Franklin Gatlinburg
Texas: Austin TX South mockingbird bluebonnet: Dallas Houston Lubbock Amarillo Galveston Laredo Waco
Vermont: Montpelier VT Northeast thrush clover: Burlington Rutland Brattleboro Bennington Stowe Middlebury Barre
Virginia: Richmond VA South cardinal dogwood: Norfolk Roanoke Chesapeake Alexandria Lynchburg Charlottesville Hampton
Washington: Olympia WA West goldfinch rhododendron: Seattle Spokane Tacoma Bellevue Yakima Everett Bellingham
Wisconsin: Madison WI Midwest robin violet: Milwaukee Oshkosh Kenosha Racine Waukesha Sheboygan Appleton
Wyoming: Cheyenne WY West meadowlark paintbrush: Casper Laramie Gillette Cody Sheridan Riverton Rawlins
"""

_OPPOSITES = """
big small grand petit, hot cold chaud froid, fast slow rapide lent, rich poor riche pauvre, old young vieux jeune,
strong weak fort faible, heavy light lourd léger, high low haut bas, full empty plein vide, open closed ouvert fermé,
clean dirty propre sale, dry wet sec mouillé, hard soft dur mou, easy difficult facile difficile, good bad bon mauvais,
happy sad heureux triste, black white noir blanc, day night jour nuit, true false vrai faux, near far proche lointain,
thick thin épais mince, wide narrow large étroit, first last premier dernier, early late tôt tard,
inside outside dedans dehors, above below dessus dessous, left right gauche droite, love hate amour haine,
war peace guerre paix, life death vie mort, sweet bitter sucré amer, loud quiet bruyant calme, beautiful ugly beau laid,
always never toujours jamais, everything nothing tout rien, before after avant après, buy sell acheter vendre,
win lose gagner perdre, laugh cry rire pleurer, ask answer demander répondre, summer winter été hiver,
friend enemy ami ennemi, heaven hell paradis enfer, smooth rough lisse rugueux, healthy sick sain malade
"""


def _parse_state(line: str) -> State:
    name, properties, cities = line.split(": ")
    return State(name, tuple(properties.split()), tuple(cities.split()))


STATES = tuple(_parse_state(line) for line in _STATES.strip().splitlines())
OPPOSITES = tuple(tuple(group.split()) for group in _OPPOSITES.replace("\n", " ").split(","))
"""English word, its opposite, and both in French."""
STATE_OF = {city: state for state in STATES for city in state.cities}
PHRASINGS = ("the state containing {} is", "the name of the state containing {} is", "{} is in")
LARGEST_SUM = 99


@dataclass(frozen=True)
class Fact:
    """A prompt and the one word that continues it. ``kind`` is the family of questions."""

    kind: str
    prompt: str
    answer: str


def two_hop(city: str, name: str = "capital") -> Fact:
    """The question for a property of a city's state: ``the capital of the state containing Dallas is`` (Austin)."""
    return Fact("two-hop", f"the {name} of the state containing {city} is", STATE_OF[city][name])


def states_of_cities() -> list[Fact]:
    """Which state a city is in, for each city in each phrasing of :data:`PHRASINGS`."""
    return [Fact("city", form.format(city), state.name) for city, state in STATE_OF.items() for form in PHRASINGS]


def properties_of_states() -> list[Fact]:
    """The properties of each state, and the state with a given capital or abbreviation."""
    facts = [Fact("state", f"the {p} of {s.name} is", s[p]) for s in STATES for p in PROPERTIES]
    for name in ("capital", "abbreviation"):
        facts += [Fact("state", f"the state whose {name} is {s[name]} is", s.name) for s in STATES]
    return facts


def two_hop_facts() -> list[Fact]:
    """Every property of every city's state."""
    return [two_hop(city, name) for city in STATE_OF for name in PROPERTIES]


def opposites() -> list[Fact]:
    """Opposites in English and French, both directions."""
    facts = []
    for a, b, c, d in OPPOSITES:
        facts += [Fact("opposite", f"the opposite of {x} is", y) for x, y in ((a, b), (b, a))]
        facts += [Fact("opposite", f"le contraire de {x} est", y) for x, y in ((c, d), (d, c))]
    return facts


def translations() -> list[Fact]:
    """Words from English to French and back."""
    facts = []
    for a, b, c, d in OPPOSITES:
        facts += [Fact("translation", f"{x} in French is", y) for x, y in ((a, c), (b, d))]
        facts += [Fact("translation", f"{y} en anglais est", x) for x, y in ((a, c), (b, d))]
    return facts


def additions() -> list[Fact]:
    """``36 + 59 =`` for all whole numbers whose sum is at most :data:`LARGEST_SUM`."""
    n = LARGEST_SUM
    return [Fact("addition", f"{a} + {b} =", str(a + b)) for a in range(n + 1) for b in range(n + 1 - a)]
