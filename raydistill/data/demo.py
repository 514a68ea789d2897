"""The embedded demo corpus: generated news reports with one-line summaries in other words.

Each report has one event, whose facts are spread over three sentences. Distractor sentences hold facts of the same
kinds and say that they do not belong to the event ("last year", "in an unrelated case"). The summary uses other verbs,
and turns a town into its region, two numbers into a trend or a winner, and a day into a period such as "this week".
Copying sentences therefore scores low, and a small model learns the task from scratch in minutes.

`demo_sentences.yaml` holds the vocabulary and the templates.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

import yaml

T = TypeVar("T")

SPLIT_SIZES = {"train": 6000, "validation": 400, "test": 400}
SOURCE_WORDS_RANGE = (45, 75)
TENS_WORDS = ("ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SEED = "raydistill demo 1"


@dataclass(frozen=True)
class EventTemplate:
    """One kind of event.

    Attributes:
        name: A name for readers of the YAML file.
        subjects: Values of the placeholder `subject`.
        sentences: The wordings of each of the three sentences.
        summaries: Wordings of the summary; wording i belongs to wording i of the first sentence, so that each report
            has exactly one correct summary.
        distractors: Sentences about other events of this kind.
    """

    name: str
    subjects: list[str]
    sentences: list[list[str]]
    summaries: list[str]
    distractors: list[str]


@dataclass(frozen=True)
class Vocabulary:
    """The content of `demo_sentences.yaml`, which describes it."""

    surnames: list[str]
    regions: dict[str, list[str]]
    periods: dict[str, str]
    phrases: dict[str, dict[str, str]]
    distractor_cues: list[str]
    openings: list[str]
    closings: list[str]
    events: list[EventTemplate]

    @functools.cached_property
    def region_by_town(self) -> dict[str, str]:
        """The region of each town."""
        return {town: region for region, towns in self.regions.items() for town in towns}


@functools.cache
def load_vocabulary() -> Vocabulary:
    """Read `demo_sentences.yaml`."""
    data = yaml.safe_load(Path(__file__).with_name("demo_sentences.yaml").read_text(encoding="utf-8"))
    return Vocabulary(**{**data, "events": [EventTemplate(**event) for event in data["events"]]})


def demo_rows(split: str) -> list[dict[str, str]]:
    """The rows (`id`, `source`, `target`) of a split; KeyError if there is no such split.

    Rows are identical in every process and Python version. No source and no target occurs twice, also not in
    different splits.
    """
    return [{"id": i, "source": source, "target": target} for i, source, target in _generate_splits()[split]]


@functools.cache
def _generate_splits() -> dict[str, tuple[tuple[str, str, str], ...]]:
    """All splits, cut from one stream of reports without repeated sources or targets."""
    vocabulary = load_vocabulary()
    rng = Random(_SEED)
    used_texts: set[str] = set()
    rows: list[tuple[str, str]] = []
    shortest, longest = SOURCE_WORDS_RANGE
    while len(rows) < sum(SPLIT_SIZES.values()):
        source, target = _generate_report(rng, vocabulary)
        if {source, target} & used_texts or not shortest <= len(source.split()) <= longest:
            continue
        used_texts |= {source, target}
        rows.append((source, target))
    splits, start = {}, 0
    for split, size in SPLIT_SIZES.items():
        splits[split] = tuple((f"{split}-{i}", *row) for i, row in enumerate(rows[start : start + size]))
        start += size
    return splits


def _generate_report(rng: Random, vocabulary: Vocabulary) -> tuple[str, str]:
    """One report and its summary."""
    event = _pick(rng, vocabulary.events)
    facts = _event_facts(rng, vocabulary, event.subjects)
    wording = int(rng.random() * len(event.summaries))
    templates = [event.sentences[0][wording], *(_pick(rng, wordings) for wordings in event.sentences[1:])]
    sentences = [_capitalize_first(template.format(**facts)) for template in templates]
    # One distractor is of the same kind as the event, so only its cue distinguishes it.
    distractor_events = [event, _pick(rng, vocabulary.events)]
    for cue, other in zip(_sample(rng, vocabulary.distractor_cues, 2), distractor_events, strict=True):
        other_facts = _distractor_facts(rng, vocabulary, facts) | {"subject": _pick(rng, other.subjects)}
        sentence = f"{cue} {_pick(rng, other.distractors).format(**other_facts)}."
        sentences.insert(int(rng.random() * (len(sentences) + 1)), sentence)
    sentences.insert(0, _pick(rng, vocabulary.openings).format(**_distractor_facts(rng, vocabulary, facts)))
    if rng.random() < 0.5:
        sentences.append(_pick(rng, vocabulary.closings).format(**_distractor_facts(rng, vocabulary, facts)))
    summary = _capitalize_first(event.summaries[wording].format(**facts)) + "."
    return " ".join(sentences), summary


def _event_facts(rng: Random, vocabulary: Vocabulary, subjects: Sequence[str]) -> dict[str, str]:
    """The values of the placeholders of an event, for the report and for the summary."""
    facts = dict(zip("PR", _sample(rng, vocabulary.surnames, 2), strict=True))
    regions = _sample(rng, list(vocabulary.regions), 2)
    facts["T"], facts["V"] = (_pick(rng, vocabulary.regions[region]) for region in regions)
    facts["n"], facts["m"] = _sample(rng, TENS_WORDS, 2)
    facts["subject"] = _pick(rng, subjects)
    for name, summary_by_phrase in vocabulary.phrases.items():
        phrase = _pick(rng, list(summary_by_phrase))
        facts |= {f"{name}_phrase": phrase, name: summary_by_phrase[phrase]}
    day = _pick(rng, list(vocabulary.periods))
    facts |= {"day": day, "day_first": _capitalize_first(day), "when": vocabulary.periods[day]}
    return facts | _derived_facts(facts, vocabulary.region_by_town)


def _derived_facts(facts: dict[str, str], region_by_town: dict[str, str]) -> dict[str, str]:
    """Placeholders computed from others: regions, the trend from m to n, and the winner."""
    now, before = (TENS_WORDS.index(facts[key]) + 1 for key in "nm")
    winner, loser = ("P", "R") if now > before else ("R", "P")
    win_town, lose_town = ("T", "V") if now > before else ("V", "T")
    rising = "more than double" if now > 2 * before else "grow"
    falling = "fall by over half" if 2 * now < before else "fall"
    return {
        "region": region_by_town[facts["T"]],
        "win_region": region_by_town[facts[win_town]],
        "lose_region": region_by_town[facts[lose_town]],
        "winner": facts[winner],
        "loser": facts[loser],
        "margin": "narrowly" if abs(now - before) == 1 else "easily",
        "trend": rising if now > before else falling,
        "low": TENS_WORDS[min(now, before) - 1],
        "high": TENS_WORDS[max(now, before) - 1],
        "demand": "for double pay" if max(now, before) >= 2 * min(now, before) else "for higher pay",
        "roles": facts["role"] + "s",
    }


def _distractor_facts(rng: Random, vocabulary: Vocabulary, facts: dict[str, str]) -> dict[str, str]:
    """A person, a town and numbers that do not occur in the facts of the event."""
    used = set(facts.values())
    k, m = _sample(rng, [word for word in TENS_WORDS if word not in used], 2)
    return {
        "Q": _pick(rng, [name for name in vocabulary.surnames if name not in used]),
        "U": _pick(rng, [town for town in vocabulary.region_by_town if town not in used]),
        "k": k,
        "m": m,
    }


def _pick(rng: Random, items: Sequence[T]) -> T:
    # Python guarantees the same numbers in every version for `random()` only, not for `choice()`.
    return items[int(rng.random() * len(items))]


def _sample(rng: Random, items: Sequence[str], count: int) -> list[str]:
    remaining = list(items)
    return [remaining.pop(int(rng.random() * len(remaining))) for _ in range(count)]


def _capitalize_first(text: str) -> str:
    return text[0].upper() + text[1:]
