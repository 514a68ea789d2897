"""`raydistill cache`: list and remove stores."""

from dataclasses import replace

from raydistill.models.loading import load_model
from raydistill.teacher_cache.builder import build_cache
from tests.factories.models import save_tiny
from tests.factories.teacher_cache import cache_examples, cache_layout
from tests.factories.workspace import command, last_json


def test_stores_are_listed_and_removed_by_prefix_or_age(tmp_path):
    home = tmp_path / "outputs"
    layout = replace(cache_layout(home / "cache", cache_examples()), names=("bart", "news"))
    build_cache(layout, load_model(save_tiny("bart", tmp_path / "teacher", dropout=0.1)))
    listed = last_json(command(home, "cache", "list", "--json"))["stores"]
    assert sorted(s["name"] for s in listed) == sorted(w.name for w in [layout.encoder_store, *layout.decoder_stores])
    assert sum(s["bytes"] for s in listed) == sum(layout.array_sizes.values())
    without_name = command(home, "cache", "remove")
    assert (without_name.returncode, without_name.stdout) == (2, "")
    assert "--unused-days" in without_name.stderr
    unknown = command(home, "cache", "remove", "encoder-x")
    assert unknown.returncode == 2
    assert layout.encoder_store.name in unknown.stderr
    assert command(home, "cache", "remove", "--unused-days", "1").stdout.strip() == "nothing to remove"
    removed = last_json(command(home, "cache", "remove", layout.encoder_store.name[:12], "--json"))["removed"]
    assert [s["name"] for s in removed] == [layout.encoder_store.name]
    assert not layout.encoder_store.exists()
    assert layout.decoder_stores[0].exists()
