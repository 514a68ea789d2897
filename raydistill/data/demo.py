"""The embedded demo corpus: short made-up news reports with one-line summaries that say it in other words.

Every report has one event. Its facts are spread over three sentences, none of them the first; other sentences
carry facts of the same kinds that do not count, and say so ("last year", "in an unrelated case"). The summary
changes the verbs, turns a town into its region, two figures into a trend or a winner, a day into "this week".
So copying scores little, and a small model learns it from nothing in minutes.
"""

import functools
from dataclasses import dataclass
from random import Random

SPLIT_SIZES = {"train": 6000, "validation": 400, "test": 400}
SOURCE_WORDS_RANGE = (45, 75)
_SEED = "raydistill demo 1"


def _words(text: str) -> list[str]:
    return text.split()


SURNAMES = _words(
    "Adler Barlow Benson Calder Carver Dalton Drake Ellis Farrow Finch Garner Gibbs Hale Hobson Holt Ingram "
    "Jarvis Keller Kemp Lang Lowry Marsh Mercer Nolan Osman Palmer Pike Quinn Reeves Rowan Sadler Shaw "
    "Tanner Thorne Tully Usher Vance Weller Yates Zeller"
)

REGIONS = {
    "coastal": _words("Saltby Gullmouth Wraymoor Pennick Tidewell"),
    "highland": _words("Cragford Stonelow Upperby Ravenscar Heathcote"),
    "lakeland": _words("Merewick Alderwater Swanholm Reedham Tarnby"),
    "border": _words("Gatesend Wallbridge Marchton Tollgate Kingsdyke"),
    "valley": _words("Deepdale Millbeck Orchard Fordham Lowfield"),
    "woodland": _words("Oakley Beechford Elmhurst Fernhill Ashgrove"),
}
REGION_OF = {town: region for region, towns in REGIONS.items() for town in towns}

TENS_WORDS = ("ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

PERIODS = {
    "on Monday": "this week",
    "on Tuesday": "this week",
    "on Thursday": "this week",
    "on Saturday": "this weekend",
    "on Sunday": "this weekend",
    "in four weeks": "next month",
    "once this month is over": "next month",
    "in June": "this summer",
    "in August": "this summer",
    "in October": "this autumn",
    "when the leaves fall": "this autumn",
    "as soon as the snow melts": "next spring",
    "in April": "next spring",
}

ROLES = {
    "looked after patients": "nurse",
    "taught young children": "teacher",
    "flew small planes": "pilot",
    "made bread at night": "baker",
    "kept cattle and sheep": "farmer",
    "worked on fishing boats": "sailor",
    "argued cases in court": "lawyer",
    "served in the army": "soldier",
    "sang on stage": "singer",
    "ran a hotel kitchen": "cook",
}

CAUSES = {
    "bills that nobody could pay": "debts",
    "the price of gas and oil": "fuel costs",
    "how few people came in": "poor sales",
    "deep cracks in the walls": "safety fears",
    "machines that broke down every day": "old machines",
    "a lack of young workers": "staff shortages",
    "a larger bill from the tax office": "taxes",
    "letters from angry neighbours": "complaints",
}

CRIMES = {
    "took money from the till": "theft",
    "set a barn alight": "arson",
    "drove a van into a wall after drinking": "drunk driving",
    "sold false paintings as real": "fraud",
    "hit a stranger in a bar": "assault",
    "carried tobacco past the guards at night": "smuggling",
}

DAMAGE = {
    "Flames had eaten the roof": "fire",
    "Water had stood a metre deep inside": "flood",
    "Strong winds had torn off the tiles": "storm",
    "The ground had shaken it to its base": "earthquake",
}

WEATHER = {
    "The river may leave its banks": "floods",
    "Deep snow may block the roads": "snowstorms",
    "Very strong winds may bring down trees": "gales",
    "The thermometer may pass all records": "heatwaves",
}

WORKS = {
    "pages on how cows and sheep are kept": "book about farmers",
    "pages on the men who go to sea": "book about sailors",
    "scenes filmed in a crowded ward": "film about nurses",
    "scenes filmed in a small class": "film about teachers",
    "verses sung by those who fought": "song about soldiers",
    "verses sung over warm ovens": "song about bakers",
}


@dataclass(frozen=True)
class EventTemplate:
    """One kind of event: wordings of its three sentences, its summary, and look-alikes that do not count.

    The summary's wording goes with the first sentence's, so that a report has one right summary.
    """

    subjects: tuple[str, ...]
    sentences: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    summaries: tuple[str, ...]
    distractors: tuple[str, ...]


EVENT_TEMPLATES = (
    EventTemplate(  # a new head
        ("hospital", "library", "school", "museum"),
        (
            (
                "{P} will take over at the top of the {place} {day}.",
                "The board of the {place} gave its highest post to {P}, who starts {day}.",
            ),
            (
                "It serves {T} and the farms around it.",
                "Its doors stand close to the market square in {T}.",
            ),
            (
                "The new boss {role_said} for {n} months before that.",
                "For many years the new boss {role_said}.",
            ),
        ),
        (
            "{P}, a former {role}, will lead a {region} {place} {when}",
            "A {region} {place} picks former {role} {P} as its head {when}",
        ),
        ("{Q} took over at the top of the {place} in {U}", "the board in {U} gave its highest post to {Q}"),
    ),
    EventTemplate(  # a closure
        ("brewery", "factory", "bakery", "mill", "hotel"),
        (
            (
                "The gates of the {place} will be locked for good {day}.",
                "The last lamp in the {place} will go out {day}.",
            ),
            (
                "It still gives work to {n} people in {T}.",
                "In {T} it pays the wages of {n} men and women.",
            ),
            ("{P}, who owns it, blames {cause_said}.", "Its owner {P} points to {cause_said}."),
        ),
        (
            "{P} shuts a {region} {place} {when} over {cause}, costing {n} jobs",
            "{cause} force {P} to end {n} jobs at a {region} {place} {when}",
        ),
        ("the {place} in {U} gave work to {m} people", "{Q} locked the gates of the {place} in {U}"),
    ),
    EventTemplate(  # visitors
        ("museum", "zoo", "castle", "garden"),
        (
            (
                "Some {n} guests an hour walk through the {place}.",
                "The {place} now sells {n} tickets an hour.",
            ),
            (
                "There were only {m} an hour when {P} was put in charge.",
                "At the time when {P} took the keys there were {m}.",
            ),
            ("Buses bring the guests to {T} all day.", "The guests come to {T} by train and by boat."),
        ),
        (
            "Visitor numbers at a {region} {place} {trend} under {P}",
            "Ticket sales {trend} at the {region} {place} that {P} runs",
        ),
        ("the {place} in {U} sold {k} tickets an hour", "{Q} was put in charge of the {place} in {U}"),
    ),
    EventTemplate(  # an election: the one with more votes wins
        ("mayor", "judge", "sheriff"),
        (
            ("Of every hundred votes {n} went to {P}.", "{P} was the choice of {n} in a hundred voters."),
            ("{R} could count on {m}.", "Only one other name was on the list, and {R} got {m}."),
            (
                "The people of {T} needed a new {place}.",
                "Voting for the post of {place} in {T} had gone on all day.",
            ),
        ),
        (
            "{winner} beats {loser} {margin} in the race for {region} {place}",
            "{region} voters choose {winner} {margin} over {loser} as {place}",
        ),
        ("{Q} was the choice of {k} in a hundred voters", "the people of {U} needed a new {place}"),
    ),
    EventTemplate(  # a rescue
        ("children", "walkers", "riders", "students"),
        (
            (
                "The {place} had been sitting on the rocks since dawn.",
                "The {place} had lost their way in the dark.",
            ),
            (
                "A crew came from {T} {day} with ropes and lamps.",
                "Boats left {T} {day} to look for them.",
            ),
            ("{P}, the first to reach them, counted {n}.", "All {n} came down on the arm of {P}."),
        ),
        (
            "{P} saves {n} stranded {place} with a {region} team {when}",
            "{region} rescuers and {P} bring {n} lost {place} home {when}",
        ),
        ("{Q} brought {m} {place} down to {U}", "a crew from {U} looked for {m} {place}"),
    ),
    EventTemplate(  # a match: the side with more points wins
        ("football", "rugby", "hockey", "basketball"),
        (
            (
                "In the {place} final the side from {T} reached {n} points.",
                "The {place} players of {T} ended on {n} points.",
            ),
            ("{V}, on the other half of the field, had {m}.", "Their guests from {V} ended on {m}."),
            ("Nobody ran more than {P}.", "The crowd sang the name of {P} all night."),
        ),
        (
            "{P} shines as {win_region} {place} team beats {lose_region} rivals {margin}",
            "{win_region} side {margin} defeats {lose_region} team in {P} {place} show",
        ),
        ("the side from {U} reached {k} points", "the crowd in {U} sang the name of {Q}"),
    ),
    EventTemplate(  # a sentence in court
        ("prison", "jail"),
        (
            (
                "A judge in {T} will explain the decision {day}.",
                "{day_first} a judge in {T} will speak.",
            ),
            ("For {n} months {P} would not see home.", "{P} must spend {n} months in a cell."),
            (
                "Before the night when the accused {crime_said}, there had been better days: the accused {role_said}.",
                "The accused, who once {role_said}, {crime_said}.",
            ),
        ),
        (
            "Former {role} {P} gets {n} months in {region} {place} for {crime}",
            "{region} court jails former {role} {P} {when} for {crime}",
        ),
        ("{Q} spent {m} months in a cell in {U}", "a judge in {U} let {Q} go home"),
    ),
    EventTemplate(  # a reopening
        ("bridge", "theatre", "station", "church"),
        (
            (
                "People can enter the {place} again {day}.",
                "The fence around the {place} comes down {day}.",
            ),
            ("{damage_said}.", "{damage_said}, and it had stood empty since."),
            (
                "Builders under {P} spent {n} weeks in {T} on it.",
                "{P} had kept {n} builders in {T} busy with it.",
            ),
        ),
        (
            "{region} {place} reopens {when} after {P} repairs {damage} damage",
            "{P} finishes {damage} repairs so {region} {place} can open {when}",
        ),
        ("{Q} kept {m} builders in {U} busy", "the fence around the {place} in {U} came down"),
    ),
    EventTemplate(  # a strike
        ("nurses", "drivers", "teachers", "miners", "cleaners"),
        (
            ("The {place} of {T} will stay at home {day}.", "No {place} will come to work in {T} {day}."),
            ("They are paid {low} coins an hour.", "An hour brings them {low} coins."),
            (
                "{P}, who speaks for them, wants {high}.",
                "It ought to be {high}, says {P}, who leads their union.",
            ),
        ),
        (
            "{region} {place} led by {P} strike {when} {demand}",
            "{P} calls {region} {place} out on strike {when} {demand}",
        ),
        ("the {place} of {U} were paid {k} coins an hour", "{Q} spoke for the {place} in {U}"),
    ),
    EventTemplate(  # a prize
        ("medal", "award", "cup"),
        (
            ("Nobody stood higher on the stage than {P}.", "All the judges put {P} first."),
            ("They had been handed {work_said}.", "What had moved them were {work_said}."),
            (
                "The {place} was given out in {T} {day}.",
                "Guests in {T} saw the {place} change hands {day}.",
            ),
        ),
        (
            "{P} wins {region} {place} {when} for a {work}",
            "A {work} earns {P} the top {region} {place} {when}",
        ),
        ("the {place} was given out in {U}", "all the judges put {Q} first"),
    ),
    EventTemplate(  # a weather warning
        ("families", "farmers", "tourists", "shopkeepers"),
        (
            ("{weather_said} {day}.", "{weather_said}, most likely {day}."),
            (
                "Police in {T} will close {n} streets.",
                "A hall in {T} has beds for {n} people.",
            ),
            (
                "{P} asks {place} not to leave the house.",
                "Doors should stay shut, {P} writes to {place}.",
            ),
        ),
        (
            "{P} tells {region} {place} to stay indoors as {weather} loom {when}",
            "{region} {place} must prepare for {weather} {when}, {P} warns",
        ),
        ("{m} streets in {U} were closed", "{Q} asked {place} in {U} not to leave the house"),
    ),
    EventTemplate(  # waiting times
        ("clinic", "surgery", "hospital"),
        (
            (
                "A patient at the {place} now waits {n} days.",
                "The {place} finds a bed after {n} days.",
            ),
            ("It was {m} before the year began.", "When the year began it took {m}."),
            (
                "{P}, its head, hired people who once {role_said}.",
                "In {T} its head {P} found helpers who once {role_said}.",
            ),
        ),
        (
            "Waits at {P} {place} {trend} after hiring of former {roles}",
            "Waiting times {trend} at {place} where {P} hired former {roles}",
        ),
        ("a patient in {U} waited {k} days", "{Q} was the head of a {place} in {U}"),
    ),
)

DISTRACTOR_CUES = (
    "Last year",
    "A decade ago",
    "In an unrelated case",
    "Many years earlier",
    "In an old story",
    "Under the last government",
)
OPENINGS = (
    "Rain fell over {U} for most of the morning.",
    "It was a quiet start to the day in {U}.",
    "The shops of {U} had just opened.",
    "{Q} was reading the paper in {U}.",
    "Few people in {U} expected any news.",
    "There was fog on the road from {U}.",
)
CLOSINGS = (
    "More is not known yet.",
    "{Q} of {U} did not want to comment.",
    "The local paper has printed a map.",
    "Friends in {U} were glad to hear it.",
)


@functools.cache
def _generate_splits() -> dict[str, tuple[tuple[str, str, str], ...]]:
    """Every split from one stream; a source or target seen before is dropped, so that splits share none."""
    rng = Random(_SEED)
    seen: set[str] = set()
    rows: list[tuple[str, str]] = []
    while len(rows) < sum(SPLIT_SIZES.values()):
        source, target = _generate_report(rng)
        if (
            source in seen
            or target in seen
            or not SOURCE_WORDS_RANGE[0] <= len(source.split()) <= SOURCE_WORDS_RANGE[1]
        ):
            continue
        seen |= {source, target}
        rows.append((source, target))
    splits, at = {}, 0
    for split, size in SPLIT_SIZES.items():
        splits[split] = tuple((f"{split}-{i}", *row) for i, row in enumerate(rows[at : at + size]))
        at += size
    return splits


def demo_rows(split: str) -> list[dict[str, str]]:
    """The rows (`id`, `source`, `target`) of a split: 6000 train, 400 validation, 400 test.

    KeyError for another split. The same in every process and Python version; no source and no target is
    in two splits.
    """
    return [{"id": i, "source": source, "target": target} for i, source, target in _generate_splits()[split]]


def _pick(rng: Random, items: tuple[str, ...] | list[str]) -> str:
    # Only `random()` is promised to give the same numbers in every Python version.
    return items[int(rng.random() * len(items))]


def _sample(rng: Random, items: tuple[str, ...] | list[str], count: int) -> list[str]:
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]


def _event_facts(rng: Random, subjects: tuple[str, ...]) -> dict[str, str]:
    """One event's facts, as the report says them and as the summary does."""
    facts = dict(zip("PR", _sample(rng, SURNAMES, 2), strict=True))
    regions = _sample(rng, list(REGIONS), 2)
    facts["T"], facts["V"] = (_pick(rng, REGIONS[region]) for region in regions)
    facts["n"], facts["m"] = _sample(rng, TENS_WORDS, 2)
    facts["place"] = _pick(rng, subjects)
    tables = {
        "role": ROLES,
        "cause": CAUSES,
        "crime": CRIMES,
        "damage": DAMAGE,
        "weather": WEATHER,
        "work": WORKS,
    }
    for name, table in tables.items():
        said = _pick(rng, list(table))
        facts |= {f"{name}_said": said, name: table[said]}
    day = _pick(rng, list(PERIODS))
    facts |= {"day": day, "day_first": day[0].upper() + day[1:], "when": PERIODS[day]}
    return facts | _derived_facts(facts)


def _derived_facts(facts: dict[str, str]) -> dict[str, str]:
    """What follows from the facts: regions, the trend from m to n, and who has more."""
    now, before = (TENS_WORDS.index(facts[key]) + 1 for key in "nm")
    more, less = ("P", "R") if now > before else ("R", "P")
    home, away = ("T", "V") if now > before else ("V", "T")
    rising = "more than double" if now > 2 * before else "grow"
    falling = "fall by over half" if 2 * now < before else "fall"
    return {
        "region": REGION_OF[facts["T"]],
        "win_region": REGION_OF[facts[home]],
        "lose_region": REGION_OF[facts[away]],
        "winner": facts[more],
        "loser": facts[less],
        "margin": "narrowly" if abs(now - before) == 1 else "easily",
        "trend": rising if now > before else falling,
        "low": TENS_WORDS[min(now, before) - 1],
        "high": TENS_WORDS[max(now, before) - 1],
        "demand": "for double pay" if max(now, before) >= 2 * min(now, before) else "for higher pay",
        "roles": facts["role"] + "s",
    }


def _distractor_facts(rng: Random, facts: dict[str, str]) -> dict[str, str]:
    """People, towns and figures that are not the event's."""
    taken = set(facts.values())
    k, m = _sample(rng, [n for n in TENS_WORDS if n not in taken], 2)
    return {
        "Q": _pick(rng, [name for name in SURNAMES if name not in taken]),
        "U": _pick(rng, [town for town in REGION_OF if town not in taken]),
        "k": k,
        "m": m,
    }


def _capitalize_first(text: str) -> str:
    return text[0].upper() + text[1:]


def _generate_report(rng: Random) -> tuple[str, str]:
    """One report and its summary."""
    kind = EVENT_TEMPLATES[int(rng.random() * len(EVENT_TEMPLATES))]
    facts = _event_facts(rng, kind.subjects)
    wording = int(rng.random() * len(kind.summaries))
    told = [kind.sentences[0][wording], *(_pick(rng, wordings) for wordings in kind.sentences[1:])]
    told = [_capitalize_first(sentence.format(**facts)) for sentence in told]
    # One look-alike is of the event's own kind: its verbs are the event's, only the cue tells them apart.
    other_kinds = [kind, EVENT_TEMPLATES[int(rng.random() * len(EVENT_TEMPLATES))]]
    for cue, other in zip(_sample(rng, DISTRACTOR_CUES, 2), other_kinds, strict=True):
        fill = _distractor_facts(rng, facts) | {"place": _pick(rng, other.subjects)}
        sentence = f"{cue} {_pick(rng, other.distractors).format(**fill)}."
        told.insert(int(rng.random() * (len(told) + 1)), sentence)
    told.insert(0, _pick(rng, OPENINGS).format(**_distractor_facts(rng, facts)))
    if rng.random() < 0.5:
        told.append(_pick(rng, CLOSINGS).format(**_distractor_facts(rng, facts)))
    summary = _capitalize_first(kind.summaries[wording].format(**facts)) + "."
    return " ".join(told), summary
