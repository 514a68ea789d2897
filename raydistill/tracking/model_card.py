"""The model card of an exported student: its origin, scores, costs, and how to load it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from raydistill.config.metric_names import ROUGE_METRICS, is_bertscore
from raydistill.config.presets import hub_teacher, is_translation
from raydistill.config.serving import ServingConfig
from raydistill.data.card import DataCard, describe_data, public_name
from raydistill.models.metadata import CheckpointMetadata
from raydistill.results.formatting import format_number
from raydistill.results.outputs import outputs_filename, read_outputs, read_texts, texts_filename
from raydistill.results.pareto import COST_UNITS
from raydistill.results.records import Trial
from raydistill.results.selection import Selection
from raydistill.results.tables import markdown_table, metric_name

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

FOLDER_LINE = 'folder = "FOLDER"'
# Loads a folder with CTranslate2 and transformers' tokenizer alone, and writes the texts that were scored.
CTRANSLATE2_EXAMPLE = f"""\
import json

import ctranslate2
from transformers import AutoTokenizer

{FOLDER_LINE}
texts = ["a text", "another text"]
serving = json.load(open(folder + "/raydistill.json"))["serving"]
settings = serving["ctranslate2"]
tokenizer = AutoTokenizer.from_pretrained(folder, **settings["tokenizer"])
translator = ctranslate2.Translator(folder + "/ctranslate2", compute_type=settings["compute_type"])
inputs = [settings["source_prefix"] + text for text in texts]
ids = tokenizer(inputs, truncation=True, max_length=serving["max_source_tokens"]).input_ids
sources = [tokenizer.convert_ids_to_tokens(row) for row in ids]
prefixes = [settings["target_prefix"]] * len(sources)
results = translator.translate_batch(sources, prefixes, **settings["translate_batch"])
tokens = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
outputs = tokenizer.batch_decode(tokens, skip_special_tokens=True)
outputs = [text.replace(serving["line_break"] or "\\n", "\\n").strip() for text in outputs]"""
NUM_SAMPLES = 3
MAX_SAMPLE_CHARACTERS = 400
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


def render_model_card(selection: Selection, student: Trial, budgets: list[str]) -> str:
    """README.md of a student with a checkpoint, with the metadata header that the Hugging Face hub reads.

    `budgets` are the names of the budgets that the student was chosen for.
    """
    assert student.checkpoint is not None
    checkpoint = CheckpointMetadata.read_from(student.checkpoint)
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    score_header = ["split", metric_name(selection.metric), "95 % interval"]
    score_header += map(metric_name, selection.metrics.reported)
    assert checkpoint.config is not None
    data = describe_data(checkpoint.config.dataset)
    properties = [*_origin_rows(student, checkpoint, data), *_serving_rows(selection, student, checkpoint)]
    samples = _read_samples(selection, student)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        selection=selection,
        student=student,
        metric=metric_name(selection.metric),
        budgets=budgets,
        metadata=_hub_metadata(selection, student, checkpoint, data, samples).to_yaml(),
        teacher_name=public_name(str(checkpoint.teacher)),
        teacher_size=selection.teacher.size,
        teacher_score=selection.teacher.metrics.get(selection.metric),
        properties=markdown_table(["", ""], properties),
        scores=markdown_table(score_header, _score_rows(selection, student)),
        costs=markdown_table(["cost", "student", "teacher"], _cost_rows(selection, student)),
        setup=selection.measured_with(student),
        loading_code=loading_example("FOLDER"),
        ctranslate2_code=CTRANSLATE2_EXAMPLE,
        samples=markdown_table(["source", "reference", "student"], samples) if samples else None,
    )


def card_of_repository(card: str, repository: str) -> str:
    """The card of an export for the hub's page of a repository, whose examples load from there."""
    download = f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repository}")'
    loading = loading_example("FOLDER")
    note = f"`FOLDER` stands for the folder of `hf download {repository} --local-dir FOLDER`.\n\n"
    return (
        card.replace(loading, loading_example(repository))
        .replace(FOLDER_LINE, download)
        .replace("MLflow loads and serves", f"{note}MLflow loads and serves")
    )


def _hub_metadata(
    selection: Selection,
    student: Trial,
    checkpoint: CheckpointMetadata,
    data: DataCard,
    samples: Sequence[Sequence[str]],
) -> "ModelCardData":
    """The metadata at the start of the card, as https://huggingface.co/docs/hub/model-cards describes them."""
    from huggingface_hub import EvalResult, ModelCardData

    assert checkpoint.config is not None
    task = "translation" if is_translation(checkpoint.config.dataset, selection.metric) else "summarization"
    metric_type = _hub_metric(selection.metric)
    scores = {student.split: student.score(selection.metric), "test": (student.test or {}).get(selection.metric)}
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data.hub or data.name,
            dataset_name=data.name,
            dataset_split=split,
            metric_type=metric_type,
            metric_name=metric_name(selection.metric),
            metric_value=round(value, 2),
        )
        for split, value in scores.items()
        if value is not None
    ]
    return ModelCardData(
        language=data.languages or None,
        license=data.licence,
        base_model=hub_teacher(str(checkpoint.teacher), checkpoint.config.dataset.name),
        datasets=[data.hub] if data.hub else None,
        metrics=[metric_type],
        library_name="transformers",
        pipeline_tag=task,
        tags=["raydistill", "distillation", task],
        model_name=f"{selection.name} {student.size}",
        eval_results=results,
        widget=[{"text": source, "output": {"text": output}} for source, _, output in samples] or None,
    )


def _hub_metric(metric: str) -> str:
    """The identifier of a metric in the hub's library `evaluate`; of a user's metric, the name of its function."""
    if is_bertscore(metric):
        return "bertscore"
    return "rouge" if metric in ROUGE_METRICS else metric.removesuffix("++").rpartition(":")[2]


def _read_samples(selection: Selection, student: Trial) -> list[list[str]]:
    """Source, reference and output of the first rows that students are scored on; empty if outputs were not kept."""
    if student.serving is None:
        return []
    rows = read_texts(selection.sweep / texts_filename(student.split)) or []
    outputs = read_outputs(student.folder / outputs_filename(student.split, student.serving)) or []
    return [
        [_shorten(row.source), _shorten(row.reference), _shorten(output)]
        for row, output in zip(rows[:NUM_SAMPLES], outputs, strict=False)
    ]


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SAMPLE_CHARACTERS else f"{text[: MAX_SAMPLE_CHARACTERS - 2]} …"


def loading_example(folder: str) -> str:
    """Python code that loads an exported student with transformers."""
    return (
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n"
        "\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
        f'model = AutoModelForSeq2SeqLM.from_pretrained("{folder}")'
    )


def _origin_rows(student: Trial, checkpoint: CheckpointMetadata, data: DataCard) -> list[list[str]]:
    supervised = checkpoint.supervised or {}
    versions = ", ".join(f"{name} {version}" for name, version in checkpoint.versions.items())
    return [
        ["data", f"{data.name}, labels: {'+'.join(map(public_name, student.labels.split('+')))}"],
        *[[f"{side} layers copied", " ".join(map(str, layers))] for side, layers in student.copied_layers.items()],
        *[[f"{side} feed-forward units", str(units)] for side, units in (checkpoint.ffn or {}).items() if units],
        *([["tokens", str(checkpoint.vocabulary)]] if checkpoint.vocabulary else []),
        *[[f"{side} layers supervised", " ".join(map(str, layers))] for side, layers in supervised.items()],
        ["teacher's key", str(checkpoint.teacher_key)],
        *([["teacher's commit", checkpoint.teacher_commit]] if checkpoint.teacher_commit else []),
        *[[f"fingerprint of the {split} data", mark] for split, mark in checkpoint.data.items()],
        ["made with", versions],
        *([["seeds", _describe_seeds(student)]] if student.repeats else []),
    ]


def _describe_seeds(student: Trial) -> str:
    return f"scores are means of {student.num_seeds} training runs; this checkpoint is the run with seed {student.seed}"


def _serving_rows(selection: Selection, student: Trial, checkpoint: CheckpointMetadata) -> list[list[str]]:
    """Decoding, precision, the shortlist with what it excludes, and the setting for many rows at once."""
    own = checkpoint.decoding
    if not own:
        return []
    serving = student.serving or ServingConfig(beams=own["beams"], length_penalty=own["length_penalty"])
    rows = [["served with", f"{serving.label}; {own['min_length']} to {own['max_length']} tokens"]]
    if student.serving:
        rows.append(["precision", serving.precision])
    if coverage := selection.record.shortlists.get(str(serving.shortlist)):
        text = (
            f"{coverage.allowed_tokens:,.0f} tokens for one text; "
            f"{coverage.share_of_rows_outside:.1%} of the references of the rows that students are chosen on have a "
            f"token outside the list"
        )
        rows.append([f"shortlist {serving.shortlist}", text])
    if setting := selection.throughput_setting(student):
        rows.append(["many rows at once", setting.label])
    return rows


def _score_rows(selection: Selection, student: Trial) -> list[list[str]]:
    """A row per split: the score that decides with its interval, and the scores that are reported next to it."""
    test = student.test or {}
    rows = []
    for split, value, interval, metrics in (
        (student.split, student.score(selection.metric), student.interval, student.metrics),
        ("test", test.get(selection.metric), test.get("interval"), test),
    ):
        if value is not None:
            reported = [format_number(metrics.get(name), 2) for name in selection.metrics.reported]
            rows.append(
                [split, f"{value:.2f}", f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "-", *reported]
            )
    return rows


def _cost_rows(selection: Selection, student: Trial) -> list[list[str]]:
    teacher_costs = selection.teacher.costs
    rows = []
    for key, unit in COST_UNITS.items():
        if key in student.metrics:
            teacher_cost = f"{teacher_costs[key]:.4g}" if key in teacher_costs else "-"
            rows.append([f"{key} ({unit})", f"{student.metrics[key]:.4g}", teacher_cost])
    if "speedup" in student.metrics:
        name = "speed-up over the teacher as it is served today, for a batch of 32"
        rows.append([name, f"{student.metrics['speedup']:.2f}x", "1.00x"])
    if "speedup_same_serving" in student.metrics:
        name = "speed-up over the teacher served like this student, for a batch of 32"
        rows.append([name, f"{student.metrics['speedup_same_serving']:.2f}x", "1.00x"])
    return rows
