"""The configuration of a run: the training of one student, or of a teacher."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from raydistill.config.label_sources import parse_labels
from raydistill.config.metric_names import MetricName, MetricOrAuto
from raydistill.config.shapes import FULL_SIZE, Shape, Units, VocabularySize

Method = Literal["sft", "kd", "pl"]
# Tables 8 and 9 of the paper call them SFT, lo, mid, hi, 000 and rand.
Init = Literal["spaced", "first", "middle", "last", "repeated", "random", "measured"]
FfnChoice = Literal["activation", "random"]
LayerIndices = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # the name is also the name of a folder


class StrictModel(BaseModel):
    """An immutable model that rejects unknown keys, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Columns(StrictModel):
    """Column names; needed if the columns cannot be detected."""

    source: str = Field(description="column of the source text; dots address nested values, as in `translation.en`")
    target: str | None = Field(None, description="column of the target text")
    id: str | None = Field(
        None, description="column of the row id; default: `id` or `fname`, else the row number; empty: the row number"
    )


class Dataset(StrictModel):
    """A data set: a named data set, a hub name, a file, or a folder of train, validation and test files."""

    name: str = Field(
        description="a named data set, a hub name, a file, or a folder of train, validation and test files"
    )
    config: str | None = Field(None, description="configuration of a data set of the hub")
    columns: Columns | None = None
    skip_bad_rows: bool = Field(
        False, description="leave out and count rows that cannot be used, instead of stopping with an error"
    )
    train_rows: int | None = Field(None, ge=1, description="use only the first rows of the training split")
    validation_rows: int | None = Field(
        None, ge=1, description="use only the first rows of the validation split, which `selection_share` divides"
    )
    selection_share: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of the validation rows that is kept for the decoding and the choice of finished students, "
        "by a hash of the row's id; the others are for checks, early stopping and search. Default: 0.5 in a sweep, 0 "
        "in a run",
    )
    selection_split: str | None = Field(
        None,
        min_length=1,
        description="split for the decoding and the choice of finished students, instead of a share of the validation "
        "split: a split of the hub, or the name of a file in the folder, such as selection for selection.jsonl",
    )
    test_rows: int | None = Field(None, ge=1, description="use only the first rows of the test split")
    max_source_tokens: int | None = Field(None, ge=4, description="default: the preset's, else 512")
    max_target_tokens: int | None = Field(None, ge=2, description="default: the preset's, else 128")
    languages: tuple[str, str] | None = Field(
        None,
        description="source and target for multilingual teachers and T5, by the codes of the teacher: [en_XX, ro_RO] "
        "(mBART), [eng_Latn, ron_Latn] (NLLB-200), [en, ro] (M2M100, T5); default: the preset's",
    )
    source_prefix: str | None = Field(
        None,
        description="text before every source of teacher and students, with its last space: `summarize: ` for a T5, "
        "`<2de> ` for MADLAD-400; an empty text for none; default: the teacher's own prefix",
    )

    @model_validator(mode="after")
    def _check_selection_rows(self) -> "Dataset":
        if self.selection_split and self.selection_share is not None:
            raise ValueError("give either selection_share or selection_split")
        if self.selection_split in ("train", "validation", "test"):
            raise ValueError(
                f"selection_split {self.selection_split}: name a split that is not used for training, checks or the "
                f"final report"
            )
        return self


class NewModel(StrictModel):
    """The architecture of a randomly initialised model whose tokenizer is trained on the training split."""

    family: Literal["bart", "marian"] = Field(description="model family")
    encoder_layers: int = Field(ge=1, description="number of encoder layers")
    decoder_layers: int = Field(ge=1, description="number of decoder layers")
    d_model: int = Field(128, ge=8, description="width; a multiple of `heads`")
    heads: int = Field(4, ge=1, description="attention heads per layer")
    ffn_dim: int = Field(512, ge=8, description="feed-forward units per layer")
    vocab_size: int = Field(8000, ge=300, description="size of the vocabulary that is built from the training split")
    max_positions: int = Field(512, ge=16, description="longest sequence in tokens")

    @model_validator(mode="after")
    def _check_head_width(self) -> "NewModel":
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        return self


class LayerChoice(StrictModel):
    """Teacher layers of each side, counted from 0; default: chosen by the student's depth."""

    encoder: LayerIndices | None = Field(
        None, description="encoder layers of the teacher, one per layer of the student"
    )
    decoder: LayerIndices | None = Field(
        None, description="decoder layers of the teacher, one per layer of the student"
    )


def _check_ffn_units(value: Units) -> Units | None:
    """A share of the teacher's feed-forward units or a number of them; None if the share is all of them."""
    if value == 1:
        return None
    if 0 < value < 1:
        return value
    if value > 1 and value == int(value):
        return int(value)
    raise ValueError(
        f"{value:g} is neither a share of the teacher's feed-forward units, above 0 and at most 1, nor a whole number "
        f"of units, at least 2"
    )


FfnUnits = Annotated[Units, AfterValidator(_check_ffn_units)] | None


def _check_vocabulary(value: Any) -> Any:
    """The value "used", a number of tokens, or None for all tokens."""
    if value is None or value == "used" or (isinstance(value, int) and value >= 1 and value is not True):
        return value
    raise ValueError(f'{value!r} is neither "used" nor a number of tokens, at least 1')


Tokens = Annotated[VocabularySize | None, BeforeValidator(_check_vocabulary)]


class Student(StrictModel):
    """The architecture of the student, and the teacher layers and feed-forward units that it starts from."""

    size: str | None = Field(
        None, description='encoder and decoder layers, such as "12-3"; default: all layers of the teacher'
    )
    encoder_ffn: FfnUnits = Field(
        None,
        description="feed-forward units that each encoder layer keeps: a share of the teacher's, as 0.5, or a number, "
        "as 1024; default: all. T5 has one width for both sides: give encoder_ffn and decoder_ffn the same value",
    )
    decoder_ffn: FfnUnits = Field(
        None, description="feed-forward units that each decoder layer keeps: a share or a number; default: all"
    )
    ffn_choice: FfnChoice = Field(
        "activation",
        description="units to keep; activation: those with the largest outputs on rows of the training split; random: "
        "drawn with `training.seed`",
    )
    vocabulary: Tokens = Field(
        None,
        description="tokens that the student keeps; used: those that occur in the training sources, targets and label "
        "sets; a number: that many, the most frequent first; default: all. Special tokens, language codes, bytes and "
        "single characters are always kept",
    )
    init: Init = Field(
        "spaced",
        description="rule for the decoder layers to copy, unless `copied.decoder` lists them; random: none; measured: "
        "those whose untrained student diverges least from the teacher on training rows",
    )
    copy_from: str | None = Field(
        None, description="copy the decoder layers from this checkpoint with the teacher's architecture"
    )
    copied: LayerChoice = Field(LayerChoice(), description="Teacher layers that the student copies, counted from 0.")
    supervised: LayerChoice = Field(
        LayerChoice(),
        description="Teacher layers that the student's layers are compared with in the hidden loss (phi), counted "
        "from 0.",
    )

    @property
    def shape(self) -> Shape:
        """The architecture; equal shapes have equal costs."""
        return Shape(self.size or FULL_SIZE, self.encoder_ffn, self.decoder_ffn, self.vocabulary)

    @classmethod
    def of_shape(cls, shape: Shape) -> "Student":
        """A student of a shape, with default settings otherwise."""
        size = None if shape.size == FULL_SIZE else shape.size
        return cls(size=size, **{name: getattr(shape, name) for name in ("encoder_ffn", "decoder_ffn", "vocabulary")})

    @property
    def is_pruned(self) -> bool:
        """Whether layers have fewer feed-forward units than the teacher's."""
        return self.encoder_ffn is not None or self.decoder_ffn is not None

    @property
    def measures_layers(self) -> bool:
        """Whether training rows decide which decoder layers are copied."""
        return self.init == "measured" and self.copied.decoder is None

    @field_validator("size", mode="after")
    @classmethod
    def _check_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @model_validator(mode="after")
    def _check_copy_from(self) -> "Student":
        if self.copy_from is not None and self.init == "random" and self.copied.decoder is None:
            raise ValueError("init random copies no decoder layer; remove copy_from, or choose another init")
        if self.copy_from is not None and self.measures_layers:
            raise ValueError(
                "init measured compares the teacher's own layers; remove copy_from, or list copied.decoder"
            )
        return self

    @model_validator(mode="after")
    def _check_layer_counts(self) -> "Student":
        if self.size is None:
            return self
        depths = dict(zip(("encoder", "decoder"), parse_size(self.size), strict=True))
        for choice in ("copied", "supervised"):
            for side, depth in depths.items():
                layers = getattr(getattr(self, choice), side)
                if layers is not None and len(layers) != depth:
                    raise ValueError(
                        f"size {self.size} has {depth} {side} layers, but {choice}.{side} lists {len(layers)}: {layers}"
                    )
        return self


class Loss(StrictModel):
    """alpha_data * CE + alpha_logits * KL + alpha_hidden * MSE; methods other than `kd` use only the first term.

    `alpha_attention` and `alpha_cosine` add terms that the paper tried in section 6.3 and found not to help.
    """

    alpha_data: float = Field(1.0, ge=0, description="weight of the cross-entropy against the labels")
    alpha_logits: float = Field(
        0.8, ge=0, description="weight of the KL divergence from the teacher's distribution to the student's"
    )
    alpha_hidden: float = Field(3.0, ge=0, description="weight of the mean squared error between hidden states")
    alpha_attention: float = Field(
        0.0,
        ge=0,
        description="weight of the mean squared error between attention maps (TinyBERT); the teacher's decoder runs in "
        "every step",
    )
    alpha_cosine: float = Field(
        0.0, ge=0, description="weight of 1 - cosine between the last hidden states (DistilBERT)"
    )
    temperature: float = Field(
        2.0, gt=0, description="temperature of both distributions in the KL term; the term is multiplied by its square"
    )
    normalize_hidden: bool = Field(False, description="apply layer normalisation to both sides of the hidden loss")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="probability mass that the cross-entropy spreads over the vocabulary"
    )


# Fields that affect execution only, not results: a run may be resumed with other values.
RUNTIME_ONLY_FIELDS = {"training": {"micro_tokens", "gpus"}}


class Training(StrictModel):
    """Optimisation, validation and hardware."""

    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")
    encoder_learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak learning rate of the encoder's layers, which may need a smaller one than a new or shrunk "
        "decoder; no effect if the encoder is frozen; default: learning_rate",
    )
    optimizer: Literal["adamw", "adafactor"] = Field(
        "adamw", description="AdamW, or Adafactor with steps of the learning rate (not scaled by the weights)"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    adam_eps: float = Field(1e-8, gt=0, description="epsilon of AdamW")
    gradient_clip: float = Field(1.0, gt=0, description="maximum norm of the gradient")
    batch_size: int = Field(32, ge=1, description="rows per optimiser step, over all workers")
    accumulation: int = Field(1, ge=1, description="minimum number of micro-batches per optimiser step")
    micro_tokens: int | None = Field(
        None,
        ge=1,
        description="maximum number of padded source and target tokens of a micro-batch; does not change the steps; "
        "default: 16384, on a GPU by its memory, where source tokens count a quarter if the encoder is frozen",
    )
    epochs: float = Field(5, gt=0, le=100_000, description="passes over the training rows; may be fractional")
    max_steps: int | None = Field(None, ge=1, description="upper bound on optimiser steps")
    warmup_steps: int = Field(
        500, ge=0, description="steps in which the learning rate rises from zero; at most half of the run"
    )
    schedule: Literal["linear", "constant"] = Field(
        "linear", description="learning rate after warm-up: linear decay to zero, or constant"
    )
    checks_per_epoch: int = Field(4, ge=1, description="validations per epoch")
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after this number of validations without a better score; default: the validations of an "
        "epoch, so that a run may end before its last epoch does. A number of at least all validations turns early "
        "stopping off",
    )
    freeze_encoder: bool | None = Field(None, description="default: true if the encoder is a full copy")
    freeze_embeddings: bool | None = Field(None, description="default: true for students, false for teachers")
    dropout: float | None = Field(None, ge=0, lt=1, description="default: the teacher's")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="compute precision; `auto`: bf16 where the hardware computes in bf16"
    )
    seed: int = Field(0, description="seed of data order, dropout and random layers")
    workers: int = Field(1, ge=1, description="data-parallel workers; the global batch stays batch_size")
    threads: int = Field(1, ge=1, description="CPU threads per worker; on a GPU: CPUs that a worker reserves")
    gpus: float = Field(
        1,
        ge=0.01,
        le=1,
        description="share of a GPU per worker, on machines with GPUs; 0.25: four small students run on one GPU, if "
        "there are enough CPUs",
    )
    launcher: Literal["auto", "train", "tune"] = Field(
        "auto", description="train: Ray Train; tune: a reused actor, for short trials with one worker"
    )
    teacher_cache: Literal["auto", "full", "encoder", "off"] = Field(
        "auto", description="teacher states to store on disk; auto: chosen by measured cost"
    )
    cache_gb: float | None = Field(
        None, gt=0, description="maximum size of the teacher cache in GB; default: 90 % of the free space"
    )
    cache_precision: Literal["int8", "bf16", "fp32"] = Field(
        "bf16", description="precision of the teacher states on disk; int8: with a scale per 128 numbers"
    )

    @model_validator(mode="after")
    def _check_batch_split(self) -> "Training":
        if self.batch_size < self.workers * self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split over {self.workers} workers "
                f"x {self.accumulation} accumulation"
            )
        if self.workers > 1 and self.gpus < 1:  # NCCL does not allow two workers of one group on the same GPU
            raise ValueError(
                f"gpus {self.gpus:g} is only for runs with one worker; {self.workers} workers need a GPU each"
            )
        return self

    def get_warmup_steps(self, total_steps: int) -> int:
        """`warmup_steps`, limited to half of `total_steps`."""
        return min(self.warmup_steps, max(1, total_steps // 2))


class Decoding(StrictModel):
    """Beam search. The default of each key is the checkpoint's value, else the preset's, else the library's.

    For `max_length`, the preset's value is before the checkpoint's.
    """

    beams: int | None = Field(None, ge=1, description="number of beams; 1 is greedy decoding")
    length_penalty: float | None = Field(None, description="exponent of the length in the score of a beam")
    min_length: int | None = Field(None, ge=0, description="tokens, counted as `generate()` of transformers does")
    max_length: int | None = Field(None, ge=2, description="tokens, counted as `generate()` of transformers does")
    no_repeat_ngram: int | None = Field(
        None, ge=0, description="no n-gram of this size may occur twice; 0 allows repetition"
    )


class Curation(StrictModel):
    """Rules that select which teacher outputs become labels. Words are split at white space.

    Empty outputs are always dropped.
    """

    choose: Literal["score", "rouge2", "chrf"] = Field(
        "score",
        description="candidate to use as label: the teacher's best, or the most similar to the original by ROUGE-2 "
        "or chrF",
    )
    min_rouge2: float | None = Field(None, ge=0, le=100, description="ROUGE-2 against the original target")
    min_length_ratio: float | None = Field(None, ge=0, description="words, as a share of the original's")
    max_length_ratio: float | None = Field(None, gt=0, description="words, as a share of the original's")
    min_score: float | None = Field(
        None, le=0, description="the teacher's score: log-probability divided by length ** length_penalty"
    )
    min_source_ratio: float | None = Field(None, ge=0, description="characters, as a share of the source's")
    max_source_ratio: float | None = Field(None, gt=0, description="characters, as a share of the source's")
    source_language: str | None = Field(
        None, min_length=2, description="language of the source as detected, by its ISO 639 code, such as en"
    )
    target_language: str | None = Field(
        None, min_length=2, description="language of the label as detected, by its ISO 639 code, such as de"
    )
    max_repetition: float | None = Field(None, ge=0, le=1, description="share of repeated trigrams")
    max_copy_rate: float | None = Field(None, ge=0, le=1, description="share of trigrams that also occur in the source")
    reverse_model: str | None = Field(
        None, description="folder or hub name of a model that was fine-tuned from targets to sources"
    )
    max_reverse_loss: float | None = Field(
        None, gt=0, description="cross-entropy of the source given the label by `reverse_model`, in nats per token"
    )
    agree_with: str | None = Field(None, description="folder of another teacher's label set for the same data")
    min_agreement: float | None = Field(
        None, ge=0, le=100, description="ROUGE-2 against the label of the set in `agree_with`"
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> "Curation":
        if (self.agree_with is None) != (self.min_agreement is None):
            raise ValueError("agree_with and min_agreement must be given together")
        if (self.reverse_model is None) != (self.max_reverse_loss is None):
            raise ValueError("reverse_model and max_reverse_loss must be given together")
        for name in ("length_ratio", "source_ratio"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{name} {low} is above max_{name} {high}")
        return self

    def without_references(self) -> "Curation":
        """The rules that compare with no other target, for texts that have none."""
        references = ("choose", "min_rouge2", "min_length_ratio", "max_length_ratio", "agree_with", "min_agreement")
        return Curation(**self.model_dump(exclude={*references}))

    @property
    def needs_original_targets(self) -> bool:
        """Whether a rule compares with the targets of the corpus."""
        ratios = (self.min_rouge2, self.min_length_ratio, self.max_length_ratio)
        return self.choose != "score" or any(rule is not None for rule in ratios)


class ExtraSources(StrictModel):
    """Texts without targets that a teacher labels: a file, a folder, or a data set of the hub."""

    name: str = Field(description="a file, a folder, a hub name or a named data set; targets are not read")
    config: str | None = Field(None, description="configuration of a data set of the hub")
    split: str = Field("train", min_length=1, description="the split to read")
    columns: Columns | None = None
    skip_bad_rows: bool = Field(False, description="leave out and count rows that cannot be used")

    def as_dataset(self) -> Dataset:
        """The texts as a data set."""
        return Dataset(name=self.name, config=self.config, columns=self.columns, skip_bad_rows=self.skip_bad_rows)


class PseudoLabeling(StrictModel):
    """Generation of pseudo-labels, for runs that train on them."""

    extra: ExtraSources | None = Field(
        None,
        description="more texts to label, without targets: a file of any format, or its name, columns and split. Runs "
        "with pseudo-labels train on them in addition to the training split",
    )
    extra_rows: int | None = Field(
        None, ge=0, description="use only the first rows of `extra`, after rows were left out; default: all"
    )
    extra_overlap: Literal["reject", "drop"] = Field(
        "reject",
        description="rows of `extra` that are near duplicates of validation, selection or test rows; reject: an "
        "error; drop: leave them out and report their number",
    )
    n_best: int = Field(1, ge=1, description="candidates to keep per row; at most the number of beams")
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="auto: fp32 on a CPU, bf16 on a GPU"
    )
    curation: Curation = Curation()

    def without_references(self) -> "PseudoLabeling":
        """The settings for texts without targets: curation by rules that compare with no other target."""
        return self.model_copy(update={"curation": self.curation.without_references()})

    @field_validator("extra", mode="before")
    @classmethod
    def _expand_extra_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_extra(self) -> "PseudoLabeling":
        if self.extra is None and (self.extra_rows is not None or self.extra_overlap != "reject"):
            raise ValueError("extra_rows and extra_overlap apply to the texts that `extra` names; give `extra`")
        return self


class Evaluation(StrictModel):
    """Scoring on the validation and test splits."""

    metric: MetricOrAuto = Field(
        "auto",
        description="metric that checkpoints and students are compared by: a named metric, `bertscore:MODEL:LAYER`, or "
        "`module:function` of your own; auto: the metric of the data set's preset, else chrf++ for a translation and "
        "rouge2 for other data",
    )
    report: list[MetricName] = Field(
        [],
        description="further metrics that are reported next to the deciding metric, for example [bleu, exact_match]; "
        "they decide nothing. With metric auto, bleu is reported next to chrf++",
    )
    allow_repetitive_teacher: bool = Field(
        False,
        description="distil a teacher of whose outputs most repeat themselves; by default, such a teacher is an error",
    )
    engine: Literal["auto", "ctranslate2", "transformers"] = Field(
        "auto",
        description="engine that decodes; `auto`: CTranslate2 where it loads and validates the model, else "
        "`transformers`",
    )
    batch_size: int = Field(32, ge=1, description="rows per decoded batch")
    validation_beams: int | None = Field(None, ge=1, description="beams during training; default: 2")
    validation_length_penalty: float | None = Field(
        None, description="length penalty during training; default: `decoding.length_penalty`"
    )
    validation_precision: Literal["final", "int8"] = Field(
        "final",
        description="precision of CTranslate2 during training; `final`: that of the final scores, which are never in "
        "int8",
    )
    validation_shortlist: int | None = Field(
        None,
        ge=1,
        description="during training, only this many of the most used target tokens can be written; default: all",
    )

    @model_validator(mode="after")
    def _check_validation_precision(self) -> "Evaluation":
        if self.validation_precision == "int8" and self.engine == "transformers":
            raise ValueError("validation_precision int8 needs CTranslate2; engine is transformers")
        return self


class Run(StrictModel):
    """The configuration of one run: a student of `teacher`, or a new model (`start`)."""

    name: str = Field(
        pattern=NAME_PATTERN, max_length=100, description="name of the run, and of its folder `outputs/runs/NAME`"
    )
    teacher: str | None = Field(
        None,
        description="the teacher to distil: a named teacher, a folder, or a hub name such as `owner/name@revision`. "
        "Without `student.size`, the checkpoint itself is fine-tuned. Exactly one of `teacher` and `start` is "
        "required",
    )
    start: NewModel | None = None
    dataset: Dataset
    method: Method = Field(
        "sft", description="`sft`: shrink and fine-tune; `kd`: knowledge distillation; `pl`: training on pseudo-labels"
    )
    labels: str = Field(
        "auto",
        description="original, pseudo, pseudo@TEACHER (of another teacher), the folder of a label set, or several with "
        "weights: original+pseudo*0.5+FOLDER; auto: pseudo for pl, else original",
    )
    student: Student = Student()
    loss: Loss = Loss()
    training: Training = Training()
    decoding: Decoding = Decoding()
    pseudo: PseudoLabeling = PseudoLabeling()
    evaluation: Evaluation = Evaluation()

    @field_validator("dataset", mode="before")
    @classmethod
    def _expand_dataset_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("labels", mode="after")
    @classmethod
    def _check_labels(cls, value: str) -> str:
        if value != "auto":
            parse_labels(value)
        return value

    @model_validator(mode="after")
    def _check_initial_model(self) -> "Run":
        if (self.teacher is None) == (self.start is None):
            raise ValueError("give either `teacher` (to train a student of it) or `start` (to train a new model)")
        if self.start is None:
            return self
        if self.method != "sft":
            raise ValueError(f"method {self.method} needs a `teacher`; `start` supports only sft")
        if self.student != Student():
            raise ValueError("`student` shrinks a teacher; set the layer counts of a new model in `start`")
        if self.uses_pseudo_labels or self.pseudo.extra is not None:
            raise ValueError(
                "labels: pseudo and pseudo.extra need a `teacher`; with `start`, give the folder of a label set"
            )
        return self

    @model_validator(mode="after")
    def _check_method(self) -> "Run":
        loss = self.loss
        distillation_weights = (loss.alpha_logits, loss.alpha_hidden, loss.alpha_attention, loss.alpha_cosine)
        if self.method == "pl" and self.labels == "original":
            raise ValueError("method pl trains on pseudo-labels; labels: original is method sft")
        if self.method == "kd" and not any(distillation_weights):
            raise ValueError("method kd with alpha_logits 0 and alpha_hidden 0 is method sft")
        if self.method != "kd" and loss.alpha_data == 0:
            raise ValueError(f"method {self.method} uses only the data loss; alpha_data must be above 0")
        return self

    @property
    def resolved_labels(self) -> str:
        """`labels` with `auto` resolved."""
        if self.labels != "auto":
            return self.labels
        return "pseudo" if self.method == "pl" else "original"

    @property
    def label_key(self) -> str:
        """Key of the label sets that this run needs: equal for runs of a space that share them."""
        settings = self.pseudo.model_dump_json(exclude_defaults=True)
        is_default = not self.uses_pseudo_labels or settings == "{}"
        return self.resolved_labels if is_default else f"{self.resolved_labels} {settings}"

    @property
    def uses_pseudo_labels(self) -> bool:
        """Whether a teacher has to generate labels for this run."""
        return any(source.is_pseudo for source in parse_labels(self.resolved_labels))

    @property
    def reads_extra(self) -> bool:
        """Whether the run trains on rows of `pseudo.extra`."""
        return self.uses_pseudo_labels and self.pseudo.extra is not None and self.pseudo.extra_rows != 0


def parse_size(size: str) -> tuple[int, int]:
    """Encoder and decoder layers of a size such as "12-3"; ValueError for another form."""
    match = re.fullmatch(r"([1-9]\d{0,2})-([1-9]\d{0,2})", size)
    if not match:
        raise ValueError(f'size {size!r} is not of the form "12-3" (encoder layers, decoder layers)')
    return int(match[1]), int(match[2])
