"""The command `raydistill describe`."""

import json
import subprocess
import sys

from tests.factories.data_files import GOOD, ROWS, write_jsonl


def run(*arguments: str, module: str = "raydistill.describe") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_has_an_example():
    done = run("--help")
    assert done.returncode == 0
    assert "raydistill describe demo" in done.stdout


def test_no_heavy_library_is_imported(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    code = (
        "import sys\nfrom raydistill.describe import main\n"
        f"sys.argv = ['describe', {str(path)!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'ray', 'torch', 'transformers', 'datasets', 'pyarrow', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_json_has_the_statistics_of_each_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", ROWS[:1])
    done = run(str(tmp_path), "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert result["splits"] == ["train", "test"]
    train = result["described"]["train"]
    # The rows have 5, 7 and 4 words: U+2028 is white space.
    assert (train["rows"], train["source_words_max"], train["source_words_p50"]) == (3, 7, 5)
    assert train["columns"] == {"source": "document", "target": "summary", "id": "id"}
    assert "train: 3 rows" in done.stderr


def test_all_problems_are_reported_at_once_with_status_2(tmp_path):
    rows = [GOOD, {"id": "x", "source": "", "target": "t"}, "{", {"id": "y", "source": 1, "target": "t"}, GOOD]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "val.jsonl", [{**GOOD, "target": None}])
    done = run(str(tmp_path))
    assert done.returncode == 2
    for text in ("train.jsonl:2: source: empty", "train.jsonl:3: invalid JSON", "train.jsonl:4: source: expected"):
        assert text in done.stdout
    assert "train.jsonl:5: duplicate id 'g', first seen at" in done.stdout
    assert "val.jsonl:1: target: expected a string, got null" in done.stdout
    assert "4 rows cannot be used" in done.stderr
    assert "1 rows repeat an id" in done.stderr
    assert "no usable row in validation" in done.stderr
    assert "Traceback" not in done.stderr


def test_repeated_ids_alone_give_status_2(tmp_path):
    done = run(str(write_jsonl(tmp_path / "x.jsonl", [GOOD, {**GOOD, "source": "other"}])), "--skip-bad-rows", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["usable"] is False


def test_skipped_rows_are_not_a_problem(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, "{"])
    assert run(str(path)).returncode == 2
    done = run(str(path), "--skip-bad-rows")
    assert done.returncode == 0
    assert "bad rows: 1" in done.stdout


def test_named_columns_and_a_single_split(tmp_path):
    write_jsonl(tmp_path / "dev.jsonl", [{"body": "a b", "head": {"line": "c"}, "key": "k"}])
    done = run(str(tmp_path), "--split", "validation")
    assert done.returncode == 2
    assert "body, head.line, key" in done.stderr
    done = run(str(tmp_path), "--split", "validation", "--source", "body", "--target", "head.line", "--id", "key")
    assert done.returncode == 0
    assert "first ids: k" in done.stdout


def test_through_the_console_script_and_with_a_misspelt_name():
    done = run("describe", "dmo", module="raydistill")
    assert done.returncode == 2
    assert "did you mean 'demo'?" in done.stderr


def test_extra_texts_are_compared_with_the_splits(tmp_path):
    """Row 2 repeats a training source; row 3 is a near duplicate of a test source, which is an error."""
    text = "An old man reads a newspaper on a bench in the park."
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", [{"id": "t", "document": text, "summary": "s"}])
    extra = ["A text that is new.", ROWS[0]["document"], text.replace("newspaper", "newspapers")]
    write_jsonl(tmp_path / "more.jsonl", [{"text": row} for row in extra])
    done = run(str(tmp_path), "--extra", str(tmp_path / "more.jsonl"), "--json")
    assert done.returncode == 2
    result = json.loads(done.stdout)["extra"]
    assert (result["rows"], [(row["row"], row["split"]) for row in result["dropped"]]) == (
        1,
        [(2, "train"), (3, "test")],
    )
    assert "more.jsonl:3: similar" in done.stderr
    assert "pseudo.extra_overlap: drop" in done.stderr
