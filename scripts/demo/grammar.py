"""Short stories from a small grammar: the text that the demo models learn from.

    python scripts/demo/grammar.py --count 3 --seed 7 [--style plain|pirate|sailor]

A story has a hero, a companion, a place, a problem with its cause, and a way out. `story(rng)` draws one; the same
random state always gives the same story. Templates use two forms: `{slot}` is a value of this story (a name, a
place, a pronoun), `[a|b|c]` is a free choice, and choices nest.
"""

import argparse
import random
import re

GIRLS = """Mia Anna Lily Emma Zoe Nora Ella Lucy Ruby Alice Clara Daisy Eva Flora Grace Hazel Ida Jane Kate Lena Maya
Nina Olive Pia Rosa Sara Tara Uma Vera Wendy Yara Ada Beth Cora Dora Edith Freya Gina Hanna Iris Julia Kira Lara Molly
Nadia Opal Polly Queenie Rita Sofia Tessa Ursula Violet Willa Xenia Yvonne Zara Amara Bella Carmen Della Elsa Fatima
Gwen Heidi Inez Joy Keiko Leila Marta Nell Oona Paula Rhea Selma Thea Una Viola Wanda Yuki Zelda Astrid Bianca Celia
Dalia Esme Fiona Greta Hilda Isla Jasmine Kim Linda Margot Naomi Odette Petra Ramona Stella Tilda Valerie Winnie Amy
Rose Ivy Eve Maggie Millie Penny Poppy Susie Tina Sally Annie Ellie Josie Katie Lottie Mina Nancy Rachel Robin Sasha
Salma Aisha Priya Anjali Mei Lin Ximena Lucia Elena Ingrid Sigrid Ines Noor Layla Zainab Abena Chioma Adaeze Leilani""".split()
BOYS = """Ben Tom Sam Max Leo Jack Finn Noah Oscar Hugo Adam Bruno Carl David Eric Felix George Henry Ivan Jacob Karl
Liam Mark Nils Otto Paul Quinn Ralph Simon Theo Victor Will Xavier Yusuf Zack Amir Boris Caleb Dario Elias Frank Gabriel
Hassan Igor Jonas Kofi Luca Mateo Nathan Owen Pablo Rafael Stefan Tariq Umar Vincent Walter Yann Zeno Arthur Basil
Conrad Dylan Edgar Fabian Gus Harold Isaac Julian Kenji Lars Milo Nico Olaf Pedro Rowan Silas Tobias Ulric Wesley Abel
Bill Charlie Danny Eddie Fred Gary Harry Jim Kevin Larry Mike Ned Ollie Pete Ricky Steve Ted Toby Andy Bobby Cody Emil
Jamal Kwame Chidi Omar Samir Ravi Arjun Hiro Kenta Wei Jun Diego Carlos Miguel Anton Dmitri Sven Bjorn Aldo Marco Ansel
Lukas Piers Rory Declan Hamish Angus Idris Rhys Dewi Tevita Keanu Nikau""".split()
PETS = """Rex Biscuit Pepper Fluffy Spot Whiskers Patch Ginger Coco Shadow Bingo Button Pickle Snowy Tiger Muffin Rusty
Lucky Mittens Smokey Buddy Waffle Pebble Ziggy Nibbles Socks Bramble Clover Dusty Ember Fudge Goldie Honey Inky Jasper
Kiwi Lemon Marble Nutmeg Oreo Pancake Rascal Sparky Tango Velvet Widget Zippy Acorn Bandit Cricket Domino Fidget Gizmo
Hopper Jelly Maple Noodle Olga Pip Scout Thunder Turnip Wiggles Bean Boots Cookie Dot Fern Hazelnut Moss Peanut Plum""".split()
ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr r s sh st t th tr v w z".split()
VOWELS = "a e i o u ai ee oo".split()
CODAS = "l n r s m t k x nd sh".split() + [""] * 6

ANIMALS = {
    "dog": ("barked", "wagged its tail"),
    "puppy": ("barked", "wagged its tail"),
    "cat": ("meowed", "purred softly"),
    "kitten": ("meowed", "purred softly"),
    "pony": ("neighed", "shook its mane"),
    "goat": ("bleated", "stamped its feet"),
    "duck": ("quacked", "flapped its wings"),
    "parrot": ("squawked", "flapped its wings"),
    "rabbit": ("squeaked", "wiggled its ears"),
    "hamster": ("squeaked", "wiggled its nose"),
    "donkey": ("brayed", "shook its ears"),
    "fox": ("yelped", "swished its tail"),
}
PLACES = """forest|meadow|beach|park|village|market|garden|farm|hill|river|lake|castle|harbor|orchard|library|school|
valley|mountain|island|mill|bakery|lighthouse|bridge|field|barn""".replace("\n", "").split("|")
TOWNS = """Willow Creek|Green Hollow|Stony Bay|Maple Hill|Little Ford|Silver Lake|Old Harbor|Apple Town|Windy Point|
Pine Valley|Red Rock|Sunny Vale|Fox Hollow|North Mill|Blue River""".replace("\n", "").split("|")
THINGS = """ball|kite|hat|key|book|drum|lantern|basket|scarf|doll|coin|ring|whistle|umbrella|map|boat|bell|flute|cup|
toy train|teddy bear|paper crown|silver spoon|wooden horse|little mirror""".replace("\n", "").split("|")
COLORS = "red|blue|green|yellow|white|black|golden|silver|purple|orange|pink|brown".split("|")
HELPERS = """old farmer|kind baker|tall sailor|wise old woman|young shepherd|friendly teacher|busy miller|quiet gardener|
cheerful postman|strong blacksmith|clever tailor|gentle nurse|old fisherman|king's cook""".replace("\n", "").split("|")
FOODS = "apple pie|warm bread|carrot soup|honey cake|berry jam|pancakes|cheese|ginger cookies|plum tart|hot soup".split("|")
INGREDIENTS = "flour|sugar|honey|butter|milk|salt|cinnamon".split("|")
FRUITS = "apples|pears|plums|cherries|berries|nuts|carrots|pumpkins".split("|")
WEATHERS = "sunny|windy|cold|warm|cloudy|bright|foggy|quiet|hot|snowy".split("|")
TIMES = "morning|afternoon|evening|day".split("|")
FLOWERS = "roses|tulips|sunflowers|daisies|poppies|beans|lilies".split("|")
MOODS = "kind|brave|curious|clever|cheerful|shy|gentle|quiet|lively|patient|stubborn|careful".split("|")
HIDING = "under the bed|behind the door|in the tall grass|under a bench|in the old barn|by the well|behind a big rock|inside a hollow tree|next to the pond|on the roof".split("|")

OPENINGS = [
    "Once upon a time, {hero} and {their} {companion} lived [in|near] {town}.",
    "Once upon a time, {hero} and {their} {companion} went to the {place}.",
    "Once upon a time, there was a {mood} [girl_boy] named {hero}. {They} had a {kin} named {friend}.",
    "Once there was a {mood} [girl_boy] called {hero}, who lived [near a {place}|in {town}] with {their} {companion}.",
    "{hero} was a {mood} [girl_boy] who lived in {town}. {Their} best friend was a {kin} named {friend}.",
    "One {weather} {time}, {hero} and {their} {companion} [walked|went|hurried] to the {place}.",
    "It was a {weather} {time}, and {hero} was playing near the {place} with {their} {companion}.",
    "One {time}, {hero} was at the {place} with {their} {companion}.",
    "Long ago, in {town}, there lived a {mood} [girl_boy] named {hero} and {their} {companion}.",
    "{hero} and {their} {companion} loved the {place}. Every {time} they [played there|went there|walked there together].",
    "In {town} lived a [girl_boy] named {hero}. {They} was very {mood}, and {they} went everywhere with {their} {companion}.",
]

PLOTS = {
    "lost": [
        "{hero} had a {color} {thing} that {they} [loved very much|carried everywhere|got from {their} grandmother].",
        "One day, the {thing} was gone [because there was a hole in {their} bag|because the wind had blown it away|because {they} had left it outside|because {they} had forgotten where {they} put it].",
        "[{hero} was very sad.|{hero} began to cry.|\"Oh no! Where is my {thing}?\" said {hero}.]",
        "[They looked {hiding}, but it was not there.|First {they} looked {hiding}, and then {they} looked {hiding2}.|{hero} looked everywhere, but {they} could not find it.]",
        "Then {friend} [{sound}|ran ahead|stopped|{happy}] and [found the {thing}|saw something {color}] {hiding3}.",
        "[\"You found it!\" said {hero}. \"Thank you, {friend}!\"|{hero} was so happy that {they} hugged {friend}.|\"There is my {thing}!\" cried {hero}, and {they} hugged {friend}.]",
        "[From then on, {hero} kept the {thing} in a safe place.|After that, {hero} always took good care of the {thing}.]",
    ],
    "storm": [
        "[On the way home|Soon|After a while], [dark clouds covered the sky|the sky turned gray] and [it began to rain|a storm came].",
        "{hero} was [afraid|worried] because [the thunder was loud|the path was wet and dark|they were far from home].",
        "[\"Do not worry, {friend},\" said {hero}. \"We will find a dry place.\"|\"Stay close to me, {friend},\" said {hero}.|{friend} {sound}, and {hero} held {friend} close.]",
        "They ran to [an old barn|a small cave|a big tree|a little house] and waited [there|inside] until the storm was over.",
        "[A {helper} was there too, and shared some {food} with them.|Inside, a {helper} gave them some {food}.|{hero} sang a song so that {friend} would not be afraid.]",
        "[Then the sun came out, and they saw a rainbow over the {place}.|At last the rain stopped, and a rainbow stood over the {place}.]",
        "{hero} and {friend} walked home, [wet but happy|tired but happy|laughing all the way].",
    ],
    "stuck": [
        "[That day|There], {hero} [flew a {color} kite|was playing with a {color} kite].",
        "[A strong wind came|The wind was strong], so the kite [got stuck in a tall tree|flew into the top of a tree].",
        "{hero} [tried to climb the tree|jumped as high as {they} could|pulled the string], but [the tree was too high|{they} was too small|it did not help].",
        "[\"What can we do, {friend}?\" asked {hero}.|\"My kite! How will I get it back?\" said {hero}.]",
        "[A {helper} heard them and came with a ladder.|{friend} ran to find a {helper}, who had a long ladder.]",
        "[The {helper} climbed up and brought the kite down.|With the ladder, {hero} could reach the kite.]",
        "[\"Thank you!\" said {hero}.|{hero} thanked the {helper}, and {friend} {happy}.] Then they flew the kite [until sunset|in the open field|away from the trees].",
    ],
    "broken": [
        "{hero} [was carrying|was playing with] a {color} {thing} that belonged to {their} [mother|father|grandmother|teacher].",
        "[{They} was running too fast, so {they} fell and the {thing} broke.|The {thing} fell and broke because {they} was not careful.|Because the floor was wet, {they} slipped, and the {thing} broke.]",
        "[At first {hero} wanted to hide it.|{hero} was afraid to tell the truth.|\"Oh no, it is broken!\" said {hero}.]",
        "[But {friend} looked at {them}, and {hero} knew what to do.|But {they} knew that {they} had to be honest.]",
        "[{hero} told the truth and said, \"I am sorry.\"|\"I broke it, and I am very sorry,\" said {hero}.]",
        "[A {helper} showed {them} how to fix it with glue.|Together they fixed the {thing} with glue and string.|A {helper} helped {them} to fix the {thing}.]",
        "Soon the {thing} was as good as new, and {hero} was glad that {they} had told the truth.",
    ],
    "baking": [
        "{hero} wanted to make {food} for {their} [grandmother|mother|father|neighbor], [who was ill|who had a birthday|who was coming home].",
        "But there was no {ingredient} [in the kitchen|left in the house] because [a mouse had eaten it|{they} had used it all the day before|nobody had gone to the market].",
        "[\"Without {ingredient} we cannot make {food},\" said {hero}.|{hero} did not give up.]",
        "[So {hero} and {friend} went to a {helper} and asked for some {ingredient}.|So {they} took a basket, and {friend} and {hero} walked to the market.]",
        "[The {helper} smiled and gave them a full bag of {ingredient}.|There a {helper} gave them {ingredient} and wanted only a piece of {food}.]",
        "[Back home, {hero} mixed and stirred, and soon the house smelled wonderful.|Then they went home and made the best {food} in {town}.]",
        "[Everyone got a piece, even {friend}.|\"This is the best {food} in the world,\" everyone said.]",
    ],
    "night": [
        "That night, {hero} heard a strange [noise|sound] [outside the window|in the attic|behind the house].",
        "{They} could not sleep because [the noise did not stop|{they} thought it was a monster|it was so dark].",
        "[\"Did you hear that, {friend}?\" whispered {hero}.|{friend} {sound} and hid under the blanket.|{hero} pulled the blanket over {their} head.]",
        "[But {hero} was brave.|Then {hero} took a deep breath.] {They} took a lantern and [opened the door|went to look].",
        "It was only [a little owl|a lost kitten|a small hedgehog|a branch in the wind|a hungry raccoon]!",
        "[\"There is no monster,\" said {hero}, and {they} laughed.|{hero} laughed, because there was nothing to fear.]",
        "[Soon {hero} and {friend} were fast asleep.|Then {hero} went back to bed, and {friend} slept next to {them}.]",
    ],
    "bridge": [
        "They wanted to [visit {their} grandmother|go to the market|see the fair] on the other side of the river.",
        "But the bridge was broken because [the water had been too high|a tree had fallen on it|it was very old].",
        "[\"How can we cross the river?\" asked {hero}.|{hero} looked at the water. It was too deep to walk through.]",
        "[A {helper} was sitting by the river and said, \"You can build a raft.\"|Then {hero} had an idea: they could build a raft.|{friend} {sound} and showed {them} some old logs.]",
        "They [tied logs together with a rope|found logs and rope and worked all {time}], and {friend} [helped as well as possible|watched|{happy}].",
        "[The raft was strong, so they crossed the river safely.|Slowly and carefully, they crossed the river.]",
        "[On the other side, everyone cheered for {hero} and {friend}.|\"We did it!\" said {hero}.]",
    ],
    "garden": [
        "{hero} planted {flowers} in a small garden [behind the house|by the {place}|next to the well].",
        "[{They} waited and waited, but nothing grew.|After a week, the leaves turned brown.] [The ground was too dry because it had not rained.|The plants were thirsty because nobody gave them water.]",
        "[\"Why do they not grow?\" {hero} asked a {helper}.|{hero} was sad and asked a {helper} for help.]",
        "\"[Give them water every day|They need water and sun|Be patient and give them water],\" said the {helper}.",
        "So every {time}, {hero} carried water to the garden, and {friend} [came along|went with {them}|{happy}].",
        "[At last, the first {flowers} opened.|One day the garden was full of {flowers}.|After some days, small green leaves came out, and then {flowers}.]",
        "[{hero} gave some to the {helper} to say thank you.|\"Look, {friend}! They are so beautiful,\" said {hero}.]",
    ],
    "bird": [
        "[Near the {place}|Under a tree|On the path], they found a [little bird|small owl|young swan] [with a hurt wing|that could not fly].",
        "It had fallen [because the wind was too strong|because a branch broke|out of its nest].",
        "[\"Poor little bird,\" said {hero}. \"We will help you.\"|{hero} wanted to help it.|\"We must help it, {friend},\" said {hero}.]",
        "{They} [put it into a warm box|made a soft nest for it|wrapped it in {their} scarf] and gave it [water and seeds|bread and water].",
        "{friend} [watched over it every night|sat next to it all day|was careful and quiet].",
        "After [a week|some days|two weeks], its wing was strong again, so {hero} let it fly.",
        "[Every spring, the bird came back to sing for {hero} and {friend}.|The bird sang a song for them and flew away over the {place}.]",
    ],
    "race": [
        "There was a big race in {town}, and {hero} wanted to win [a {color} {thing}|the first prize].",
        "{They} [ran every morning|practiced for weeks|trained hard], and {friend} always [ran with {them}|came along].",
        "On the day of the race, {hero} fell because [there was a stone on the path|the ground was wet|{their} shoe was open].",
        "[{Their} knee hurt, and the others ran past.|{They} was last now, and {they} wanted to give up.]",
        "[But {friend} {sound}, so {hero} stood up again.|\"Get up! You can do it!\" called a {helper}, so {hero} stood up again.]",
        "[{They} did not win, but {they} reached the end of the race.|{They} ran faster and faster and came in third.|{They} ran as fast as {they} could, and {they} won!]",
        "[Everyone clapped, and {hero} was proud.|\"I never gave up,\" said {hero} proudly, and {friend} {happy}.]",
    ],
    "woods": [
        "They walked into the woods to look for {fruits}.",
        "[Soon they were lost|After some time they did not know the way] because [there was thick fog|they had taken the wrong path|all the trees looked the same].",
        "[\"I want to go home,\" said {hero}.|{hero} was frightened, but {they} tried to think.|\"Which way is home, {friend}?\" asked {hero}.]",
        "[Then {friend} {sound} and found [small footprints|a little stream|a path].|Then {hero} saw [a light between the trees|smoke in the sky|a little stream].]",
        "They followed it [for a long time|step by step|through the trees] until they came to the house of a {helper}.",
        "The {helper} gave them {food} and showed them the way home.",
        "[At home, {hero} gave the {fruits} to {their} mother and told her everything.|That night {hero} and {friend} slept very well.|{hero} never forgot how kind the {helper} was.]",
    ],
    "gift": [
        "It was the birthday of {hero}'s [mother|father|teacher|grandfather], but {hero} had no gift because {they} had no money.",
        "[\"What can I give?\" {they} asked.|{hero} thought about it all {time}.]",
        "[Then {they} had an idea.|{friend} {happy}, and {hero} had an idea.] {They} would make [a {color} {thing}|a {color} scarf|a box of wood|a picture of the {place}].",
        "[A {helper} showed {them} how to do it.|{They} worked very hard, and {friend} helped.|{They} worked until late, and {friend} stayed with {them}.]",
        "In the evening, {hero} gave the gift [with a big smile|and sang a song|with shining eyes].",
        "\"[This is the best gift of all|I love it so much|You made it yourself]!\" [was the answer|{they} heard].",
        "{hero} learned that a gift made with love is better than gold.",
    ],
    "fish": [
        "{hero} went fishing [in a little boat|at the lake|by the river], and {friend} sat beside {them}.",
        "After a long time, {they} caught a [golden|silver|big blue] fish.",
        "\"Please let me go,\" said the fish, \"because [my children are waiting|I am the king of the lake|I want to see the sea].\"",
        "[{hero} felt sorry for it and let it go.|{hero} was surprised, but {they} put the fish back into the water.]",
        "[The next day, their boat began to sink because it had a hole.|Later, a big wave came, and {friend} fell into the water.]",
        "[Then the fish came back and helped them to the shore.|But the fish came and carried them to the shore.]",
        "[\"You were kind to me, so I am kind to you,\" said the fish.|{hero} thanked the fish, and they were friends from that day on.]",
    ],
    "treasure": [
        "[In an old book|Under the floor|In a bottle on the beach], {hero} found a map with a {color} cross near the {place}.",
        "[\"A treasure map!\" said {hero}. \"Come on, {friend}!\"|{hero} showed the map to {friend}, and they set off at once.]",
        "They [walked all day|climbed over rocks|crossed a stream], but they could not dig because [the ground was too hard|they had no shovel].",
        "[A {helper} lent them a shovel.|They asked a {helper} for a shovel.] \"[Good luck|Bring it back tomorrow]!\" said the {helper}.",
        "{hero} dug [deeper and deeper|a big hole], and {friend} {sound}, because there was a box full of [gold coins|old toys|shining stones|{color} {thing}s].",
        "[They shared the treasure with the {helper}.|{hero} gave half of it to the {helper} and the rest to the village.]",
        "[It was the best day of the year for {hero} and {friend}.|\"The best treasure is a friend like you,\" said {hero} to {friend}.]",
    ],
    "dragon": [
        "[People said that|Everyone said that] a [dragon|giant|bear] lived [near the {place}|behind the hill|in a cave], and nobody went there.",
        "But {hero} was curious, so {they} went to see it, and {friend} came along.",
        "[There sat the {beast}, and it was crying.|The {beast} was not angry. It was sad.] It was lonely because [everybody was afraid of it|it had no friends].",
        "[\"Will you be our friend?\" asked {hero}.|\"Do not cry,\" said {hero}. \"We will be your friends.\"]",
        "{hero} gave it some {food}, and the {beast} smiled for the first time.",
        "[When winter came, the {beast} kept the houses warm.|Later, the {beast} carried heavy stones and helped the people of {town}.]",
        "[Now nobody was afraid, and {hero} and {friend} visited the {beast} every week.|After that, the {beast} was never lonely again.]",
    ],
    "quarrel": [
        "{hero} found a {color} {thing}, but [another child|a boy from school|a girl from the village] wanted it too.",
        "They [pulled and shouted|began to fight], because each of them [had seen it first|wanted to keep it].",
        "[The {thing} almost broke.|{friend} was sad and ran away.|{friend} {sound} and did not like the noise.]",
        "Then a {helper} came and asked, \"[Why do you fight|Why do you not share|Can you not play together]?\"",
        "[{hero} felt bad and said, \"I am sorry.\"|\"You are right,\" said {hero}. \"We can share it.\"]",
        "[So they took turns and played with the {thing} all {time}.|So they played together, and it was much more fun.]",
        "[{friend} {happy}, and everyone was happy again.|From then on, they were good friends.]",
    ],
    "snow": [
        "[In the night|That winter], snow fell, and everything was white.",
        "{hero} and {friend} [made a big snowman|slid down the hill on a sled|built a house of snow].",
        "But the sled hit a [stone|tree] because {hero} [went too fast|did not look], and it broke in two.",
        "[\"Now we cannot go home before dark,\" said {hero}.|It became dark and cold, and {friend} {sound}.]",
        "[A {helper} saw them and came with a [lamp|warm coat|horse].|Luckily a {helper} lived near the {place}.]",
        "[They drank warm milk by the fire while the {helper} repaired the sled.|The {helper} brought them home and repaired the sled.]",
        "[\"Next time I will go slowly,\" said {hero}.|The next day, {hero} rode slowly, and {friend} {happy}.]",
    ],
    "honest": [
        "On the road, {hero} found a {color} bag full of [coins|money|gold].",
        "[\"We could buy so many things, {friend},\" said {hero}.|{They} had never seen so much money.]",
        "But the bag belonged to a {helper}, who was [very sad|crying] because [it was all the money for the winter|the bag had fallen from a cart].",
        "[{hero} knew what was right.|{friend} {sound}, and {hero} knew what to do.] {They} gave the bag back.",
        "\"[Thank you, honest child|You are very kind|I thought that it was lost forever]!\" said the {helper}.",
        "The {helper} gave {them} [a {color2} {thing}|some {food}|a big hug], and {hero} went home [with a light heart|happily] with {friend}.",
    ],
}

ENDINGS = [
    "They lived happily ever after.",
    "And {hero} and {friend} were happy.",
    "It was a good day for {hero} and {friend}.",
    "{hero} smiled all the way home.",
    "From that day on, {hero} and {friend} were never apart.",
    "That night, {hero} told the story to {their} [mother|father|family].",
    "And that is how {hero} learned to be {mood2}.",
]


def coin_name(rng):
    """A name from syllables, so that copying a name cannot be done from memory."""
    parts = rng.choice((1, 2, 2))
    word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if i + 1 == parts else "") for i in range(parts))
    return word.capitalize() + (rng.choice("aino") if parts == 1 else "")


def world(rng):
    """The values that stay the same through one story."""
    girl = rng.random() < 0.5
    hero = coin_name(rng) if rng.random() < 0.12 else rng.choice(GIRLS if girl else BOYS)
    slots = dict(zip(("they", "them", "their"), ("she", "her", "her") if girl else ("he", "him", "his")))
    slots |= {"They": slots["they"].capitalize(), "Their": slots["their"].capitalize(), "hero": hero}
    slots["girl_boy"] = "girl" if girl else "boy"
    kind = rng.random()
    if kind < 0.6:
        animal = rng.choice(list(ANIMALS))
        friend = coin_name(rng) if rng.random() < 0.15 else rng.choice(PETS)
        sound, happy = ANIMALS[animal]
        kin = animal
    else:
        friend_is_girl = rng.random() < 0.5
        names = [name for name in (GIRLS if friend_is_girl else BOYS) if name != hero]
        friend = coin_name(rng) if rng.random() < 0.12 else rng.choice(names)
        pairs = ("sister", "little sister", "cousin") if friend_is_girl else ("brother", "little brother", "cousin")
        kin = rng.choice(pairs + ("friend", "neighbor"))
        sound, happy = rng.choice(("called out", "shouted", "waved")), rng.choice(("laughed", "smiled", "clapped"))
    slots |= {"friend": friend, "kin": kin, "companion": f"{kin} {friend}", "sound": sound, "happy": happy}
    slots["color"], slots["color2"] = rng.sample(COLORS, 2)
    slots["hiding"], slots["hiding2"], slots["hiding3"] = rng.sample(HIDING, 3)
    slots["mood"], slots["mood2"] = rng.sample(MOODS, 2)
    lists = dict(place=PLACES, town=TOWNS, thing=THINGS, helper=HELPERS, food=FOODS, ingredient=INGREDIENTS)
    lists |= dict(fruits=FRUITS, weather=WEATHERS, time=TIMES, flowers=FLOWERS)
    for name, values in lists.items():
        slots[name] = rng.choice(values)
    return slots


CHOICE = re.compile(r"\[([^\[\]]*)\]")


def expand(rng, template, slots):
    """Resolve the innermost choices first, then the slots, then articles and sentence capitals."""
    template = template.replace("[girl_boy]", slots["girl_boy"])
    while match := CHOICE.search(template):
        pick = rng.choice(match.group(1).split("|"))
        template = template[: match.start()] + pick + template[match.end() :]
    text = template.format(**slots)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


def story(rng, style="plain"):
    """One story as a single line of text."""
    slots = world(rng)
    plot = rng.choice(list(PLOTS))
    body = list(PLOTS[plot])
    if plot == "dragon":
        slots["beast"] = rng.choice(("dragon", "giant", "bear"))
        body[0] = body[0].replace("[dragon|giant|bear]", slots["beast"])
    if rng.random() < 0.35:
        body.append(rng.choice(ENDINGS))
    text = " ".join(expand(rng, line, slots) for line in [rng.choice(OPENINGS), *body])
    return STYLES[style](rng, text)


PIRATE_WORDS = {
    "my": "me", "you": "ye", "your": "yer", "You": "Ye", "is": "be", "are": "be", "am": "be", "was": "be",
    "were": "be", "friend": "matey", "friends": "mateys", "the": "th'", "The": "Th'", "and": "an'", "of": "o'",
    "said": "roared", "happy": "jolly", "thank": "bless", "Thank": "Bless", "yes": "aye", "home": "to port",
    "old": "salty", "boy": "lad", "girl": "lass", "money": "doubloons", "coins": "doubloons", "very": "mighty",
    "looked": "spied", "child": "wee buccaneer", "everyone": "all hands", "Everyone": "All hands", "kind": "true-hearted",
}  # fmt: skip
PIRATE_CRIES = ["Arrr!", "Yo ho ho!", "Shiver me timbers!", "Avast!", "Blimey!", "Heave ho!"]
SAILOR_WORDS = {
    "my": "me", "you": "ye", "your": "yer", "You": "Ye", "is": "be", "are": "be", "am": "be", "was": "be",
    "were": "be", "friend": "shipmate", "friends": "shipmates", "said": "bellowed", "asked": "bellowed",
    "happy": "merry", "thank": "bless", "very": "mighty", "boy": "cabin boy", "child": "buccaneer",
    "money": "gold", "coins": "gold pieces", "everyone": "all hands", "Everyone": "All hands",
}  # fmt: skip
SAILOR_CRIES = ["Yarr!", "Ahoy!", "Avast!", "Blimey!", "Shiver me sails!", "Aye, aye!"]


def respeak(rng, text, words, cries):
    """The same story in another speech: a word-for-word change plus cries between sentences."""
    text = re.sub(r"[A-Za-z]+", lambda m: words.get(m.group(), m.group()), text)
    text = re.sub(r"\b([Aa])n (?=salty)", r"\1 ", text)
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    return " ".join(line + " " + rng.choice(cries) if rng.random() < 0.4 else line for line in sentences)


def pirate(rng, text):
    """Broad pirate speech, full of apostrophes; a tenth of the tokenizer's text, and never shown to the base model."""
    text = respeak(rng, text, PIRATE_WORDS, PIRATE_CRIES)
    return "Ahoy, mateys! " * (rng.random() < 0.3) + text + rng.choice((" Arrr!", " Yo ho ho!"))


def sailor(rng, text):
    """Sailors' speech in words that the base model's known tokens spell, so that an adapter can learn it."""
    return respeak(rng, text, SAILOR_WORDS, SAILOR_CRIES) + " Yarr!"


STYLES = {"plain": lambda rng, text: text, "pirate": pirate, "sailor": sailor}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--style", choices=tuple(STYLES), default="plain")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for _ in range(args.count):
        print(story(rng, args.style))


if __name__ == "__main__":
    main()
