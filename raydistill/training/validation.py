"""Scores of a student: the loss on the validation rows, and generation through a serving engine."""

import importlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistill.config.run import Run
from raydistill.data.batching import buckets
from raydistill.evaluation.checkpoint import Evaluation, evaluate
from raydistill.inference.decoding import Beam
from raydistill.inference.engines import open_engine
from raydistill.models import families
from raydistill.models.loading import Languages
from raydistill.teacher_cache.builder import mask_of, padded
from raydistill.training.losses import Targets, output_loss
from raydistill.training.run_folder import save_checkpoint
from raydistill.training.tokenized_data import Material, tokens

SCORERS = {"rouge2": "rouge_score", "bleu": "sacrebleu"}


@dataclass(frozen=True)
class Validator:
    """Scores the student as it is, or a checkpoint of it.

    `metric` is rouge2 or bleu, or val_loss where the metric's library is not installed: the score of a validation
    is then -val_loss, nothing is generated, and there are no test scores.
    """

    run: Run
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    material: Material
    beam: Beam
    languages: Languages | None
    device: str
    metric: str

    def validate(self, folder: Path) -> dict[str, float]:
        """Write the student into `folder` and score it there."""
        self.student.eval()
        save_checkpoint(self.student, self.tokenizer, folder)
        loss = self.loss()
        found = self.score(folder, ["validation"], self.quick_beam()).get("validation")
        if found is None:
            return {"val_loss": loss, "score": -loss}
        metrics = found.scored.metrics
        return {"val_loss": loss, **metrics, "score": metrics[self.metric], "repetition": found.repetition}

    def quick_beam(self) -> Beam:
        """The decoding of the checks during training: fewer beams and a penalty of their own, as in the recipes."""
        asked = self.run.evaluation
        penalty = asked.validation_length_penalty
        return replace(
            self.beam,
            beams=asked.validation_beams or min(2, self.beam.beams),
            length_penalty=self.beam.length_penalty if penalty is None else penalty,
        )

    def score(self, folder: Path, splits: Sequence[str], beam: Beam) -> dict[str, Evaluation]:
        """Generate and score splits with the checkpoint in `folder`; none where there is no such split or scorer."""
        corpora = {split: self.material.corpora[split] for split in splits if split in self.material.corpora}
        if self.metric == "val_loss" or not corpora:
            return {}
        engine = open_engine(
            folder,
            self.run.evaluation.engine,
            device=self.device,
            threads=self.run.training.threads,
            languages=self.languages,
            cache=folder.parent / ".engine",
        )
        try:
            return {
                split: evaluate(
                    engine,
                    corpus.sources,
                    corpus.targets,
                    self.metric,
                    beam,
                    max_source_tokens=self.material.max_source_tokens,
                    batch_size=self.run.evaluation.batch_size,
                )
                for split, corpus in corpora.items()
            }
        finally:
            shutil.rmtree(folder.parent / ".engine", ignore_errors=True)

    def loss(self) -> float:
        """Mean cross-entropy per real target token of the validation rows."""
        sources = self.material.sources["validation"]
        targets = tokens(self.tokenizer, self.run.dataset, "validation", "target", self.material.max_target_tokens)
        total, count = 0.0, 0
        with torch.inference_mode():
            for batch in buckets([len(s) for s in sources], 8192):
                picked = [sources[i] for i in batch]
                ids, mask = padded(picked, self.student.config.pad_token_id), mask_of(picked)
                labels = padded([targets[i] for i in batch], -100).to(self.student.device)
                ids, mask = ids.to(self.student.device), mask.to(self.student.device)
                encoded = families.encode(self.student, ids, mask).last
                hidden = families.decode(self.student, families.shift_right(self.student, labels), encoded, mask).last
                real = labels != -100
                wanted = Targets(labels[real])
                _, entropy, _ = output_loss(
                    hidden[real], lambda h: families.head(self.student, h), wanted, self.student.config.vocab_size
                )
                total += float(entropy)
                count += int(real.sum())
        return total / count


def missing_scorer(metric: str) -> str | None:
    """The library that `metric` needs, where it is not installed."""
    try:
        importlib.import_module(SCORERS[metric])
    except ImportError:
        return SCORERS[metric]
    return None
