"""Tasks of the builtin prompts whose checks go with one task alone."""

from typing import Any

Own = tuple[str, dict[str, dict[str, Any]]]


def _includes(task: str, *phrases: str) -> Own:
    return task, {"includes": {"phrases": [*phrases]}}


def _excludes(task: str, *phrases: str) -> Own:
    return task, {"excludes": {"phrases": [*phrases]}}


def _mentions(task: str, text: str, least: int, most: int | None = None) -> Own:
    return task, {"mentions": {"text": text, "least": least, "most": most or least}}


def _number(task: str, value: float) -> Own:
    return task, {"number": {"value": value}}


def _one_of(task: str, *options: str) -> Own:
    return task, {"one_of": {"options": [*options]}}


def _alphabet(task: str, script: str) -> Own:
    return task, {"alphabet": {"script": script}}


def _paragraph_start(task: str, paragraph: int, text: str) -> Own:
    checks: dict[str, dict[str, Any]] = {"paragraph_start": {"paragraph": paragraph, "text": text}}
    return task, checks


def _placeholders(task: str, least: int, most: int | None = None) -> Own:
    return task, {"placeholders": {"least": least, "most": most} if most else {"least": least}}


def _acrostic(task: str, word: str) -> Own:
    return task, {"acrostic": {"word": word}}


def _alphabetical(task: str, count: int) -> Own:
    return task, {"alphabetical": {"count": count}}


def _palindrome(task: str, letters: int) -> Own:
    return task, {"palindrome": {"letters": letters}}


def _json_object(task: str, *keys: str) -> Own:
    return task, {"json_object": {"keys": [*keys]}}


def _json_list(task: str, items: int) -> Own:
    return task, {"json_list": {"items": items}}


def _table(task: str, columns: int, rows: int) -> Own:
    return task, {"table": {"columns": columns, "rows": rows}}


def _code(task: str, language: str) -> Own:
    return task, {"code": {"language": language}}


OWN: dict[str, list[Own]] = {
    "train": [
        _includes("Write a short story about a fisherman.", "lantern", "fog", "promise"),
        _includes("Explain how a castle was defended.", "moat", "drawbridge"),
        _includes("Describe a rainy afternoon.", "teapot", "window"),
        _includes("Give advice to a young pianist.", "patience", "teacher", "fingers"),
        _includes("Tell me about a voyage to Mars.", "red dust", "silence"),
        _includes("Advertise a second-hand sofa.", "comfortable", "bargain"),
        _excludes("Describe what water is like.", "wet", "liquid"),
        _excludes("Write about winter.", "snow", "cold", "ice"),
        _excludes("Praise a friend who always helps.", "good", "nice", "great"),
        _excludes("Explain what a teacher does.", "school", "teach", "student"),
        _excludes("Tell me how to boil an egg.", "egg", "eggs"),
        _excludes("Describe a sunset over the sea.", "beautiful", "orange", "sky"),
        _mentions("Write a few lines about the sea.", "wave", 3),
        _mentions("Describe how to paint a fence.", "brush", 2),
        _mentions("Tell a story about a baker.", "flour", 3, 5),
        _mentions("Explain why friends matter.", "trust", 4),
        _mentions("Write about a long road.", "road", 5),
        _number("A box holds 12 eggs. How many eggs are in 17 boxes?", 204),
        _number("What is 348 plus 275?", 623),
        _number("A train leaves at 9:40 and arrives at 12:15. How many minutes does it take?", 155),
        _number("What is 15 percent of 240?", 36),
        _number(
            "Three friends share a bill of 86.40 evenly. How much does each of them pay?", 28.8
        ),
        _number(
            "A field is 45 metres long and 18 metres wide. What is its area in square metres?", 810
        ),
        _number("What is 1000 minus 387?", 613),
        _number("Anna is 7 years older than Ben, who is 16. How old are they together?", 39),
        _number("How many seconds are there in two and a half hours?", 9000),
        _number("A shirt costs 35 and is sold for 20 percent less. What is its price now?", 28),
        _one_of("Is a whale a fish?", "yes", "no"),
        _one_of("Is it wise to swim right after a heavy meal?", "yes", "no", "maybe"),
        _one_of("Which of these is heaviest?", "feather", "brick", "pencil"),
        _one_of("Is the number 91 prime?", "prime", "not prime"),
        _one_of("Which season follows spring in Norway?", "summer", "autumn", "winter"),
        _one_of("Does the Sun go round the Earth?", "it does", "it does not", "nobody knows"),
        _alphabet("Write a greeting in Greek.", "greek"),
        _alphabet("Say good morning to a friend in Russian.", "cyrillic"),
        _alphabet("Name the days of the week in Japanese.", "japanese"),
        _alphabet("Write a sentence about the weather in Arabic.", "arabic"),
        _alphabet("Thank a host in Hindi.", "devanagari"),
        _alphabet("Introduce yourself in French.", "latin"),
        _alphabet("Wish somebody a good night in Korean.", "hangul"),
        _paragraph_start("Compare tea and coffee in two paragraphs.", 2, "Coffee"),
        _paragraph_start("Write three paragraphs about a day at work.", 3, "In the evening"),
        _paragraph_start(
            "Argue for and against school uniforms, a paragraph for each.", 2, "However"
        ),
        _paragraph_start("Tell of a trip by boat in three paragraphs.", 2, "Suddenly"),
        _paragraph_start("Describe a town in two paragraphs.", 1, "Between two hills"),
        _placeholders("Write a letter to a landlord about a broken heater.", 3),
        _placeholders("Draft an invitation to a housewarming party.", 4),
        _placeholders("Write a message that cancels a dentist's appointment.", 2, 2),
        _placeholders("Compose a reference for a former employee.", 5),
        _placeholders("Draft a notice that a pet is lost.", 3, 3),
        _acrostic("Write a poem about the sun.", "SUN"),
        _acrostic("Write a poem for a friend.", "TRUST"),
        _acrostic("Write a poem about a river.", "RIVER"),
        _acrostic("Write a few lines about a holiday.", "BEACH"),
        _acrostic("Write a poem about night.", "MOON"),
        _alphabetical("Name animals that live in water.", 5),
        _alphabetical("Name countries in Europe.", 6),
        _alphabetical("List tools that a carpenter uses.", 4),
        _alphabetical("List fruits.", 7),
        _alphabetical("Name musical instruments.", 5),
        _palindrome("Write a sentence about a boat.", 5),
        _palindrome("Write something about noon in a town.", 4),
        _palindrome("Tell me about your parents in two sentences.", 3),
        _palindrome("Describe a machine.", 5),
        _palindrome("Write about a ruler of a small country.", 4),
        _json_object("Describe a book that you like.", "title", "author", "year"),
        _json_object("Give the facts about the planet Saturn.", "name", "moons", "rings"),
        _json_object("Make up a character for a fairy tale.", "name", "age", "wish", "enemy"),
        _json_object("Where does the Danube begin and end?", "source", "mouth"),
        _json_object("Plan a dinner of three courses.", "starter", "main", "dessert"),
        _json_list("Name colours of a traffic light and of the sky.", 4),
        _json_list("Name capitals in South America.", 5),
        _json_list("Suggest names for a parrot.", 3),
        _json_list("Name planets, from the Sun outwards.", 8),
        _json_list("List ingredients of a pancake.", 4),
        _table("Compare three means of transport by speed and price.", 3, 3),
        _table("List four chemical elements with their symbols.", 2, 4),
        _table("Plan the meals of two days.", 4, 2),
        _table("List five countries with their capitals.", 2, 5),
        _table("Compare cats and dogs as pets by cost and care.", 3, 2),
        _code("Show how to print the numbers from 1 to 10.", "python"),
        _code("Show a function that adds two numbers.", "javascript"),
        _code("How do I list the files of a folder on the command line?", "bash"),
        _code("Write a query that counts the rows of the table orders.", "sql"),
        _code("Show a web page with one heading.", "html"),
    ],
    "eval": [
        _includes("Write a short story about a shepherd.", "whistle", "valley", "stranger"),
        _includes("Explain how a sailing boat is steered.", "rudder", "wind"),
        _includes("Describe a morning in a big city.", "tram", "newspaper"),
        _excludes("Describe what fire is like.", "hot", "flame", "burn"),
        _excludes("Write about summer.", "sun", "warm", "beach"),
        _excludes("Explain what a doctor does.", "patient", "medicine", "hospital"),
        _mentions("Write a few lines about the wind.", "leaf", 3),
        _mentions("Describe how to build a bird house.", "nail", 2),
        _mentions("Tell a story about a postwoman.", "letter", 4),
        _number("A shelf holds 14 books. How many books are on 23 such shelves?", 322),
        _number("What is 512 minus 178?", 334),
        _number("What is 35 percent of 80?", 28),
        _number("A film starts at 19:50 and ends at 22:05. How long is it in minutes?", 135),
        _number("Four tickets cost 50 together. How much does one of them cost?", 12.5),
        _one_of("Is a tomato a mineral?", "yes", "no"),
        _one_of("Which of these can fly?", "penguin", "swallow", "ostrich"),
        _one_of("Is 57 divisible by 3?", "divisible", "not divisible"),
        _alphabet("Write a farewell in Greek.", "greek"),
        _alphabet("Describe a garden in one Ukrainian sentence.", "cyrillic"),
        _alphabet("Wish somebody a happy birthday in Hebrew.", "hebrew"),
        _paragraph_start("Compare trains and planes in two paragraphs.", 2, "Planes"),
        _paragraph_start("Write three paragraphs about a concert.", 3, "At last"),
        _paragraph_start("Tell of a lost key in two paragraphs.", 2, "Nobody knew"),
        _placeholders("Write a letter of complaint about a late parcel.", 3),
        _placeholders("Draft an invitation to a school play.", 2, 2),
        _placeholders("Write a note that introduces a new colleague.", 4),
        _acrostic("Write a poem about the sea.", "SEA"),
        _acrostic("Write a poem about a forest.", "TREES"),
        _acrostic("Write a few lines about a journey.", "TRAIN"),
        _alphabetical("Name birds.", 5),
        _alphabetical("List vegetables.", 6),
        _alphabetical("Name professions.", 4),
        _palindrome("Write a sentence about lunch.", 4),
        _palindrome("Write about a small boat on a lake.", 5),
        _palindrome("Tell me about your sister in one sentence.", 3),
        _json_object("Describe a film that you know.", "title", "director", "genre"),
        _json_object("Give the facts about Mount Everest.", "height", "country"),
        _json_object("Make up a small shop.", "name", "street", "goods"),
        _json_list("Name rivers in Africa.", 3),
        _json_list("Suggest names for a boat.", 4),
        _json_list("Name the days of the week.", 7),
        _table("Compare two materials for a roof by price and weight.", 3, 2),
        _table("List four animals with the number of their legs.", 2, 4),
        _table("Plan three days of exercise, with what to do and for how long.", 3, 3),
        _code("Show how to add up the numbers of a list.", "python"),
        _code("Show a loop that counts down from 5.", "c"),
        _code("How do I make a folder on the command line?", "bash"),
    ],
}
