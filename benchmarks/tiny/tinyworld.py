"""A seeded toy world that a 100k-parameter model can know, asked as seven tasks.

The idea: facts are composed, not listed.  A name has a given and a family part ("ada ash"), each
part belongs to hidden groups, and a table over pairs of groups says what kind of animal ada ash
is, what color, whether brave.  Kinds have properties of their own ("every fox lives in the den"),
so many questions take two steps.  Goals ("to cut the rope") and scripts ("first wash cups then
pour tea then ...") are composed in the same way.  So a model has to compute its answers instead of
storing them in embedding rows, and what pruning breaks can be repaired with *other* instances of
the same rules.

Names, goals, scripts and pairs of people are split once into a training and an evaluation part.

* Pre-training sees questions about the training part and statements about whole kinds.
* Recovery rows are drawn from the same training questions, without repetition.
* Evaluation documents ask about the evaluation part only.  Neither their prompts nor the facts
  they ask for occur in pre-training or recovery, in any form, and no two documents of a task ask
  for the same fact (two people may meet again, but in another order or with the other pronoun).
  The words, and the rules behind the answers, occur in both: "ada ash lives in the den" is new,
  but that ada ash is a fox and that foxes live there follows from what is known.

The tasks mirror the skills, not the difficulty, of BoolQ, PIQA, HellaSwag, WinoGrande, ARC (easy
and challenge) and OpenBookQA.  Text is words with single spaces between; every word is a token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Part = Literal["train", "eval"]
Item = TypeVar("Item")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SPECIAL: Final = _words("<pad> <bos> <eos> <unk>")
GLUE: Final = _words(
    "? . what is kind color who was he she met and then first to the use can in will every lives "
    "eats"
)
YES_NO: Final = _words("yes no")
MEN: Final = _words("ben cole eli finn hugo jack liam nils otto sven walt zeno")
WOMEN: Final = _words("ada cleo dora gwen iris kara mona opal rosa tess vera yara")
GIVEN: Final = MEN + WOMEN
FAMILY: Final = _words(
    "ash beck dale elm frost gray hale hart inge joss king lane moss nash oaks pike reed sage tate "
    "ulm vale wood york zane"
)
KINDS: Final = _words("fox owl bear frog hare crow seal mole")
COLORS: Final = _words("red blue green black white brown pink gold")
TRAITS: Final = _words("brave shy")
SKILLS: Final = _words("swim climb fly run")
HOMES: Final = _words("den tree cave pond field roof coast burrow")
FOODS: Final = _words("fish seeds honey flies clover corn crabs worms")
SEASONS: Final = _words("spring summer autumn winter")
PASTIMES: Final = _words("sleep dance build travel hunt sing dig rest")
ACTIONS: Final = _words(
    "cut split trim carve lift haul raise shift clean rinse scrub wipe join bind fix glue scoop "
    "mark drill press"
)
OBJECTS: Final = _words(
    "rope wire cloth paper plank beam log branch stone brick slab tile pipe rod bolt chain pot pan "
    "jug bowl rug sack net tent soil sand clay gravel window mirror lamp door"
)
TOOLS: Final = _words("saw knife shears chisel crane lever brush hose mop needle clamp hammer")
STEPS: Final = _words("wash fill heat stir chop pour cool serve")
THINGS: Final = _words("cups tea soup rice milk beans eggs dough")
MOODS: Final = _words("tired happy late hungry sick lost")

CHOICES: Final = {
    "tiny_boolq": 2,
    "tiny_piqa": 2,
    "tiny_hellaswag": 4,
    "tiny_winogrande": 2,
    "tiny_arc_easy": 4,
    "tiny_arc_challenge": 4,
    "tiny_openbookqa": 4,
}
"""The tasks and their numbers of choices."""
TASKS: Final = tuple(CHOICES)

NAME_GROUPS: Final = (6, 6)
GOAL_GROUPS: Final = (5, 8)
SCRIPTS: Final = 410
SCRIPT_LENGTH: Final = 5
EVALUATION: Final = {"names": 200, "goals": 320, "pairs": 80, "scripts": 110}
"""Sizes of the evaluation parts; all the rest is for training."""


@dataclass(frozen=True)
class Question:
    """A prompt, its one right answer, and the wrong answers that may be offered beside it."""

    prompt: str
    answer: str
    wrong: Sequence[str]


@dataclass(frozen=True)
class Topic:
    """One thing that a task asks about every name, or about every name by way of its kind."""

    task: str
    prompt: str
    answers: Mapping[str, str]
    options: Sequence[str]

    def question(self, subject: str, key: str) -> Question:
        """Asks about a subject; the key is the name or kind that the answer is found under."""
        return _question(self.prompt.format(subject), self.answers[key], self.options)


class World:
    """All rules, facts and splits that follow from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rng = _generator("world", seed)

        def named(task: str, prompt: str, options: Sequence[str]) -> Topic:
            return Topic(task, prompt, _composed(rng, GIVEN, FAMILY, options, NAME_GROUPS), options)

        def by_kind(task: str, prompt: str, options: Sequence[str]) -> Topic:
            values = [*options] * (len(KINDS) // len(options))
            return Topic(task, prompt, _matched(rng, KINDS, values), options)

        kind = named("tiny_arc_easy", "what kind is {} ?", KINDS)
        self.kind = kind.answers
        self.name_topics = [
            kind,
            named("tiny_arc_easy", "what color is {} ?", COLORS),
            *(named("tiny_boolq", f"is {{}} {trait} ?", YES_NO) for trait in TRAITS),
        ]
        self.kind_topics = [
            *(by_kind("tiny_boolq", f"can {{}} {skill} ?", YES_NO) for skill in SKILLS),
            *(by_kind("tiny_arc_challenge", f"in {s} {{}} will", PASTIMES) for s in SEASONS),
            by_kind("tiny_openbookqa", "{} lives in the", HOMES),
            by_kind("tiny_openbookqa", "{} eats", FOODS),
        ]
        self.tool = _composed(rng, ACTIONS, OBJECTS, TOOLS, GOAL_GROUPS)
        # Two events fix the next.  Given the second, the rule is one-to-one in the first, so that
        # scripts never run together.
        self.next_step = {step: _matched(rng, STEPS, STEPS) for step in STEPS}
        self.next_thing = {thing: _matched(rng, THINGS, THINGS) for thing in THINGS}
        self.names = _split(rng, [*self.kind], EVALUATION["names"])
        self.goals = _split(rng, [*self.tool], EVALUATION["goals"])
        self.pairs = _split(rng, [*product(MEN, WOMEN)], EVALUATION["pairs"])
        self.scripts = _split(rng, self._scripts(rng), EVALUATION["scripts"])

    @property
    def vocabulary(self) -> list[str]:
        """Every word once, special tokens first; a word's place is its token id."""
        words = SPECIAL + GLUE + YES_NO + GIVEN + FAMILY + KINDS + COLORS + TRAITS + SKILLS + HOMES
        words += FOODS + SEASONS + PASTIMES + ACTIONS + OBJECTS + TOOLS + STEPS + THINGS + MOODS
        return [*dict.fromkeys(words)]

    def questions(self, task: str, part: Part) -> list[Question]:
        """Lists all that can be asked about one part of the world in one task."""
        askers = {
            "tiny_piqa": self._tools,
            "tiny_hellaswag": self._endings,
            "tiny_winogrande": self._pronouns,
        }
        return [*askers.get(task, partial(self._about_names, task))(part)]

    def statements(self) -> list[Question]:
        """Lists what holds for whole kinds; no name, hence no part of the world, occurs in it."""
        return [t.question(f"every {kind}", kind) for t in self.kind_topics for kind in KINDS]

    def _scripts(self, rng: random.Random) -> list[list[str]]:
        """Draws scripts of distinct events, no two of which share a pair of neighbors."""
        scripts: list[list[str]] = []
        taken: set[tuple[str, str]] = set()
        while len(scripts) < SCRIPTS:
            steps, things = rng.choices(STEPS, k=2), rng.choices(THINGS, k=2)
            while len(steps) < SCRIPT_LENGTH:
                steps.append(self.next_step[steps[-1]][steps[-2]])
                things.append(self.next_thing[things[-1]][things[-2]])
            script = [" ".join(event) for event in zip(steps, things, strict=True)]
            links = {*pairwise(script)}
            if len({*script}) == SCRIPT_LENGTH and not links & taken:
                taken |= links
                scripts.append(script)
        return scripts

    def _about_names(self, task: str, part: Part) -> Iterator[Question]:
        for topic in self.name_topics + self.kind_topics:
            for name in self.names[part] if topic.task == task else ():
                key = name if topic in self.name_topics else self.kind[name]
                yield topic.question(name, key)

    def _tools(self, part: Part) -> Iterator[Question]:
        for goal in self.goals[part]:
            action, thing = goal.split()
            # Tempting tools do the same to another thing, or something else to the same thing.
            near = {self.tool[f"{action} {other}"] for other in OBJECTS}
            near |= {self.tool[f"{other} {thing}"] for other in ACTIONS}
            yield _question(f"to {action} the {thing} use the", self.tool[goal], sorted(near))

    def _endings(self, part: Part) -> Iterator[Question]:
        for script in self.scripts[part]:
            for place in range(2, SCRIPT_LENGTH):
                step, thing = script[place].split()
                near = [f"{step} {other}" for other in THINGS]
                near += [f"{other} {thing}" for other in STEPS if other != step]
                new = [event for event in near if event not in script[:place]]
                yield _question(f"first {' then '.join(script[:place])} then", script[place], new)

    def _pronouns(self, part: Part) -> Iterator[Question]:
        rng = _generator("moods", self.seed)
        for people in self.pairs[part]:
            for pronoun, answer in zip(("he", "she"), people, strict=True):
                for first, second in (people, people[::-1]):
                    # The mood does not matter, so in evaluation it would only repeat a question.
                    for mood in MOODS if part == "train" else [rng.choice(MOODS)]:
                        told = f"{first} met {second} and {pronoun} was {mood} ."
                        yield _question(f"{told} who was {mood} ?", answer, people)


def pretraining_documents(world: World, count: int, shares: Mapping[str, float]) -> list[Question]:
    """Draws pre-training documents, with repetition.

    Args:
        world: What they are about.
        count: Number of documents.
        shares: Frequency of each task's training questions; what is missing to 1 is statements.
    """
    rng = _generator("pretraining", world.seed)
    pools = [world.questions(task, "train") for task in shares] + [world.statements()]
    weights = [*shares.values(), 1 - sum(shares.values())]
    return [rng.choice(pool) for pool in rng.choices(pools, weights, k=count)]


def recovery_rows(world: World, count: int = 4000) -> list[dict[str, str]]:
    """Draws distinct Alpaca rows, as evenly over the tasks as the smaller pools allow."""
    rng = _generator("recovery", world.seed)
    pools = sorted((world.questions(task, "train") for task in TASKS), key=len)
    rows: list[Question] = []
    for index, pool in enumerate(pools):
        rows += rng.sample(pool, min(len(pool), (count - len(rows)) // (len(pools) - index)))
    rng.shuffle(rows)
    return [{"instruction": row.prompt, "input": "", "output": row.answer} for row in rows]


def task_documents(world: World, task: str, count: int = 320) -> list[dict[str, Any]]:
    """Draws multiple-choice documents about the evaluation part, each about another fact.

    Returns:
        Documents ``{"context": str, "choices": [str, ...], "gold": int}``.  All places of the
        right choice are equally frequent; so are yes and no where these are the choices.
    """
    rng = _generator(task, world.seed)
    pool = world.questions(task, "eval")
    rng.shuffle(pool)
    if pool[0].answer in YES_NO:
        sides = ([question for question in pool if question.answer == word] for word in YES_NO)
        pool = [question for pair in zip(*sides, strict=False) for question in pair]
    documents = []
    for index, question in enumerate(pool[:count]):
        choices = rng.sample(question.wrong, CHOICES[task] - 1)
        place = index // 2 % CHOICES[task]  # halved, for yes and no alternate
        choices.insert(place, question.answer)
        documents.append({"context": question.prompt, "choices": choices, "gold": place})
    rng.shuffle(documents)
    return documents


def _generator(*key: object) -> random.Random:
    return random.Random(" ".join(map(str, key)))  # noqa: S311


def _question(prompt: str, answer: str, options: Sequence[str]) -> Question:
    return Question(prompt, answer, [option for option in options if option != answer])


def _split(rng: random.Random, items: list[Item], evaluation: int) -> dict[Part, list[Item]]:
    shuffled = rng.sample(items, len(items))
    return {"eval": shuffled[:evaluation], "train": shuffled[evaluation:]}


def _matched(rng: random.Random, keys: Sequence[str], values: Sequence[str]) -> dict[str, str]:
    return dict(zip(keys, rng.sample(values, len(values)), strict=True))


def _composed(
    rng: random.Random,
    firsts: Sequence[str],
    seconds: Sequence[str],
    values: Sequence[str],
    groups: tuple[int, int],
) -> dict[str, str]:
    """Gives every pair of words a value that depends only on the hidden groups of the two."""
    first = {word: i % groups[0] for i, word in enumerate(rng.sample(firsts, len(firsts)))}
    second = {word: i % groups[1] for i, word in enumerate(rng.sample(seconds, len(seconds)))}
    cells = [*product(range(groups[0]), range(groups[1]))]
    value = {cell: values[i % len(values)] for i, cell in enumerate(rng.sample(cells, len(cells)))}
    return {f"{a} {b}": value[first[a], second[b]] for a, b in product(firsts, seconds)}
