"""How the selection's kernels are launched.

Plans are pure functions of sizes, so that the tests can build every configuration that a launch would use on a machine
without a GPU.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fcn_kernels.device.constants import constants
from fcn_kernels.device.gpu import Device, device_of
from fcn_kernels.device.splits import COOPERATIVE, LAUNCHES, WHOLE
from fcn_kernels.selection.kernels.common import Constants
from fcn_kernels.selection.problem import Problem

MAX_ROWS = 2**31 - 1
CHUNK_BYTES = 512  # of a row at a time: 16 bytes a thread, so that its sum stays within a warp
TILE_ELEMENTS = 32  # of a tile that a thread holds
BACKWARD_ELEMENTS = 64  # the same backward, by cosine, of rows of BACKWARD_COLUMNS; for others that spills
BACKWARD_COLUMNS = (256, 384, 512)  # of 128 they spill up to 16 bytes, of float32 on sm_80, of others on sm_100
ODD_ELEMENTS = 8  # the same of rows that do not lie 16 elements apart: each element has an address of its own
HELD_ELEMENTS = 128  # the same where a set is one tile, which is loaded once; of 512 columns of 2 bytes
HELD_REST_ELEMENTS = 64  # of other rows, which spill with more
POINT = 8  # columns up to which a thread has whole rows, and a tile as many as fill its registers
WIDE = 1024  # columns above which a row takes all of a program's threads, and not a warp, a chunk at a time
WARPS = 4
WIDE_WARPS = 8
SHORT_ROWS = 128  # of a packed set that a program of one warp takes; whatever the batch, so that bits do not change
LAST_ROWS = 32  # sets of up to so many are begun with last, so that none is left alone at the end
LOOK = 16  # sets that a program looks through for long ones, as most have none
FORWARD_AT_ONCE = 3  # programs of 4 warps on a multiprocessor
FLOATS_AT_ONCE = 2  # the same of rows of FLOATS float32 and more, which were 8 bytes short of registers on sm_80
FLOATS = 512
BACKWARD_AT_ONCE = 2
SHORT_AT_ONCE = 4  # 16 programs of a warp for short sets of 512 columns of 2 bytes; others spill with 128 registers
SHORT_REST_AT_ONCE = 2
WARP_ROWS = 32  # at a time in the scalar loops of a warp
LONG_AT_ONCE = 2
REGISTERS = 65536  # of a multiprocessor
SPLIT_ROWS = 32  # a part with less work than that costs more at the barrier than it saves
SCALAR_ROWS = 256  # at a time in the scalar loops


class Sizes(NamedTuple):
    """What plans depend on."""

    sets: int
    rows: int | None
    """Of the longest set; None: known on the device alone."""
    dim: int
    itemsize: int
    """Bytes of a row's numbers, ``dim`` of them."""
    ragged: bool
    """Sets have lengths on the device, and their rows are summed alike by programs of one warp and of four."""
    device: Device

    @classmethod
    def of(cls, p: Problem) -> "Sizes":
        """Of a call."""
        packed = p.cu_seqlens is not None
        rows = p.rows if p.sets == 1 else None if packed else p.features.shape[1]
        ragged = (packed or p.lengths is not None) and _rows_fit_a_warp(p.features)
        return cls(p.sets, rows, p.dim, p.features.itemsize, ragged, device_of(p.features))

    @property
    def chunk(self) -> int:
        """Columns of a row at a time."""
        block_c = int(triton.next_power_of_2(self.dim))
        if self.dim <= POINT:
            return max(2, block_c)
        return block_c if self.dim > WIDE else min(max(16, block_c), CHUNK_BYTES // self.itemsize)

    @property
    def chunks(self) -> int:
        """Of a row."""
        return -(-self.dim // self.chunk)

    @property
    def elements(self) -> int:
        """Of a tile that a thread holds, whatever the kernel."""
        return ODD_ELEMENTS if self.dim > POINT and self.dim % 16 else TILE_ELEMENTS

    def fold(self, warps: int) -> int:
        """The least rows of a tile: with fewer the compiler would give a row to more threads, in another order."""
        return _fold(self.dim, self.itemsize, self.chunk, warps)

    def parts(self, programs: int, warps: int) -> int:
        """Of a set: no more than there are programs, and none smaller than a tile."""
        if self.rows is None:
            return 1
        return max(1, min(programs // max(self.sets, 1), self.rows // max(SPLIT_ROWS, self.fold(warps))))


def _fold(dim: int, itemsize: int, chunk: int, warps: int) -> int:
    """Rows of a tile in different threads, which load 16 bytes at once where rows are aligned."""
    vector = min(chunk, 16 // itemsize) if dim == chunk or dim % 16 == 0 else 1
    return max(1, 32 * warps * vector // chunk)


def _rows_fit_a_warp(features: Tensor) -> bool:
    """Whether one warp sums a row in programs of four, too, so that these give the bits of those of one."""
    *sets, row, _ = features.stride()
    aligned = row % 16 == 0 and all(stride % 16 == 0 for stride in sets) and features.data_ptr() % 16 == 0
    return features.shape[-1] <= 32 or aligned


class Plan(NamedTuple):
    """How a kernel is launched: the constants it is built with, how many programs share a set, and which sets it is
    for."""

    block_n: int
    chunk: int
    chunks: int
    warps: int = WARPS
    parts: int = 1
    split: int = WHOLE.value
    block_r: int = SCALAR_ROWS
    at_once: int = BACKWARD_AT_ONCE
    shortest: int = 0
    longest: int = MAX_ROWS
    last: int = 0
    """Sets of up to so many rows are begun with last, by programs of their own."""
    look: int = 0
    """How many sets a program looks through for those of the launch; 0: each set has programs of its own."""
    held: bool = False
    """Forward, rows stay in registers from step to step: a set is a tile."""

    @property
    def name(self) -> str:
        """How a set is divided."""
        meeting = {COOPERATIVE.value: "at barriers", LAUNCHES.value: "between launches"}.get(self.split)
        return f"split into {self.parts} parts that meet {meeting}" if meeting else "a program a set"

    @property
    def block_c(self) -> int:
        """Columns of a row, up to a power of two."""
        return int(triton.next_power_of_2(self.chunk * self.chunks))

    def constants(self, p: Problem, **options: int) -> Constants:
        """What a kernel is built for."""
        return constants(  # type: ignore[no-any-return]
            Constants,
            SEEDED=p.seed is not None,
            NORMALIZED=p.normalized,
            EUCLIDEAN=p.euclidean,
            TIGHT=self.chunk == p.dim <= POINT and _lie_side_by_side(p.features),
            SPLIT=self.split,
            BLOCK_N=self.block_n,
            CHUNK=self.chunk,
            CHUNKS=self.chunks,
            BLOCK_C=self.block_c,
            BLOCK_P=int(triton.next_power_of_2(self.parts)),
            BLOCK_R=self.block_r,
            FOLD=min(self.block_n, _fold(p.dim, p.features.itemsize, self.chunk, self.warps)),
            TWICE=self.last > 0,
            LOOK=self.look,
            HELD=self.held,
            **options,
        )

    def programs(self, sets: int) -> int:
        """How many are launched."""
        return -(-sets // self.look) if self.look else sets * (2 if self.last else self.parts)

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told beside the kernel's own constants."""
        options: dict[str, Any] = {"num_warps": self.warps}
        if torch.version.hip is None:
            # a multiple of 8, as registers are handed out; all programs of a cooperative launch must run at once
            most = REGISTERS // (32 * self.warps * self.at_once) // 8 * 8
            options["maxnreg"] = min(255, most) if self.split == COOPERATIVE.value or self.last else 255
        return options | ({"launch_cooperative_grid": True} if self.split == COOPERATIVE.value else {})


def _lie_side_by_side(features: Tensor) -> bool:
    *sets, row, column = features.stride()
    return column == 1 and row == features.shape[-1] and all(stride % row == 0 for stride in sets)


def forward_plans(sizes: Sizes, at_once: int = FORWARD_AT_ONCE) -> tuple[Plan, ...]:
    """The forward launches, with programs of which so many share a multiprocessor.

    Sets that are too few to fill the device are split, if each part still gets SPLIT_ROWS rows. Where lengths are on
    the device, one launch takes the short sets, with programs of a warp, and one the others.
    """
    width = sizes.chunk * sizes.chunks
    room = _Room(
        max(sizes.chunk, width // 2), sizes.elements
    )  # the compiler loads all chunks ahead, where they are few
    if sizes.itemsize == 4 and sizes.dim >= FLOATS:
        at_once = min(at_once, FLOATS_AT_ONCE)
    return _tiers(sizes, room, WARPS) or (_holding(sizes, _whole(sizes, room, at_once)),)


def backward_plans(sizes: Sizes, euclidean: bool = False) -> tuple[Plan, ...]:
    """As :func:`forward_plans`. Squared distances, whose rows are seen from one of them, leave fewer registers."""
    holds = sizes.dim in BACKWARD_COLUMNS and not euclidean
    room = _Room(  # a row has two weights and two sums beside it
        max(2 * POINT, sizes.chunk * sizes.chunks), BACKWARD_ELEMENTS if holds else sizes.elements
    )
    short_at_once = SHORT_REST_AT_ONCE if euclidean else SHORT_AT_ONCE
    return _tiers(sizes, room, WIDE_WARPS, short_at_once) or (_whole(sizes, room, BACKWARD_AT_ONCE),)


class _Room(NamedTuple):
    """What a kernel has for a tile."""

    held: int  # elements of a row that are in registers at once
    elements: int  # of a tile that a thread holds


def _plan(sizes: Sizes, room: _Room, at_once: int, warps: int, **options: Any) -> Plan:
    """A plan for parts of sets, with programs of so many ``warps``."""
    block_n = 1 << max(1, (room.elements * 32 * warps // max(room.held, POINT)).bit_length() - 1)
    block_r = max(SCALAR_ROWS * warps // WARPS, block_n if sizes.dim <= POINT else 0)
    if sizes.rows is not None:
        each = int(triton.next_power_of_2(-(-max(sizes.rows, 1) // options.get("parts", 1))))
        block_n, block_r = max(2, min(block_n, each)), max(16, min(block_r, each))
    block_n = max(block_n, sizes.fold(warps))
    block_r, at_once = max(block_r, block_n), max(1, at_once * WARPS // warps)
    return Plan(block_n, sizes.chunk, sizes.chunks, warps, block_r=block_r, at_once=at_once, **options)


def _whole(sizes: Sizes, room: _Room, at_once: int) -> Plan:
    """One launch for all sets."""
    warps = WIDE_WARPS if room.held > WIDE else WARPS
    parts = sizes.parts(sizes.device.processors * max(1, at_once * WARPS // warps), warps)
    split = (COOPERATIVE if sizes.device.cooperative else LAUNCHES) if parts > 1 else WHOLE
    return _plan(sizes, room, at_once, warps, parts=parts, split=split.value)


def _holding(sizes: Sizes, plan: Plan) -> Plan:
    """A plan whose only tile has all of a set's rows, where so many fit its threads' registers; else the given."""
    elements = HELD_ELEMENTS if (sizes.dim, sizes.itemsize) == (512, 2) else HELD_REST_ELEMENTS
    if sizes.rows is None or plan.parts > 1 or sizes.dim <= POINT or sizes.dim % 16:
        return plan
    block_n = max(plan.block_n, int(triton.next_power_of_2(sizes.rows)))
    if block_n * plan.chunk * plan.chunks > elements * 32 * plan.warps:
        return plan
    return plan._replace(block_n=block_n, block_r=max(plan.block_r, block_n), held=True)


def _tiers(sizes: Sizes, room: _Room, warps: int, short_at_once: int = SHORT_AT_ONCE) -> tuple[Plan, ...]:
    """Two launches for sets whose lengths are on the device, programs of so many ``warps`` for long ones and those of
    one warp for short ones; none where one launch is as good."""
    few = sizes.rows is not None and sizes.rows <= SHORT_ROWS
    if not sizes.ragged or sizes.sets <= 1 or room.held > WIDE or few:
        return ()
    if sizes.parts(sizes.device.processors * FORWARD_AT_ONCE, WARPS) > 1:
        return ()
    at_once = short_at_once if (sizes.dim, sizes.itemsize) == (512, 2) else SHORT_REST_AT_ONCE
    shorter = _plan(sizes, room._replace(elements=sizes.elements), at_once, 1, longest=SHORT_ROWS, last=LAST_ROWS)
    longer = _plan(sizes, room, LONG_AT_ONCE, warps, shortest=SHORT_ROWS + 1, look=LOOK)
    return longer, shorter._replace(block_r=max(shorter.block_n, WARP_ROWS))
