"""Layout of a cache: content keys of its stores, limits, and a folder that is removed during a build."""

from dataclasses import replace

import pytest

from raydistill.core.errors import UserError
from raydistill.data.batching import Examples
from raydistill.teacher_cache.layout import CacheDtypes
from tests.factories.teacher_cache import cache_examples, cache_layout


def test_keys_depend_on_teacher_sources_targets_and_dtypes(tmp_path):
    examples = cache_examples()
    base = cache_layout(tmp_path, examples)
    others = [
        replace(base, teacher_key="other"),
        replace(base, dtypes=CacheDtypes("bf16", "fp32")),
        replace(base, dtypes=CacheDtypes("int8", "fp32")),
        replace(base, dtypes=CacheDtypes("fp32", "bf16")),
        cache_layout(tmp_path, cache_examples(8)),
    ]
    assert len({layout.encoder_store.name for layout in (base, *others)}) == 6
    relabelled = Examples(examples.sources, [[7, 2]] * 9, examples.source_indices)
    assert cache_layout(tmp_path, relabelled).encoder_store == base.encoder_store
    assert cache_layout(tmp_path, relabelled).decoder_stores != base.decoder_stores
    assert cache_layout(tmp_path, examples, [1]).decoder_stores == base.decoder_stores


def test_store_that_was_removed_during_a_build_is_reported(tmp_path):
    layout = cache_layout(tmp_path, cache_examples())
    layout.prepare()
    with pytest.raises(UserError, match="was removed during the build; run the same command again"):
        layout.finish()
