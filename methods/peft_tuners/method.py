"""The gateway to every tuner of the installed PEFT."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from pydantic import Field, JsonValue, SerializerFunctionWrapHandler, field_validator, model_serializer

from harness.errors import InputError, unknown
from harness.method import EVERY_DTYPE, PACKED, Adaptation, Backbone, Trace, TrainData, in_modules
from harness.optimizer import adamw
from methods.peft_tuners.fields import fields_of
from methods.shared.lora_method import LoraMethod

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec


class Tried(NamedTuple):
    """What became of a tuner on a tiny BERT, with which fields of its configuration."""

    fields: str = ""
    failure: str | None = None


# With PEFT 0.21, on layers of 16 x 16 and up, too small for some defaults. The tests compare it with what happens.
TRIED = {
    "adamss": Tried("r=8,use_asa=true,asa_target_subspaces=10,init_warmup=1,final_warmup=5,mask_interval=2"),
    "adaption_prompt": Tried(failure="Unsupported model type for adaption prompt: 'bert'."),
    "beft": Tried(),
    "boft": Tried(),
    "c3a": Tried("block_size=16"),
    "cartridge": Tried("num_virtual_tokens=4"),
    "cpt": Tried(failure="CPTConfig only supports task_type = CAUSAL_LM."),
    "deft": Tried(),
    "delora": Tried(),
    "fourierft": Tried("n_frequency=50"),
    "frod": Tried(),
    "glora": Tried(),
    "gralora": Tried(),
    "hira": Tried(),
    "hra": Tried(),
    "ia3": Tried(),
    "lily": Tried(),
    "ln_tuning": Tried(),
    "loha": Tried(),
    "lokr": Tried(),
    "lora": Tried(),
    "miss": Tried("r=4"),
    "multitask_prompt_tuning": Tried("num_virtual_tokens=4,num_tasks=1", "task_ids cannot be None"),
    "oft": Tried(),
    "osf": Tried(),
    "p_tuning": Tried("num_virtual_tokens=4"),
    "peanut": Tried(),
    "poly": Tried(failure="task_ids should not be None."),
    "prefix_tuning": Tried("num_virtual_tokens=4"),
    "prompt_tuning": Tried("num_virtual_tokens=4"),
    "psoft": Tried("r=4"),
    "pvera": Tried(),
    "randlora": Tried("r=4"),
    "road": Tried("group_size=16"),
    "shadow": Tried(failure="'ShadowCarrier' object has no attribute 'view'"),
    "shira": Tried("r=4"),
    "supertuning": Tried(),
    "tinylora": Tried(),
    "trainable_tokens": Tried("token_indices=[1,2,3]"),
    "unilora": Tried(),
    "vblora": Tried("vector_length=8,num_vectors=32"),
    "vera": Tried(),
    "waveft": Tried("n_frequency=50"),
    "xlora": Tried(failure="`use_cache` must be False"),
}


ON_PACKED = ("lora", "ia3", "vera")  # read no weight's numbers, and were tried
READ = ("init_lora_weights", "use_dora")  # settings with which it does


class PeftMethod(LoraMethod):
    """Any tuner of the installed PEFT by its type, as peft[type=ia3] or peft[type=vera,r=64].

    Beside the parameters below, every field of the tuner's own configuration is a parameter, checked against PEFT's
    dataclass; what is not given keeps PEFT's default, and steps in it are updates. `modules_to_save` is the task's
    head. Learning rates that suit one tuner are far off for another: tune them.

    What a tuner needs from the training loop it gets: AdaMSS (use_asa=true) allocates after every update, and EVA
    (type=lora,init_lora_weights=eva) reads batches before the first one until its directions converge, which count as
    batches of the budget. A tuner that PEFT cannot put into the backbone is a reported cell with PEFT's reason.
    """

    provenance = "PEFT's"
    capabilities: ClassVar[tuple[str, ...]] = ("linear", "conv2d")
    backbone_dtypes = EVERY_DTYPE
    traces: ClassVar[tuple[Trace, ...]] = (
        Trace("training_numbers", "parameters in training", drawing="steps"),  # AdaMSS's, fewer and fewer
    )
    identity_at_start: ClassVar[bool] = False  # prompts are not; most others are

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    type: str = Field(description="the tuner: one of those below")
    target_modules: tuple[str, ...] | None = Field(
        None, min_length=1, description="ends of layer names (of norms for ln_tuning); all if unset"
    )
    config: dict[str, JsonValue] = Field({}, description="the tuner's own fields; write them beside these: r=64")

    @field_validator("type")
    @classmethod
    def _lower(cls, name: str) -> str:
        return name.lower()

    @classmethod
    def of(cls, values: dict[str, Any], owner: str) -> Self:
        """See `Strict.of`. What is no parameter of the method is one of the tuner's; defaults are left out."""
        own = {name: value for name, value in values.items() if name in cls.model_fields}
        method = super().of(own, owner)
        types = tuner_types()
        if method.type not in types:
            raise unknown("PEFT type", method.type, types)
        if method.type == "adalora":
            raise InputError(
                f"{owner}[type=adalora]: the method adalora does it whole; write --methods adalora", "type"
            )
        fields = fields_of(types[method.type])
        given = method.config | {name: value for name, value in values.items() if name not in own}
        for name in given:
            if name not in fields.model_fields:
                known = {*fields.model_fields, *cls.model_fields} - {"config"}
                raise unknown(f"parameter of {owner}[type={method.type}]", name, known)
        checked = fields.of(given, f"{owner}[type={method.type}]")
        defaults = fields()
        config = {name: value for name, value in given.items() if getattr(checked, name) != getattr(defaults, name)}
        return method.model_copy(update={"config": config})

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = handler(self)
        config = values.pop("config")
        return {**values, **config}

    @classmethod
    def details(cls) -> list[str]:
        """See `Method.details`: the tuners of the installed PEFT, and what became of those that were tried."""
        width = max(map(len, tuner_types()))
        return ["", "types, as tried on a tiny BERT with PEFT 0.21:"] + [
            f"  {name:<{width}}  {_outcome(name)}" for name in sorted(tuner_types())
        ]

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`. The tuner is put into a copy, on the meta device where PEFT can do that."""
        from methods.peft_tuners.trial import failure, takes_tokens, trial_inputs, without_values
        from methods.shared.peft_model import unfit, with_values

        if backbone.dtype in PACKED and (self.type not in ON_PACKED or self.config.keys() & set(READ)):
            given = "".join(f" with {name}" for name in READ if name in self.config)
            return f"PEFT's {self.type}{given} was not tried on weights packed as {backbone.dtype}"
        config = self._peft_config(backbone)
        self._check_tokens(backbone)
        targets = self._targets(backbone)
        if targets == []:
            return backbone.without_layers("norm" if self.type == "ln_tuning" else "linear or convolution layer")
        if self.type == "lora" and str(self.config.get("init_lora_weights")).lower() == "olora":
            reason = unfit(backbone, targets or [], "init = olora")
            if reason is not None:
                return reason
        module = without_values(backbone.module)
        inputs = trial_inputs(module)
        error = failure(module, config, inputs)
        if isinstance(error, InputError):
            raise error
        if error is not None or (inputs is None and takes_tokens(module)):
            module = with_values(backbone.module)
            error = failure(module, config, trial_inputs(module))
        if error is None:
            return None
        reason = str(error).strip().partition("\n")[0]
        return f"PEFT's {self.type} cannot adapt this backbone: {reason or type(error).__name__}"

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        from methods.peft_tuners.adaptation import PeftAdaptation
        from methods.peft_tuners.trial import failure, without_values
        from methods.shared.peft_model import peft_model, with_values

        config, module = self._peft_config(backbone), backbone.module
        if next(module.parameters()).is_meta and failure(without_values(module), config, None) is not None:
            module = with_values(module)  # a tuner that computes with the weights: made-up ones give its counts
        model: Any = peft_model(module, config)
        if getattr(config, "feedforward_modules", None):  # IA3's, which PEFT reads back only as a part of the targets
            config.target_modules = set(self._targets(backbone) or ())
            ends = tuple(config.feedforward_modules)
            config.feedforward_modules = {name for name in config.target_modules if name.endswith(ends)}
        for name, parameter in model.named_parameters():
            if in_modules(name, backbone.head) and ".original_module." not in name:
                parameter.requires_grad_(True)  # where a configuration knows no modules_to_save
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        awaits_eva = self.config.get("init_lora_weights") == "eva"
        return PeftAdaptation(model, optimizer, backbone, data, self.weight_decay, awaits_eva)

    def _peft_config(self, backbone: Backbone) -> Any:
        """PEFT's configuration for this backbone. Raises InputError for one that PEFT refuses."""
        from peft.config import PromptLearningConfig

        config_class = tuner_types()[self.type]
        names = {field.name for field in dataclasses.fields(config_class)}
        checked = fields_of(config_class).of(self.config, f"peft[type={self.type}]")
        values = {name: getattr(checked, name) for name in self.config}
        if "target_modules" in names:
            values["target_modules"] = self._targets(backbone)
        if "feedforward_modules" in values:
            ends = values["feedforward_modules"]
            values["feedforward_modules"] = list(backbone.targets((ends,) if isinstance(ends, str) else tuple(ends)))
        if "modules_to_save" in names:
            values["modules_to_save"] = list(backbone.head) or None
        if issubclass(config_class, PromptLearningConfig):
            # of PEFT's classes the one that generates with the prompt, and the one that hands on an encoder's outputs
            generates = getattr(backbone.module, "can_generate", bool)()
            values["task_type"] = "CAUSAL_LM" if generates else "SEQ_CLS"
        try:
            return config_class(**values)
        except (TypeError, ValueError) as error:
            raise InputError(f"peft[type={self.type}]: {error}", self.type) from None

    def _targets(self, backbone: Backbone) -> list[str] | None:
        """Names of the modules to adapt; None leaves the choice to PEFT."""
        if self.type in ("trainable_tokens", "adaption_prompt"):  # embeddings, whole attention blocks
            return None if self.target_modules is None else list(self.target_modules)
        if self.type == "ln_tuning":
            norms = [name for name, part in backbone.module.named_modules() if "Norm" in type(part).__name__]
            backbone = dataclasses.replace(backbone, layers=tuple(norms))
        return list(backbone.targets(self.target_modules))

    def _check_tokens(self, backbone: Backbone) -> None:
        """Raises InputError for a token that the backbone does not have, which PEFT would find when it trains."""
        given: Any = self.config.get("token_indices")
        sizes = [getattr(part, "num_embeddings", 0) for part in backbone.module.modules()]
        if given and max(given) >= max(sizes) > 0:
            raise InputError(
                f"peft[type={self.type}].token_indices holds {max(given)}, and the model has {max(sizes)} tokens",
                "token_indices",
            )


@functools.cache
def tuner_types() -> dict[str, Any]:
    """The configuration class of every tuner of the installed PEFT, by its type in small letters."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {
        kind.value.lower(): PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        for kind in PeftType
        if kind in PEFT_TYPE_TO_CONFIG_MAPPING
    }


def _outcome(name: str) -> str:
    """What `list` says about a type."""
    if name == "adalora":
        return "is the method adalora"
    if name not in TRIED:
        return "untried"
    fields, failure = TRIED[name]
    return f"fails: {failure}" if failure else f"works with {fields}" if fields else "works"
