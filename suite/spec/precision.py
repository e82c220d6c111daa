"""Precision as a value that travels: what a cell asks for, and what its live engines say they ran in.

A number format is a row of FORMATS. fp16 has 5 exponent and 10 mantissa bits (spacing 2^-10, largest 65,504), bf16 has 8
and 7 (spacing 2^-7): Table 1 of the paper. Three mantissa bits more make rounding errors 8 times smaller, and a KL, second
order in them, 64 times. m0 to m22 are fp32 numbers of which so many explicit mantissa bits are kept (round to nearest
even): doses of coarseness, with the exponent range of fp32 and of bf16, for the sampler alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: its explicit mantissa bits, its exponent bits, and the torch dtype that holds it."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    torch_name: str

    @property
    def is_dtype(self) -> bool:
        """Whether the torch dtype is the format itself; else its numbers are those of the dtype that lie on its grid."""
        return not self.name.startswith("m")

    @property
    def storage(self) -> str:
        """The name of the format whose torch dtype holds these numbers."""
        return self.name if self.is_dtype else "fp32"

    @property
    def rounding(self) -> float:
        """Largest relative error of rounding to the format."""
        return 2.0 ** -(self.mantissa_bits + 1)


_ROWS = (
    Format("fp32", 8, 23, "float32"),
    Format("bf16", 8, 7, "bfloat16"),
    Format("fp16", 5, 10, "float16"),
    *(Format(f"m{bits}", 8, bits, "float32") for bits in range(23)),
)
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
DTYPES = tuple(row.name for row in _ROWS if row.is_dtype)
CACHE_FORMATS = ("fp8_e4m3", "fp8_e5m2")  # 8-bit formats in which vLLM can keep keys and values; it holds them as bytes
COARSE_FORMATS = tuple(row.name for row in _ROWS if not row.is_dtype)

# Where a coarse format acts. "weights": the weights are rounded on their way to the sampler and stay so until the next
# sync, as quantised rollouts do; products are those of fp32. A task names it, since rounding elsewhere is another experiment.
ROUNDED_WHERE = ("weights",)

# How products of 16-bit operands are formed. "native": the device's own kernels. "rounded-fp32-accumulate": operands and
# result are 16-bit numbers, the product is computed in fp32, as tensor cores do; on a CPU both 16-bit precisions take
# that one path, so that the arms differ in rounding and in nothing else.
NATIVE, ROUNDED = "native", "rounded-fp32-accumulate"


def dtype_name(dtype) -> str:
    """'fp16' for torch.float16 and so on; a dtype the suite has no short name for keeps its own ('float8_e4m3fn')."""
    name = str(dtype).removeprefix("torch.")
    return next((row.name for row in _ROWS if row.is_dtype and row.torch_name == name), name)


@dataclass(frozen=True)
class Precision:
    """The format asked for at every point of the pipeline. None in a task means: follows its engine."""

    rollout: str  # sampler weights and arithmetic
    train: str  # trainer compute dtype; master weights are always fp32
    wire: str  # dtype in which weights travel from trainer to sampler
    trainer_head: str  # dtype of the trainer's lm_head product
    rollout_logits: str
    kv_cache: str
    gradient_reduction: str  # dtype in which micro-batches and ranks add up their gradients

    @classmethod
    def of(cls, asked: dict) -> Precision:
        rollout, train = asked["rollout"], asked["train"]
        held = FORMATS[rollout].storage if rollout else None
        follows = {"wire": rollout, "trainer_head": train, "rollout_logits": held, "kv_cache": held, "gradient_reduction": "fp32"}
        return cls(rollout, train, **{point: asked.get(point) or default for point, default in follows.items()})

    @property
    def coarser(self) -> str:
        """Of sampler and trainer, the one with fewer mantissa bits."""
        return min(self.rollout, self.train, key=lambda name: FORMATS[name].mantissa_bits)


# which executed point must equal which asked point
CONTRACT = {
    "rollout_weights": "rollout",
    "kv_cache": "kv_cache",
    "rollout_logits": "rollout_logits",
    "compute": "train",
    "trainer_head": "trainer_head",
    "wire": "wire",
    "gradient_reduction": "gradient_reduction",
}
ALWAYS_FP32 = ("master_weights", "optimizer_state")


def contract_breaches(asked: dict, executed: dict) -> list[str]:
    """One sentence per point at which an engine ran in another dtype than its arm says; such a run is INVALID.

    Points that a protocol does not have (no wire without weight sync) are absent from `executed` and not checked;
    `unsaid_points` finds those that it should have.
    """
    precision = Precision.of(asked)
    wanted = {point: getattr(precision, name) for point, name in CONTRACT.items()} | dict.fromkeys(ALWAYS_FP32, "fp32")
    return [
        f"{point}: ran in {executed[point]}, the arm asks for {dtype}"
        for point, dtype in wanted.items()
        if point in executed and executed[point] != dtype
    ]


def breaches_of(must_say: tuple[str, ...], asked: dict, executed: dict) -> list[str]:
    """All that makes a run INVALID for its precision: other dtypes than asked for, and points that it must say and does
    not."""
    return contract_breaches(asked, executed) + [f"{point}: not recorded" for point in unsaid_points(must_say, executed)]


def unsaid_points(must_say: tuple[str, ...], executed: dict) -> list[str]:
    """The points of the pipeline at which a run must say what it ran in (Kind.must_say), and does not."""
    return [point for point in must_say if point not in executed]
