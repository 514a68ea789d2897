"""Scores of a student: its loss on the validation split, and the metric of its generated texts."""

import importlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from raydistill.config.metric_names import VALIDATION_LOSS, MetricChoice
from raydistill.config.run import Run
from raydistill.core.console import print_progress
from raydistill.core.errors import TransientError, UserError
from raydistill.core.locks import check_locks
from raydistill.data.batching import Examples, bucket_by_length
from raydistill.evaluation.metrics import get_metric, signatures
from raydistill.evaluation.scoring import EvaluationResult, evaluate
from raydistill.inference.decoding import BeamSearchParams, Engine, EngineOptions, resolve_decoding
from raydistill.inference.engines import FALLBACK_NOTICE, EngineName, open_engine
from raydistill.inference.shortlist import MAP_FILE, fixed_shortlist, kept_tokens, write_map
from raydistill.models import families, tokenization
from raydistill.models.saving import save_checkpoint
from raydistill.models.tensors import make_attention_mask, pad_to_tensor
from raydistill.training.losses import OutputTargets, output_loss
from raydistill.training.run_folder import CONVERSION_FOLDER
from raydistill.training.student import StudentSetup, set_generation_config
from raydistill.training.tokenized_data import TokenizedData, tokenize_split
from raydistill.training.workers import Worker

# Padded source tokens of a batch of the validation loss.
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Validator:
    """Scores the student in memory, or a saved checkpoint.

    Attributes:
        run: The run's config.
        setup: The student with its tokenizer and teacher.
        data: The run's data.
        beam: The decoding of the final scores.
        device: The device of losses and generation.
        metric: The deciding metric; `VALIDATION_LOSS` where its library is missing: no text is generated then.
        training_targets: Token ids of the training targets, for the shortlist of validations.
    """

    run: Run
    setup: StudentSetup
    data: TokenizedData
    beam: BeamSearchParams
    device: str
    metric: str
    training_targets: Sequence[Sequence[int]]

    @classmethod
    def create(
        cls, run: Run, setup: StudentSetup, data: TokenizedData, examples: Examples, worker: Worker
    ) -> "Validator":
        """A validator with the run's decoding, which is also written into the student's generation config."""
        preset = setup.teacher.preset if setup.teacher else None
        preset_decoding = preset.decoding if preset else None
        generation_config = setup.student.generation_config
        beam = resolve_decoding(run.decoding, generation_config, preset_decoding, data.max_target_tokens)
        set_generation_config(setup.student, beam, run.decoding)
        metric = _available_metric(data.metric, worker)
        return cls(run, setup, data, beam, worker.device, metric, examples.targets)

    @property
    def signature(self) -> str:
        """Metric libraries and options of the final scores; "val_loss" where no text is scored."""
        return VALIDATION_LOSS if self.metric == VALIDATION_LOSS else signatures(self.data.metrics.names)

    def validate(self, folder: Path, engine: str | None = None) -> dict[str, Any]:
        """Save the student as a checkpoint in `folder`; returns its loss and its scores on the validation split.

        `engine` is the engine of the run's earlier validations; see `score`.
        """
        self.setup.student.eval()
        save_checkpoint(self.setup.student, self.setup.tokenizer, folder)
        loss = self.compute_loss()
        evaluations = self.score(folder, ["validation"], self.validation_beam(), engine, in_training=True)
        evaluation = evaluations.get("validation")
        if evaluation is None:
            return {"val_loss": loss, "metric": VALIDATION_LOSS, "score": -loss}
        metrics = evaluation.scores.metrics
        return {
            "val_loss": loss,
            **metrics,
            "metric": self.metric,
            "score": metrics[self.metric],
            "repetition": evaluation.repetition_rate,
            "engine": evaluation.engine,
        }

    def validation_beam(self) -> BeamSearchParams:
        """The decoding of validations during training: by default up to 2 beams, as in the paper's recipes."""
        settings = self.run.evaluation
        penalty = settings.validation_length_penalty
        return replace(
            self.beam,
            beams=settings.validation_beams or min(2, self.beam.beams),
            length_penalty=self.beam.length_penalty if penalty is None else penalty,
        )

    def score(
        self,
        folder: Path,
        splits: Sequence[str],
        beam: BeamSearchParams,
        required_engine: str | None = None,
        *,
        in_training: bool = False,
    ) -> dict[str, EvaluationResult]:
        """Generate and score splits with the checkpoint in `folder`.

        Args:
            folder: The checkpoint.
            splits: The splits to score.
            beam: The decoding.
            required_engine: Engine and precision of the run's earlier validations, such as "ctranslate2 fp32"; None for
                the engine of the run's config.
            in_training: Whether to use precision and shortlist of validations and to score by the deciding metric
                only. All other scores are measured in full precision with the whole vocabulary.

        Returns:
            The scores by split, without splits that the data set lacks; empty where the metric's library is missing.

        Raises:
            TransientError: The required engine cannot be used, or another process took over the run's folder.
        """
        splits = [split for split in splits if split in self.data.corpora]
        if self.metric == VALIDATION_LOSS or not splits:
            return {}
        conversion_folder = folder.parent / CONVERSION_FOLDER
        options = EngineOptions(
            device=self.device,
            threads=self.run.training.threads,
            languages=self.setup.teacher.languages if self.setup.teacher else None,
            cache_dir=conversion_folder,
        )
        try:
            if in_training:
                options = self._validation_options(options, conversion_folder / MAP_FILE)
            engine = self._open_engine(folder, options, required_engine)
            metrics = MetricChoice(self.metric) if in_training else self.data.metrics
            return score_splits(engine, self.data, splits, beam, self.run.evaluation.batch_size, metrics)
        finally:
            check_locks()  # with a lost lock, the folder belongs to the validation of another process
            shutil.rmtree(conversion_folder, ignore_errors=True)

    def _validation_options(self, options: EngineOptions, map_path: Path) -> EngineOptions:
        """The options with precision and shortlist of validations during training; the shortlist is written."""
        settings, tokenizer = self.run.evaluation, self.setup.tokenizer
        if settings.validation_precision == "int8":
            options = replace(options, precision="int8")
        if settings.validation_shortlist is None:
            return options
        kept = kept_tokens(tokenizer, self.setup.student.config)
        candidates = fixed_shortlist(self.training_targets, settings.validation_shortlist, kept)
        write_map(map_path, candidates, tokenization.tokens_by_id(tokenizer))
        return replace(options, shortlist=map_path)

    def _open_engine(self, folder: Path, options: EngineOptions, required_engine: str | None) -> Engine:
        """Open the required engine, or the engine of the run's config.

        A retry repeats the validation from the saved state. Another engine would make the scores of the run's
        checkpoints incomparable.
        """
        if required_engine is None:
            return open_engine(folder, self.run.evaluation.engine, options, log=_print_fallback)
        name: EngineName = "ctranslate2" if required_engine.startswith("ctranslate2 ") else "transformers"
        precision = required_engine.removeprefix(f"{name} ")
        if precision == "int8":  # of validations, which have it in their options
            precision = options.precision
        try:
            return open_engine(folder, name, replace(options, precision=precision, allow_fallback=False))
        except UserError as error:
            raise TransientError(
                f"{error}. {required_engine} scored the run's first validation, so that all others need this engine: "
                f"run the same command again. If the engine fails again, set evaluation.engine to transformers and "
                f"give the run another name"
            ) from None

    def compute_loss(self) -> float:
        """Mean cross-entropy in nats per target token of the validation split."""
        tokenizer, max_length = self.setup.tokenizer, self.data.max_target_tokens
        sources = self.data.sources["validation"]
        targets = tokenize_split(tokenizer, self.run.dataset, "validation", "target", max_length)
        total, num_tokens = 0.0, 0
        with torch.inference_mode():
            for rows in bucket_by_length([len(source) for source in sources], BATCH_TOKENS):
                loss, count = self._batch_loss([sources[i] for i in rows], [targets[i] for i in rows])
                total += loss
                num_tokens += count
        return total / num_tokens

    def _batch_loss(self, sources: list[list[int]], targets: list[list[int]]) -> tuple[float, int]:
        """The sum of the cross-entropy over a batch, and the number of its target tokens."""
        student = self.setup.student
        ids = pad_to_tensor(sources, student.config.pad_token_id).to(student.device)
        mask = make_attention_mask(sources).to(student.device)
        labels = pad_to_tensor(targets, -100).to(student.device)
        encoder_states = families.encode(student, ids, mask).last_hidden_state
        decoder_ids = families.shift_right(student, labels)
        hidden = families.decode(student, decoder_ids, encoder_states, mask).last_hidden_state
        is_token = labels != -100
        _, cross_entropy, _ = output_loss(
            hidden[is_token],
            lambda states: families.lm_head(student, states),
            OutputTargets(labels[is_token]),
            student.config.vocab_size,
        )
        return float(cross_entropy), int(is_token.sum())


def _print_fallback(message: str) -> None:
    """Print why another engine than CTranslate2 scores the run; other messages of an engine are not printed."""
    if FALLBACK_NOTICE in message:
        print_progress(message)


def score_splits(
    engine: Engine,
    data: TokenizedData,
    splits: Sequence[str],
    beam: BeamSearchParams,
    batch_size: int,
    metrics: MetricChoice,
) -> dict[str, EvaluationResult]:
    """Generate and score the texts of some splits, by split."""
    return {
        split: evaluate(
            engine,
            data.corpora[split],
            metrics,
            beam,
            max_source_tokens=data.max_source_tokens,
            batch_size=batch_size,
        )
        for split in splits
    }


def _available_metric(metric: str, worker: Worker) -> str:
    """The metric, or `VALIDATION_LOSS` with a message where its library is not installed."""
    missing = missing_metric_library(metric)
    if missing is None:
        return metric
    if worker.is_main_process:
        print_progress(
            f"{missing} is not installed: checkpoints are compared by validation loss, and no text is scored"
        )
    return VALIDATION_LOSS


def missing_metric_library(metric: str) -> str | None:
    """The library that `metric` needs if it is not installed, else None."""
    library = get_metric(metric).library
    try:
        importlib.import_module(library or "raydistill")
    except ImportError:
        return library
    return None
