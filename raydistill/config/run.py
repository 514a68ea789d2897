"""What a run is: one training of one student (or of a teacher), from teacher and data to checkpoint."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from raydistill.config.label_sources import parse_labels

Method = Literal["sft", "kd", "pl"]
# Tables 8 and 9: SFT, lo, mid, hi, 000 and rand.
Init = Literal["spaced", "first", "middle", "last", "repeated", "random"]
LayerIndices = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class StrictModel(BaseModel):
    """Frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Columns(StrictModel):
    """Column names, where they are not found by themselves."""

    source: str
    target: str | None = None
    id: str | None = None


class Dataset(StrictModel):
    """A data set: a known name, a hub name, a file, or a folder of train/validation/test files."""

    name: str
    config: str | None = Field(None, description="the hub data set's configuration")
    columns: Columns | None = None
    skip_bad_rows: bool = False
    train_rows: int | None = Field(None, ge=1, description="use only the first rows of the training split")
    validation_rows: int | None = Field(None, ge=1, description="rows that each validation scores")
    test_rows: int | None = Field(None, ge=1)
    max_source_tokens: int | None = Field(None, ge=4, description="default: the preset's, else 512")
    max_target_tokens: int | None = Field(None, ge=2, description="default: the preset's, else 128")
    languages: tuple[str, str] | None = Field(
        None, description="source and target for mBART and T5, such as [en_XX, ro_RO]; default: the preset's"
    )


class NewModel(StrictModel):
    """A random start: the shape of a new model whose tokenizer is built from the training split."""

    form: Literal["bart", "marian"]
    encoder_layers: int = Field(ge=1)
    decoder_layers: int = Field(ge=1)
    d_model: int = Field(128, ge=8)
    heads: int = Field(4, ge=1)
    ffn_dim: int = Field(512, ge=8)
    vocab_size: int = Field(8000, ge=300)
    max_positions: int = Field(512, ge=16)

    @model_validator(mode="after")
    def _check_head_width(self) -> "NewModel":
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        return self


class LayerChoice(StrictModel):
    """Teacher layers per side, counted from 0; absent means the default for the student's depth."""

    encoder: LayerIndices | None = None
    decoder: LayerIndices | None = None


class Student(StrictModel):
    """The student's shape and where its layers come from."""

    size: str | None = Field(None, description='"12-3": encoder and decoder layers; absent: the full teacher')
    init: Init = Field("spaced", description="which decoder layers to copy where `copied` does not say; random: none")
    copy_from: str | None = Field(
        None, description="copy the decoder layers from this checkpoint of the teacher's shape, not from the teacher"
    )
    copied: LayerChoice = LayerChoice()
    supervised: LayerChoice = Field(LayerChoice(), description="phi: the teacher layer per student layer")

    @field_validator("size", mode="after")
    @classmethod
    def _check_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @model_validator(mode="after")
    def _check_copy_from(self) -> "Student":
        if self.copy_from is not None and self.init == "random" and self.copied.decoder is None:
            raise ValueError("init random copies no decoder layer; leave out copy_from, or give another init")
        return self

    @model_validator(mode="after")
    def _check_layer_counts(self) -> "Student":
        if self.size is None:
            return self
        depths = dict(zip(("encoder", "decoder"), parse_size(self.size), strict=True))
        for word in ("copied", "supervised"):
            for side, depth in depths.items():
                layers = getattr(getattr(self, word), side)
                if layers is not None and len(layers) != depth:
                    raise ValueError(
                        f"size {self.size} has {depth} {side} layers, but {word}.{side} lists {len(layers)}: {layers}"
                    )
        return self


class Loss(StrictModel):
    """alpha_data * CE + alpha_logits * KL + alpha_hidden * MSE; only `kd` uses more than the first.

    `alpha_attention` and `alpha_cosine` add what the paper tried in section 6.3 and did not find to help.
    """

    alpha_data: float = Field(1.0, ge=0)
    alpha_logits: float = Field(0.8, ge=0)
    alpha_hidden: float = Field(3.0, ge=0)
    alpha_attention: float = Field(
        0.0, ge=0, description="attention maps against those of the teacher's layers (TinyBERT); its decoder runs live"
    )
    alpha_cosine: float = Field(0.0, ge=0, description="1 - cosine of the last hidden states (DistilBERT)")
    temperature: float = Field(2.0, gt=0)
    normalize_hidden: bool = Field(False, description="layer-norm both sides before the hidden loss")
    label_smoothing: float = Field(0.0, ge=0, lt=1)


# Settings that change how a run is carried out and not what comes of it: it may be taken up with others.
RUNTIME_ONLY_FIELDS = {"training": {"micro_tokens", "gpus"}}


class Training(StrictModel):
    """Optimisation, validation and where it runs."""

    learning_rate: float = Field(3e-4, gt=0)
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    adam_eps: float = Field(1e-8, gt=0)
    gradient_clip: float = Field(1.0, gt=0)
    batch_size: int = Field(32, ge=1, description="rows per optimiser step, over all workers")
    accumulation: int = Field(1, ge=1, description="micro-batches that one step is split into, at least")
    micro_tokens: int | None = Field(
        None,
        ge=1,
        description="padded source and target tokens of a micro-batch, at most; steps stay the same; "
        "default: 16384, on a GPU of its share, where source tokens count a quarter if the encoder is not trained",
    )
    epochs: float = Field(5, gt=0, le=100_000)
    max_steps: int | None = Field(None, ge=1)
    warmup_steps: int = Field(500, ge=0)
    schedule: Literal["linear", "constant"] = "linear"
    checks_per_epoch: int = Field(4, ge=1, description="validations per epoch")
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many checks without a better score; default: an epoch of checks",
    )
    freeze_encoder: bool | None = Field(None, description="default: when the encoder is fully copied")
    freeze_embeddings: bool | None = Field(None, description="default: for students, not for teachers")
    dropout: float | None = Field(None, ge=0, lt=1, description="default: the teacher's own")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    workers: int = Field(1, ge=1, description="data-parallel workers; the global batch stays batch_size")
    threads: int = Field(1, ge=1, description="CPU threads per worker; with a GPU the CPUs held beside it")
    gpus: float = Field(
        1,
        ge=0.01,
        le=1,
        description="share of a GPU per worker, where there are any; 0.25: four small students share one, if there are "
        "CPUs for them",
    )
    launcher: Literal["auto", "train", "tune"] = Field(
        "auto", description="train: Ray Train; tune: a reused actor, for short trials of one worker"
    )
    teacher_cache: Literal["auto", "full", "encoder", "off"] = Field(
        "auto", description="what of the teacher is kept on disk; auto: what pays, by measurement"
    )
    cache_gb: float | None = Field(
        None, gt=0, description="disk that the teacher cache may take, in GB; default: 90 % of what is free"
    )
    cache_precision: Literal["bf16", "fp32"] = "bf16"

    @model_validator(mode="after")
    def _check_batch_split(self) -> "Training":
        if self.batch_size < self.workers * self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split over {self.workers} workers "
                f"x {self.accumulation} accumulation"
            )
        if self.workers > 1 and self.gpus < 1:  # NCCL refuses two workers of one group on the same GPU
            raise ValueError(f"gpus {self.gpus:g} is for runs of one worker; {self.workers} workers need a GPU each")
        return self

    def get_warmup_steps(self, total_steps: int) -> int:
        """Steps of a run of `total_steps` in which the learning rate rises: `warmup_steps`, but half the run at
        most."""
        return min(self.warmup_steps, max(1, total_steps // 2))


class Decoding(StrictModel):
    """Beam search. An absent value is the checkpoint's own, else the preset's, else the library's default."""

    beams: int | None = Field(None, ge=1)
    length_penalty: float | None = None
    min_length: int | None = Field(None, ge=0, description="tokens, counted as generate() does")
    max_length: int | None = Field(None, ge=2, description="tokens, counted as generate() does")
    no_repeat_ngram: int | None = Field(None, ge=0)


class Curation(StrictModel):
    """Which of a teacher's texts become labels. Words are split at white space; an empty text is never kept."""

    choose: Literal["score", "rouge2"] = Field(
        "score", description="which candidate is the label: the teacher's best, or the nearest to the original"
    )
    min_rouge2: float | None = Field(None, ge=0, le=100, description="ROUGE-2 against the original")
    min_length_ratio: float | None = Field(None, ge=0, description="words, as a share of the original's")
    max_length_ratio: float | None = Field(None, gt=0)
    max_repetition: float | None = Field(None, ge=0, le=1, description="share of trigrams that stood before")
    max_copy_rate: float | None = Field(None, ge=0, le=1, description="share of trigrams that stand in the source")
    agree_with: str | None = Field(None, description="another teacher's label set of the same data: its folder")
    min_agreement: float | None = Field(None, ge=0, le=100, description="ROUGE-2 against the label in `agree_with`")

    @model_validator(mode="after")
    def _check_consistency(self) -> "Curation":
        if (self.agree_with is None) != (self.min_agreement is None):
            raise ValueError("agree_with and min_agreement go together")
        low, high = self.min_length_ratio, self.max_length_ratio
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_length_ratio {low} is above max_length_ratio {high}")
        return self

    @property
    def needs_original_targets(self) -> bool:
        """Whether any rule compares with the corpus's own targets."""
        ratios = (self.min_rouge2, self.min_length_ratio, self.max_length_ratio)
        return self.choose == "rouge2" or any(rule is not None for rule in ratios)


class PseudoLabeling(StrictModel):
    """How pseudo-labels are made where a run wants some."""

    n_best: int = Field(1, ge=1, description="candidates kept per row; at most as many as beams")
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="auto: fp32 on a CPU, bf16 on a GPU"
    )
    curation: Curation = Curation()


class Evaluation(StrictModel):
    """How scores are made."""

    metric: Literal["auto", "rouge2", "bleu"] = Field("auto", description="auto: bleu where the preset translates")
    engine: Literal["auto", "ctranslate2", "transformers"] = "auto"
    batch_size: int = Field(32, ge=1)
    validation_beams: int | None = Field(None, ge=1, description="beams during training; default: 2")
    validation_length_penalty: float | None = Field(
        None, description="length penalty during training; default: the decoding's own"
    )


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # a folder is called so


class Run(StrictModel):
    """One run. `teacher` or `start` says what is trained: a (shrunk) teacher, or a new model."""

    name: str = Field(pattern=NAME_PATTERN, max_length=100)
    teacher: str | None = None
    start: NewModel | None = None
    dataset: Dataset
    method: Method = "sft"
    labels: str = Field(
        "auto",
        description="original, pseudo, pseudo@TEACHER (another's), a label set's folder, or several with weights: "
        "original+pseudo*0.5+FOLDER; "
        "auto: pseudo for pl",
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
    def _check_consistency(self) -> "Run":
        if (self.teacher is None) == (self.start is None):
            raise ValueError("give either `teacher` (a student of it is trained) or `start` (a new model)")
        if self.start is not None and self.method != "sft":
            raise ValueError(f"method {self.method} needs a `teacher`; a random `start` knows only sft")
        if self.start is not None and self.student != Student():
            raise ValueError("`student` shrinks a teacher; a random `start` has its own layer counts")
        if self.method == "pl" and self.labels == "original":
            raise ValueError("method pl trains on pseudo-labels; labels: original is method sft")
        loss = self.loss
        if self.method == "kd" and not any(
            (loss.alpha_logits, loss.alpha_hidden, loss.alpha_attention, loss.alpha_cosine)
        ):
            raise ValueError("method kd with alpha_logits 0 and alpha_hidden 0 is method sft")
        if self.start is not None and self.uses_pseudo_labels:
            raise ValueError("labels: pseudo are a `teacher`'s; a random `start` can be given a label set's folder")
        if self.method != "kd" and self.loss.alpha_data == 0:
            raise ValueError(f"method {self.method} has only the data loss; alpha_data must be above 0")
        return self

    @property
    def resolved_labels(self) -> str:
        """`labels` with `auto` resolved."""
        if self.labels != "auto":
            return self.labels
        return "pseudo" if self.method == "pl" else "original"

    @property
    def label_key(self) -> str:
        """What tells the label sets of a space's runs apart: the source, and how pseudo-labels are made."""
        made = self.pseudo.model_dump_json(exclude_defaults=True)
        return self.resolved_labels if not self.uses_pseudo_labels or made == "{}" else f"{self.resolved_labels} {made}"

    @property
    def uses_pseudo_labels(self) -> bool:
        """Whether pseudo-labels are among the labels that a teacher has to write."""
        return any(part.is_pseudo for part in parse_labels(self.resolved_labels))


def parse_size(size: str) -> tuple[int, int]:
    """Encoder and decoder layers of a size such as "12-3"; ValueError where it is not one."""
    match = re.fullmatch(r"([1-9]\d{0,2})-([1-9]\d{0,2})", size)
    if not match:
        raise ValueError(f'size {size!r} is not of the form "12-3" (encoder layers, decoder layers)')
    return int(match[1]), int(match[2])
