from stepwire.v1 import precision_pb2 as _precision_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Rule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RULE_UNSPECIFIED: _ClassVar[Rule]
    RULE_ADAM: _ClassVar[Rule]
    RULE_NADAM: _ClassVar[Rule]
    RULE_RADAM: _ClassVar[Rule]
    RULE_ADAMAX: _ClassVar[Rule]
    RULE_SGD: _ClassVar[Rule]
    RULE_RMSPROP: _ClassVar[Rule]
    RULE_ADAGRAD: _ClassVar[Rule]
    RULE_ADADELTA: _ClassVar[Rule]
    RULE_LION: _ClassVar[Rule]
    RULE_LAMB: _ClassVar[Rule]
    RULE_LARS: _ClassVar[Rule]

class Formula(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FORMULA_UNSPECIFIED: _ClassVar[Formula]
    FORMULA_TORCH: _ClassVar[Formula]
    FORMULA_KERAS: _ClassVar[Formula]
    FORMULA_OPTAX: _ClassVar[Formula]
    FORMULA_NO_BIAS_CORRECTION: _ClassVar[Formula]
    FORMULA_DECAY_AFTER: _ClassVar[Formula]

class Amsgrad(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AMSGRAD_UNSPECIFIED: _ClassVar[Amsgrad]
    AMSGRAD_NONE: _ClassVar[Amsgrad]
    AMSGRAD_RAW: _ClassVar[Amsgrad]
    AMSGRAD_CORRECTED: _ClassVar[Amsgrad]

class ScheduleKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCHEDULE_KIND_UNSPECIFIED: _ClassVar[ScheduleKind]
    SCHEDULE_KIND_CONSTANT: _ClassVar[ScheduleKind]
    SCHEDULE_KIND_LINEAR: _ClassVar[ScheduleKind]
    SCHEDULE_KIND_COSINE: _ClassVar[ScheduleKind]
    SCHEDULE_KIND_STEP: _ClassVar[ScheduleKind]
    SCHEDULE_KIND_EXPONENTIAL: _ClassVar[ScheduleKind]
    SCHEDULE_KIND_POLYNOMIAL: _ClassVar[ScheduleKind]
    SCHEDULE_KIND_ONE_CYCLE: _ClassVar[ScheduleKind]

class NonFinitePolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NON_FINITE_POLICY_UNSPECIFIED: _ClassVar[NonFinitePolicy]
    NON_FINITE_POLICY_REJECT: _ClassVar[NonFinitePolicy]
    NON_FINITE_POLICY_SKIP: _ClassVar[NonFinitePolicy]
    NON_FINITE_POLICY_ALLOW: _ClassVar[NonFinitePolicy]

class ClipFormula(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CLIP_FORMULA_UNSPECIFIED: _ClassVar[ClipFormula]
    CLIP_FORMULA_TORCH: _ClassVar[ClipFormula]
    CLIP_FORMULA_OPTAX: _ClassVar[ClipFormula]
    CLIP_FORMULA_KERAS: _ClassVar[ClipFormula]

class MissingGradientPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISSING_GRADIENT_POLICY_UNSPECIFIED: _ClassVar[MissingGradientPolicy]
    MISSING_GRADIENT_POLICY_REJECT: _ClassVar[MissingGradientPolicy]
    MISSING_GRADIENT_POLICY_KEEP: _ClassVar[MissingGradientPolicy]
RULE_UNSPECIFIED: Rule
RULE_ADAM: Rule
RULE_NADAM: Rule
RULE_RADAM: Rule
RULE_ADAMAX: Rule
RULE_SGD: Rule
RULE_RMSPROP: Rule
RULE_ADAGRAD: Rule
RULE_ADADELTA: Rule
RULE_LION: Rule
RULE_LAMB: Rule
RULE_LARS: Rule
FORMULA_UNSPECIFIED: Formula
FORMULA_TORCH: Formula
FORMULA_KERAS: Formula
FORMULA_OPTAX: Formula
FORMULA_NO_BIAS_CORRECTION: Formula
FORMULA_DECAY_AFTER: Formula
AMSGRAD_UNSPECIFIED: Amsgrad
AMSGRAD_NONE: Amsgrad
AMSGRAD_RAW: Amsgrad
AMSGRAD_CORRECTED: Amsgrad
SCHEDULE_KIND_UNSPECIFIED: ScheduleKind
SCHEDULE_KIND_CONSTANT: ScheduleKind
SCHEDULE_KIND_LINEAR: ScheduleKind
SCHEDULE_KIND_COSINE: ScheduleKind
SCHEDULE_KIND_STEP: ScheduleKind
SCHEDULE_KIND_EXPONENTIAL: ScheduleKind
SCHEDULE_KIND_POLYNOMIAL: ScheduleKind
SCHEDULE_KIND_ONE_CYCLE: ScheduleKind
NON_FINITE_POLICY_UNSPECIFIED: NonFinitePolicy
NON_FINITE_POLICY_REJECT: NonFinitePolicy
NON_FINITE_POLICY_SKIP: NonFinitePolicy
NON_FINITE_POLICY_ALLOW: NonFinitePolicy
CLIP_FORMULA_UNSPECIFIED: ClipFormula
CLIP_FORMULA_TORCH: ClipFormula
CLIP_FORMULA_OPTAX: ClipFormula
CLIP_FORMULA_KERAS: ClipFormula
MISSING_GRADIENT_POLICY_UNSPECIFIED: MissingGradientPolicy
MISSING_GRADIENT_POLICY_REJECT: MissingGradientPolicy
MISSING_GRADIENT_POLICY_KEEP: MissingGradientPolicy

class Optimizer(_message.Message):
    __slots__ = ("rule", "formula", "amsgrad", "decoupled_weight_decay", "nesterov", "centered", "hyperparameters", "initial_accumulator_value")
    RULE_FIELD_NUMBER: _ClassVar[int]
    FORMULA_FIELD_NUMBER: _ClassVar[int]
    AMSGRAD_FIELD_NUMBER: _ClassVar[int]
    DECOUPLED_WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    NESTEROV_FIELD_NUMBER: _ClassVar[int]
    CENTERED_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    INITIAL_ACCUMULATOR_VALUE_FIELD_NUMBER: _ClassVar[int]
    rule: Rule
    formula: Formula
    amsgrad: Amsgrad
    decoupled_weight_decay: bool
    nesterov: bool
    centered: bool
    hyperparameters: Hyperparameters
    initial_accumulator_value: float
    def __init__(self, rule: _Optional[_Union[Rule, str]] = ..., formula: _Optional[_Union[Formula, str]] = ..., amsgrad: _Optional[_Union[Amsgrad, str]] = ..., decoupled_weight_decay: bool = ..., nesterov: bool = ..., centered: bool = ..., hyperparameters: _Optional[_Union[Hyperparameters, _Mapping]] = ..., initial_accumulator_value: _Optional[float] = ...) -> None: ...

class Hyperparameters(_message.Message):
    __slots__ = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize", "momentum", "dampening", "alpha", "beta3", "decay", "trust_coefficient", "eps_root")
    LR_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MAXIMIZE_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    DAMPENING_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    BETA3_FIELD_NUMBER: _ClassVar[int]
    DECAY_FIELD_NUMBER: _ClassVar[int]
    TRUST_COEFFICIENT_FIELD_NUMBER: _ClassVar[int]
    EPS_ROOT_FIELD_NUMBER: _ClassVar[int]
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    momentum: float
    dampening: float
    alpha: float
    beta3: float
    decay: float
    trust_coefficient: float
    eps_root: float
    def __init__(self, lr: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ..., maximize: bool = ..., momentum: _Optional[float] = ..., dampening: _Optional[float] = ..., alpha: _Optional[float] = ..., beta3: _Optional[float] = ..., decay: _Optional[float] = ..., trust_coefficient: _Optional[float] = ..., eps_root: _Optional[float] = ...) -> None: ...

class ParameterGroup(_message.Message):
    __slots__ = ("overrides", "schedule", "clip_grad_norm", "state_precision")
    OVERRIDES_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    CLIP_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    STATE_PRECISION_FIELD_NUMBER: _ClassVar[int]
    overrides: Hyperparameters
    schedule: Schedule
    clip_grad_norm: float
    state_precision: _precision_pb2.StatePrecision
    def __init__(self, overrides: _Optional[_Union[Hyperparameters, _Mapping]] = ..., schedule: _Optional[_Union[Schedule, _Mapping]] = ..., clip_grad_norm: _Optional[float] = ..., state_precision: _Optional[_Union[_precision_pb2.StatePrecision, str]] = ...) -> None: ...

class Schedule(_message.Message):
    __slots__ = ("kind", "warmup_steps", "total_steps", "final_factor", "gamma", "interval_steps", "warmup_start_factor")
    KIND_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    FINAL_FACTOR_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_START_FACTOR_FIELD_NUMBER: _ClassVar[int]
    kind: ScheduleKind
    warmup_steps: int
    total_steps: int
    final_factor: float
    gamma: float
    interval_steps: int
    warmup_start_factor: float
    def __init__(self, kind: _Optional[_Union[ScheduleKind, str]] = ..., warmup_steps: _Optional[int] = ..., total_steps: _Optional[int] = ..., final_factor: _Optional[float] = ..., gamma: _Optional[float] = ..., interval_steps: _Optional[int] = ..., warmup_start_factor: _Optional[float] = ...) -> None: ...

class GradientTreatment(_message.Message):
    __slots__ = ("non_finite", "clip_grad_norm", "clip_formula", "clip_grad_value", "accumulation_steps", "loss_scaling", "two_phase", "missing_gradient", "parameter_average_decay")
    NON_FINITE_FIELD_NUMBER: _ClassVar[int]
    CLIP_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    CLIP_FORMULA_FIELD_NUMBER: _ClassVar[int]
    CLIP_GRAD_VALUE_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATION_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALING_FIELD_NUMBER: _ClassVar[int]
    TWO_PHASE_FIELD_NUMBER: _ClassVar[int]
    MISSING_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_AVERAGE_DECAY_FIELD_NUMBER: _ClassVar[int]
    non_finite: NonFinitePolicy
    clip_grad_norm: float
    clip_formula: ClipFormula
    clip_grad_value: float
    accumulation_steps: int
    loss_scaling: LossScaling
    two_phase: bool
    missing_gradient: MissingGradientPolicy
    parameter_average_decay: float
    def __init__(self, non_finite: _Optional[_Union[NonFinitePolicy, str]] = ..., clip_grad_norm: _Optional[float] = ..., clip_formula: _Optional[_Union[ClipFormula, str]] = ..., clip_grad_value: _Optional[float] = ..., accumulation_steps: _Optional[int] = ..., loss_scaling: _Optional[_Union[LossScaling, _Mapping]] = ..., two_phase: bool = ..., missing_gradient: _Optional[_Union[MissingGradientPolicy, str]] = ..., parameter_average_decay: _Optional[float] = ...) -> None: ...

class LossScaling(_message.Message):
    __slots__ = ("initial_scale", "growth_factor", "backoff_factor", "growth_interval")
    INITIAL_SCALE_FIELD_NUMBER: _ClassVar[int]
    GROWTH_FACTOR_FIELD_NUMBER: _ClassVar[int]
    BACKOFF_FACTOR_FIELD_NUMBER: _ClassVar[int]
    GROWTH_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    initial_scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    def __init__(self, initial_scale: _Optional[float] = ..., growth_factor: _Optional[float] = ..., backoff_factor: _Optional[float] = ..., growth_interval: _Optional[int] = ...) -> None: ...

class LossScaleState(_message.Message):
    __slots__ = ("scale", "clean_steps")
    SCALE_FIELD_NUMBER: _ClassVar[int]
    CLEAN_STEPS_FIELD_NUMBER: _ClassVar[int]
    scale: float
    clean_steps: int
    def __init__(self, scale: _Optional[float] = ..., clean_steps: _Optional[int] = ...) -> None: ...
