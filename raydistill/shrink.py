"""`raydistill shrink`: make a student checkpoint, untrained."""

import re
from pathlib import Path
from typing import Annotated

import typer

from raydistill._app import make_app, run_app
from raydistill.config.run import Init
from raydistill.core.console import print_json, print_text
from raydistill.core.errors import UserError

app = make_app()


@app.command()
def shrink(
    teacher: Annotated[str, typer.Option(help="a known name, a hub name or a path")],
    size: Annotated[str, typer.Option(help='encoder and decoder layers, such as "12-3"')],
    output: Annotated[Path, typer.Option(help="the folder to write; must not exist")],
    copy: Annotated[str | None, typer.Option(help='decoder layers to copy, such as "0,6,11"')] = None,
    copy_encoder: Annotated[str | None, typer.Option(help="encoder layers to copy")] = None,
    init: Annotated[Init, typer.Option(help="where --copy does not say")] = "spaced",
    copy_from: Annotated[
        str | None, typer.Option(help="another checkpoint of the teacher's shape, whose decoder layers are copied")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="which of a known teacher's checkpoints; default: its first")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Copy layers of a teacher into a smaller checkpoint that `from_pretrained` reads.

    Example: `raydistill shrink --teacher bart --size 12-3 --copy 0,6,11 --output bart-12-3`
    """
    from pydantic import ValidationError

    from raydistill.config.presets import check_teacher, default_dataset
    from raydistill.config.run import LayerChoice, Student
    from raydistill.config.validation import format_validation_error

    if output.exists():
        raise UserError(f"--output {output}: exists already; give another folder, or delete it")
    try:
        copied = LayerChoice(
            encoder=_parse_layers("--copy-encoder", copy_encoder), decoder=_parse_layers("--copy", copy)
        )
        student = Student(size=size, init=init, copied=copied, copy_from=copy_from)
    except ValidationError as error:
        raise UserError(format_validation_error(error, Student, "shrink", {})) from None

    for name in (teacher, copy_from) if copy_from else (teacher,):
        check_teacher(name)
    from raydistill.core.files import CHECKPOINT_METADATA, write_json_atomic
    from raydistill.models import families
    from raydistill.models.loading import (
        load_config,
        load_model,
        load_tokenizer,
        locate_checkpoint,
        set_target_language,
    )
    from raydistill.models.saving import save_checkpoint
    from raydistill.models.shrinking import plan_layers
    from raydistill.models.shrinking import shrink as make

    where = locate_checkpoint(teacher, dataset or default_dataset(teacher) or "")
    layers = plan_layers(families.num_layers(load_config(where)), student)
    model, tokenizer = load_model(where), load_tokenizer(where)
    set_target_language(model, tokenizer)
    made = make(
        model, layers, decoder_from=load_model(locate_checkpoint(copy_from, dataset or "")) if copy_from else None
    )
    save_checkpoint(made, tokenizer, output)
    card = {
        "teacher": teacher,
        "size": size,
        "copied": layers.copied,
        "copied_from": copy_from or teacher,
        "supervised": layers.supervised,
        "trained": False,
    }
    write_json_atomic(output / CHECKPOINT_METADATA, card)
    parameters = sum(p.numel() for p in made.parameters())
    print_text(
        f"{output}: {size}, decoder layers {layers.decoder or 'random'}, {parameters / 1e6:.1f} M parameters", as_json
    )
    print_json({**card, "params_m": parameters / 1e6, "output": str(output)}, as_json)


def _parse_layers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text.replace(" ", "")):
        raise UserError(f"{option} {text!r}: expected layer numbers with commas between, such as 0,6,11")
    return [int(n) for n in text.split(",")]


def main() -> None:
    """The command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.shrink import main as entry

    entry()
