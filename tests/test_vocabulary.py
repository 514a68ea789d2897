"""The vocabulary of the project: plain technical English, in code and in documents.

The first version used a private idiom that a new reader had to learn. This test fails where a banned word returns.
"""

import ast
import io
import re
import tokenize
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Word -> what to write instead.
WORDS = {
    "anew": "again",
    "beside": "next to, in addition to",
    "told": "reported",
    "tells": "reports, says",
    "taken up": "resumed, retried",
    "take up": "resume, retry",
    "goes on": "resumes, continues",
    "go on": "resume, continue",
    "going on": "resuming, continuing",
    "went on": "resumed, continued",
    "half-way": "unfinished, interrupted",
    "hand over": "export",
    "handed over": "exported",
    "dear": "expensive",
    "dearer": "more expensive",
    "barred": "infeasible, excluded",
    "died": "failed, was killed",
    "is there already": "exists",
    "what is there": "the existing files",
    "is made up": "is a placeholder",
    "the house": "the conventions, the layout",
    "whence": "from where",
    "taught": "supervised",
    "for ever": "without end",
    "beaten": "dominated",
    "calm": "idle, not noisy",
    "tell": "report, say, detect",
}
# Optuna's term for the report of a trial's values.
OPTUNA_TELL = re.compile(r"\.tell\(|ask-and-tell")
# A variable, a parameter or a function is named after the thing that it holds.
NAMES = {
    *{"found", "place", "one", "told", "anew", "beside", "taught", "theirs", "barred", "held"},
    *{"mine", "its", "got", "given", "admitted", "died", "also", "calm", "disturbed", "beaten"},
}
# Definitions of the first version, each of which has a name of the field now (DESIGN.md, section 1).
DEFINITIONS = {
    *{"UNFIT", "damage_told", "appearing", "making", "is_there", "PassingError", "Leaving", "Diverged", "TrackingDown"},
    *{
        "claim_origin",
        "origin_of",
        "HOW",
        "Material",
        "Supervision",
        "from_leader",
        "per_source",
        "with_depths",
        "quicken",
    },
    *{"made_up", "disagreement", "PROOF", "Others", "CALM", "facts_of", "held_mb", "tell_of_others", "room_for_actors"},
    *{"Want", "Wanted", "Kept", "read_by", "take_up", "_settle", "Ending", "Begun", "WAITS", "STUCK", "GIVEN_UP"},
    *{"Departures", "falls_behind", "rivals", "as_served", "on_one_clock"},
    *{"forms", "slopes", "mend", "helps", "leads", "warm", "places", "admitted", "Keep", "Room", "Watch", "Numbers"},
}
# A docstring names its nouns: a reader of "those of" or "The same for" has to search the text above for the noun, and
# most docstrings are read alone, as in the pop-up window of an editor.
NO_NOUN = re.compile(r"\b(those\s+(?:of|that|whose)|The\s+same\s+for)\b")
PATTERN = re.compile(rf"(?<![a-z])({'|'.join(sorted(WORDS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
FOLDERS = ["raydistill", "tests", "benchmarks", "docs", "docs_build", "search_spaces", "cluster", "deploy"]
SUFFIXES = {".py", ".md", ".yaml", ".sh", ".toml", ".jinja", ".css", ".js", ".ipynb"}
# Text that is data, and records of earlier measurements.
EXEMPT = [Path(__file__), ROOT / "raydistill/data/demo_sentences.yaml", *(ROOT / "benchmarks/results").glob("*")]


def source_files():
    """Every file that a person writes."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    files += [path for path in ROOT.glob("*") if path.suffix in SUFFIXES or path.name == "Makefile"]
    return sorted(path for path in files if path not in EXEMPT and "docs/reference" not in path.as_posix())


def banned_words(text):
    """(line number, word) of each banned word in a text."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in PATTERN.finditer(OPTUNA_TELL.sub("", line)):
            yield number, match.group(1).lower()


def banned_names(text):
    """(line number, name) of each banned name that Python source defines."""
    for node in ast.walk(ast.parse(text)):
        name = defined_name(node)
        if name in NAMES | DEFINITIONS:
            yield node.lineno, name


def defined_name(node):
    """The name that a node of a syntax tree defines; None if it defines no name.

    An import without `as` uses the name of a library and defines none.
    """
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.id if isinstance(node, ast.Name) else node.attr
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.alias):
        return node.asname
    if isinstance(node, ast.MatchMapping):
        return node.rest
    names = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler | ast.MatchAs | ast.MatchStar
    return node.name if isinstance(node, names) else None


def prose(text):
    """(line number, text) of each docstring of Python source, and of each comment with all of its lines."""
    for node in ast.walk(ast.parse(text)):
        has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if has_docstring and (docstring := ast.get_docstring(node)):
            yield node.body[0].lineno, docstring
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [(token.start[0], token.string.lstrip("# ")) for token in tokens if token.type == tokenize.COMMENT]
    for _, lines in groupby(enumerate(comments), lambda numbered: numbered[1][0] - numbered[0]):
        block = [comment for _, comment in lines]
        yield block[0][0], " ".join(comment for _, comment in block)


def missing_nouns(text):
    """(line number, words) of each docstring or comment of Python source with words that stand for a noun."""
    for number, sentences in prose(text):
        for match in NO_NOUN.finditer(sentences):
            yield number, " ".join(match.group(1).split())


def test_no_banned_word_in_code_or_documents():
    hits = [
        f"{path.relative_to(ROOT)}:{line}: {word!r}; write {WORDS[word]}"
        for path in source_files()
        for line, word in banned_words(path.read_text(encoding="utf-8"))
    ]
    assert hits == [], "\n".join(hits)


def test_no_banned_name_in_code():
    hits = [
        f"{path.relative_to(ROOT)}:{line}: {name!r}"
        for path in source_files()
        if path.suffix == ".py"
        for line, name in banned_names(path.read_text(encoding="utf-8"))
    ]
    assert hits == [], "\n".join(hits)


def test_docstrings_and_comments_name_their_nouns():
    hits = [
        f"{path.relative_to(ROOT)}:{line}: {words!r}; write the noun"
        for path in source_files()
        if path.suffix == ".py" and path.is_relative_to(ROOT / "raydistill")
        for line, words in missing_nouns(path.read_text(encoding="utf-8"))
    ]
    assert hits == [], "\n".join(hits)


@pytest.mark.parametrize(
    "text",
    [
        '"""The keys of a file, those of its run included."""',
        'def f():\n    """Some rows, also those\n    that are repeated."""',
        'class A:\n    """A class.\n\n    Attributes:\n        batch: The same for a batch.\n    """',
        "x = 1  # as those whose key differs",
        "# the names of the files, and those\n# of the folders\nx = 1",
    ],
)
def test_a_missing_noun_is_detected(text):
    assert len(list(missing_nouns(text))) == 1


@pytest.mark.parametrize("text", ["x = 'those of'", '"""Of those rows, some."""', "# those\nx = 1\n# of y"])
def test_a_noun_or_a_message_is_no_missing_noun(text):
    assert list(missing_nouns(text)) == []


def test_scripts_and_notebooks_are_scanned():
    assert {".js", ".ipynb"} <= {path.suffix for path in source_files()}


@pytest.mark.parametrize(
    "text", ["# started anew", "The run goes on.", "damage_told(path)", "Beside it", "hand over", "nobody can tell"]
)
def test_a_banned_word_is_detected(text):
    assert len(list(banned_words(text))) == 1


@pytest.mark.parametrize("text", ["dearth", "foretells", "besides"])
def test_a_longer_word_is_not_banned(text):
    assert list(banned_words(text)) == []


@pytest.mark.parametrize("text", ["study.tell(trial)", "the ask-and-tell interface"])
def test_the_term_of_optuna_is_not_banned(text):
    assert list(banned_words(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "found = 1",
        "self.found = 1",
        "def f(place): ...",
        "async def place(): ...",
        "for one in x: ...",
        "class Want: ...",
        "import numpy as found",
        "match x:\n    case [place, 1]: ...",
        "match x:\n    case [1, *place]: ...",
        "match x:\n    case {**place}: ...",
        "try: ...\nexcept E as found: ...",
    ],
)
def test_a_banned_name_is_detected(text):
    assert len(list(banned_names(text))) == 1


def test_a_name_of_a_library_is_not_banned():
    assert list(banned_names("from hypothesis import given")) == []
