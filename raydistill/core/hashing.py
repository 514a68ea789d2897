"""Hashes of content: keys of folders on disk, and draws that depend on a text only."""

import hashlib
import json


def content_hash(content: object, digits: int = 16) -> str:
    """The first hexadecimal digits of the SHA-256 of content as JSON with sorted keys.

    Values that JSON does not have, such as paths, count as their text. Keys of folders on disk depend on the exact
    bytes of this JSON.
    """
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text only: the first 8 bytes of its SHA-256 over 2^64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
