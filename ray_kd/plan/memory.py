"""Memory: of a train worker at each ZeRO stage, of a teacher, and of the host.

N parameters that train, F that do not, W workers, w bytes of a working weight (student.dtype). Bytes, as DeepSpeed
0.19 was counted to hold them (tests/unit/plan/test_memory.py counts the tensors of real engines); the states are those
of Rajbhandari et al. 2020 (ZeRO, https://arxiv.org/abs/1910.02054, section 5) but where it is said:

    stage     weights         master       moments      gradients                       in the step
    0 fp32    4 (N + F)       -            8 N          4 N                             -
    0 half    w (N + F)       4 N          8 N          w N                             4 N (gradients in fp32)
    1, 2      w (N + F)       4 N / W      8 N / W      g N / W                         g N / W, in fp32 4 N / W more
    3         w (N + F) / W   4 N / W      8 N / W      4 N / W (fp32)                  4 N / W
                                                        + the largest layer, gathered, and its gradient: 2 w

g: bytes of a gradient between micro-batches, 4 for bfloat16 at stage 2 (`data_types.grad_accum_dtype`), else w; a step
makes one flat tensor of them, and one in fp32 where they are not. Buckets of `zero_optimization.reduce_bucket_size`
elements come on top, two where communication overlaps.
"""

from dataclasses import dataclass
from typing import Any

from ray_kd import plugins
from ray_kd.config import RunConfig
from ray_kd.plan.activations import Activations
from ray_kd.plan.sizes import Size
from ray_kd.teacher.topk import CHUNK_SIZE, GROUP_SIZE, TILE_NBYTES
from ray_kd.trainer.zero import deepspeed_config

STAGES = (0, 1, 2, 3)
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
FREE_NBYTES = 1.5e9
"""Of a GPU for what no tensor is: the CUDA context, libraries' workspaces, and holes between the allocator's blocks."""

PROCESS_NBYTES = 0.8e9
"""Of a worker on a CPU for what no tensor is: measured with torch 2.13 and DeepSpeed 0.19, half of it at the start."""


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of one train worker at one stage."""

    stage: int
    weights: float
    master: float
    """In fp32; at stage 0 in fp32 the weights are their own."""
    moments: float
    """Both."""
    gradients: float
    buffers: float
    """DeepSpeed's buckets, and at stage 3 a gathered layer with its gradient."""
    activations: float
    loss: float
    in_step: float
    """Gradients made again in fp32 for the step, when activations and the loss's buffers are gone."""
    evaluation: float
    """The teacher's weights for the exact held-out KL, before the first step."""

    @property
    def training(self) -> float:
        """The most at once: at the end of a forward and its loss, or in the step."""
        held = self.weights + self.master + self.moments + self.gradients
        return held + max(self.buffers + self.activations + self.loss, self.in_step)

    @property
    def most(self) -> float:
        """Of training, and of the evaluation before it, when there are no gradients and no moments yet."""
        return max(self.training, self.weights + self.master + self.evaluation)


@dataclass(frozen=True)
class TeacherMemory:
    """Bytes of one teacher actor, on each of its GPUs."""

    weights: float
    activations: float
    selection: float
    """A chunk of the head's logits and the groups that are kept of it."""
    reserved: float = 0.0
    """What the engine takes of the GPU whatever the model needs (`gpu_memory_utilization`)."""

    @property
    def most(self) -> float:
        return max(self.weights + self.activations + self.selection, self.reserved)


def worker_memory(
    config: RunConfig, stage: int, workers: int, student: Size, activations: Activations, *,
    loss_nbytes: float, evaluation_nbytes: float,
) -> WorkerMemory:  # fmt: skip
    """Of one of so many workers at a ZeRO stage."""
    dtype, on_gpu = config.student.dtype, config.train.gpus_per_worker > 0
    size, trained, share = ITEMSIZE[dtype], student.trained, student.trained / workers
    weights = float(size * (student.parameters + student.beside))
    zero: dict[str, Any] = deepspeed_config(
        zero_stage=stage, micro_batch_size=1, gradient_accumulation_steps=1, dtype=dtype, max_grad_norm=1.0,
        on_gpu=on_gpu, overrides=config.train.deepspeed,
    )["zero_optimization"]  # fmt: skip
    # Stage 3 makes its bucket at the start, the others as large as it gets.
    bucket = zero["reduce_bucket_size"] if stage == 3 else min(zero["reduce_bucket_size"], trained)
    buffers, in_step = float(size * bucket * (1 + bool(zero["overlap_comm"]))), 0.0
    if stage == 0:
        is_half = size == 2
        master, moments, gradients = 4.0 * trained * is_half, 8.0 * trained, float(size * trained)
        buffers, in_step = (buffers if workers > 1 else 0.0), 4.0 * trained * is_half
    elif stage in (1, 2):
        own = 4 if (dtype == "bfloat16" and stage == 2) else size
        master, moments, gradients, in_step = 4 * share, 8 * share, own * share, (own + 4 * (own == 2)) * share
    else:
        master, moments, gradients, in_step = 4 * share, 8 * share, 4 * share, 4 * share
        weights /= workers
        buffers += 2 * size * student.largest_layer
    return WorkerMemory(
        stage, weights, master, moments, gradients, buffers, activations.nbytes + activations.recomputed, loss_nbytes,
        in_step, evaluation_nbytes,
    )  # fmt: skip


def loss_nbytes(config: RunConfig, teacher: Size, student: Size, teacher_itemsize: int, *, is_dense: bool) -> float:
    """What the fused loss holds while it runs: a chunk of logits, d head, hidden and d hidden of a micro-batch.

    is_dense: and with hidden states a chunk of the teacher's logits, and its head, which stays.
    """
    size, places = ITEMSIZE[config.student.dtype], config.train.micro_batch_size * config.data.sequence_length
    chunk = min(config.loss.chunk_size, places)
    nbytes = size * (chunk * student.vocab_size + 2 * places * student.width)
    nbytes += size * student.vocab_size * student.width * student.trains_head
    if is_dense:
        nbytes += teacher_itemsize * teacher.vocab_size * (chunk + teacher.width) + 2 * places * teacher.width
    return float(nbytes)


def teacher_memory(
    config: RunConfig, teacher: Size, itemsize: int, num_gpus: int, *, selects: bool, looks: bool, nbytes: float | None
) -> TeacherMemory:  # fmt: skip
    """Of a teacher actor on so many GPUs. No keys and values are kept: a row is one forward.

    While a layer of the forward runs: its input, two copies in its norm (fp32) and three of the MLP's width, or its
    attention's mask, in the weights' type and as booleans.

    looks: at attention, which is eager then: the maps of all layers are held until the forward is over, and of one its
    scores and its softmax in fp32. nbytes: of the GPU, of which an engine may take a share (`gpu_memory_utilization`).
    """
    length, rows = config.data.sequence_length, config.teacher.batch_size
    places = rows * length if config.teacher.batch_tokens is None else max(length, config.teacher.batch_tokens)
    of_layer = places * (itemsize * (2 * teacher.width + 3 * teacher.intermediate) + 8 * teacher.width)
    mask = places * length * (1 + itemsize)
    one_layer = places // length * length**2 * teacher.heads if looks else 0
    maps = one_layer * (itemsize * teacher.layers + itemsize + 4)
    chunk = min(CHUNK_SIZE, places)
    selection = 2 * TILE_NBYTES + chunk * config.teacher.top_k * GROUP_SIZE * 2 * itemsize if selects else 0
    weights, activations = itemsize * teacher.parameters / num_gpus, float(of_layer + mask + maps)
    _, engine = plugins.options("teacher.engines", config.teacher.engine, "teacher.engine")
    reserved = 0.0 if nbytes is None else nbytes * (getattr(engine, "gpu_memory_utilization", None) or 0.0)
    # vLLM then looks at no share: it takes that for keys and values beside the rest.
    if (cached := (getattr(engine, "options", None) or {}).get("kv_cache_memory_bytes")) is not None:
        reserved = weights + activations + selection + float(cached)
    return TeacherMemory(weights, activations, float(selection), reserved)


def checkpoint_nbytes(student: Size) -> int:
    """fp32 weights and both moments of what trains (`trainer/fragments.py`), without headers: 12 bytes a parameter."""
    return 12 * student.trained
