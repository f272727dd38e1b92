"""The stages of an experiment, as one table: run folders, hand-over, resuming and preflight read it.

    pretrain_fp32 -> pretrain_quant -> search -> finetune -> eval
                           |
                           +-> finetune_static, finetune_modal, finetune_uniform_w3a4 ...   (fixed configurations)

A fixed configuration is a baseline of the policy; `FINETUNE_FIXED` describes all stages that train under one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from instaqnas.config.settings import Config, SearchConfig, TrainConfig

# Settings that do not change the result of a stage: by section, or `stage` for the section that the stage follows.
HARMLESS_SETTINGS = {
    "data": ("roots", "workers", "test_roots", "test_split"),  # annotations are compared, not their folder
    "eval": ("batch_size",),
    "stage": ("save_every", "save_minutes", "keep_checkpoints"),
}


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        kind: name in the table.
        name: name of the folder in a run, equal to `kind` but for stages under a fixed configuration.
        section: section of the config with its settings.
        script: script that runs it, for messages.
        networks: sections of the config that its networks are built from.
        starts_from: kinds of stages whose checkpoints it may start from.
        further: sections whose epochs train the detector after pretraining, its own section last.
        rewarded: whether its result depends on the section `reward`.
    """

    kind: str
    name: str
    section: str
    script: str
    networks: tuple[str, ...]
    starts_from: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    rewarded: bool = False

    @property
    def has_policy(self) -> bool:
        """Whether its checkpoints hold a policy."""
        return "policy" in self.networks

    @property
    def is_quantized(self) -> bool:
        """Whether its detector is quantized."""
        return "bits" in self.networks

    def settings(self, config: Config) -> TrainConfig:
        """The settings of this stage, for a stage that trains."""
        return getattr(config, self.section)

    def decisive(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Sections of a plain config without the settings that cannot change the result of this stage.

        Evaluation settings count where they decide: in a search, and where a val split picks the best epoch.
        """
        sections = ["seed", "data", *self.networks, self.section]
        first_policy = self.section == "pretrain_quant" and plain["pretrain_quant"]["configurations"] == "policy"
        if first_policy:
            sections.append("policy")
        if self.rewarded or first_policy:
            sections.append("reward")
        if self.rewarded or plain["data"]["val_split"]:
            sections.append("eval")
        kept = {section: plain[section] for section in sections}
        for section in ("data", "eval", self.section):
            if section in kept:
                harmless = HARMLESS_SETTINGS.get(section, HARMLESS_SETTINGS["stage"])
                kept[section] = {key: value for key, value in kept[section].items() if key not in harmless}
        return {**kept, "runtime.amp": plain["runtime"]["amp"]}

    @property
    def compared_sections(self) -> tuple[str, ...]:
        """Sections that `decisive` reads."""
        return ("seed", "data", *self.networks, "policy", self.section, "reward", "eval", "runtime")


def _stage(kind: str, script: str, networks: tuple[str, ...], **settings: Any) -> Stage:
    return Stage(**{"kind": kind, "name": kind, "section": kind, "script": script, "networks": networks, **settings})


QUANTIZED_KINDS = ("pretrain_quant", "search", "finetune", "finetune_fixed")

PRETRAIN_FP32 = _stage("pretrain_fp32", "pretrain.py", ("detector",))
PRETRAIN_QUANT = _stage("pretrain_quant", "pretrain.py", ("detector", "bits"), starts_from=("pretrain_fp32",))
SEARCH = _stage(
    "search",
    "search.py",
    ("detector", "bits", "policy"),
    starts_from=QUANTIZED_KINDS,
    further=("search",),
    rewarded=True,
)
FINETUNE = _stage(
    "finetune",
    "finetune.py",
    ("detector", "bits", "policy"),
    starts_from=("search", "finetune"),
    further=("search", "finetune"),
)
FINETUNE_FIXED = _stage(
    "finetune_fixed",
    "finetune.py",
    ("detector", "bits"),
    section="finetune",
    starts_from=QUANTIZED_KINDS,
    further=("finetune",),
)
EVAL = _stage("eval", "eval.py", ("detector", "bits", "policy"))

TRAINING_STAGES = (PRETRAIN_FP32, PRETRAIN_QUANT, SEARCH, FINETUNE)  # in the order of a run
RUN_STAGES = (*TRAINING_STAGES, EVAL)
FULL_PRECISION_KINDS = (PRETRAIN_FP32.kind,)
POLICY_KINDS = (SEARCH.kind, FINETUNE.kind)
_TABLE = {stage.kind: stage for stage in (*RUN_STAGES, FINETUNE_FIXED)}


def stage_named(name: str) -> Stage:
    """The stage with a folder of this name; `finetune_static` and so on are stages under a fixed configuration.

    Raises: KeyError if there is no such stage.
    """
    if name in _TABLE:
        return _TABLE[name]
    if name.startswith(f"{FINETUNE.name}_"):
        return replace(FINETUNE_FIXED, name=name)
    raise KeyError(name)


def fixed_stage(bits: str) -> Stage:
    """The stage that trains under the fixed configuration `bits`: `static`, `modal`, `uniform:w3a4` ..."""
    return replace(FINETUNE_FIXED, name=f"{FINETUNE.name}_{bits.replace(':', '_')}")


def fixed_config(config: Config) -> Config:
    """`config` with the `finetune` section of a detector under a fixed configuration, trained as long as the policy's.

    If the search trains the detector, the section gets the epochs of search and finetuning together, in one cosine from
    the higher of the two learning rates, and distills if either does. Otherwise it stays as it is.
    """
    search, finetune = config.search, config.finetune
    if not search.train_detector:
        return config
    section = replace(
        finetune,
        epochs=search.epochs + finetune.epochs,
        lr=max(search.lr, finetune.lr),
        distill_weight=max(search.distill_weight, finetune.distill_weight),
    )
    return replace(config, finetune=section)


def further_epochs(stage: Stage, plain: dict[str, Any], epoch: int) -> int:
    """Epochs that a detector was trained for after pretraining, at the end of epoch number `epoch` of `stage`.

    Args:
        stage: of the checkpoint.
        plain: config of the checkpoint as plain values.
        epoch: finished epochs of the stage.
    """
    count = 0
    for section in stage.further:
        if plain[section].get("train_detector", True):
            count += epoch if section == stage.section else plain[section]["epochs"]
    return count


def trains_detector(stage: Stage, config: Config) -> bool:
    """Whether a training stage changes the detector; a search may leave it as it was pretrained."""
    settings = stage.settings(config)
    return settings.train_detector if isinstance(settings, SearchConfig) else True
