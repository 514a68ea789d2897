"""Fingerprints of checkpoints: SHA-256 over weights, over configuration and tokenizer, over a teacher's outputs."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from raydistill.core.hashing import content_hash
from raydistill.models.hub import check_weights, resolve_checkpoint, safe_open, weight_files
from raydistill.models.loading import load_config
from raydistill.models.tokenization import MARIAN_FILES, TOKENIZER_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weights_fingerprint(model: "str | Path | PreTrainedModel") -> str:
    """Return 16 hex digits of a SHA-256 over names, dtypes, shapes and bytes of the weights, each shared weight once.

    A model and the folder that its `save_pretrained` writes have equal fingerprints. Models in two dtypes do not.

    Raises:
        UserError: The checkpoint does not exist, or its weights are missing or damaged.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_iter_tensors(model)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def teacher_key(checkpoint: str | Path) -> str:
    """Return 16 hex digits of a SHA-256 over the weights and all settings that change a forward pass.

    Names, library versions, the dtype at loading and the settings of `generate()` do not change the key.

    Raises:
        UserError: The checkpoint does not exist, or its files are missing or damaged.
    """
    config = {
        key: value for key, value in load_config(checkpoint).to_dict().items() if key not in _non_forward_config_keys()
    }
    return content_hash([weights_fingerprint(checkpoint), config])


def settings_fingerprint(checkpoint: str | Path) -> str:
    """Return 16 hex digits of a SHA-256 over a checkpoint's configuration, generation config and tokenizer files.

    Raises:
        UserError: The checkpoint does not exist.
    """
    names = {"config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"}
    names |= {"added_tokens.json", "merges.txt", *TOKENIZER_FILES, *MARIAN_FILES}
    return hashlib.sha256(file_digests(resolve_checkpoint(checkpoint, weights=False), sorted(names))).hexdigest()[:16]


def file_digests(folder: Path, names: Iterable[str]) -> bytes:
    """Return name and SHA-256 of each file of `names` that exists in the folder, concatenated in the given order."""
    existing = [name for name in names if (folder / name).is_file()]
    return b"".join(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest() for name in existing)


def _non_forward_config_keys() -> set[str]:
    """Return the config keys that do not change a forward pass. The ids of special tokens do change it."""
    names = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "task_specific_params"}
    outputs = {"use_cache", "output_attentions", "output_hidden_states", "return_dict"}
    tokens = {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}
    return names | outputs | (set(GenerationConfig().to_dict()) - tokens)


def _iter_tensors(model: "str | Path | PreTrainedModel") -> Iterator[tuple[str, torch.Tensor]]:
    if not isinstance(model, str | Path):
        # save_pretrained omits tied weights and Marian's sinusoids, too.
        omitted = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
        yield from ((name, t) for name, t in model.state_dict().items() if name not in omitted)
        return
    folder = resolve_checkpoint(model)
    check_weights(folder, model)
    for path in weight_files(folder):
        with safe_open(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)
