"""Small teacher caches: examples of different lengths, a layout over them, and the expected states."""

import torch

from raydistill.config.run import Run
from raydistill.data.batching import Examples
from raydistill.teacher_cache.layout import CacheDtypes, CacheLayout

FP32_CACHE = CacheDtypes("fp32", "fp32")


def cache_examples(num_sources=9):
    """Sources and targets of different lengths. Source 2 has two examples, source 4 none, any other source one."""
    generator = torch.Generator().manual_seed(0)

    def random_tokens(length):
        return [*torch.randint(4, 100, (length,), generator=generator).tolist(), 2]

    rows = [2, *[row for row in range(num_sources) if row != 4]]
    sources = [random_tokens(3 + 5 * i % 11) for i in range(num_sources)]
    return Examples(sources, [random_tokens(1 + i % 5) for i in range(len(rows))], rows)


def cache_layout(root, examples, layers=(0, 2), dtypes=FP32_CACHE, encoder=True):
    """The layout of encoder states and of decoder `layers` of one label set, for a teacher of width 16."""
    return CacheLayout(root, "key", examples, 16, encoder, [(examples, list(layers))], dtypes)


def compute_states(teacher, examples, i):
    """Encoder states and states of all decoder layers of example i alone, by the forward pass of transformers."""
    source, target = examples.sources[examples.source_indices[i]], examples.targets[i]
    with torch.no_grad():
        outputs = teacher(
            input_ids=torch.tensor([source]), labels=torch.tensor([target]), output_hidden_states=True, use_cache=False
        )
    return outputs.encoder_last_hidden_state[0], [hidden[0] for hidden in outputs.decoder_hidden_states[1:]]


def is_close(states, expected):
    """Equality up to float32 rounding: a row alone and a row of a batch are summed in different orders."""
    return states.shape == expected.shape and float((states - expected).norm() / expected.norm()) < 1e-4


def cached_run(workspace, method, **training):
    """A run of the teacher and the corpus of `tests.factories.workspace.make_world`."""
    return Run.model_validate(
        {
            "name": "r",
            "teacher": str(workspace / "teacher"),
            "dataset": str(workspace / "data"),
            "method": method,
            "labels": "pseudo" if method == "kd" else "original",
            "student": {"size": "2-1"},
            "decoding": {"beams": 2, "max_length": 12},
            "training": {"precision": "fp32", "epochs": 4, **training},
            "evaluation": {"allow_repetitive_teacher": True},  # the teacher is not trained
        }
    )
