"""`raydistill shrink`: create an untrained student checkpoint from a teacher's layers."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raydistill._app import make_app, run_app
from raydistill.config.run import FfnChoice, Init
from raydistill.core.console import print_json, print_text
from raydistill.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raydistill.config.run import Student
    from raydistill.models.metadata import CheckpointMetadata
    from raydistill.models.shrinking import LayerPlan
    from raydistill.training.student_choice import StudentChoice

app = make_app()


@app.command()
def shrink(  # noqa: PLR0913
    teacher: Annotated[str, typer.Option(help="a named teacher, a hub name or a path")],
    size: Annotated[str, typer.Option(help='encoder and decoder layers, such as "12-3"')],
    output: Annotated[Path, typer.Option(help="the folder to write; must not exist")],
    copy: Annotated[str | None, typer.Option(help='decoder layers to copy, such as "0,6,11"')] = None,
    copy_encoder: Annotated[str | None, typer.Option(help="encoder layers to copy")] = None,
    init: Annotated[Init, typer.Option(help="how to choose decoder layers without --copy")] = "spaced",
    copy_from: Annotated[
        str | None, typer.Option(help="a checkpoint of the teacher's architecture to copy the decoder layers from")
    ] = None,
    encoder_ffn: Annotated[
        float | None, typer.Option(help="feed-forward units per encoder layer: a share (0.5) or a number (1024)")
    ] = None,
    decoder_ffn: Annotated[
        float | None, typer.Option(help="feed-forward units per decoder layer: a share or a number")
    ] = None,
    ffn_choice: Annotated[
        FfnChoice, typer.Option(help="units to keep; activation: the largest outputs on training rows of --dataset")
    ] = "activation",
    vocabulary: Annotated[
        str | None,
        typer.Option(help="tokens to keep; used: those in the training rows of --dataset, or a number, as 30000"),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="data set that selects a named teacher's checkpoint, and whose training rows rank feed-forward units "
            "and tokens; default: the teacher's first data set"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Copy layers of a teacher into a smaller checkpoint that `from_pretrained` reads.

    Examples:

        raydistill shrink --teacher bart --size 12-3 --copy 0,6,11 --output bart-12-3

        raydistill shrink --teacher bart --size 12-3 --decoder-ffn 0.25 --dataset xsum --output bart-small
    """
    from raydistill.config.presets import check_teacher, default_dataset
    from raydistill.core import artifact

    _check_new(output)
    copied = {"encoder": _parse_layers("--copy-encoder", copy_encoder), "decoder": _parse_layers("--copy", copy)}
    tokens = int(vocabulary) if vocabulary and vocabulary.isdecimal() else vocabulary
    shape = {"size": size, "encoder_ffn": encoder_ffn, "decoder_ffn": decoder_ffn, "vocabulary": tokens}
    student = _parse_student(
        {**shape, "ffn_choice": ffn_choice, "init": init, "copied": copied, "copy_from": copy_from}
    )
    for name in (teacher, copy_from) if copy_from else (teacher,):
        check_teacher(name)
    with artifact.lock(output):
        _check_new(output)  # another process may have written the folder before this one had the lock
        metadata, plan, config = _create_student(
            teacher, dataset or default_dataset(teacher) or "", student, dataset or "", output
        )
    from raydistill.models.families import count_parameters

    params_m = count_parameters(config) / 1e6
    print_text(
        f"{output}: {metadata.size}, decoder layers {plan.decoder or 'random'}, {params_m:.1f} M parameters", as_json
    )
    print_json({**metadata.to_json(), "params_m": params_m, "output": str(output)}, as_json)


def _check_new(output: Path) -> None:
    if output.exists():
        raise UserError(f"--output {output}: exists already; give another folder, or delete it")


def _parse_student(settings: dict[str, Any]) -> "Student":
    from pydantic import ValidationError

    from raydistill.config.run import Student
    from raydistill.config.validation import format_validation_error

    try:
        return Student.model_validate(settings)
    except ValidationError as error:
        raise UserError(format_validation_error(error, Student, "shrink", {})) from None


def _create_student(
    teacher: str, teacher_dataset: str, student: "Student", copy_from_dataset: str, output: Path
) -> tuple["CheckpointMetadata", "LayerPlan", "PretrainedConfig"]:
    """Write the student and its metadata to `output`; return the metadata, the layer plan and the student's config.

    The data sets select the checkpoints of the teacher and of `student.copy_from` if these are named teachers. The
    caller holds the lock of `output`.
    """
    from raydistill.models.loading import load_config, load_model, locate_checkpoint
    from raydistill.models.metadata import CheckpointMetadata
    from raydistill.models.saving import save_checkpoint
    from raydistill.models.shrinking import plan_student
    from raydistill.models.shrinking import shrink as shrink_model
    from raydistill.models.tokenization import load_tokenizer, set_target_language
    from raydistill.models.vocabulary import trim_model, trim_tokenizer

    location = locate_checkpoint(teacher, teacher_dataset)
    choice = _choose(teacher, teacher_dataset, student)
    plan = plan_student(load_config(location), choice.apply(student))
    model, tokenizer = load_model(location), load_tokenizer(location)
    if token_ids := _choose_tokens(teacher, teacher_dataset, student):
        model, tokenizer = trim_model(model, token_ids), trim_tokenizer(tokenizer, token_ids)
    set_target_language(model, tokenizer)
    donor = load_model(locate_checkpoint(student.copy_from, copy_from_dataset)) if student.copy_from else None
    result = shrink_model(model, plan, decoder_from=donor, units=choice.kept_units)
    metadata = CheckpointMetadata(
        teacher=teacher,
        size=student.shape.name,
        copied=plan.copied,
        copied_from=student.copy_from or teacher,
        supervised=plan.supervised,
        ffn=plan.kept_ffn,
        vocabulary=result.config.vocab_size if student.vocabulary else None,
        trained=False,
    )
    save_checkpoint(result, tokenizer, output, metadata)
    return metadata, plan, result.config


def _choose_tokens(teacher: str, dataset: str, student: "Student") -> tuple[int, ...] | None:
    """The ids of the tokens that the student keeps, as a run on the data set would choose them; None for all."""
    from raydistill.config.run import Dataset, Run
    from raydistill.models.loading import load_config
    from raydistill.models.teacher import open_teacher
    from raydistill.training.tokenized_data import select_student_tokens

    if student.vocabulary is None:
        return None
    if not dataset:
        raise UserError("--vocabulary counts the tokens of training rows: give --dataset")
    run = Run(name="shrink", teacher=teacher, dataset=Dataset(name=dataset), student=student)
    opened = open_teacher(teacher, run.dataset)
    return select_student_tokens(run, opened.tokenizer, load_config(opened.location), {})


def _choose(teacher: str, dataset: str, student: "Student") -> "StudentChoice":
    """The layers and feed-forward units that the student copies, as a run on the data set would choose them."""
    from raydistill.config.run import Dataset, Run
    from raydistill.models.teacher import open_teacher
    from raydistill.training.student_choice import StudentChoice, make_choice

    if not student.measures_layers and not student.is_pruned:
        return StudentChoice()
    if not dataset and (student.measures_layers or student.ffn_choice == "activation"):
        raise UserError(
            "--init measured and --ffn-choice activation read training rows: give --dataset, or another --init and "
            "--ffn-choice random"
        )
    run = Run(name="shrink", teacher=teacher, dataset=Dataset(name=dataset or teacher), student=student)
    return make_choice(run, open_teacher(teacher, run.dataset), {})


def _parse_layers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text.replace(" ", "")):
        raise UserError(f"{option} {text!r}: expected layer numbers with commas between, such as 0,6,11")
    return [int(n) for n in text.split(",")]


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.shrink import main as entry

    entry()
