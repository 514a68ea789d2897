"""Hashes of content, whose bytes decide the names of folders on disk."""

import hashlib
from pathlib import Path

import pytest

from raydistill.core.hashing import content_hash, hash_fraction


def test_content_hash_is_the_sha256_of_json_with_sorted_keys() -> None:
    text = b'{"a": [1, null, "x"], "b": {"c": 0.5, "d": true}}'
    content = {"b": {"d": True, "c": 0.5}, "a": (1, None, "x")}
    assert content_hash(content) == hashlib.sha256(text).hexdigest()[:16]
    assert content_hash(content, digits=8) == hashlib.sha256(text).hexdigest()[:8]
    assert content_hash([Path("a")]) == content_hash(["a"])


def test_hash_fraction_is_the_start_of_the_sha256_as_a_binary_fraction() -> None:
    """SHA-256 of "abc" begins with ba7816bf 8f01cfea (FIPS 180-2, appendix B.1)."""
    assert hash_fraction("abc") == pytest.approx(0xBA7816BF8F01CFEA / 0x1_0000_0000_0000_0000, abs=0)
    fractions = [hash_fraction(str(i)) for i in range(1000)]
    assert sum(fraction < 0.3 for fraction in fractions) == pytest.approx(300, abs=60)  # 4 standard deviations
