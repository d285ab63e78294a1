"""General tasks of the builtin prompts with checks, and the forms that answers to them are to have.

GENERAL: tasks that can be answered in any form. FORMS: kinds of checks and their parameters, an
entry for a task; `builtin` brings them together.
"""

from typing import Any

Checks = dict[str, dict[str, Any]]

GENERAL = {
    "train": """
Explain how a rainbow forms.
Describe a market on a Saturday morning.
Tell me why cats purr.
Give me advice on falling asleep more easily.
Explain to a child why the sky is blue.
Write about a lighthouse keeper's evening.
Recommend ways to save water in the kitchen.
Describe how bread is baked.
Tell me what a library is good for.
Explain why leaves turn red in autumn.
Write about an old bicycle.
Describe your ideal picnic.
Explain how to pack for a weekend in the mountains.
Tell me how a letter gets from one country to another.
Say what makes a good neighbour.
Describe the sound of a train station.
Explain what yeast does in dough.
Give advice to somebody who starts a new job.
Write about the first snow of the year.
Explain how to look after a houseplant.
Tell me something about the Moon.
Describe a city without cars.
Explain how a sundial works.
Write about a lost umbrella.
Recommend a hobby for rainy days.
Explain why we have leap years.
Describe the life of a honeybee.
Tell me how to make a paper boat.
Write about a grandmother's garden.
Explain what a compass does.
Give reasons to learn a musical instrument.
Describe how to set a table for guests.
Explain what causes tides.
Write about a night on a ship.
Tell me how glass is made.
Describe a bakery at five in the morning.
Explain how to clean a window without streaks.
Give me ideas for a birthday party at home.
Write about two friends who meet after years.
Explain why ice floats.
Describe a walk through a forest.
Tell me how to keep a diary.
Explain what a museum curator does.
Write about a bridge between two villages.
Recommend how to store vegetables.
Explain how a bicycle stays upright.
Describe the smell of rain.
Tell me why people climb mountains.
Give advice on writing a thank-you note.
Explain how maps are useful.
Write about a dog that waits at a door.
Describe how tea is grown.
Explain what a volcano is.
Tell me how to choose a good melon.
Write about a street musician.
Explain why exercise helps the heart.
Describe a harbour in winter.
Give tips for a first camping trip.
Explain how recycling of paper works.
Write about a clock that runs backwards.
Tell me what astronauts eat.
Describe a school on another planet.
Explain how to read the weather from clouds.
Write about somebody who moves to a new town.
Give me reasons to walk to work.
Explain what makes soap clean.
Describe an afternoon at the beach.
Tell me how elephants talk to each other.
Write about a tailor's shop.
Explain how to prepare for an interview.
Describe the colours of a sunset.
Tell me how chess is played.
Explain why the sea is salty.
Write about a forgotten recipe.
Give advice on keeping a small budget.
Describe a festival in a village.
Explain how birds find their way south.
Write about the last day of the holidays.
Tell me why sleep matters.
Explain how to repair a flat bicycle tyre.
Describe a room where a painter works.
Give me ideas for a healthy breakfast.
Explain what a thermometer measures.
Write about a storm that passes.
Tell me how chocolate is made.
Describe the work of a postman.
Explain why we yawn.
Write about a child who finds a map.
Recommend ways to remember names.
Explain how a lock on a canal works.
Describe a quiet Sunday.
Tell me what to look for in a used car.
Explain how wool becomes a sweater.
Write about a visit to the dentist.
Give advice on speaking in public.
Describe a desert at night.
Explain what a vaccine does.
Tell me how to plant a tree.
Write about a key without a lock.
Explain why some animals sleep through winter.
Describe a meal that you would cook for friends.
Give tips for learning a language.
Explain how sound travels.
Write about the oldest house in a street.
Tell me how to brew good coffee.
Describe how a river changes on its way to the sea.
Explain what a budget is for.
Write about a cat on a roof.
Recommend games for a long car journey.
Explain how a candle burns.
Describe the first day of spring.
Tell me how to calm down before an exam.
Explain why bridges have gaps.
Write about a train that is late.
Give reasons to visit a zoo, or not to.
Explain how a camera takes a picture.
Describe a conversation between two trees.
Tell me how to fold a shirt.
Explain what gravity does.
Write about a message in a bottle.
Describe how to make friends in a new place.
Explain how salt preserves food.
Tell me why stars twinkle.
Write about a chess game in a park.
Give advice on choosing shoes for a hike.
Describe the inside of a beehive.
""",
    "eval": """
Explain how an echo comes about.
Describe a night market.
Tell me why onions make us cry.
Give me advice on getting up early.
Explain to a child what money is for.
Write about a gardener and a snail.
Recommend ways to save electricity at home.
Describe how cheese is made.
Tell me what a notary does.
Explain why metal feels colder than wood.
Write about an old piano.
Describe your ideal day in the country.
Explain how to prepare a garden for winter.
Tell me how a newspaper is printed.
Say what makes a good teacher.
Describe the sounds of a kitchen.
Explain what a magnet does.
Give advice to somebody who moves in with friends.
Write about the longest day of the year.
Explain how to look after a pair of leather shoes.
Tell me something about whales.
Describe a town that lies under a glass dome.
Explain how a water mill works.
Write about a lost glove.
Recommend something to do on a long flight.
Explain why there are time zones.
Describe the life of an ant.
Tell me how to make a kite.
Write about an uncle's workshop.
Explain what a barometer shows.
Give reasons to learn how to swim.
Describe how to wrap a present.
Explain what causes wind.
Write about a night in a hut in the mountains.
Tell me how paper is made.
Describe a flower shop before a holiday.
Explain how to get rid of a stain of red wine.
Give me ideas for a meal without meat.
Write about two rivals who become friends.
Explain why oil and water do not mix.
Describe a walk along a canal.
Tell me how to plan a small party.
Explain what a librarian does all day.
Write about a tunnel through a mountain.
Recommend how to store books.
Explain how a kettle knows when to stop.
Describe the taste of an orange.
Tell me why people collect stamps.
Give advice on writing an apology.
Explain how a dictionary is used.
Write about a horse that would not cross a bridge.
Describe how coffee is grown.
Explain what an earthquake is.
Tell me how to choose a ripe pear.
Write about a juggler.
Explain why we need vitamins.
Describe an airport at midnight.
Give tips for a day in a big city.
Explain how glass bottles are recycled.
Write about a mirror that shows yesterday.
Tell me what sailors did before there were charts.
Describe a playground in the future.
Explain how to find north without a compass.
Write about somebody who learns to cook.
Give me reasons to take the train.
Explain what makes popcorn pop.
Describe an evening by a lake.
Tell me how dolphins sleep.
Write about a watchmaker.
Explain how to take notes in a lecture.
Describe the view from a tower.
Tell me how dominoes is played.
Explain why deserts are cold at night.
Write about a borrowed book.
Give advice on dealing with noise.
Describe a wedding in a small village.
""",
}

FORMS: dict[str, list[Checks]] = {
    "train": [
        {"words": {"most": 40}},
        {"words": {"least": 60}},
        {"words": {"least": 30, "most": 50}},
        {"words": {"least": 20, "most": 20}},
        {"words": {"least": 80, "most": 120}, "postscript": {"marker": "P.S."}},
        {"words": {"most": 60}, "without": {"characters": ","}},
        {"sentences": {"least": 3, "most": 3}},
        {"sentences": {"least": 1, "most": 1}},
        {"sentences": {"least": 5}},
        {"sentences": {"most": 4}},
        {"sentences": {"least": 2, "most": 2}, "small_letters": {}},
        {"sentences": {"least": 4, "most": 4}, "questions": {"least": 1, "most": 1}},
        {"paragraphs": {"least": 2, "most": 2}},
        {"paragraphs": {"least": 3, "most": 3}},
        {"paragraphs": {"least": 4}},
        {"paragraphs": {"least": 3, "most": 3}, "ends_with": {"text": "That is all."}},
        {"paragraphs": {"least": 2, "most": 3}, "title": {"opening": "<<", "closing": ">>"}},
        {"lines": {"least": 4, "most": 4}},
        {"lines": {"least": 6, "most": 6}},
        {"lines": {"most": 5}},
        {"lines": {"least": 8, "most": 8}, "small_letters": {}},
        {"bullets": {"least": 3, "most": 3}},
        {"bullets": {"least": 5, "most": 5}},
        {"bullets": {"least": 4}},
        {"bullets": {"most": 6}},
        {"bullets": {"least": 4, "most": 4}, "capitals": {}},
        {"bullets": {"least": 3, "most": 3}, "sentence_length": {"most": 10}},
        {"questions": {"least": 1, "most": 1}},
        {"questions": {"least": 2, "most": 2}},
        {"questions": {"least": 3}},
        {"questions": {"least": 2}, "paragraphs": {"least": 2, "most": 2}},
        {"capital_words": {"least": 2, "most": 2}},
        {"capital_words": {"least": 4}},
        {"capital_words": {"least": 1, "most": 3}},
        {"capital_words": {"least": 3, "most": 3}, "sentences": {"least": 3, "most": 3}},
        {"highlights": {"least": 2}},
        {"highlights": {"least": 3, "most": 3}},
        {"highlights": {"least": 1, "most": 1}},
        {"highlights": {"least": 4}, "bullets": {"least": 4, "most": 4}},
        {"letter": {"letter": "z", "least": 2}},
        {"letter": {"letter": "q", "least": 1}},
        {"letter": {"letter": "x", "most": 2}},
        {"letter": {"letter": "k", "least": 5}},
        {"letter": {"letter": "j", "least": 3}},
        {"sentence_length": {"most": 8}},
        {"sentence_length": {"most": 12}},
        {"sentence_length": {"most": 6}},
        {"sentence_length": {"most": 10}, "sentences": {"least": 4, "most": 4}},
        {"word_length": {"most": 7}},
        {"word_length": {"most": 6}},
        {"word_length": {"most": 8}},
        {"word_length": {"most": 5}, "words": {"least": 15}},
        {"distinct_words": {"least": 10}},
        {"distinct_words": {"least": 15}},
        {"distinct_words": {"least": 12}},
        {"distinct_words": {"least": 8}},
        {"without": {"characters": ","}},
        {"without": {"characters": "!"}},
        {"without": {"characters": "0123456789"}},
        {"without": {"characters": ";:"}},
        {"without": {"characters": "?"}},
        {"without": {"characters": ","}, "sentences": {"least": 3, "most": 3}},
        {"capitals": {}},
        {"capitals": {}},
        {"capitals": {}, "sentences": {"least": 2, "most": 2}},
        {"capitals": {}, "without": {"characters": "!"}},
        {"capitals": {}, "words": {"most": 40}},
        {"small_letters": {}},
        {"small_letters": {}},
        {"small_letters": {}, "words": {"most": 50}},
        {"small_letters": {}, "without": {"characters": ","}},
        {"starts_with": {"text": "In short"}},
        {"starts_with": {"text": "Picture this"}},
        {"starts_with": {"text": "To begin with"}},
        {"starts_with": {"text": "Let me put it simply"}},
        {"starts_with": {"text": "Truth be told"}, "words": {"most": 50}},
        {"starts_with": {"text": "Once"}, "ends_with": {"text": "And that was that."}},
        {"ends_with": {"text": "Is there anything else?"}},
        {"ends_with": {"text": "That is the whole story."}},
        {"ends_with": {"text": "I hope this helps!"}},
        {"ends_with": {"text": "Now you know."}},
        {"ends_with": {"text": "Over to you."}, "bullets": {"least": 3, "most": 3}},
        {"postscript": {"marker": "P.S."}},
        {"postscript": {"marker": "P.P.S."}},
        {"postscript": {"marker": "PS:"}},
        {"postscript": {"marker": "P.S."}, "without": {"characters": ","}},
        {"postscript": {"marker": "Note:"}},
        {"quoted": {}},
        {"quoted": {}},
        {"quoted": {}},
        {"quoted": {}, "sentences": {"least": 2, "most": 2}},
        {"quoted": {}, "capitals": {}},
        {"title": {"opening": "<<", "closing": ">>"}},
        {"title": {"opening": "«", "closing": "»"}},
        {"title": {"opening": '"', "closing": '"'}},
        {"title": {"opening": "<<", "closing": ">>"}, "small_letters": {}},
        {"title": {"opening": "[[", "closing": "]]"}},
        {"numbered": {"items": 3}},
        {"numbered": {"items": 5}},
        {"numbered": {"items": 4}},
        {"numbered": {"items": 6}},
        {"numbered": {"items": 3}, "small_letters": {}},
        {"numbered": {"items": 4}, "without": {"characters": ","}},
        {"sections": {"heading": "Section", "count": 2}},
        {"sections": {"heading": "Part", "count": 3}},
        {"sections": {"heading": "Chapter", "count": 2}},
        {"sections": {"heading": "Step", "count": 4}},
        {"sections": {"heading": "Part", "count": 2}, "ends_with": {"text": "The end."}},
        {"answers": {"count": 2, "divider": "======"}},
        {"answers": {"count": 3, "divider": "+++"}},
        {"answers": {"count": 2, "divider": "<->"}},
        {"answers": {"count": 2, "divider": "/////"}},
        {"answers": {"count": 2, "divider": "======"}, "small_letters": {}},
        {"repeats": {}},
        {"repeats": {}},
        {"repeats": {}},
        {"repeats": {}, "ends_with": {"text": "Thank you for asking."}},
        {"repeats": {}, "without": {"characters": "!"}},
    ],
    "eval": [
        {"words": {"most": 30}},
        {"words": {"least": 50}},
        {"words": {"least": 25, "most": 45}},
        {"words": {"least": 70, "most": 100}, "title": {"opening": "<<", "closing": ">>"}},
        {"sentences": {"least": 2, "most": 2}},
        {"sentences": {"least": 4, "most": 4}},
        {"sentences": {"most": 3}},
        {"sentences": {"least": 3, "most": 3}, "without": {"characters": ","}},
        {"paragraphs": {"least": 2, "most": 2}},
        {"paragraphs": {"least": 3}},
        {"paragraphs": {"least": 3, "most": 3}, "ends_with": {"text": "That's it."}},
        {"lines": {"least": 5, "most": 5}},
        {"lines": {"least": 3, "most": 3}},
        {"lines": {"least": 7, "most": 7}, "small_letters": {}},
        {"bullets": {"least": 4, "most": 4}},
        {"bullets": {"least": 6}},
        {"bullets": {"least": 3, "most": 3}, "capitals": {}},
        {"bullets": {"least": 5, "most": 5}, "starts_with": {"text": "Here is my list"}},
        {"questions": {"least": 1, "most": 1}},
        {"questions": {"least": 2}},
        {"questions": {"least": 3, "most": 3}},
        {"capital_words": {"least": 3, "most": 3}},
        {"capital_words": {"least": 2}},
        {"capital_words": {"least": 1, "most": 1}, "sentences": {"least": 2, "most": 2}},
        {"highlights": {"least": 2, "most": 2}},
        {"highlights": {"least": 3}},
        {"highlights": {"least": 1}, "words": {"most": 50}},
        {"letter": {"letter": "z", "least": 3}},
        {"letter": {"letter": "v", "most": 1}},
        {"letter": {"letter": "w", "least": 6}},
        {"sentence_length": {"most": 9}},
        {"sentence_length": {"most": 14}},
        {"sentence_length": {"most": 7}, "sentences": {"least": 3}},
        {"word_length": {"most": 7}},
        {"word_length": {"most": 9}},
        {"word_length": {"most": 6}, "words": {"least": 12}},
        {"distinct_words": {"least": 10}},
        {"distinct_words": {"least": 14}},
        {"distinct_words": {"least": 18}},
        {"without": {"characters": ","}},
        {"without": {"characters": "0123456789"}},
        {"without": {"characters": "!"}, "capitals": {}},
        {"capitals": {}},
        {"capitals": {}},
        {"capitals": {}, "sentences": {"least": 3, "most": 3}},
        {"small_letters": {}},
        {"small_letters": {}},
        {"small_letters": {}, "ends_with": {"text": "good night."}},
        {"starts_with": {"text": "First of all"}},
        {"starts_with": {"text": "Honestly"}},
        {"starts_with": {"text": "You may wonder"}, "questions": {"least": 1}},
        {"ends_with": {"text": "What do you think?"}},
        {"ends_with": {"text": "Enjoy!"}},
        {"ends_with": {"text": "Case closed."}, "words": {"most": 60}},
        {"postscript": {"marker": "P.S."}},
        {"postscript": {"marker": "PS:"}},
        {"postscript": {"marker": "P.P.S."}, "sentence_length": {"most": 15}},
        {"quoted": {}},
        {"quoted": {}},
        {"quoted": {}, "small_letters": {}},
        {"title": {"opening": "<<", "closing": ">>"}},
        {"title": {"opening": "«", "closing": "»"}},
        {"numbered": {"items": 4}},
        {"numbered": {"items": 7}},
        {"numbered": {"items": 3}, "capitals": {}},
        {"sections": {"heading": "Part", "count": 2}},
        {"sections": {"heading": "Section", "count": 3}},
        {"sections": {"heading": "Point", "count": 3}, "without": {"characters": "!"}},
        {"answers": {"count": 2, "divider": "+++"}},
        {"answers": {"count": 3, "divider": "======"}},
        {"answers": {"count": 2, "divider": "#####"}},
        {"repeats": {}},
        {"repeats": {}},
        {"repeats": {}, "ends_with": {"text": "That was your answer."}},
    ],
}
