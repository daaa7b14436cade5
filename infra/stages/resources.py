"""What a unit of work needs of the machine or the cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace

RESOURCE_LIMIT = 3600.0  # seconds that work waits for cores, GPUs or memory that other work on the cluster holds


@dataclass(frozen=True)
class Resources:
    """What one unit of a stage takes while it runs.

    Attributes:
        cpus: CPU cores.
        gpus: GPUs; fractions share one.
        memory: bytes that are reserved; 0 leaves it to the scheduler.
        gpu_optional: whether the unit runs on the CPU where there are fewer GPUs than it asks for.
    """

    cpus: float = 1
    gpus: float = 0
    memory: int = 0
    gpu_optional: bool = False

    def __str__(self) -> str:
        wanted = (self.cpus, "CPU"), (self.gpus, "GPU"), (self.memory / 1e9, "GB of memory")
        return ", ".join(f"{count:g} {name}" for count, name in wanted if count)

    def within(self, cpus: float, gpus: float) -> Resources:
        """What the unit takes on a machine with so many cores and GPUs: optional GPUs are limited to these."""
        return replace(self, gpus=min(self.gpus, gpus)) if self.gpu_optional else self

    def lacking(self, cpus: float, gpus: float) -> str | None:
        """What the machine has too little of, as a clause; None where the unit fits."""
        for name, wanted, there in (("CPU", self.cpus, cpus), ("GPU", self.gpus, gpus)):
            if wanted > there:
                return f"wants {wanted:g} {name}, and there are {there:g}"
        return None

    def slots(self, cpus: float, gpus: float) -> int:
        """How many units run at once on a machine with so many cores and GPUs; at least 1."""
        fit = [total // wanted for total, wanted in ((cpus, self.cpus), (gpus, self.gpus)) if wanted]
        return max(1, int(min(fit, default=1)))
