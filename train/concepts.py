"""Which emoji become concepts of the demo model, and what people call them: hand-written tables and rules to read them.

Keys are emojibase's English labels; names and aliases are what a newcomer would type, in lower case.
"""

import re
from collections.abc import Sequence

COLOUR_WORDS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "grey")


def _set(text: str) -> frozenset[str]:
    return frozenset(" ".join(text.split()).split(", "))


# Signs, letters and country flags say nothing as pictures; families and hair styles are variants of "person".
DROPPED_SUBGROUPS = _set("""
alphanum, arrow, av-symbol, country-flag, currency, family, flag, gender, geometric, hair-style, keycap, math,
other-symbol, punctuation, religion, skin-tone, subdivision-flag, transport-sign, warning, zodiac
""")

# The pictures worth keeping from the subgroups dropped above.
KEPT_SYMBOLS = _set("""
people hugging, speaking head, bust in silhouette, busts in silhouette, footprints, warning, radioactive, biohazard,
yin yang, peace symbol, atom symbol, star of David, latin cross, star and crescent, menorah, red question mark, red
exclamation mark, heavy dollar sign, recycling symbol, fleur-de-lis, trident emblem, check mark, cross mark, no entry,
infinity, medical symbol, diamond with a dot, up arrow, right arrow, wheel of dharma, om
""")

# Trademarks in the drawing, vulgar gestures, near-copies of kept pictures, and what recolouring makes anyway.
DROPPED_LABELS = _set("""
paperclip, linked paperclips, technologist, video game, mahjong red dragon, middle finger, white flower, Mx Claus,
pregnant man, pregnant person, pink heart, orange heart, yellow heart, green heart, blue heart, light blue heart,
purple heart, brown heart, black heart, grey heart, white heart, green book, blue book, orange book, heart suit, guide
dog, whale, snowman, umbrella with rain drops, speaker low volume, speaker medium volume, magnifying glass tilted
right, ox, closed mailbox with lowered flag, open mailbox with lowered flag, man in tuxedo, woman feeding baby, man
feeding baby, globe showing Americas, globe showing Asia-Australia, bell with slash, muted speaker, 1st place medal,
2nd place medal, 3rd place medal, Japanese post office, love hotel, raised back of hand, page facing up, tear-off
calendar, spiral calendar, locked with pen, locked with key, kiss, couple with heart, input symbols, identification
card, face without mouth, dotted line face, cinema, name badge
""")

_GENDERED = re.compile(r"^(man|woman|men|women) (?!dancing)")
_CLOCK_FACE = re.compile(r"(o’clock|-thirty)$")


def keep(entry: dict, subgroup: str) -> bool:
    """Whether an emojibase entry is a concept. `subgroup` is the name of the entry's subgroup."""
    label = entry["label"]
    if label in KEPT_SYMBOLS:
        return True
    variant = "gender" in entry or ":" in label or _GENDERED.match(label) or _CLOCK_FACE.search(label)
    return not (variant or label in DROPPED_LABELS or subgroup in DROPPED_SUBGROUPS)


def _table(text: str) -> dict[str, list[str]]:
    """Parse lines `label = name | alias | alias`."""
    pairs = (line.split("=") for line in text.strip().splitlines())
    return {label.strip(): [name.strip() for name in names.split("|")] for label, names in pairs}


# Where two drawings would share a name, the more recognizable one has the plain name.
NAMES = _table("""
cat face = cat | cat face | kitty
cat = standing cat
dog face = dog | dog face | puppy
dog = standing dog
tiger face = tiger | tiger face
tiger = standing tiger
cow face = cow | cow face
cow = standing cow
monkey face = monkey | monkey face
monkey = sitting monkey
pig face = pig | pig face
pig = standing pig
mouse face = mouse | mouse face
mouse = standing mouse
rabbit face = rabbit | bunny | rabbit face
rabbit = sitting rabbit | sitting bunny
horse face = horse head | horse face
horse = horse | pony
dragon face = dragon head | dragon face
dragon = dragon
unicorn = unicorn | unicorn head
ewe = sheep | ewe
camel = one-hump camel | dromedary
two-hump camel = camel
rhinoceros = rhino | rhinoceros
hippopotamus = hippo | hippopotamus
chipmunk = squirrel | chipmunk
boar = wild boar
baby chick = chick | baby chick
front-facing baby chick = front-facing chick
black bird = blackbird | crow | raven
crocodile = crocodile | alligator
turtle = turtle | tortoise
sauropod = dinosaur | sauropod
T-Rex = t-rex | tyrannosaurus
spouting whale = whale | spouting whale
blowfish = pufferfish | blowfish
spiral shell = seashell | shell
bug = caterpillar
honeybee = bee | honeybee
lady beetle = ladybug | ladybird
cricket = grasshopper | cricket
microbe = microbe | germ
rosette = marigold | rosette
blossom = flower | daisy
evergreen tree = pine tree | fir tree | evergreen tree
deciduous tree = tree
shamrock = clover | shamrock
four leaf clover = four-leaf clover | lucky clover
fallen leaf = autumn leaves | fallen leaves
leaf fluttering in wind = green leaves
sheaf of rice = rice plant | wheat
herb = herb | twig with leaves
potted plant = potted plant | plant | houseplant
seedling = seedling | sprout
empty nest = nest | bird nest
nest with eggs = nest with eggs
mushroom = mushroom | toadstool
tangerine = tangerine | orange | mandarin
red apple = apple
kiwi fruit = kiwi | kiwi fruit
eggplant = eggplant | aubergine
ear of corn = corn | ear of corn
hot pepper = chili pepper | chili | hot pepper
leafy green = lettuce | leafy green
peanuts = peanuts
ginger root = ginger
pea pod = peas | pea pod
baguette bread = baguette
cheese wedge = cheese | piece of cheese
meat on bone = meat on a bone
poultry leg = chicken leg | drumstick
cut of meat = steak | raw steak
hamburger = hamburger | burger | cheeseburger
french fries = french fries | fries | chips
pizza = pizza | slice of pizza
hot dog = hot dog
stuffed flatbread = kebab | stuffed flatbread
cooking = fried egg | frying pan
shallow pan of food = paella
pot of food = stew | pot of food
bowl with spoon = bowl with a spoon
green salad = salad
canned food = tin can | canned food
cooked rice = bowl of rice | rice
rice ball = rice ball | onigiri
curry rice = curry
steaming bowl = bowl of noodles | ramen | noodles
roasted sweet potato = sweet potato
fried shrimp = fried shrimp
soft ice cream = ice cream cone | soft ice cream
shaved ice = snow cone | shaved ice
ice cream = bowl of ice cream | ice cream sundae
doughnut = donut | doughnut
birthday cake = birthday cake
shortcake = cake | slice of cake | piece of cake
cupcake = cupcake | muffin
chocolate bar = chocolate bar | chocolate
candy = candy | sweet
custard = pudding | custard
honey pot = honey pot | honey
glass of milk = glass of milk | milk
hot beverage = cup of coffee | coffee | mug of coffee
teacup without handle = cup of tea | tea
bottle with popping cork = bottle of champagne | champagne
wine glass = glass of wine | wine
cocktail glass = cocktail | martini
tropical drink = tropical drink
beer mug = beer | mug of beer | glass of beer
clinking beer mugs = two beers
clinking glasses = two glasses of champagne
tumbler glass = glass of whisky | whisky
cup with straw = soda | cup with a straw
beverage box = juice box
ice = ice cube
fork and knife with plate = plate with fork and knife | plate
fork and knife = fork and knife
kitchen knife = knife | kitchen knife
globe showing Europe-Africa = earth | globe | planet earth
snow-capped mountain = snowy mountain | snow-capped mountain
mountain = mountain
beach with umbrella = beach
desert island = desert island | island
classical building = temple | classical building
building construction = construction crane | crane
brick = bricks | brick wall
rock = rock | stone
wood = log | wood
houses = row of houses
house = house | home
house with garden = house with a garden
derelict house = abandoned house
office building = office building | skyscraper
factory = factory
castle = castle
wedding = wedding chapel
Tokyo tower = tower
Statue of Liberty = statue of liberty
night with stars = starry night
sunrise over mountains = sunrise over mountains
bridge at night = bridge
playground slide = slide
locomotive = steam train | locomotive | steam engine
railway car = railway carriage
train = front of a train
bullet train = bullet train
high-speed train = train | high-speed train
tram = front of a tram
tram car = tram | streetcar
bus = bus
fire engine = fire truck | fire engine
automobile = car | automobile
oncoming automobile = oncoming car
sport utility vehicle = jeep | sport utility vehicle
pickup truck = pickup truck
delivery truck = truck | delivery truck | van
articulated lorry = semi truck | articulated lorry
racing car = race car | racing car
motorcycle = motorcycle | motorbike
motor scooter = scooter | motor scooter | moped
auto rickshaw = rickshaw | tuk-tuk
bicycle = bicycle | bike
manual wheelchair = wheelchair
motorized wheelchair = electric wheelchair
motorway = road | highway
railway track = railroad | railway track
oil drum = barrel | oil drum
fuel pump = gas pump | fuel pump
police car light = siren
horizontal traffic light = horizontal traffic light
vertical traffic light = traffic light
construction = barrier
ring buoy = lifebuoy | life ring
sailboat = sailboat | boat | sailing boat
passenger ship = cruise ship
ship = ship
airplane = airplane | plane | aeroplane
flying saucer = ufo | flying saucer
luggage = suitcase | luggage
bellhop bell = service bell
hourglass done = hourglass
hourglass not done = running hourglass
mantelpiece clock = clock
new moon = dark moon
full moon = full moon
crescent moon = moon | crescent moon
ringed planet = planet | saturn
sun behind cloud = sun behind a cloud
sun behind small cloud = mostly sunny sky
sun behind large cloud = mostly cloudy sky
sun behind rain cloud = sun behind a rain cloud
cloud with rain = rain cloud | rain
cloud with snow = snow cloud
cloud with lightning = thundercloud
cloud with lightning and rain = thunderstorm
high voltage = lightning bolt | lightning
snowman without snow = snowman
fire = fire | flame
droplet = drop of water | water drop | raindrop
water wave = wave | ocean wave
umbrella on ground = beach umbrella
wrapped gift = gift | present
ribbon = bow | ribbon
reminder ribbon = awareness ribbon
sports medal = medal | gold medal
soccer ball = soccer ball | football
american football = american football
tennis = tennis racket | racket
ping pong = table tennis paddle | ping pong paddle
bowling = bowling ball and pins
boxing glove = boxing glove
cricket game = cricket bat
flag in hole = golf hole
fishing pole = fishing rod | fishing pole
running shirt = tank top
bullseye = target | bullseye
pool 8 ball = billiard ball | pool ball
game die = die | dice
performing arts = theater masks
framed picture = painting | framed picture
artist palette = palette
sewing needle = needle and thread
yarn = ball of yarn | yarn
necktie = tie | necktie
t-shirt = t-shirt | shirt
jeans = jeans | pants | trousers
coat = coat | jacket
one-piece swimsuit = swimsuit
woman’s clothes = blouse
folding hand fan = hand fan
clutch bag = pouch
shopping bags = shopping bags
backpack = backpack | school bag
thong sandal = flip-flop
man’s shoe = shoe
running shoe = sneaker | running shoe
flat shoe = ballet flat
high-heeled shoe = high heel | high-heeled shoe
woman’s sandal = sandal
woman’s boot = boot
hiking boot = hiking boot
hair pick = comb
woman’s hat = sun hat | hat
billed cap = cap | baseball cap
rescue worker’s helmet = helmet
gem stone = diamond | gem | jewel
speaker high volume = loud speaker
loudspeaker = public address speaker
headphone = headphones
musical keyboard = piano | musical keyboard
mobile phone = phone | mobile phone | smartphone
telephone receiver = telephone receiver
electric plug = plug
laptop = laptop | laptop computer
desktop computer = computer | desktop computer
computer mouse = computer mouse
optical disk = compact disc | cd
computer disk = minidisc
television = television | tv
movie camera = movie camera
magnifying glass tilted left = magnifying glass
light bulb = light bulb | lamp
red paper lantern = paper lantern | lantern
closed book = book
books = pile of books | books
page with curl = sheet of paper | page
label = price tag | tag
coin = coin
money bag = bag of money | money bag
dollar banknote = dollar bill | money
package = box | package | parcel
closed mailbox with raised flag = mailbox
open mailbox with raised flag = open mailbox
ballot box with ballot = ballot box
black nib = pen nib
paintbrush = paintbrush | brush
file folder = folder
chart increasing = rising chart
chart decreasing = falling chart
round pushpin = round pin
pushpin = pushpin | thumbtack
straight ruler = ruler
wastebasket = trash can | bin
locked = lock | padlock
unlocked = open lock
key = key
pick = pickaxe
carpentry saw = saw
crossed swords = crossed swords | swords
bow and arrow = bow and arrow
balance scale = scales | balance scale
chains = chain
satellite antenna = satellite dish
adhesive bandage = bandage | band-aid
couch and lamp = couch | sofa
roll of paper = toilet paper
lotion bottle = bottle of lotion | shampoo bottle
fire extinguisher = fire extinguisher
headstone = gravestone | tombstone
moai = stone head
placard = sign
red heart = heart
red question mark = question mark
red exclamation mark = exclamation mark
heavy dollar sign = dollar sign
latin cross = christian cross
pile of poo = poop | pile of poo
hundred points = one hundred points
jack-o-lantern = pumpkin | halloween pumpkin | jack-o-lantern
alien monster = space invader
Santa Claus = santa claus | santa
Mrs. Claus = mrs. claus
mage = wizard | mage
merperson = mermaid
smiling face = gently smiling face
grinning face = smiley | smiley face | grinning face
crying face = crying face
angry face = angry face
red envelope = lucky money envelope
cook = chef | cook
deaf person = deaf person
police officer = police officer | policeman
guard = royal guard
spaghetti = spaghetti | pasta
flexed biceps = flexed arm | muscle
woman dancing = dancer
musical notes = music notes
musical note = music note
studio microphone = studio microphone
long drum = conga drum
cyclone = spiral
goal net = soccer goal
""")

# What a newcomer types first: drawn more often in training, and the list that is scored and shown first.
EVERYDAY = _set("""
cat, dog, monkey, gorilla, orangutan, poodle, wolf, fox, raccoon, lion, tiger, leopard, horse, moose, donkey, unicorn,
zebra, deer, bison, cow, pig, ram, sheep, goat, camel, llama, giraffe, elephant, mammoth, rhino, hippo, mouse, rat,
hamster, rabbit, squirrel, beaver, hedgehog, bat, bear, polar bear, koala, panda, sloth, otter, skunk, kangaroo,
turkey, chicken, rooster, chick, bird, penguin, dove, eagle, duck, swan, owl, flamingo, peacock, parrot, goose, frog,
crocodile, turtle, lizard, snake, dragon, dinosaur, t-rex, whale, dolphin, seal, fish, pufferfish, shark, octopus,
seashell, coral, jellyfish, crab, lobster, shrimp, squid, snail, butterfly, caterpillar, ant, bee, beetle, ladybug,
grasshopper, spider, scorpion, mosquito, fly, worm, bouquet, cherry blossom, lotus, rose, hibiscus, sunflower, tulip,
flower, potted plant, pine tree, tree, palm tree, cactus, clover, four-leaf clover, maple leaf, mushroom, seedling,
grapes, melon, watermelon, tangerine, lemon, banana, pineapple, mango, apple, pear, peach, cherries, strawberry,
blueberries, kiwi, tomato, olive, coconut, avocado, eggplant, potato, carrot, corn, chili pepper, bell pepper,
cucumber, lettuce, broccoli, garlic, onion, peanuts, bread, croissant, baguette, pretzel, bagel, pancakes, waffle,
cheese, steak, bacon, hamburger, french fries, pizza, hot dog, sandwich, taco, burrito, egg, fried egg, salad,
popcorn, butter, sushi, ice cream cone, donut, cookie, birthday cake, cake, cupcake, pie, chocolate bar, candy,
lollipop, glass of milk, cup of coffee, teapot, glass of wine, cocktail, beer, bubble tea, ice cube, spoon, knife,
car, bus, truck, taxi, police car, ambulance, fire truck, tractor, race car, motorcycle, scooter, bicycle, skateboard,
train, steam train, tram, jeep, pickup truck, airplane, helicopter, rocket, ufo, sailboat, ship, speedboat, canoe,
anchor, traffic light, parachute, wheelchair, house, castle, church, hospital, school, factory, tent, hut, mountain,
volcano, desert island, fountain, ferris wheel, circus tent, bridge, sun, moon, star, cloud, rain cloud, rainbow,
snowflake, snowman, lightning bolt, fire, drop of water, wave, tornado, umbrella, planet, earth, t-shirt, jeans,
dress, coat, socks, gloves, scarf, shoe, sneaker, boot, high heel, top hat, sun hat, cap, crown, glasses, sunglasses,
backpack, handbag, tie, ring, lipstick, shorts, helmet, diamond, book, pencil, pen, paintbrush, crayon, scissors, key,
lock, hammer, axe, saw, wrench, screwdriver, magnet, ladder, shield, bomb, light bulb, candle, flashlight, camera,
phone, telephone, laptop, computer, television, radio, microphone, headphones, guitar, piano, violin, trumpet,
saxophone, drum, bell, alarm clock, clock, hourglass, watch, envelope, box, gift, balloon, christmas tree, teddy bear,
kite, soccer ball, basketball, baseball, american football, tennis racket, volleyball, trophy, medal, die, chair,
couch, bed, bathtub, toilet, door, window, bucket, broom, toothbrush, soap, shopping cart, suitcase, microscope,
telescope, heart, skull, ghost, robot, alien, smiley, pumpkin, baby, astronaut, wizard, ninja, mermaid, santa claus
""")

# Things of several colours where everyone knows which part a colour word means.
MAIN_COLOUR = _set("""
frog, dragon, bus, truck, bicycle, tram, robot, santa claus, gift, castle, car, alarm clock, butterfly, parrot,
cupcake, kite, tractor
""")

# Things whose most common colour is that of something else: the water under a boat, the beam under a flying saucer.
NO_COLOUR = _set("""
canoe, speedboat, motor boat, sailboat, ship, ferry, cruise ship, ufo, desert island, earth, beach, potted plant,
glass of milk
""")

# Words that end in s and yet are one thing, and things that are never counted.
SINGULAR_S = _set("""
bus, minibus, trolleybus, cactus, octopus, lotus, hibiscus, compass, abacus, hourglass, santa claus, mrs. claus
""")
MASS = _set("""
bread, bacon, popcorn, butter, salt, garlic, broccoli, ginger, sushi, spaghetti, pasta, fire, fog, coral, soap,
cheese, corn, lettuce, honey, milk, coffee, tea, wine, champagne, rice, ramen, noodles, curry, paella, yarn, thread,
meat on a bone, money, money with wings, earth, toilet paper, dna, sake, oden, dango, whisky, chocolate, rain, mate,
bubble tea, falafel, ice hockey, field hockey, lacrosse, badminton, santa claus, santa, mrs. claus, om, saturn, planet
earth, dice, statue of liberty, milky way, mount fuji, pouring liquid, zzz, one hundred points, shaved ice, needle and
thread, fork and knife, bowling ball and pins, performing arts, soft ice cream, theater masks, pudding, custard,
lightning
""")
_AFTER_THE_NOUN = re.compile(r" (?:of|with|without|behind|over|on|in|at|holding|blowing|hugging|wrestling) ")
_VOWEL_SOUND = re.compile(r"^(?!uni|euro|ufo|one|use|ut)[aeiou]|^hour|^hono|^x-ray")


def indefinite(phrase: str) -> str:
    """'a' or 'an', by the sound that `phrase` begins with."""
    return "an" if _VOWEL_SOUND.match(phrase.lower()) else "a"


def article(name: str) -> str:
    """'a', 'an', or '' where English puts none: plurals, mass nouns and names."""
    head = "person" if name.startswith("person ") else _AFTER_THE_NOUN.split(name)[0]
    last = head.split()[-1]
    plural = last.endswith("s") and not last.endswith("ss") and name not in SINGULAR_S and last not in SINGULAR_S
    return "" if plural or name in MASS or re.match(r"(two|three|people) ", name) else indefinite(name)


def names_of(label: str) -> list[str]:
    """The concept's name and then its aliases, in lower case with plain apostrophes."""
    names = NAMES.get(label) or [label]
    return [name.lower().replace("’", "'").replace("ñ", "n") for name in names]


def may_take(name: str, group: str, colours: Sequence[str], muted: Sequence[str]) -> list[str]:
    """Those of `colours` that a thing so named may be given: no second colour, no skin, faces in hues only."""
    if has_colour_word(name) or name in NO_COLOUR or group == "people-body":
        return []
    return [colour for colour in colours if colour not in muted or "face" not in name]


def has_colour_word(phrase: str) -> bool:
    """True for names such as 'black cat', which a caption must not give a second colour."""
    return any(word in COLOUR_WORDS for word in re.split(r"[ -]", phrase))
