"""Further kinds of prompts for prompts.py: translation, rewriting, lists, SQL, dialogue of several turns, puzzles."""

import random
import re
from collections.abc import Callable

import reasoning_gym

Fill = Callable[[str], str]  # {name} in a template by a word of that list

LANGUAGES = [
    "French",
    "Spanish",
    "German",
    "Italian",
    "Portuguese",
    "Dutch",
    "Polish",
    "Swedish",
    "Turkish",
    "Japanese",
]
SENTENCES = [
    "Good morning, my name is {name} and I am a {job} from {city}.",
    "The {animal} is sleeping next to the {colour} {artifact}.",
    "Where is the nearest {place}, please?",
    "I would like to buy a {product} and two tickets to {city}.",
    "On {day} we are going to the {place} with {name} and {name}.",
    "The {food} was very good, but the {food} was cold.",
    "{name} has lived in {country} since {month} and works as a {job}.",
    "How much does the {colour} {product} cost?",
    "We arrived late because the train from {city} had stopped for {n:2-9} hours.",
    "My grandmother likes {hobby}, and my brother likes {hobby}.",
    "Please send the {product} to {company} before {day}.",
    "It rained all week in {city}, so the {place} stayed closed.",
]
TRANSLATION = [
    "Translate into {tongue}: {sentence}",
    'Translate this sentence into {tongue}: "{sentence}"',
    "How do you say in {tongue}: {sentence}",
    'What is "{sentence}" in {tongue}?',
    "Translate the following text into {tongue}.\n\n{sentence} {sentence}",
    "Give a {tongue} translation, then explain each word: {sentence}",
    'Translate into {tongue} and into {tongue}: "{sentence}"',
    'A customer wrote: "{sentence}" Answer politely in {tongue}.',
]
REWRITING = [
    'Rewrite this in a {tone} tone: "{sentence}"',
    "Make this text shorter:\n\n{passage}",
    "Rewrite the following text in the present tense:\n\n{passage}",
    "Correct all mistakes in this text:\n\n{mistakes}",
    'Say this in three different ways: "{sentence}"',
    "Rewrite this as a list of steps:\n\n{passage}",
    'Turn this sentence into a question: "{sentence}"',
    "Rewrite this text so that a child understands it:\n\n{passage}",
    'Change the names in this sentence to {name} and {name}: "{sentence}"',
    "Rewrite this email so that it is more {tone}:\n\nHi {name},\n{passage}\nBest, {name}",
    "Expand this note into a paragraph: {name}, {place}, {day}, bring the {product}.",
    "Put this text into the first person:\n\n{passage}",
]
LISTS = [
    "List {n:5-12} kinds of {animal}s or animals like it.",
    "Name {n:5-15} things that you find in a {place}.",
    "List {n:4-10} countries near {country}, with their capitals.",
    "Give me {n:5-12} words that rhyme with or sound like {food}.",
    "Write a packing list for {n:2-9} days in {city} in {month}.",
    "List the steps to {goal}, numbered.",
    "Make a table of {n:3-8} {product}s with price, weight and colour.",
    "Give {n:5-10} synonyms of the word {adjective}.",
    "What are the {n:4-10} most important terms of {topic}? Explain each in one line.",
    "List the pros and cons of being a {job}.",
    "Write a shopping list for a dinner with {food} and {food} for {n:2-9} people.",
    "Order these by size, from small to large: {animal}, {artifact}, {food}, {place}.",
    "Give me {n:4-9} titles for an article about {topic}.",
    "List {n:5-10} questions that one could ask a {job}.",
    "Count from {n:1-20} to {n:25-60} in steps of {n:2-5}.",
    "List the months of the year with a holiday in {country} for each.",
]
COLUMNS = {
    "customers": "id, name, city, country, created_at",
    "orders": "id, customer_id, product_id, quantity, price, ordered_on",
    "employees": "id, name, job, salary, manager_id, hired_on",
    "products": "id, name, category, price, stock",
    "students": "id, name, birthday, class_id, grade",
    "books": "id, title, author, year, pages, copies",
    "flights": "id, origin, destination, departs_at, seats, price",
    "invoices": "id, customer_id, total, due_on, is_paid",
    "players": "id, name, team_id, position, goals",
    "rooms": "id, building, floor, seats, has_projector",
}
SQL = [
    "Write an SQL query that counts the rows of {table} by {column}.",
    "Select the {n:3-20} rows of {table} with the highest {column}.",
    "Write a query that finds all {table} whose {column} is above the average.",
    "Update {table}: raise {column} by {n:2-20} percent where id is below {n:10-900}.",
    "Delete the rows of {table} that have no {column}, and say what could go wrong.",
    "Write a CREATE TABLE statement for {table}.",
    "Show {column} and {column} of {table}, sorted by {column}, without duplicates.",
    "Join {table} with {other} and show {n:2-5} columns.",
    "Write an INSERT with {n:2-5} rows for {table}.",
    "Explain what this does: SELECT {column}, COUNT(*) FROM {table} GROUP BY {column} HAVING COUNT(*) > {n:1-9};",
    "Add an index that makes searching {table} by {column} faster, and explain why it helps.",
    "Write a query for the second highest {column} in {table}.",
]
# What was said before, turn about, and what is asked now.
DIALOGUES = [
    (
        "Hello! My name is {name} and I work as a {job} in {city}.",
        "Hello {name}! It is nice to meet you. How can I help you today?",
        "Suggest {n:3-5} hobbies for somebody with my job.",
    ),
    (
        "I want to {goal}.",
        "That is a good plan. How much time do you have each week?",
        "About {n:2-9} hours. Make me a plan for the first two weeks.",
    ),
    (
        "What should I cook with {food}?",
        "You could make a soup, a salad or a pie. Which would you like?",
        "A soup, please. Give me the recipe for {n:2-6} people.",
    ),
    (
        "Tell me about {topic}.",
        "Gladly. Would you like a short overview or an example?",
        "An example, as if you explained it to {audience}.",
    ),
    (
        "I am planning a trip to {country} in {month}.",
        "That sounds wonderful! What do you like to do when you travel?",
        "I like {hobby} and good food. Which {n:2-4} places should I see?",
    ),
    (
        "Can you help me with a letter?",
        "Of course. Who is it for, and what is it about?",
        "It is for my friend {name}, a {job}. I want to say sorry for missing the dinner on {day}.",
    ),
    (
        "Write one sentence about a {animal}.",
        "The {animal} walked slowly through the garden and looked for something to eat.",
        "Now make it {tone}, and add a second sentence about a {artifact}.",
    ),
    (
        "My {product} from {company} is broken.",
        "I am sorry to hear that. What exactly does not work?",
        "It stopped after {n:2-9} days. What should I write to the company?",
    ),
    (
        "What is a {artifact}?",
        "It is a thing that people make and use. Would you like to know more?",
        "Yes. Where does it come from, and who uses it today?",
    ),
    (
        "Let us play a game. I think of an animal.",
        "Great! Does it live in the water?",
        "No, it is a {animal}. Now you think of one, and give me {n:2-4} hints.",
    ),
]
PUZZLES = [
    "family_relationships",
    "letter_counting",
    "number_sorting",
    "sentence_reordering",
    "spell_backward",
    "syllogism",
    "time_intervals",
    "word_sequence_reversal",
    "word_sorting",
    "zebra_puzzles",
]


def translation_prompt(fill: Fill, rng: random.Random, forms: list[str]) -> str:
    tongues = iter(rng.sample(LANGUAGES, 2))
    form = re.sub("{tongue}", lambda _: next(tongues), rng.choice(forms))
    return filled(form, fill, rng)


def rewriting_prompt(fill: Fill, rng: random.Random, forms: list[str]) -> str:
    return filled(rng.choice(forms), fill, rng)


def list_prompt(fill: Fill, rng: random.Random, forms: list[str]) -> str:
    return fill(rng.choice(forms))


def sql_prompt(fill: Fill, rng: random.Random, forms: list[str]) -> str:
    """A task about one table, or two, sometimes after their columns."""
    table, other = rng.sample(sorted(COLUMNS), 2)
    form = rng.choice(forms).replace("{table}", table).replace("{other}", other)
    columns = rng.sample(COLUMNS[table].split(", "), 4)
    form = re.sub("{column}", lambda _: columns.pop(), form)
    schema = f"Table {table}: {COLUMNS[table]}.\n" + (f"Table {other}: {COLUMNS[other]}.\n" if other in form else "")
    return fill(schema + form if rng.random() < 0.6 else form)


def dialogue(fill: Fill, rng: random.Random, forms: list[tuple[str, ...]]) -> list[dict[str, str]]:
    """Messages of three turns. A word that one turn has, the others repeat."""
    turns = rng.choice(forms)
    words: dict[str, str] = {}
    for turn in turns:
        for name in re.findall("{([a-z]+)}", turn):
            words.setdefault(name, fill(f"{{{name}}}"))
    said = [fill(re.sub("{([a-z]+)}", lambda match: words[match[1]], turn)) for turn in turns]
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]


def puzzle_prompt(rng: random.Random, forms: list[str], is_heldout: bool) -> str:
    """A task of reasoning-gym that is not of numbers alone."""
    seed = 2 * rng.randrange(10**6) + is_heldout
    question = reasoning_gym.create_dataset(rng.choice(forms), size=1, seed=seed)[0]["question"].strip()
    return question + rng.choice(["", " Explain your steps."])


def filled(form: str, fill: Fill, rng: random.Random) -> str:
    """A form with sentences, and passages of two or three of them, of which some may have mistakes."""
    form = re.sub("{sentence}", lambda _: rng.choice(SENTENCES), form)
    form = re.sub("{passage}", lambda _: " ".join(rng.sample(SENTENCES, rng.choice([2, 3]))), form)
    form = form.replace(
        "{mistakes}", " ".join(rng.sample(SENTENCES, 2)).replace(" is ", " are ").replace(" has ", " have ")
    )
    return fill(form)
