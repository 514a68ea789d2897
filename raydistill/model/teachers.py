"""Teachers and students on disk: finding, checking and loading them, and turning text into their tokens.

A checkpoint is a folder as `save_pretrained` writes it, or the hub's name of one; `owner/name@revision` is a
revision of it. Weights are read from safetensors only, since a pickled file can run code when it is opened.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raydistill.config.console import home
from raydistill.config.errors import UserError
from raydistill.config.presets import DATASETS, DEMO_TEACHER_RUN, TEACHERS, TeacherPreset, teacher_preset
from raydistill.config.run import Dataset

FAMILIES = ("bart", "pegasus", "mbart", "marian", "t5")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
MARIAN_FILES = ("source.spm", "target.spm", "vocab.json")
# The hub's files that are needed: none from sub-folders, no pickles, no other frameworks' weights.
HUB_PATTERNS = ["*.json", "model*.safetensors", "*.model", "*.spm", "*.txt"]
HUB_TIMEOUT = 5.0  # seconds until the hub counts as unreachable

Languages = tuple[str, str]


def locate(teacher: str, dataset: str) -> str:
    """The folder or hub name of a teacher: a preset's name (for the data set), a folder, or a hub name.

    Raises UserError where the demo's teacher is not trained yet or the preset has none for the data set.
    """
    if teacher == "demo":
        folder = home() / "runs" / DEMO_TEACHER_RUN / "best"
        if not folder.is_dir():
            raise UserError(f"the demo teacher is not at {folder}; train it with `python -m raydistill.train demo`")
        return str(folder)
    preset = teacher_preset(teacher, dataset)
    return preset.hub if preset else teacher


def resolve(where: str | Path, weights: bool = True) -> Path:
    """The local folder of a checkpoint, fetched from the hub where it is not here yet.

    `weights=False` fetches only what the configuration and the tokenizer need. With HF_HUB_OFFLINE=1 only
    the cache is read. Raises UserError: no such folder, not on the hub, the hub is out of reach.
    """
    folder = Path(where)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{where}: is a file; a checkpoint is a folder with config.json and model.safetensors")
    name, _, revision = str(where).partition("@")
    if not _may_be_hub_name(name):
        known = ", ".join([*TEACHERS, "demo"])
        raise UserError(f"{where}: no such folder, and not a hub name (owner/name); named teachers are {known}")
    return _from_hub(name, revision or None, weights)


def load_config(where: str | Path) -> PretrainedConfig:
    """The checked configuration of a checkpoint, without its weights.

    Raises UserError where it is missing or unreadable, or the model is none of `FAMILIES`.
    """
    folder = resolve(where, weights=False)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{where}: has no config.json; a checkpoint is what save_pretrained writes")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the checkpoint again") from None
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type is {kind!r}; supported are the encoder-decoders {', '.join(FAMILIES)}")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{path}: cannot be used: {_first_line(error)}") from None


def load_tokenizer(where: str | Path, languages: Languages | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, checked against its embedding table.

    `languages` are mBART's (source, target) codes such as ("en_XX", "ro_RO"); other families ignore them.
    Without them the target language is the one that the checkpoint's configuration starts with.
    Raises UserError: missing or unreadable files, a vocabulary larger than the table, an unknown language.
    """
    config = load_config(where)
    folder = resolve(where, weights=False)
    # Without its files from_pretrained would make an empty tokenizer without a word.
    if config.model_type == "marian":
        if absent := [name for name in MARIAN_FILES if not (folder / name).is_file()]:
            raise UserError(f"{where}: the tokenizer's {', '.join(absent)} is missing; copy it there")
    elif not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{where}: has no tokenizer files (one of {', '.join(TOKENIZER_FILES)})")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*sacremoses.*")
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{where}: the tokenizer cannot be loaded: {_first_line(error)}") from None
    check_vocabulary(config, tokenizer, where)
    if config.model_type == "mbart":
        _set_tokenizer_languages(tokenizer, config, folder, languages, where)
    return tokenizer


def load_model(where: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a checkpoint in eval mode, on the CPU, in `dtype`.

    Raises UserError: none of `FAMILIES`, no safetensors (only pickled weights), damaged or incomplete weights.
    """
    load_config(where)
    folder = resolve(where)
    check_weights(folder, where)
    logging = transformers.utils.logging
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is said below in a line
    try:
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise UserError(f"{where}: the model cannot be loaded: {_first_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{where}: the weights do not fit config.json: {len(missing)} are missing, such as {missing[0]}"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise UserError(
            f"{where}: the weights do not fit config.json: {len(mismatched)} have another shape, "
            f"such as {name} ({tuple(found)}, and {tuple(wanted)} by the config)"
        )
    return model.eval()


def load_generation_config(where: str | Path) -> GenerationConfig:
    """The checkpoint's generation config, or an empty one; unset values are None."""
    folder = resolve(where, weights=False)
    if not (folder / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(load_config(where))
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder / 'generation_config.json'}: cannot be used: {error}") from None


def check_weights(folder: Path, where: str | Path) -> None:
    """Raise a UserError where a folder's safetensors are absent, truncated or incomplete."""
    files = weight_files(folder)
    if not files:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        has = f"only pickled weights ({', '.join(pickled)})" if pickled else "no model.safetensors"
        raise UserError(
            f"{where}: has {has}, and a pickled file can run code when it is opened. If you trust it, convert "
            'it: python -c "from transformers import AutoModelForSeq2SeqLM as M, AutoTokenizer as T; '
            f"M.from_pretrained('{where}').save_pretrained('converted'); "
            "T.from_pretrained('" + str(where) + "').save_pretrained('converted')\" and use ./converted "
            "(on the hub, owner/name@refs/pr/N is a conversion that waits in a pull request)"
        )
    for path in files:
        if not path.is_file():
            raise UserError(f"{where}: {path.name} is missing; the index lists it. Copy the checkpoint again")
        try:
            with _safe_open(path) as tensors:
                tensors.keys()
        except Exception as error:
            raise UserError(f"{path}: damaged or truncated ({_first_line(error)}); copy the checkpoint again") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index lists."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [p for p in [folder / "model.safetensors"] if p.is_file()]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: not a weight index ({error}); copy the checkpoint again") from None
    return [folder / name for name in sorted(names)]


def check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, where: str | Path) -> None:
    """Raise a UserError where the tokenizer can write an id that the embedding table has no row for.

    A table padded beyond the tokenizer is fine. Published BART models have a <mask> beyond the table's end:
    it is then taken as ordinary characters where a text holds it.
    """
    rows = config.vocab_size
    beyond = [word for word, i in tokenizer.get_vocab().items() if i >= rows]
    if not beyond:
        return
    if beyond != [tokenizer.mask_token]:
        raise UserError(
            f"{where}: the tokenizer knows {len(beyond)} tokens beyond the embedding's {rows} rows, such as "
            f"{beyond[0]!r}; tokenizer and model do not belong together"
        )
    tokenizer.split_special_tokens = True


def set_languages(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make an mBART model write the tokenizer's target language; nothing for the other families."""
    apply_languages(model.config, model.generation_config, tokenizer)


def apply_languages(config: PretrainedConfig, generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set mBART's target language in both configurations, in place.

    mBART-25 starts the decoder with the language's id, mBART-50 forces it as the first token.
    """
    if config.model_type != "mbart" or getattr(tokenizer, "tgt_lang", None) is None:
        return
    code = tokenizer.convert_tokens_to_ids(tokenizer.tgt_lang)
    key = "forced_bos_token_id" if _is_mbart50(tokenizer) else "decoder_start_token_id"
    setattr(config, key, code)
    setattr(generation, key, code)


def fingerprint(of: str | Path | PreTrainedModel) -> str:
    """16 hex digits of a SHA-256 over the weights: names, dtypes, shapes, bytes, each shared weight once.

    The same for a model and for the folder that `save_pretrained` wrote of it; a model loaded in another
    dtype is another.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(of)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest sequence in tokens that the model has positions for; None (T5) is no limit."""
    return None if config.model_type == "t5" else int(config.max_position_embeddings)


def max_tokens(
    which: Literal["max_source_tokens", "max_target_tokens"],
    dataset: Dataset,
    preset: TeacherPreset | None,
    config: PretrainedConfig,
) -> int:
    """A length limit in tokens: as the data set asks, else the teacher's preset, else the data set's, else 512 or 128.

    UserError where more is asked for than the model has positions; other limits are cut down to them.
    """
    positions = max_positions(config)
    asked = getattr(dataset, which)
    if asked is not None:
        if positions is not None and asked > positions:
            raise UserError(f"dataset.{which} is {asked}, but the model has {positions} positions")
        return int(asked)
    default = 512 if which == "max_source_tokens" else 128
    limit = getattr(preset or DATASETS.get(dataset.name), which, default)
    return min(limit, positions) if positions else int(limit)


def tokenize_sources(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> list[list[int]]:
    """The token ids of each source text with the family's special tokens, cut to `max_tokens` in all."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def tokenize_targets(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> list[list[int]]:
    """The labels of each target text, cut to `max_tokens` in all; the special tokens at the end are kept."""
    if not texts:
        return []
    encoded = tokenizer(text_target=list(texts), truncation=True, max_length=max_tokens, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _tensors(of: str | Path | PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(of, PreTrainedModel):
        # Not written by save_pretrained either: tied weights, and Marian's sinusoids.
        left_out = {*of.all_tied_weights_keys, *(of._keys_to_ignore_on_save or ())}
        yield from ((name, t) for name, t in of.state_dict().items() if name not in left_out)
        return
    folder = resolve(of)
    check_weights(folder, of)
    for path in weight_files(folder):
        with _safe_open(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def _safe_open(path: Path):  # type: ignore[no-untyped-def]
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def _set_tokenizer_languages(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    folder: Path,
    languages: Languages | None,
    where: str | Path,
) -> None:
    vocabulary = tokenizer.get_vocab()
    for code in languages or ():
        if code not in vocabulary or "_" not in code:
            known = sorted(w for w in tokenizer.all_special_tokens if len(w) == 5 and w[2] == "_")
            raise UserError(f"{where}: unknown language {code!r}; it knows {', '.join(known)}")
    if languages:
        tokenizer.src_lang, tokenizer.tgt_lang = languages
    elif getattr(tokenizer, "tgt_lang", None) is None:
        generation = load_generation_config(folder)
        start = generation.forced_bos_token_id if _is_mbart50(tokenizer) else config.decoder_start_token_id
        token = tokenizer.convert_ids_to_tokens(start) if start is not None else None
        if token is None or token in (tokenizer.eos_token, tokenizer.bos_token):
            raise UserError(
                f"{where}: which languages? The checkpoint does not say; give both, such as en_XX and ro_RO"
            )
        tokenizer.tgt_lang = token
    # The attribute alone does not change the special tokens of the source.
    tokenizer.src_lang = tokenizer.src_lang


def _is_mbart50(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "MBart50" in type(tokenizer).__name__


def _may_be_hub_name(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _from_hub(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [p for p in HUB_PATTERNS if weights or "safetensors" not in p]
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                etag_timeout=HUB_TIMEOUT,
            )
        )
    except GatedRepoError:
        raise UserError(f"{name}: the hub asks for a login; accept its terms and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name}: neither a folder here nor a model on the hub (or a private one)") from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: the hub has no revision {revision!r} of it") from None
    except (LocalEntryNotFoundError, OSError) as error:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            why = "HF_HUB_OFFLINE is set and it is not in the local cache"
        else:
            why = f"it is not in the local cache and the hub cannot be reached ({_first_line(error)})"
        raise UserError(
            f"{name}: no such folder; {why}. Give a folder, or fetch it where there is a network: hf download {name}"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0][:300]}" if lines else type(error).__name__
