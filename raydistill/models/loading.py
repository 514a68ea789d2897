"""Loads and checks the configuration, the weights and the generation config of a checkpoint."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig, PretrainedConfig

from raydistill.config.presets import DEMO_TEACHER_RUN, teacher_preset
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home
from raydistill.models.families import FAMILIES, family_of, untie_lm_head
from raydistill.models.hub import (
    check_no_missing_weights,
    check_weights,
    first_error_line,
    resolve_checkpoint,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Upper limits for values of a config.json: larger ones would exhaust memory or time before any weight is read.
MAX_CONFIG_VALUES = {
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), 1000),
    "max_position_embeddings": 2**20,
}


def locate_checkpoint(name: str, dataset: str) -> str:
    """Return the folder or hub name of a teacher.

    A named teacher becomes the hub name of its checkpoint for `dataset`, at a pinned revision.

    Raises:
        UserError: The demo teacher is not trained yet, or the named teacher has no checkpoint for the data set.
    """
    if name == "demo":
        folder = raydistill_home() / "runs" / DEMO_TEACHER_RUN / "best"
        if not folder.is_dir():
            raise UserError(f"the demo teacher is not at {folder}; train it with `raydistill train demo`")
        return str(folder)
    preset = teacher_preset(name, dataset)
    return f"{preset.hub}@{preset.revision}" if preset else name


def load_config(checkpoint: str | Path) -> PretrainedConfig:
    """Return the checked configuration of a checkpoint without loading its weights.

    Raises:
        UserError: `config.json` is missing, unreadable or implausible, or the model type is not in `FAMILIES`.
    """
    folder = resolve_checkpoint(checkpoint, weights=False)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{checkpoint}: has no config.json; a checkpoint is what save_pretrained writes")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the checkpoint again") from None
    model_type = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"{checkpoint}: model_type is {model_type!r}; supported are the encoder-decoders {', '.join(FAMILIES)}"
        )
    for key, limit in MAX_CONFIG_VALUES.items():
        if isinstance(data.get(key), int) and data[key] > limit:
            raise UserError(f"{path}: {key} is {data[key]}, and no model of these families has more than {limit}")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{path}: cannot be used: {first_error_line(error)}") from None


def load_model(checkpoint: str | Path, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """Return the model of a checkpoint on the CPU, in eval mode and in `dtype`.

    Raises:
        UserError: The model type is not in `FAMILIES`, or the weights are missing, damaged or do not fit config.json.
    """
    config = load_config(checkpoint)
    folder = resolve_checkpoint(checkpoint)
    check_weights(folder, checkpoint)
    _check_weights_size(config, folder, checkpoint)
    with loading_errors(str(checkpoint)):
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_no_missing_weights(info, checkpoint)
    _check_weight_shapes(info, checkpoint)
    return untie_lm_head(model).eval()


@contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Turn every error of a block that loads a model into a UserError that begins with `name`.

    Progress bars and transformers' report of missing weights are not printed: the caller checks the weights.
    """
    logging = transformers.utils.logging
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:
        raise UserError(f"{name}: the model cannot be loaded: {first_error_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)


def load_generation_config(checkpoint: str | Path) -> GenerationConfig:
    """Return the checkpoint's generation config, or one made from config.json; unset values are None.

    Older checkpoints keep beams, lengths and length penalty in config.json. `AutoConfig` drops these values, so the
    file itself is read, as `from_pretrained` of a model does.

    Raises:
        UserError: The file cannot be used.
    """
    folder = resolve_checkpoint(checkpoint, weights=False)
    path = folder / "generation_config.json"
    try:
        if path.is_file():
            return GenerationConfig.from_pretrained(folder)
        load_config(checkpoint)  # checks the file
        path = folder / "config.json"
        return GenerationConfig.from_model_config(json.loads(path.read_text(encoding="utf-8")))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be used: {error}") from None


def _check_weight_shapes(info: dict[str, Any], checkpoint: str | Path) -> None:
    """Raise UserError if `from_pretrained`'s loading info lists weights of another shape than config.json asks for."""
    if mismatched := sorted(info["mismatched_keys"]):
        name, shape, expected = mismatched[0]
        raise UserError(
            f"{checkpoint}: the weights do not fit config.json: {len(mismatched)} have another shape, "
            f"such as {name} ({tuple(shape)}, and {tuple(expected)} by the config)"
        )


def _check_weights_size(config: PretrainedConfig, folder: Path, checkpoint: str | Path) -> None:
    """Raise UserError if config.json asks for more parameters than the weight files have bytes.

    Without this check, `from_pretrained` would allocate and randomly initialise the missing weights.
    """
    family = family_of(config)
    sides = ((family.encoder_layers, family.encoder_ffn), (family.decoder_layers, family.decoder_ffn))
    try:
        feed_forward = sum(2 * getattr(config, layers) * getattr(config, width) for layers, width in sides)
        num_parameters = int(config.d_model * (config.vocab_size + feed_forward))
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{checkpoint}: config.json: d_model, vocab_size, a number of layers or a feed-forward width is no number; "
            f"copy the checkpoint again"
        ) from None
    num_bytes = sum(path.stat().st_size for path in weight_files(folder))
    if num_parameters > num_bytes:
        raise UserError(
            f"{checkpoint}: the weights do not fit config.json: it asks for more than {num_parameters:,} numbers, and "
            f"the weights are {num_bytes:,} bytes"
        )
