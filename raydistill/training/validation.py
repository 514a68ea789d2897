"""Scores of a student: the loss on the validation rows, and generation through a serving engine."""

import importlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistill.config.run import Run
from raydistill.data.batching import bucket_by_length
from raydistill.evaluation.scoring import EvaluationResult, evaluate
from raydistill.inference.decoding import BeamSearchParams
from raydistill.inference.engines import open_engine
from raydistill.models import families
from raydistill.models.loading import Languages
from raydistill.models.tensors import make_attention_mask, pad_to_tensor
from raydistill.training.losses import OutputTargets, output_loss
from raydistill.training.run_folder import save_checkpoint
from raydistill.training.tokenized_data import TokenizedData, tokenize_split

METRIC_LIBRARIES = {"rouge2": "rouge_score", "bleu": "sacrebleu"}


@dataclass(frozen=True)
class Validator:
    """Scores the student as it is, or a checkpoint of it.

    `metric` is rouge2 or bleu, or val_loss where the metric's library is not installed: the score of a validation
    is then -val_loss, nothing is generated, and there are no test scores.
    """

    run: Run
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TokenizedData
    beam: BeamSearchParams
    languages: Languages | None
    device: str
    metric: str

    def validate(self, folder: Path) -> dict[str, float]:
        """Write the student into `folder` and score it there."""
        self.student.eval()
        save_checkpoint(self.student, self.tokenizer, folder)
        loss = self.compute_loss()
        found = self.score(folder, ["validation"], self.validation_beam()).get("validation")
        if found is None:
            return {"val_loss": loss, "score": -loss}
        metrics = found.scored.metrics
        return {"val_loss": loss, **metrics, "score": metrics[self.metric], "repetition": found.repetition}

    def validation_beam(self) -> BeamSearchParams:
        """The decoding of the checks during training: fewer beams and a penalty of their own, as in the recipes."""
        asked = self.run.evaluation
        penalty = asked.validation_length_penalty
        return replace(
            self.beam,
            beams=asked.validation_beams or min(2, self.beam.beams),
            length_penalty=self.beam.length_penalty if penalty is None else penalty,
        )

    def score(self, folder: Path, splits: Sequence[str], beam: BeamSearchParams) -> dict[str, EvaluationResult]:
        """Generate and score splits with the checkpoint in `folder`; none where there is no such split or scorer."""
        corpora = {split: self.data.corpora[split] for split in splits if split in self.data.corpora}
        if self.metric == "val_loss" or not corpora:
            return {}
        engine = open_engine(
            folder,
            self.run.evaluation.engine,
            device=self.device,
            threads=self.run.training.threads,
            languages=self.languages,
            cache_dir=folder.parent / ".engine",
        )
        try:
            return {
                split: evaluate(
                    engine,
                    corpus.sources,
                    corpus.targets,
                    self.metric,
                    beam,
                    max_source_tokens=self.data.max_source_tokens,
                    batch_size=self.run.evaluation.batch_size,
                )
                for split, corpus in corpora.items()
            }
        finally:
            shutil.rmtree(folder.parent / ".engine", ignore_errors=True)

    def compute_loss(self) -> float:
        """Mean cross-entropy per real target token of the validation rows."""
        sources = self.data.sources["validation"]
        targets = tokenize_split(self.tokenizer, self.run.dataset, "validation", "target", self.data.max_target_tokens)
        total, count = 0.0, 0
        with torch.inference_mode():
            for batch in bucket_by_length([len(s) for s in sources], 8192):
                picked = [sources[i] for i in batch]
                ids, mask = pad_to_tensor(picked, self.student.config.pad_token_id), make_attention_mask(picked)
                labels = pad_to_tensor([targets[i] for i in batch], -100).to(self.student.device)
                ids, mask = ids.to(self.student.device), mask.to(self.student.device)
                encoded = families.encode(self.student, ids, mask).last_hidden_state
                hidden = families.decode(
                    self.student, families.shift_right(self.student, labels), encoded, mask
                ).last_hidden_state
                real = labels != -100
                wanted = OutputTargets(labels[real])
                _, entropy, _ = output_loss(
                    hidden[real], lambda h: families.lm_head(self.student, h), wanted, self.student.config.vocab_size
                )
                total += float(entropy)
                count += int(real.sum())
        return total / count


def missing_metric_library(metric: str) -> str | None:
    """The library that `metric` needs, where it is not installed."""
    try:
        importlib.import_module(METRIC_LIBRARIES[metric])
    except ImportError:
        return METRIC_LIBRARIES[metric]
    return None
