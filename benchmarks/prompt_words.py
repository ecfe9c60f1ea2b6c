"""The templates and word lists of prompts.py; {name} is filled from a list, {n:2-9} with a number."""

# ruff: noqa: E501


def words(text: str) -> list[str]:
    """A comma-separated list."""
    return [word.strip() for word in " ".join(text.split()).split(",")]


# Shared out between the splits.
WORDS = {
    "name": words("""
        Anna, Ben, Carla, David, Elena, Felix, Grace, Hugo, Iris, Jonas, Kira, Leo, Maya, Noah, Olga, Paul,
        Quinn, Rosa, Samir, Tara, Umar, Vera, Walter, Xenia, Yusuf, Zoe, Alice, Bruno, Chloe, Diego, Emil,
        Fatima, George, Hannah, Ivan, Julia, Karim, Linda, Marco, Nina
    """),
    "city": words("""
        Lisbon, Oslo, Kyoto, Lima, Toronto, Nairobi, Prague, Dublin, Seoul, Cairo, Madrid, Boston, Vienna,
        Athens, Jakarta, Chicago, Warsaw, Havana, Mumbai, Sydney, Helsinki, Denver, Rome, Bogota, Seattle
    """),
    "country": words("""
        Japan, Brazil, Norway, Kenya, Italy, Canada, India, Peru, Greece, Egypt, France, Vietnam, Mexico,
        Iceland, Morocco, Spain, Thailand, Chile, Turkey, Portugal
    """),
    "job": words("""
        nurse, carpenter, teacher, pilot, baker, journalist, farmer, architect, librarian, plumber, chemist,
        photographer, lawyer, chef, mechanic, musician, dentist, translator, gardener, engineer, accountant,
        firefighter, tailor, biologist, bus driver, designer, police officer, sailor, vet, writer
    """),
    "hobby": words("""
        playing the piano, running, baking bread, chess, gardening, painting with watercolours, hiking,
        photography, learning Spanish, knitting, swimming, bird watching, playing the guitar, yoga, woodworking,
        cycling, writing poems, fishing, public speaking, drawing, rock climbing, cooking Italian food, dancing,
        juggling, meditation
    """),
    "topic": words("""
        photosynthesis, the water cycle, gravity, black holes, inflation, supply and demand, vaccines, electric
        cars, solar energy, the French Revolution, the Roman Empire, climate change, artificial intelligence,
        machine learning, blockchain, the human heart, DNA, volcanoes, earthquakes, the solar system, evolution,
        plate tectonics, the Renaissance, democracy, the stock market, compound interest, time zones, recycling,
        the internet, antibiotics, nuclear energy, wind power, the Silk Road, the Industrial Revolution, the
        moon landing, tides, rainbows, sleep, memory, the immune system, coral reefs, deforestation, bees and
        pollination, magnets, lightning, jazz music, impressionism, the printing press, ancient Egypt, the Cold
        War, microchips, encryption, search engines, quantum computers, robots, 3D printing, satellites, the
        ozone layer, fossils, dinosaurs, the digestive system, vitamins, stress, friendship, public transport,
        remote work, minimalism, budgeting, insurance, taxes, the Olympic Games, the history of chess,
        Shakespeare, Greek mythology, haiku, opera, glaciers, deserts, rainforests, the speed of light, sound
        waves, atoms, chemical reactions, acids and bases, fermentation, yeast, the nitrogen cycle, migration of
        birds, hibernation, the human eye, colour blindness, left-handedness, dreams, habits, motivation, the
        placebo effect, body language, negotiation, leadership, teamwork, urban planning, bridges, skyscrapers,
        elevators, bicycles, steam engines, batteries, LED lights
    """),
    "goal": words("""
        save money, sleep better, wake up early, eat healthier, prepare for a job interview, learn to code, read
        more books, make new friends, stay focused at work, reduce stress, plan a birthday party, move to a new
        city, train a puppy, pack for a long trip, study for an exam, organise a small kitchen, grow tomatoes on
        a balcony, improve my handwriting, write a good CV, ask for a raise, quit smoking, start a podcast, run
        a marathon, remember names, clean a bicycle, use less plastic, learn a new language, start a small
        business, give a good presentation, take better photos, stop procrastinating, drink more water, keep a
        diary, choose a laptop, host a dinner party, fix a leaking tap
    """),
    "adjective": words("""
        brave, lonely, curious, clumsy, old, tiny, grumpy, kind, forgetful, lazy, magical, shy, proud, hungry,
        cheerful, mysterious, stubborn, gentle, clever, sleepy
    """),
    "audience": words("""
        a five-year-old, a beginner, a high school student, my grandmother, a busy manager, a new employee, a
        tourist, a group of teenagers, someone with no background, a college student
    """),
    "product": words("""
        coffee maker, pair of headphones, backpack, desk lamp, water bottle, phone case, office chair, keyboard,
        blender, winter jacket, tent, toaster, watch, umbrella, suitcase, vacuum cleaner, notebook, camera,
        bicycle, pair of shoes, monitor, fan, electric kettle, mouse, yoga mat
    """),
    "company": words("""
        Northwind, Bluebird, Acme, Greenleaf, Starlight, Ironbridge, Sunrise Foods, Pinewood, Riverstone,
        Oakline, Maple & Co, Lumen, Harbor Labs, Redstone, Clearwater
    """),
    "place": words("""
        library, train station, school, museum, park, hospital, harbour, market, town hall, swimming pool,
        theatre, bakery, airport, community garden, bookshop, factory, zoo, stadium, post office, river bridge
    """),
    "entity": words("""
        book, user, student, employee, recipe, movie, song, order, invoice, car, hotel, flight, course,
        restaurant, patient, pet, city, country, game, event, product, house, team, blog post, weather report
    """),
    "structure": words("""
        stack, queue, linked list, binary search tree, graph, priority queue, hash table, matrix, bank account,
        shopping cart, playlist, timer, library catalogue, address book, deck of cards, inventory, to-do list,
        temperature converter, text adventure room, parking garage
    """),
    "table": words("""
        customers, orders, employees, products, students, books, flights, invoices, players, rooms
    """),
    "concept": words("""
        a list comprehension, a decorator, recursion, a generator, a lambda function, a dictionary, a class,
        inheritance, an exception, a context manager, a for loop, a while loop, a tuple, a set, slicing, string
        formatting, a module, big O notation, a hash function, a pointer, an API, a regular expression, version
        control, unit testing, threading, async and await, a compiler, an interpreter, binary search, dynamic
        programming
    """),
}

# Too few to share out: both splits use them all.
CLOSED_CLASSES = {
    "day": words("""
        Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
    """),
    "month": words("""
        January, February, March, April, May, June, July, August, September, October, November, December
    """),
    "colour": words("""
        red, blue, green, black, white, yellow, grey, orange, purple, brown
    """),
    "tone": words("""
        formal, friendly, funny, polite, enthusiastic, serious, poetic, simple, persuasive, calm
    """),
    "language": words("""
        JavaScript, Java, C++, Go, Rust, TypeScript, C, Ruby, Kotlin, C#
    """),
}

CHAT = [
    "Explain {topic} to {audience}.",
    "What is {topic}?",
    "Write a short story about a {adjective} {animal} and a {person}.",
    "Give me five tips to {goal}.",
    "Write a poem about {topic}.",
    "Write a four-line poem about a {animal}.",
    "How can I {goal}?",
    "Write a short letter to {name} about a trip to {city}.",
    "List {n:3-8} facts about {topic}.",
    "Compare a {animal} and a {animal}.",
    "What are the advantages and disadvantages of {topic}?",
    "What should I see in {city} in {n:2-5} days?",
    "I want to start {hobby}. Where do I begin?",
    "Write a {tone} email to my boss asking for a day off on {day}.",
    "You are a {job}. Introduce yourself and describe your day.",
    "Pretend you are a {adjective} {animal}. Tell me about your morning.",
    "Describe a {artifact} to someone who has never seen one.",
    "What is the difference between a {artifact} and a {artifact}?",
    "Write a dialogue between a {job} and a {job} who meet in {city}.",
    "Give me a recipe that uses {food} and {food}.",
    "Write a {tone} product description for a {product}.",
    "Why is {topic} important?",
    "Suggest {n:3-7} names for a {adjective} {animal} and say why.",
    'Rewrite this sentence in a {tone} tone: "The {product} we ordered on {day} has not arrived."',
    'What does the word "{act}" mean? Use it in three sentences.',
    "How do people usually deal with {feeling}?",
    "Write a diary entry of a {job} who moved to {country}.",
    "Plan a {n:3-7}-day trip to {country}.",
    "My friend {name} loves {hobby}. What gift should I buy?",
    "Write the opening paragraph of a mystery novel set in a {place} in {city}.",
    "Tell me a joke about a {job}.",
    "What skills does a good {job} need?",
    "Write a speech of one minute about {topic}.",
    "Summarise the history of {topic} in one paragraph.",
    "Is it a good idea to {goal} together with a friend? Explain.",
    "Give me a weekly plan to get better at {hobby}.",
    "Write a thank-you note to {name}, who is a {job}.",
    "What would happen if there was no {food} in the world?",
    "Explain the saying: a {animal} in the hand is worth two in the bush.",
    "Write a social media post about the new {place} in {city}.",
    "Ask me three questions about {topic} and then answer them.",
    "Describe {city} in {month}.",
    "How does {phenomenon} come about?",
    "Write a fairy tale that begins with a {adjective} {person} finding a {colour} {artifact}.",
    'Correct the grammar: "{name} go to the {place} on every {day} and he like {hobby} very much."',
    "Give arguments for and against {topic} in a table.",
    "What is a {plant} and where does it grow?",
    'Continue the story: "When {name} opened the {colour} {artifact}, the {animal} was already gone."',
    "Teach me one useful thing about {topic} in three sentences.",
    "Write an advertisement for {company}, a company that sells a {product}.",
    'Translate into simple English: "The {job} had to postpone the appointment owing to unforeseen circumstances."',
    "Hello! My name is {name} and I live in {city}. What can you help me with?",
    "I feel {feeling} because my {animal} is ill. What should I do?",
    "Who invented the {artifact}, and what came before it?",
]

CODE_TASKS = [
    "reverses a string",
    "checks whether a word is a palindrome",
    "counts the vowels in a text",
    "returns the n-th Fibonacci number",
    "computes the factorial of a number",
    "finds the largest number in a list",
    "removes duplicates from a list",
    "sorts a list of numbers with bubble sort",
    "merges two sorted lists",
    "finds the second largest element of a list",
    "checks whether a number is prime",
    "lists all primes below n",
    "counts how often each word occurs in a text",
    "converts Celsius to Fahrenheit",
    "converts a Roman numeral to an integer",
    "flattens a nested list",
    "rotates a list by k places",
    "computes the greatest common divisor of two numbers",
    "checks whether two words are anagrams",
    "finds the longest word in a sentence",
    "capitalises every word of a sentence",
    "computes the average of a list",
    "computes the median of a list",
    "does a binary search in a sorted list",
    "transposes a matrix",
    "multiplies two matrices",
    "counts the lines of a text file",
    "reads a CSV file and returns its rows",
    "writes a dictionary to a JSON file",
    "generates a random password",
    "validates an email address",
    "checks whether brackets are balanced",
    "computes the sum of the digits of a number",
    "converts a decimal number to binary",
    "finds the common elements of two lists",
    "groups words by their first letter",
    "returns all permutations of a list",
    "returns all subsets of a set",
    "finds the shortest path in a graph",
    "implements quicksort",
    "implements merge sort",
    "computes the power of a number by recursion",
    "computes the distance of two points",
    "swaps the keys and values of a dictionary",
    "removes all spaces and punctuation from a text",
    "replaces every digit in a text with a star",
    "counts the even and odd numbers in a list",
    "splits a list into chunks of size n",
    "finds the missing number in a list from 1 to n",
    "checks whether a year is a leap year",
    "returns the number of days between two dates",
    "computes compound interest",
    "encodes a text with a Caesar cipher",
    "compresses a string by run lengths",
    "finds the longest common prefix of a list of words",
    "prints a multiplication table",
    "prints a triangle of stars",
    "simulates rolling two dice",
    "plays rock, paper, scissors",
    "plays a number guessing game",
    "retries a function three times when it fails",
    "measures how long a function takes",
    "caches the results of another function",
    "downloads a web page",
    "renames all files in a folder",
    "parses a query string",
    "formats a number with thousands separators",
    "finds the two numbers in a list that add up to a target",
    "returns the index of the first repeated character",
    "computes the moving average of a list",
    "normalises a list to the range 0 to 1",
    "checks whether a sudoku row is valid",
    "counts the islands in a grid",
    "traverses a binary tree in order",
    "inserts a value into a binary search tree",
    "reverses a linked list",
    "evaluates a postfix expression",
    "sorts a list of dictionaries by a key",
    "merges two dictionaries",
    "filters out negative numbers",
    "squares every number in a list",
    "extracts all URLs from a text",
    "pads a string to a given length",
    "converts seconds to hours, minutes and seconds",
    "computes the area of a polygon",
]

CODE = [
    "Write a Python function that {task}.",
    "Write a Python function that {task}. Include a docstring and an example.",
    "Write a {language} function that {task}.",
    "Write a Python class for a {structure}.",
    "Implement a {structure} in {language}.",
    "Explain {concept} in Python with a short example.",
    "Write a Python script that {task}, and print the result.",
    "Write a SQL query that selects all {table} created in {month}, newest first.",
    "Write a SQL query that counts the {table} per {entity}.",
    "Write a function that {task}, then explain how it works.",
    "What is {concept}? Show a code example.",
    "How would you test a function that {task}? Write the tests.",
    "Write an HTML page with a form for a {entity} and a {colour} button.",
    "Write a bash script that backs up a folder called {entity} every {day}.",
    "Write a Python dataclass for a {entity} with five fields.",
    "Write a function that {task} without using built-in helpers.",
    'Complete this code:\n\n```python\ndef solve(data):\n    """A function that {task}."""\n```',
    "Show how to use {concept} in {language}.",
    'Write a regular expression in Python that finds a {entity} number such as "{n:100-999}-{n:10-99}" in a text.',
    "Write pseudocode for a program that {task}.",
    "Create a CSS style for a {colour} button on the page of a {place}.",
    "Write a Python class called {entity} for a program about a {place}, with methods to add, remove and list.",
    "Write a Flask route that returns a {entity} as JSON.",
    "Give me a one-line Python expression that {task}.",
]

MATHS_TASKS = [
    "gsm_symbolic",
    "gsm_symbolic",
    "chain_sum",
    "basic_arithmetic",
    "simple_equations",
    "gcd",
    "lcm",
    "fraction_simplification",
    "simple_geometry",
    "prime_factorization",
    "products",
    "time_intervals",
    "number_sequence",
    "number_sorting",
    "coin_flip",
    "leg_counting",
    "decimal_chain_sum",
    "complex_arithmetic",
    "calendar_arithmetic",
    "number_filtering",
    "gsm_symbolic",
    "base_conversion",
    "advanced_geometry",
    "count_primes",
]

FACTS = [
    "{name} has {n:12-90} apples and gives {n:2-11} of them to {name}. How many apples are left?",
    "A {product} costs ${n:20-400}. It is reduced by {n:5-60} percent. What is the new price?",
    "A train travels {n:50-180} km per hour for {n:2-9} hours. How far does it go? Explain.",
    "{name} reads {n:10-60} pages a day. How many days does a book of {n:200-900} pages take?",
    "What is {n:11-99} times {n:11-99}? Show your work.",
    "Solve for x: {n:2-9}x + {n:3-40} = {n:50-150}. Show each step.",
    "A rectangle is {n:3-40} cm long and {n:3-30} cm wide. Find its area and its perimeter.",
    "Find the mean and the median of {n:1-50}, {n:1-50}, {n:1-50}, {n:1-50} and {n:1-50}.",
    "{name} saves ${n:20-300} a month. How much is saved after {n:2-6} years?",
    "What is {n:5-95} percent of {n:100-900}?",
    "A {job} earns ${n:12-60} an hour and works {n:20-45} hours a week. What is the pay for {n:2-8} weeks?",
    "A recipe for {n:2-6} people needs {n:100-600} g of flour. How much is needed for {n:7-20} people?",
    "A circle has a radius of {n:2-25} cm. What are its circumference and area?",
    "Explain how to add {n:1-8}/{n:9-12} and {n:1-6}/{n:7-8}.",
    "In a class of {n:20-35} students, {n:5-18} play football. What fraction does not? Explain step by step.",
    "Convert {n:2-90} kilometres to miles and explain how.",
    "A box holds {n:6-24} {colour} and {n:6-24} {colour} balls. What is the probability of drawing a {colour} one?",
    "{name} buys {n:2-9} notebooks at ${n:2-9} each and {n:2-9} pens at ${n:1-5} each. What is the total?",
    "What are the factors of {n:24-240}?",
    "A car uses {n:5-12} litres of fuel for 100 km. How much does it need from {city} to a town {n:150-900} km away?",
    "{name} is {n:5-20} years older than {name}. Together they are {n:40-90}. How old is each?",
    "Explain the Pythagorean theorem with a triangle of sides {n:3-12} and {n:3-12}.",
    "Invest ${n:500-9000} at {n:2-9} percent a year. What is it worth after {n:2-5} years?",
    "Write a word problem about a {animal} and a {job}, then solve it.",
]

SUMMARY = [
    "Summarise the following text in one sentence:",
    "Summarize this passage in two sentences:",
    "Give the main points of this text as a bulleted list:",
    "What is this text about? Answer briefly:",
    "Write a short summary of the text below:",
    "Condense this passage to half its length:",
    "Summarise this for a ten-year-old:",
    "Give this passage a title and a one-sentence summary:",
    "TL;DR of the following text:",
    "List three key points from this text:",
    "Rewrite this passage in simple modern English:",
    "Write one headline and two sentences that sum up the text:",
]

REPORTS = {
    "start": [
        "The {place} of {city} reopened on {day} after {n:2-18} months of repairs.",
        "Minutes of the meeting on {day}: {name}, {name} and {name} discussed the {place} project.",
        "{company} announced on {day} that it will sell a new {product} in {country} from {month}.",
        "A {adjective} {animal} escaped from the {place} in {city} on {day} morning and was found by a {job}.",
        "Dear team, as you know {company} is moving its office to {city} in {month}.",
        "I bought this {product} from {company} in {month} and have used it nearly every day since.",
        "{name}, a {job} from {city}, has won a national prize for {hobby}.",
        "Researchers in {country} published a study about {topic} in {month}.",
        "Last {month}, {name} left a job as a {job} in {city} in order to spend more time on {hobby}.",
        "Heavy rain closed the {place} in {city} for {n:2-9} days, and {n:20-400} people had to leave their homes.",
    ],
    "middle": [
        "The work cost about ${n:2-90} million, which is {n:5-40} percent more than was planned.",
        "{name}, who has been a {job} for {n:4-30} years, said that many people had asked for it.",
        "More than {n:100-900} visitors came on the first day, although it was a {day}.",
        "Some neighbours complained about the noise and asked the council to close the {place} at {n:8-11} in the evening.",
        "The old {product} was too heavy and broke after only {n:2-11} months.",
        "A survey of {n:200-900} people found that {n:30-80} percent would like to learn more about {topic}.",
        "A second group, led by {name}, will look at the costs and report back in {month}.",
        "Schools in {city} have begun to teach {topic} to children from the age of {n:6-12}.",
        "It took {n:2-9} volunteers and a {job} to carry everything inside.",
        "The weather was better than expected, and the guests stayed until {n:9-11} at night.",
        "According to {company}, delivery will take between {n:2-5} and {n:6-14} days.",
        "Not everyone agrees: {name} called the plan a waste of time.",
        "The colour is {colour}, not {colour} as in the picture, but the quality is good.",
        "Tickets will cost ${n:5-40}, and children under {n:5-12} can enter for free.",
        "During the first week there were problems with the heating, and a {job} had to be called twice.",
        "Since then {name} has started to keep a {animal} and writes about it every {day}.",
    ],
    "end": [
        "The next meeting will be held on {day}.",
        "A decision is expected in {month}.",
        "{name} hopes that others will follow.",
        "If nothing changes, the {place} may have to close next year.",
        "All in all, most people seem to be happy with the result.",
        "More information can be found at the {place}.",
        "The mayor of {city} thanked everyone who had helped.",
        "I would buy it again, but only at a lower price.",
    ],
}

JSON_FORMS = [
    'Extract the name, age, job and city as JSON: "{name} is a {n:20-70}-year-old {job} who lives in {city}."',
    "Create a JSON object that describes a {entity} with five fields.",
    'Create a JSON array of three {entity} objects with the keys "id", "name" and "price".',
    "Turn this order into JSON: {n:2-9} x {product} ({colour}) and {n:2-9} x {product}, for {name} in {city}, paid on {day}.",
    "Generate a JSON profile for a fictional {job} named {name} from {country}.",
    "Write a JSON schema for a {entity}.",
    'Extract all people and places from this text as JSON with the keys "people" and "places": "{name} met {name} at the {place} in {city}."',
    'Return the sentiment of this review as JSON with the keys "sentiment" and "reason": "The {product} is {adjective}-looking but broke after {n:2-9} days."',
    "Convert this to JSON:\nname: {name}\nage: {n:18-80}\nhobby: {hobby}\ncity: {city}",
    "Give me a JSON configuration for a web server of {company} on port {n:1000-9999} with logging on.",
    'Make a JSON list of {n:3-6} quiz questions about {topic}, each with "question" and "answer".',
    "Convert this CSV to JSON:\nname,job,age\n{name},{job},{n:20-60}\n{name},{job},{n:20-60}",
    'Respond only with JSON. Plan a day in {city} with the keys "morning", "afternoon" and "evening".',
    "Write a JSON recipe for a dish with {food} and {food}: title, ingredients, steps.",
    'Extract the event as JSON (title, day, time, place): "On {day} at {n:1-11} pm there is a talk about {topic} at the {place} of {city}."',
    "Represent a {animal} as JSON with the fields name, legs, habitat, diet and lifespan.",
    'Fill this JSON for the {product} of {company}: {"name": "", "price": 0, "colour": "", "tags": []}',
    "Write the JSON body of a request that books a table for {n:2-9} people on {day} in {city} in the name of {name}.",
    "Classify the words {animal}, {food}, {artifact} and {plant} into categories. Answer in JSON.",
    'Translate this into a JSON function call with "name" and "arguments": "Book a flight from {city} to {city} on {n:1-28} {month} for {n:2-6} people."',
    "Give the weather in {city} in {month} as JSON with temperature, humidity and a description.",
    "Make a JSON to-do list for someone who wants to {goal}, with priority and deadline.",
    'Fix this JSON: {"name": "{name}", "age": {n:20-60}, "city": "{city}" "job": "{job}",}',
    "Create a JSON resume for {name}, a {job} with {n:2-20} years of experience at {company}.",
    "Return a JSON object that maps {n:3-6} countries to their capitals, {country} among them.",
    "Write a nested JSON for a family: {name} and {name} have {n:2-4} children and a {animal}.",
]

LIBRARY_MODULES = [
    "bisect",
    "heapq",
    "textwrap",
    "statistics",
    "calendar",
    "colorsys",
    "fnmatch",
    "shutil",
    "string",
    "difflib",
    "random",
    "fractions",
    "collections",
    "functools",
    "posixpath",
    "glob",
    "csv",
    "json.encoder",
    "json.decoder",
    "queue",
    "sched",
    "shlex",
    "copy",
    "pprint",
    "ast",
    "base64",
    "bdb",
    "cmd",
    "configparser",
    "contextlib",
    "datetime",
    "dis",
    "gettext",
    "gzip",
    "html",
    "http.cookies",
    "inspect",
    "ipaddress",
    "linecache",
    "locale",
    "mimetypes",
    "operator",
    "pathlib",
    "platform",
    "reprlib",
    "selectors",
    "tempfile",
    "timeit",
    "tokenize",
    "traceback",
    "types",
    "typing",
    "urllib.parse",
    "uuid",
    "warnings",
    "wave",
    "weakref",
    "zipfile",
]
