"""Shortlists: the tokens that the decoder may write, as a vocabulary map of CTranslate2.

A `fixed` shortlist holds the most used target tokens and is the same for every text. A `source` shortlist holds fewer
of the most used tokens and, for each source token, likely translations. The output layer computes the listed tokens
only.

Tokens are never excluded if an output cannot do without them: special tokens, language codes, the end token, the
unknown token, and the bytes of tokenizers that spell unknown words with bytes.

The file is the vocabulary map that `ctranslate2.Translator` reads as vmap.txt in the model's folder and that
`translate_batch(use_vmap=True)` applies. A line is a source token, a tab, and target tokens separated by spaces. The
line with an empty source token lists the tokens that are always allowed. CTranslate2 allows, for a batch, the union of
the lists of its rows: with a `source` shortlist, a text may depend on the other texts of its batch.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from raydistill.core.artifact import MANIFEST
from raydistill.core.errors import UserError
from raydistill.core.files import atomic_path, corrupt_file_error
from raydistill.core.paths import raydistill_home
from raydistill.inference.word_alignment import Rows, Translations
from raydistill.models.tokenization import BYTE_TOKEN

MAP_FILE = "vmap.txt"  # the name that CTranslate2 reads in a model's folder
SEPARATORS = re.compile(r"[ \t\n\r]")  # cannot be part of a token in the file
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")


@dataclass(frozen=True)
class Shortlist:
    """The tokens that the decoder may write.

    Attributes:
        always: Ids that are always allowed, sorted.
        by_source: Further ids that a source token allows, by the id of the source token; empty for a `fixed` shortlist.
    """

    always: np.ndarray
    by_source: Mapping[int, np.ndarray] = field(default_factory=dict)

    def allowed(self, sources: Iterable[Sequence[int]]) -> np.ndarray:
        """The ids that the decoder may write for a batch of source rows, sorted: the union over the rows."""
        tokens = {token for row in sources for token in row if token in self.by_source}
        return np.unique(np.concatenate([self.always, *(self.by_source[token] for token in tokens)]))

    @cached_property
    def key(self) -> list[list[int]]:
        """The content as lists of integers; equal for equal shortlists."""
        lines = [[token, *map(int, np.sort(ids))] for token, ids in sorted(self.by_source.items())]
        return [self.always.tolist(), *lines]


def fixed_shortlist(targets: Rows, size: int, kept: Collection[int]) -> Shortlist:
    """A shortlist of the `size` most used target tokens and the `kept` tokens (see `kept_tokens`)."""
    return Shortlist(_most_used(targets, size, kept))


def source_shortlist(
    sources: Rows,
    targets: Rows,
    translations: Translations,
    num_candidates: int,
    num_most_used: int,
    kept: Collection[int],
) -> Shortlist:
    """A shortlist that depends on the source: likely translations of its tokens, its tokens, and the most used tokens.

    The source tokens themselves are listed because names and numbers are copied; source and target share a vocabulary.

    Args:
        sources: Token ids of the training sources.
        targets: Token ids of the targets.
        translations: From `word_alignment.translation_probabilities` of the same rows.
        num_candidates: Translations per source token, at most, in addition to the tokens that are always allowed.
        num_most_used: Number of most used target tokens, which are always allowed.
        kept: Further tokens that are always allowed (see `kept_tokens`).
    """
    always = _most_used(targets, num_most_used, kept)
    by_source = translations.best(num_candidates, ignore=always)
    for token in set().union(*sources) - set(always.tolist()):
        by_source[token] = np.append(by_source.get(token, np.empty(0, np.int64)), token)
    return Shortlist(always, {token: np.unique(ids) for token, ids in by_source.items()})


def kept_tokens(tokenizer: PreTrainedTokenizerBase, config: Any) -> set[int]:
    """The ids that every shortlist allows: special tokens, language codes and bytes.

    An output cannot do without special tokens, and CTranslate2 confuses them with others if they are optional (see
    `ctranslate2_conversion`).

    Args:
        tokenizer: The tokenizer.
        config: The model's configuration, for tokens that the tokenizer does not declare as special.
    """
    vocabulary = tokenizer.get_vocab()
    ids = set(tokenizer.all_special_ids) | {getattr(config, name, None) for name in TOKEN_IDS}
    ids |= {i for token, i in vocabulary.items() if BYTE_TOKEN.fullmatch(token)}
    alphabet = ByteLevel.alphabet()
    if all(character in vocabulary for character in alphabet):  # byte-level BPE: a character for each byte
        ids |= {vocabulary[character] for character in alphabet}
    return {i for i in ids if i is not None and i < config.vocab_size}


def _most_used(targets: Rows, size: int, kept: Collection[int]) -> np.ndarray:
    """The `size` most used tokens and the kept tokens, sorted; of equally frequent tokens, lower ids come first."""
    ids, counts = np.unique(np.fromiter(itertools.chain.from_iterable(targets), np.int64), return_counts=True)
    most_used = ids[np.argsort(-counts, kind="stable")[:size]]
    return np.union1d(most_used, np.fromiter(kept, np.int64, len(kept)))


# The file


def write_map(path: Path, shortlist: Shortlist, tokens: Sequence[str]) -> None:
    """Write a shortlist atomically as a vocabulary map of CTranslate2.

    Args:
        path: The file.
        shortlist: The shortlist.
        tokens: All tokens by id.

    Raises:
        UserError: A token contains a space, a tab or a line break, which the format cannot express.
    """
    used = {*shortlist.always.tolist(), *shortlist.by_source}
    used = used.union(*(ids.tolist() for ids in shortlist.by_source.values()))
    if unwritable := sorted(i for i in used if SEPARATORS.search(tokens[i])):
        raise UserError(
            f"{path}: the token {tokens[unwritable[0]]!r} contains a space or a line break, so CTranslate2 "
            f"cannot read it in a vocabulary map; use no shortlist for this model"
        )
    lines = ["\t" + " ".join(tokens[i] for i in shortlist.always)]
    lines += [f"{tokens[token]}\t{' '.join(tokens[i] for i in ids)}" for token, ids in shortlist.by_source.items()]
    with atomic_path(path) as temporary:
        temporary.write_bytes("".join(f"{line}\n" for line in lines).encode())


def read_map(path: Path, tokens: Sequence[str], required: Collection[int] = ()) -> Shortlist:
    """Read a vocabulary map.

    Args:
        path: The file.
        tokens: All tokens by id.
        required: Ids that must always be allowed (see `kept_tokens`).

    Raises:
        UserError: The file is missing or damaged, has a line of several source tokens, lacks a required token, or was
            made for another vocabulary.
    """
    token_to_id = {token: i for i, token in enumerate(tokens)}
    with corrupt_file_error(path, "Write the vocabulary map again"):
        lists: dict[str, np.ndarray] = {}
        for number, line in enumerate(path.read_bytes().decode().split("\n")[:-1], 1):
            source, tab, targets = line.partition("\t")
            if not tab or " " in source:
                raise ValueError(f"line {number} is not a source token, a tab and target tokens")
            if unknown := [token for token in (source, *targets.split(" ")) if token and token not in token_to_id]:
                raise ValueError(f"line {number}: the model's vocabulary lacks {unknown[0]!r}")
            lists[source] = np.array(sorted(token_to_id[token] for token in targets.split(" ") if token), np.int64)
        if "" not in lists:
            raise ValueError("no line with the tokens that are always allowed")
        always = lists.pop("")
        if missing := [tokens[i] for i in required if i not in always]:
            raise ValueError(f"the tokens that are always allowed lack {missing[0]!r}")
    return Shortlist(always, {token_to_id[token]: ids for token, ids in lists.items()})


def stored_map(name: str) -> Path:
    """The vocabulary map of a shortlist that a sweep made. `name` is the name of the artifact."""
    return raydistill_home() / "shortlists" / name / MAP_FILE


def restrict_map(path: Path, tokens: Sequence[str], folder: Path) -> Path:
    """The vocabulary map of `path` for a model that has some of its tokens only.

    Args:
        path: A map that was made with a larger vocabulary.
        tokens: All tokens of the model by id.
        folder: Where the new map is written.

    Returns:
        `path` itself if the model has every token of the map.
    """
    known = {"", *tokens}
    lines = [line.partition("\t") for line in path.read_bytes().decode().split("\n")[:-1]]
    kept = [
        (source, [token for token in targets.split(" ") if token in known])
        for source, _, targets in lines
        if source in known
    ]
    content = "".join(f"{source}\t{' '.join(targets)}\n" for source, targets in kept).encode()
    if content == path.read_bytes():
        return path
    restricted = folder / MAP_FILE
    restricted.write_bytes(content)
    return restricted


def link_model(model: Path, map_path: Path, folder: Path) -> Path:
    """Create and return `folder`: a model with a vocabulary map, as symbolic links to the files of `model` and the map.

    `ctranslate2.Translator` reads the new folder like any other; the weights are not copied.
    """
    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and path.name not in (MAP_FILE, MANIFEST):  # the manifest describes the folder of the model
            (folder / path.name).symlink_to(path.resolve())
    (folder / MAP_FILE).symlink_to(map_path.resolve())
    return folder


# Coverage


@dataclass(frozen=True)
class Coverage:
    """How much of some texts a shortlist allows.

    Attributes:
        rows: Number of texts.
        tokens: Number of their tokens.
        rows_outside: Texts with a token that is not allowed.
        tokens_outside: Tokens that are not allowed.
        mean_allowed: Tokens that are allowed, averaged over the batches.
    """

    rows: int
    tokens: int
    rows_outside: int
    tokens_outside: int
    mean_allowed: float

    @property
    def share_of_tokens_outside(self) -> float:
        return self.tokens_outside / max(1, self.tokens)

    @property
    def share_of_rows_outside(self) -> float:
        return self.rows_outside / max(1, self.rows)


def measure_coverage(shortlist: Shortlist, sources: Rows, targets: Rows, batch_size: int = 1) -> Coverage:
    """Count the tokens of held-out targets that a shortlist excludes.

    Args:
        shortlist: The shortlist.
        sources: Token ids of the sources.
        targets: Token ids of the targets: row i belongs to `sources[i]`.
        batch_size: Rows per batch; a `source` shortlist allows the union over the rows of a batch.
    """
    rows_outside = tokens_outside = 0
    sizes = []
    for start in range(0, len(targets), batch_size):
        allowed = shortlist.allowed(sources[start : start + batch_size])
        sizes.append(len(allowed))
        members = set(allowed.tolist())
        for row in targets[start : start + batch_size]:
            missing = sum(token not in members for token in row)
            tokens_outside += missing
            rows_outside += bool(missing)
    return Coverage(
        rows=len(targets),
        tokens=sum(len(row) for row in targets),
        rows_outside=rows_outside,
        tokens_outside=tokens_outside,
        mean_allowed=float(np.mean(sizes)) if sizes else 0.0,
    )
