"""The prompts: topics in wordings, split by topic, so that held-out topics are not trained on.

A task is a constraint whose violations are exact stretches of text.
"""

import dataclasses
import re

from attnpo_jax.data.prompts import Prompt

# An answer that hardly says anything keeps any constraint; it does not count.
LEAST_WORDS = 10


@dataclasses.dataclass(frozen=True)
class Task:
    """A constraint on answers.

    Attributes:
      violation: matches each stretch of a text that violates it.
      wordings: of the prompts, with the slot `{topic}`; none violates the constraint needlessly.
    """

    violation: re.Pattern
    wordings: tuple[str, ...]

    def violations(self, text: str) -> list[tuple[int, int]]:
        """The [start, end) characters of all violations."""
        return [match.span() for match in self.violation.finditer(text)]

    def long_enough(self, text: str) -> bool:
        """Whether an answer says as much as two short sentences do."""
        return len(text.split()) >= LEAST_WORDS

    def passes(self, text: str, finished: bool) -> bool:
        """Whether an answer is complete, not too short, and violates nothing."""
        return finished and self.long_enough(text) and not self.violations(text)


_ASKED = (
    "Explain {topic} in two or three sentences.",
    "Tell me about {topic} in two short sentences.",
    "Why do people care about {topic}? Answer in two short sentences.",
    "Describe {topic} in two short sentences.",
)

TASKS = {
    "no_commas": Task(
        re.compile(r","),
        tuple(f"{asked} Do not use any commas." for asked in _ASKED),
    ),
    "no_the": Task(
        re.compile(r" ?\bthe\b", re.IGNORECASE),
        tuple(f'{asked} Do not use the word "the".' for asked in _ASKED),
    ),
}

_TOPICS = """
gravity; volcanoes; photosynthesis; the water cycle; bridges; lighthouses; honey; bread; rice
farming; chess; marathons; jazz; opera; pottery; knitting; bicycles; trains; sailing; submarines;
airships; maps; clocks; calendars; libraries; newspapers; postage stamps; coins; markets; taxes;
insurance; elections; juries; vaccines; antibiotics; blood types; sleep; memory; dreams; taste;
color blindness; bees; ants; whales; owls; salmon; wolves; octopuses; penguins; oak trees;
mushrooms; cacti; seaweed; soil; rivers; glaciers; deserts; tides; earthquakes; thunder; rainbows;
fog; comets; the Moon; Mars; black holes; magnets; batteries; mirrors; lenses; glass; steel;
concrete; paper; ink; soap; computer passwords; spreadsheets; search engines; email; barcodes;
satellites; robots; elevators; refrigerators; windmills; solar panels; compost; recycling;
beekeeping; gardening; coral reefs; chocolate; tea; coffee; cheese; salt; pepper; olive oil;
noodles; soup; pancakes; cinema; puppets; poetry; proverbs; sign language; the alphabet;
dictionaries; prime numbers; zero; percentages; averages; triangles; probability; kites; swimming;
skiing; tennis; football; yoga; camping; hiking; museums; castles; pyramids; vikings; pirates;
knights; silk; cotton; leather; perfume; fireworks; candles; umbrellas; shoes; hats; buttons;
pencils
"""

_COUNTS = {"train": 88, "validation": 17, "test": 34}
WORDINGS_A_TOPIC = 3
MOST = {"train": 264, "validation": 50, "test": 100}


def topics() -> dict[str, list[str]]:
    """The topics of each split."""
    # Neighbours are alike: every split takes its topics from all over the list.
    every = [" ".join(topic.split()) for topic in _TOPICS.split(";")]
    spread = [topic for start in range(7) for topic in every[start::7]]
    found, place = {}, 0
    for split, count in _COUNTS.items():
        found[split] = spread[place : place + count]
        place += count
    return found


def prompts(task: str, split: str) -> list[Prompt]:
    """The prompts of a split: each topic in some of the wordings, in turn."""
    wordings = TASKS[task].wordings
    found = []
    for number, topic in enumerate(topics()[split]):
        for k in range(WORDINGS_A_TOPIC):
            text = wordings[(number + k) % len(wordings)].format(topic=topic)
            found.append(Prompt(f"{topic}/{k}", ({"role": "user", "content": text},)))
    return found[: MOST[split]]
