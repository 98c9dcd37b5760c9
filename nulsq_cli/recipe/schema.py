"""What a recipe may say: frozen pydantic sections, one class each. Unknown keys are refused everywhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from nulsq_cli.errors import suggest
from nulsq_cli.recipe import checks
from nulsq_cli.recipe.fields import (
    NUMBER,
    AtLeastZero,
    AutoOrBool,
    BelowOne,
    Bits,
    Compile,
    Count,
    LayerPattern,
    MethodName,
    Name,
    Number,
    Options,
    Percent,
    Positive,
    Range,
    Rate,
    RuleName,
    SchemeName,
    Share,
    StabilizerName,
)
from nulsq_cli.recipe.source import dump
from nulsq_cli.schemes import phases
from nulsq_cli.stabilizers import STABILIZERS
from nulsq_cli.values import Bits as _Bits
from nulsq_cli.values import Phase


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        arbitrary_types_allowed=True,
        ser_json_inf_nan="constants",
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_written(cls, values: Any) -> Any:
        """null for a section or a list: its default. `teacher: null` is how one says no teacher."""
        if not isinstance(values, dict):
            return values
        whole = {name for name, field in cls.model_fields.items() if isinstance(field.default, Section | dict | list)}
        return {key: value for key, value in values.items() if value is not None or key not in whole}


class Published(Section):
    """One figure of a paper for this recipe; never a measurement of ours."""

    bits: Bits
    method: MethodName
    stabilizer: StabilizerName | None = None
    scheme: SchemeName | None = None
    top1: Percent
    top5: Percent | None = None


class Measured(Section):
    """A figure that somebody measured with this recipe, and how."""

    bits: Bits
    method: MethodName
    top1: Percent
    epochs: AtLeastZero
    seeds: Count
    note: str = ""


class Model(Section):
    """The float model."""

    name: Name = "resnet18"
    pretrained: bool = False
    initial_checkpoint: str | None = None
    num_classes: Count | None = None
    in_chans: Count | None = None
    kwargs: Options = {}


class Teacher(Section):
    """Distillation. `self` is the float model itself, null is none."""

    name: str | None = None
    checkpoint: str | None = None
    weight: Rate = 1.0
    task_weight: Rate = 1.0
    temperature: Positive = 1.0


class Scheme(Section):
    """How training is divided into phases: plain, kd, qkd or profit. null: kd where there is a teacher."""

    name: SchemeName | None = None
    options: Options = {}


class Augment(Section):
    """What training images go through; timm's names. `crop_pad` pads and crops instead of resizing."""

    scale: Range = [0.08, 1.0]
    ratio: Range = [0.75, 1.3333]
    hflip: Share = 0.5
    vflip: Share = 0.0
    color_jitter: Rate | None = None
    aa: str | None = None
    reprob: Share = 0.0
    remode: str = "pixel"
    recount: Count = 1
    train_interpolation: str | None = None
    crop_pad: AtLeastZero | None = None
    no_aug: bool = False
    mixup: Rate = 0.0
    cutmix: Rate = 0.0
    mixup_prob: Share = 1.0
    mixup_switch_prob: Share = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    mixup_off_epoch: AtLeastZero = 0
    smoothing: BelowOne = 0.0


class Data(Section):
    """The images. null means: as the model was made for. `hold_out` is for choosing the best epoch."""

    dataset: str = ""
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    hold_out: Annotated[float, Field(ge=0, le=0.5), NUMBER] = 0.0
    download: bool = False
    class_map: str = ""
    input_size: Annotated[list[Count], Field(min_length=3, max_length=3)] | None = None
    mean: Annotated[list[Number], Field(min_length=1, max_length=4)] | None = None
    std: Annotated[list[Positive], Field(min_length=1, max_length=4)] | None = None
    interpolation: str | None = None
    crop_pct: Positive | None = None
    crop_mode: str | None = None
    batch_size: Count = 128
    validation_batch_size: Count | None = None
    workers: AtLeastZero = 2
    pin_mem: bool = False
    augment: Augment = Augment()


class Init(Section):
    """How steps start."""

    weights: RuleName = "lloyd"
    activations: RuleName = "lloyd"


class FirstLast(Section):
    """The first and the last layer."""

    bits: Bits = _Bits(8, 8)
    method: MethodName = "lsq"


class Calibration(Section):
    """How many training images the statistics are taken from."""

    samples: Count = 1024


class Rule(Section):
    """An exception for the layers whose name matches; the last that matches wins."""

    match: LayerPattern
    bits: Bits | None = None
    method: MethodName | None = None
    granularity: Literal["tensor", "channel"] | None = None
    signed: bool | None = None
    skip: bool = False


class Stabilizer(Section):
    """What steadies training. null is what its authors do, and what a resolved recipe then says."""

    name: StabilizerName
    begin: Share | None = None
    first: Rate | None = None
    last: Rate | None = None
    widest: Annotated[int, Field(ge=2, le=8), NUMBER] | None = None
    momentum: Annotated[float, Field(gt=0, lt=1), NUMBER] | None = None
    aggregate: Literal["kernel_mean", "mean", "sum"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_its_authors_do(cls, values: Any) -> Any:
        name = values.get("name") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in STABILIZERS:
            return values
        return {**STABILIZERS[name].options, **{key: value for key, value in values.items() if value is not None}}

    @model_validator(mode="after")
    def _only_its_own(self) -> Stabilizer:
        known = STABILIZERS[self.name].options
        for name in self.model_fields_set - {"name", *known}:
            raise ValueError(f"{self.name} has no option {name!r}; {suggest(name, known)}")
        return self

    @model_serializer(mode="wrap")
    def _without_others(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in whole(self).items() if value is not None}


class Quant(Section):
    """What is quantized, and how. `grid: int8` keeps levels on a scale times integers, as runtimes for int8 compute."""

    bits: Bits = _Bits(3, 3)
    method: MethodName = "nulsq-wa"
    granularity: Literal["tensor", "channel"] = "tensor"
    grid: Literal["float", "int8"] = "float"
    init: Init = Init()
    signed: AutoOrBool = "auto"
    first_last: FirstLast = FirstLast()
    calibration: Calibration = Calibration()
    options: Options = {}
    stabilizers: list[Stabilizer] = []
    rules: list[Rule] = []


class Weights(Section):
    """The optimizer of the weights. timm's `sgd` is Nesterov; `momentum` is plain."""

    opt: Name = "momentum"
    lr: Rate = 0.01
    weight_decay: Rate = 1e-4
    momentum: Share = 0.9
    filter_bias_and_bn: bool = True
    layer_decay: Positive | None = None
    kwargs: Options = {}


class Steps(Section):
    """The optimizer of the steps."""

    opt: Name = "adamw"
    lr: Rate = 1e-3
    weight_decay: Rate = 0.0
    momentum: Share = 0.9
    kwargs: Options = {}


class Optimizer(Section):
    """Two optimizers; clipping is over the weights alone."""

    weights: Weights = Weights()
    steps: Steps = Steps()
    clip_grad: Positive | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"


class Schedule(Section):
    """Rates are those of the weights; the steps' rate follows in proportion."""

    sched: Name = "cosine"
    epochs: AtLeastZero = 10
    warmup_epochs: AtLeastZero = 0
    warmup_lr: Rate = 1e-5
    min_lr: Rate = 0.0


class BatchNorm(Section):
    """BatchNorm: re-estimated once the quantizers are on; frozen from an epoch on, if wanted."""

    freeze_after: AtLeastZero | None = None
    reestimate_samples: AtLeastZero = 2048


class Ema(Section):
    """An average of weights and steps, which is then what is evaluated and exported."""

    enabled: bool = False
    decay: Annotated[float, Field(gt=0, lt=1), NUMBER] = 0.9998
    warmup: bool = True


class Engine(Section):
    """Where and how it computes. `compile` is about the quantizers; auto compiles where it pays, model compiles it whole."""

    device: str = "auto"
    amp: Literal["bfloat16", "float16"] | None = None
    grad_accum_steps: Count = 1
    channels_last: bool = False
    sync_bn: bool = False
    dist_bn: Literal["reduce", "broadcast", "none"] = "reduce"
    compile: Compile = "auto"
    deterministic: bool = False


class Checkpoint(Section):
    """How often a run can be continued from inside an epoch."""

    recovery_minutes: Positive = 15.0
    recovery_steps: Count | None = None


class Log(Section):
    """How often progress is shown, in updates."""

    interval: Count = 50


class Output(Section):
    """Where new run folders are made."""

    dir: str = "output"
    experiment: str | None = None


class Recipe(Section):
    """A whole recipe, resolved."""

    version: Literal[1] = 1
    description: str = ""
    published: list[Published] = []
    measured: list[Measured] = []
    seed: Annotated[int, Field(ge=0, lt=2**63), NUMBER] = 42
    model: Model = Model()
    teacher: Teacher = Teacher()
    scheme: Scheme = Scheme()
    data: Data = Data()
    quant: Quant = Quant()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    bn: BatchNorm = BatchNorm()
    ema: Ema = Ema()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    export: bool = True
    output: Output = Output()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if wrong := checks.across(self):
            raise ValueError("\n".join(wrong))
        return self

    @property
    def scheme_name(self) -> str:
        """The scheme: the one that is named, else `kd` where there is a teacher, else `plain`."""
        return self.scheme.name or ("plain" if self.teacher.name is None else "kd")

    def phases(self) -> list[Phase]:
        """The scheme's phases for this recipe."""
        return phases(self.scheme_name, self.quant.bits, self.schedule.epochs, self.scheme.options)

    def to_yaml(self) -> str:
        """The recipe with everything resolved; it runs again as it is."""
        return dump(self.model_dump(mode="json"))
