"""The machines that a training job can have: which devices, how many, with how much memory, and on what the job's files lie.

From AWS's pages of the EC2 instance types. Which of them SageMaker offers, botocore's model of CreateTrainingJob knows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpt.errors import UserError
from gpt.typed import nearest


@dataclass(frozen=True)
class Instance:
    """One type of machine."""

    type: str
    """Such as ml.p5.48xlarge."""
    device: str
    """What a run computes on there, as `device` has it: cuda, neuron or cpu."""
    processes: int
    """One for each GPU or logical Neuron core; 1 on a CPU."""
    chip: str
    """The GPU or the chip; empty for a CPU."""
    memory_gb: int
    """Of the memory of one device; 0 for a CPU."""
    local_gb: int
    """Disks of its own, on which the job's files then lie, encrypted by their hardware; 0: a volume of launch.volume_gb."""

    @property
    def devices(self) -> str:
        """What it computes on, for people: `8 H100`."""
        return (
            "a CPU"
            if not self.chip
            else f"{self.processes} cores of {self.chip}"
            if self.needs_own_image
            else f"{self.processes} {self.chip}"
        )

    def has(self, device: str) -> bool:
        """Whether it is a machine for what the config calls its device."""
        return device in ("auto", self.device) or (self.device == "cpu" and device == "neuron_sim")

    @property
    def needs_own_image(self) -> bool:
        """Whether none of AWS's images will do."""
        return self.device == "neuron"


# family: chip, GB of each; size: how many of them and GB of local disks.
_GPUS: dict[str, tuple[str, int, dict[str, tuple[int, int]]]] = {
    "p3": ("V100", 16, {"2xlarge": (1, 0), "8xlarge": (4, 0), "16xlarge": (8, 0)}),
    "p3dn": ("V100", 32, {"24xlarge": (8, 1800)}),
    "p4d": ("A100", 40, {"24xlarge": (8, 8000)}),
    "p4de": ("A100", 80, {"24xlarge": (8, 8000)}),
    "p5": ("H100", 80, {"4xlarge": (1, 3840), "48xlarge": (8, 30720)}),
    "p5e": ("H200", 141, {"48xlarge": (8, 30720)}),
    "p5en": ("H200", 141, {"48xlarge": (8, 30720)}),
    "p6-b200": ("B200", 179, {"48xlarge": (8, 30720)}),
    "p6-b300": ("B300", 268, {"48xlarge": (8, 30720)}),
    "p6e-gb200": ("GB200", 185, {"36xlarge": (4, 22500)}),
    "g4dn": ("T4", 16, {
        "xlarge": (1, 125), "2xlarge": (1, 225), "4xlarge": (1, 225), "8xlarge": (1, 900), "12xlarge": (4, 900), "16xlarge": (1, 900),
    }),
    "g5": ("A10G", 24, {
        "xlarge": (1, 250), "2xlarge": (1, 450), "4xlarge": (1, 600), "8xlarge": (1, 900), "12xlarge": (4, 3800), "16xlarge": (1, 1900),
        "24xlarge": (4, 3800), "48xlarge": (8, 7600),
    }),
    "g6": ("L4", 24, {
        "xlarge": (1, 250), "2xlarge": (1, 450), "4xlarge": (1, 600), "8xlarge": (1, 900), "12xlarge": (4, 3760), "16xlarge": (1, 1880),
        "24xlarge": (4, 3760), "48xlarge": (8, 7520),
    }),
    "g6e": ("L40S", 48, {
        "xlarge": (1, 250), "2xlarge": (1, 450), "4xlarge": (1, 600), "8xlarge": (1, 900), "12xlarge": (4, 3800), "16xlarge": (1, 1900),
        "24xlarge": (4, 3800), "48xlarge": (8, 7600),
    }),
    "g7e": ("RTX PRO 6000", 96, {
        "2xlarge": (1, 1900), "4xlarge": (1, 1900), "8xlarge": (1, 1900), "12xlarge": (2, 3800), "24xlarge": (4, 7600),
        "48xlarge": (8, 15200),
    }),
}  # fmt: skip
INSTANCES = {
    f"ml.{family}.{size}": Instance(f"ml.{family}.{size}", "cuda", count, chip, memory, disks)
    for family, (chip, memory, sizes) in _GPUS.items()
    for size, (count, disks) in sizes.items()
} | {"ml.trn2.48xlarge": Instance("ml.trn2.48xlarge", "neuron", 64, "Trainium2", 24, 7600)}
"""Those with an accelerator."""
_REFUSED = {
    "trn1": "only the XLA package runs on it, and that is out of support for training; take ml.trn2.48xlarge (launch/instance=trn2)",
    "p2": "no build of torch for CUDA 12 or newer runs on its K80; take another, such as ml.g6.2xlarge (launch/instance=gpu)",
}
_REFUSED["trn1n"] = _REFUSED["trn1"]
_CPU = re.compile(r"ml\.[cmrt]\d\w*(-flex)?\.\d*(medium|large|xlarge)")


def find_instance(name: str) -> Instance | None:
    """What a type is; None for one that is not known here, which needs `device` and `launch.nproc` said.

    Raises:
        UserError: it is no type, or one that cannot run this.
    """
    family = name.split(".")[1] if name.count(".") == 2 else ""
    if not re.fullmatch(r"ml\.[a-z0-9-]+\.(\d*xlarge|large|medium)", name):
        raise UserError(
            f"launch.instance_type={name}: is no type of training instance, such as ml.g6.2xlarge{nearest(f'ml.{name}', INSTANCES)}"
        )
    if family in _REFUSED:
        raise UserError(f"launch.instance_type={name}: {_REFUSED[family]}")
    if family in _GPUS and name not in INSTANCES:
        raise UserError(f"launch.instance_type={name}: there is no such size{nearest(name, INSTANCES) or '.'} {_sizes(family)}")
    return INSTANCES.get(name) or _cpu(name)


def has_own_disks(name: str) -> bool:
    """Whether the job's files lie on the machine's own disks there, as far as it is known."""
    instance = INSTANCES.get(name) or _cpu(name)
    return instance is not None and instance.local_gb > 0


def _cpu(name: str) -> Instance | None:
    """A machine without an accelerator, if it is one; that of a family with `d` has disks, whose size is not known here."""
    return Instance(name, "cpu", 1, "", 0, 1 if re.match(r"ml\.\w+d\.", name) else 0) if _CPU.fullmatch(name) else None


def _sizes(family: str) -> str:
    return f"There are: {', '.join(name for name in INSTANCES if name.split('.')[1] == family)}"
