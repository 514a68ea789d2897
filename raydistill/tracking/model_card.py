"""A student's model card: what it is, how good, how dear, how to load it."""

from typing import Any

from raydistill.core.files import CARD, read_json
from raydistill.results.pareto import UNITS
from raydistill.results.records import Trial, decoding_label
from raydistill.results.selection import Outcome
from raydistill.results.tables import NAMES, markdown_table


def model_card(found: Outcome, student: Trial, budgets: list[str]) -> str:
    """README.md of a checkpoint, with the header that the Hugging Face hub reads."""
    assert student.checkpoint is not None
    card = read_json(student.checkpoint / CARD)
    teacher, data = found.teacher, card["config"]["dataset"]["name"]
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [raydistill, {'translation' if found.metric == 'bleu' else 'summarization'}]",
        "---",
        f"# {found.name}: {student.size} student by {student.method}",
        "",
        f"A student of `{card['teacher']}` ({teacher.get('size', 'size unknown')}), distilled by raydistill"
        + (f"; chosen for: {', '.join(budgets)}." if budgets else "."),
        "",
        markdown_table(["", ""], [*_origin(student, card, data), *_decoding(student, card)]),
        "",
        "## Scores",
        "",
        markdown_table(["split", NAMES.get(found.metric, found.metric), "95 % interval"], _scores(found, student)),
        "",
        f"Validation decided; test is for reporting. Scorer: `{student.signature}`."
        + (f" The teacher has {teacher['metrics'][found.metric]:.2f} on validation." if teacher.get("metrics") else ""),
        "",
        "## Cost",
        "",
        markdown_table(["cost", "student", "teacher"], _costs(found, student)),
        "",
        *([f"Milliseconds with {measured}.", ""] if (measured := found.measured(student)) else []),
        "## How to load it",
        "",
        "```python",
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        'model = AutoModelForSeq2SeqLM.from_pretrained("FOLDER")  # decodes as above by default',
        "```",
        "",
        "`FOLDER/ctranslate2`, where it is there, is what `ctranslate2.Translator` reads.",
        "",
        "MLflow loads and serves it where raydistill is installed, which is not on PyPI (`FOLDER/requirements.txt`",
        'pins what it needs beside itself): `mlflow.pyfunc.load_model("FOLDER").predict(["a text"])`, or',
        "",
        "```sh",
        """echo '{"inputs": ["a text", "another text"]}' > texts.json""",
        "mlflow models predict --env-manager local -m FOLDER -t json -i texts.json",
        "mlflow models serve --env-manager local -m FOLDER -p 5001",
        "curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' -d @texts.json",
        "```",
        "",
        "An environment that MLflow makes would lack raydistill, hence `local`. Texts are written on a GPU where there",
        "is one, else with all cores, as a sweep times its finalists. To change that, give `load_model` a",
        '`model_config={"device": "cpu", "threads": 4}`, or set `MLFLOW_PYFUNC_INFERENCE_CONFIG` to the same in JSON.',
    ]
    return "\n".join(lines) + "\n"


def _origin(student: Trial, card: dict[str, Any], data: str) -> list[list[str]]:
    rows = [["data", f"{data}, labels: {student.labels}"]]
    rows += [[f"{side} layers copied", " ".join(map(str, layers))] for side, layers in student.copied.items()]
    rows += [[f"{side} layers supervised", " ".join(map(str, v))] for side, v in (card.get("supervised") or {}).items()]
    rows += [["teacher's key", str(card.get("teacher_key"))]]
    rows += [["teacher's commit", str(card["teacher_commit"])]] if card.get("teacher_commit") else []
    rows += [[f"{split} data's fingerprint", mark] for split, mark in (card.get("data") or {}).items()]
    versions = card.get("versions") or {}
    return [*rows, ["made with", ", ".join(f"{name} {version}" for name, version in versions.items())]]


def _decoding(student: Trial, card: dict[str, Any]) -> list[list[str]]:
    beam = {**(card.get("decoding") or {}), **(student.decoding or {})}
    if not beam:
        return []
    lengths = f"; {beam['min_length']} to {beam['max_length']} tokens" if "max_length" in beam else ""
    return [["decoding", decoding_label(beam) + lengths]]


def _scores(found: Outcome, student: Trial) -> list[list[str]]:
    rows = []
    for split, value, interval in (
        ("validation", student.score(found.metric), student.interval),
        ("test", (student.test or {}).get(found.metric), (student.test or {}).get("interval")),
    ):
        if value is not None:
            rows.append([split, f"{value:.2f}", f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "-"])
    return rows


def _costs(found: Outcome, student: Trial) -> list[list[str]]:
    teacher = found.teacher.get("costs") or {}
    rows = []
    for key, unit in UNITS.items():
        if key in student.metrics:
            theirs = f"{teacher[key]:.4g}" if key in teacher else "-"
            rows.append([f"{key} ({unit})", f"{student.metrics[key]:.4g}", theirs])
    if "speedup" in student.metrics:
        rows.append(["speed-up, for a batch of 32", f"{student.metrics['speedup']:.2f}x", "1.00x"])
    return rows
