"""The prompts of the real model's recipe: templates over topics, of eight kinds, drawn by a seed.

    python -m pasta_jax.real_model.prompts --to=runs/real

Writes prompts.jsonl, to be answered and learnt, and held_out.jsonl, to be measured on. Topics are split first, so
that no topic of a held-out prompt is in a prompt of the training data. Answers of the first five kinds have parts
that do not depend on each other; `single` asks for one fact or sentence, `story` for a text in which each sentence
needs the one before, so a promise in these two is a false one; `reason` asks for a paragraph, and is in between.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import re
from collections.abc import Iterator, Sequence

from absl import flags

from pasta_jax.files import write_jsonl
from pasta_jax.verbs import refuse, run_main

PARTS = ("list", "compare", "steps", "explain", "advice")
"""Kinds whose answers have independent parts."""

WHOLE = ("single", "story", "reason")
"""Kinds whose answers have none, or hardly any."""

HELD_OUT = 0.12
"""The share of the topics that only held-out prompts are about."""

TOPICS: dict[str, tuple[str, ...]] = {
    name: tuple(" ".join(part.split()) for part in text.split(","))
    for name, text in {
        "place": """
            Lisbon, Kyoto, Nairobi, Edinburgh, Istanbul, Buenos Aires, Marrakesh, Vienna, Hanoi, Cape Town,
            Montreal, Cusco, Stockholm, Athens, Melbourne, Cairo, Prague, Havana, Singapore, Reykjavik, Mexico City,
            Mumbai, Seville, Chicago, Naples, Seoul, Dublin, Zanzibar, Berlin, Lima, Bangkok, Krakow, Vancouver,
            Florence""",
        "country": """
            Portugal, Japan, Kenya, Brazil, Norway, Egypt, Canada, Vietnam, Morocco, Peru, Greece, India, Iceland,
            Turkey, Mexico, Sweden, Thailand, Ireland, Chile, Poland, Indonesia, New Zealand, Ghana, Austria, Cuba,
            South Korea, Nepal, Argentina, Finland, Ethiopia, Italy, Colombia, Mongolia, Jordan""",
        "animal": """
            octopuses, elephants, honey bees, penguins, wolves, dolphins, owls, camels, sea turtles, ants, bats,
            giraffes, salmon, hedgehogs, parrots, beavers, crocodiles, monarch butterflies, foxes, polar bears,
            frogs, koalas, eagles, spiders, seals, hummingbirds, reindeer, snails, tigers, gorillas,
            otters, swans""",
        "job": """
            nurse, teacher, carpenter, software engineer, journalist, chef, architect, firefighter, librarian,
            pilot, veterinarian, farmer, accountant, electrician, photographer, translator, social worker, plumber,
            judge, graphic designer, bus driver, pharmacist, gardener, baker, museum curator, surveyor, tailor,
            paramedic""",
        "hobby": """
            running, baking bread, photography, chess, gardening, knitting, bird watching, playing the guitar,
            hiking, painting with watercolours, learning a language, cycling, swimming, woodworking, keeping a
            journal, yoga, pottery, fishing, astronomy, home brewing, rock climbing, calligraphy, dancing, camping,
            sewing, rowing, beekeeping, singing in a choir, collecting stamps, juggling""",
        "idea": """
            photosynthesis, gravity, inflation, natural selection, supply and demand, the water cycle, vaccines,
            democracy, plate tectonics, electricity, the immune system, machine learning, compound interest,
            erosion, the greenhouse effect, atoms, blockchain, the food chain, probability, evolution, tides,
            encryption, renewable energy, the solar system, friction, recycling, cholesterol, the internet, DNA,
            magnetism, the carbon cycle, antibiotics, volcanoes, sleep, memory, sound waves,
            fermentation, rainbows""",
        "habit": """
            sleeping better, saving money, eating less sugar, being more productive, speaking in public, studying
            for an exam, making new friends, making small talk, writing clearly, waking up early, keeping a house
            tidy, drinking more water, reading more books, using a phone less, preparing for a job interview,
            working from home, staying fit at a desk, cooking at home, remembering names, wasting less food,
            listening well, planning a week, asking for a raise, giving feedback, learning from mistakes, walking
            more, choosing a gift, hosting guests, travelling with children, being patient""",
        "thing": """
            remote work, electric cars, social media, nuclear power, online learning, school uniforms, living by
            the sea, owning a pet, public transport, video games, renting a home, solar panels, fast food, credit
            cards, working at night, e-books, a vegetarian diet, tourism, space exploration, smartphones in schools,
            self-driving cars, freelancing, city bicycles, organic farming, zoos, plastic packaging, co-operatives,
            early retirement, open offices, paper money""",
        "dish": """
            pancakes, vegetable soup, an omelette, tomato sauce, fried rice, guacamole, a fruit salad, lentil curry,
            apple pie, hummus, roast potatoes, a cheese sandwich, iced tea, banana bread, mushroom risotto, pesto,
            chicken noodle soup, tacos, porridge, a Greek salad, chocolate chip cookies, mashed potatoes, falafel,
            lemonade, pizza dough, bean chili""",
        "task": """
            changing a bicycle tyre, planting a tree, writing a letter of application, cleaning a kitchen, packing a
            suitcase, setting up a tent, making a budget, wrapping a present, painting a room, sewing on a button,
            backing up a computer, growing tomatoes, starting a book club, organising a birthday party, washing a
            car, choosing a laptop, hanging a picture, starting a blog, repotting a plant, training a puppy,
            planning a picnic, learning to type, hosting a dinner, building a birdhouse""",
        "pair": """
            tea and coffee, cats and dogs, trains and planes, wood and plastic, football and basketball, novels and
            films, lakes and oceans, winter and summer, bicycles and cars, frogs and toads, butter and olive oil,
            violins and guitars, e-mail and letters, pens and pencils, rice and pasta, moths and butterflies,
            cash and cards, glass and paper, alligators and crocodiles, oranges and apples, deserts and rainforests,
            laptops and tablets, comedies and tragedies, comets and asteroids, wind power and solar power, museums
            and libraries""",
        "person": """
            Marie Curie, Nelson Mandela, Isaac Newton, Frida Kahlo, Mahatma Gandhi, Ada Lovelace, Leonardo da Vinci,
            Rosa Parks, Charles Darwin, Cleopatra, Wolfgang Amadeus Mozart, Amelia Earhart, Galileo Galilei, Jane
            Austen, Albert Einstein, Florence Nightingale, William Shakespeare, Martin Luther King, Joan of Arc,
            Louis Pasteur, Vincent van Gogh, Alexander Fleming, Harriet Tubman, Johannes Gutenberg""",
        "word": """
            happy, cold, brave, quick, silent, ancient, gentle, bright, honest, lazy, curious, fragile, enormous,
            generous, strange, calm, clever, difficult, empty, famous, hungry, polite, narrow, smooth, wealthy,
            humble""",
        "scene": """
            a lighthouse keeper, a lost umbrella, a robot who learns to paint, the first snow of the year, two rival
            bakers, a clock that runs backwards, a girl who talks to birds, an old bridge, a train that never stops,
            a dragon who is afraid of fire, a letter that arrives late, a garden on the moon, a mouse in a library,
            a fisherman and the sea, a broken violin, a city without lights, a secret door, a talking tree, a night
            in the desert, the last day of school, a cat who travels the world, a forgotten island, a storm at sea,
            a boy who finds a map, an honest thief, a wishing well""",
        "number": """
            12 and 15, 36 and 9, 48 and 17, 25 and 40, 63 and 7, 14 and 28, 90 and 11, 55 and 5, 72 and 8, 19 and
            21, 33 and 66, 45 and 15, 80 and 16, 27 and 13, 64 and 4, 100 and 35, 18 and 6, 24 and 96, 81 and 3, 50
            and 70""",
    }.items()
}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "list": (
        "List {n} things to see in {place}, with one sentence about each.",
        "What are {n} popular dishes from {country}? Describe each briefly.",
        "Name {n} interesting facts about {animal}.",
        "What are the main duties of a {job}?",
        "Give me {n} ideas for a weekend in {place}.",
        "What do I need to start {hobby}? Make a list.",
        "List {n} uses of {idea} in everyday life.",
        "Which skills does a {job} need? Name {n} and explain each in a sentence.",
        "What are {n} good reasons to visit {country}?",
        "List {n} ingredients of {dish} and say what each is for.",
        "Name {n} achievements of {person}.",
        "List {n} foods that {animal} eat, and where they find them.",
        "What tools does a {job} use? List {n} with a short description of each.",
        "Name {n} places to visit in {country} and say why each is worth it.",
        "What are {n} benefits of {hobby}?",
        "List {n} careers for people who like {hobby}.",
    ),
    "compare": (
        "Compare {pair}.",
        "What are the advantages and disadvantages of {thing}?",
        "What are the differences between {pair}?",
        "Give {n} arguments for and {n} against {thing}.",
        "Describe the pros and cons of {thing} for a family.",
        "How are {pair} alike, and how do they differ?",
        "Compare the cost, the comfort and the effort of {pair}, where that applies.",
        "What do supporters and critics of {thing} say?",
    ),
    "steps": (
        "How do I make {dish}?",
        "Write a recipe for {dish} with ingredients and instructions.",
        "Explain how to go about {task}.",
        "What are the steps of {task}?",
        "Make a checklist for {task}.",
        "I have never made {dish} before. Tell me what to buy and what to do.",
        "Write instructions for {task} that a child could follow.",
        "Plan {task} for me: what to prepare, what to do, and what to check afterwards.",
    ),
    "explain": (
        "Explain {idea} in {n} key points.",
        "What should everyone know about {idea}?",
        "Describe {animal}: what they look like, where they live, and what they eat.",
        "Give an overview of {country}: its geography, its culture and its economy.",
        "Describe the working day of a {job}: morning, noon and afternoon.",
        "Tell me about the climate, the food and the festivals of {country}.",
        "What are the most important parts of {idea}? Explain each.",
        "How does {thing} affect health, money and the environment?",
        "Describe {place}: its history, its sights and its food.",
        "What are the causes and the effects of {idea}? Name {n} points.",
    ),
    "advice": (
        "Give me {n} tips for {habit}.",
        "What is the best way of {habit}?",
        "I want to get better at {hobby}. What do you recommend?",
        "How can a beginner get started with {hobby}?",
        "What mistakes should I avoid when {habit}?",
        "Suggest {n} ways of {habit}, with a short explanation of each.",
        "My friend wants to become a {job}. What advice would you give?",
    ),
    "single": (
        "What is the capital of {country}?",
        "In one sentence, what is {idea}?",
        "Who was {person}? Answer in one sentence.",
        "What is a synonym for the word {word}?",
        "What is the opposite of {word}?",
        "Which language is spoken in {country}?",
        "On which continent is {country}?",
        "What is the sum of {number}?",
        "Use the word {word} in a sentence.",
        "What does a {job} do? Answer in one short sentence.",
        "Is {place} a capital city? Answer yes or no.",
        "Write one sentence that recommends {hobby}.",
    ),
    "story": (
        "Write a very short story about {scene}.",
        "Tell me a short story about {scene} in one paragraph.",
        "Write a short poem about {scene}.",
        "Write a short letter to a friend about a trip to {place}.",
        "Write the opening paragraph of a novel about {scene}.",
        "Write a diary entry of a {job} after a long day.",
    ),
    "reason": (
        "Summarize the life of {person} in one paragraph.",
        "Explain in a short paragraph why {idea} matters.",
        "Write a polite e-mail that asks a {job} for an appointment.",
        "In one paragraph, say what you think of {thing}.",
        "A shop sells two boxes with {number} pens. How many pens are there in all? Explain how you get there.",
        "Describe {place} in one paragraph.",
    ),
}

SHARES = {
    **{"list": 0.24, "compare": 0.10, "steps": 0.10, "explain": 0.16, "advice": 0.13},
    **{"single": 0.14, "story": 0.07, "reason": 0.06},
}
"""Of each kind among the prompts."""

_ITEMS = (
    " Use a numbered list, with two or three sentences about each item.",
    " Use bullet points, each with a bold name and two or three sentences about it.",
    " Use a numbered list. Begin each item with its name in bold, then explain it in two or three sentences.",
    " Use bullet points with two or three full sentences each.",
)
HINTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(PARTS, (*_ITEMS, *_ITEMS, " Answer in at most 100 words.")),
    **{"single": (" Be brief.",), "story": (" Keep it short.",), "reason": (" Keep it short.",)},
}
"""How an answer is asked for, so that it has a form and an end; a small model left alone rambles."""

HINTED, SHOWN = 0.95, 0.3
"""The share of prompts that are asked with a hint, and of these the share that is also learnt with it."""

NUMBERS = ("three", "four", "five")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
      prompt: what the model is asked, with a hint at the form of the answer or without.
      question: what the answer is learnt as an answer to: often the same without the hint.
      kind: a key of TEMPLATES.
    """

    prompt: str
    question: str
    kind: str


def training_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """So many different prompts, in random order; the first of a larger count are those of a smaller one.

    >>> training_prompts(2) == training_prompts(900)[:2]
    True
    """
    draw = random.Random(f"{seed} hints")
    return [_hinted(asked, draw) for asked in _drawn(count, seed, held_out=False)]


def held_out_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """So many different prompts about other topics, without hints.

    >>> {asked.question for asked in held_out_prompts(100)} & {asked.question for asked in training_prompts(1500)}
    set()
    """
    return _drawn(count, seed, held_out=True)


def topics(held_out: bool, seed: int = 0) -> dict[str, tuple[str, ...]]:
    """The topics of the held-out prompts, or of the others, by name."""
    draw, found = random.Random(f"{seed} topics"), {}
    for name, members in TOPICS.items():
        order = draw.sample(members, len(members))
        cut = max(2, round(HELD_OUT * len(members)))
        found[name] = tuple(order[:cut] if held_out else order[cut:])
    return found


def _drawn(count: int, seed: int, held_out: bool) -> list[Prompt]:
    draw = random.Random(f"{seed} {'held out' if held_out else 'training'}")
    waiting = {kind: _all_of(kind, topics(held_out, seed), draw) for kind in TEMPLATES}
    found: list[Prompt] = []
    while len(found) < count and waiting:
        (kind,) = draw.choices([*waiting], [SHARES[kind] for kind in waiting])
        if (text := next(waiting[kind], None)) is None:
            del waiting[kind]
        else:
            found.append(Prompt(text, text, kind))
    if len(found) < count:
        raise ValueError(f"The templates give {len(found):,} prompts, not {count:,}.")
    return found


def _hinted(asked: Prompt, draw: random.Random) -> Prompt:
    chance, shown, hint = draw.random(), draw.random(), draw.choice(HINTS[asked.kind])
    if chance >= HINTED:
        return asked
    hinted = asked.prompt + hint
    return Prompt(hinted, hinted if shown < SHOWN else asked.question, asked.kind)


def _all_of(kind: str, topics: dict[str, tuple[str, ...]], draw: random.Random) -> Iterator[str]:
    """All prompts of a kind, each once; templates take turns, so that those with few topics do not come first."""
    filled = []
    for template in TEMPLATES[kind]:
        (topic,) = [name for name in re.findall(r"{(\w+)}", template) if name != "n"][:1]
        members = draw.sample(topics[topic], len(topics[topic]))
        texts = [template.format_map({topic: each, "n": draw.choice(NUMBERS)}) for each in members]
        filled.append([re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text) for text in texts])
    order = draw.sample(filled, len(filled))
    return (text for turn in itertools.zip_longest(*order) for text in turn if text is not None)


def main(argv: Sequence[str]) -> None:
    """Writes both files."""
    values = flags.FLAGS
    if len(argv) > 1 or not values.to:
        refuse("Add --to=FOLDER.")
    os.makedirs(values.to, exist_ok=True)
    drawn = {
        "prompts": training_prompts(values.count, values.seed),
        "held_out": held_out_prompts(values.held_out, values.seed),
    }
    for name, prompts in drawn.items():
        path = os.path.join(values.to, f"{name}.jsonl")
        write_jsonl(path, map(dataclasses.asdict, prompts))
        print(f"{path}: {len(prompts):,} prompts.")


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("to", None, "Folder of the two files.")
    flags.DEFINE_integer("count", 1500, "Prompts to be answered.", lower_bound=1, upper_bound=1800)
    flags.DEFINE_integer("held_out", 100, "Prompts to be measured on.", lower_bound=1, upper_bound=200)
    flags.DEFINE_integer("seed", 0, "Of the drawing.", lower_bound=0)
    run_main(main)


if __name__ == "__main__":
    command()
