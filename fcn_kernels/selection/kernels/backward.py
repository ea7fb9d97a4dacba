"""The backward kernel: from the last pick to the first, then the rows' gradient, of one set in one program.

With c the gradient at pick k, complete once the later picks are done, and y its softmax,

    along(n) = c . x_n,  mean = sum_n y(n) along(n),  chain(n) += y(n) (along(n) - mean) / tau

is the gradient of the running minimum. The share of it that belongs to the distance to pick k - 1 gives
dcos(n) = -scale q^gamma share chain, and sum_n dcos(n) u_n is what pick k - 1 gets of it. That sum is linear in the
mean, which is known only once all rows were seen: the streaming tier sums the two parts of it in the pass that makes
the mean, so each step reads the rows once, as does the last, which writes their gradient.
"""

import triton
import triton.language as tl

from fcn_kernels.device.rows import load_row, load_rows, locate, products
from fcn_kernels.device.splits import COOPERATIVE, LAUNCHES, WHOLE, divide, grid_barrier
from fcn_kernels.selection.kernels.common import RAGGED, RESIDENT_TIER, UNSPECIALIZED, perturb, power, scalar


@triton.jit
def load_marks(norms_ptr, quality_ptr, first, rows, inside):
    """(can be picked, norm, quality) [n], harmless ones where a row cannot be picked."""
    mark = tl.load(norms_ptr + first + rows, mask=inside, other=-1.0)
    open_to = mark > 0
    norm = tl.where(open_to, mark, 1.0)
    quality = norm
    if quality_ptr is not None:
        quality = tl.load(quality_ptr + first + rows, mask=open_to, other=1.0)
    return open_to, norm, quality


@triton.jit
def load_gap(gaps_ptr, first, rows, inside, step, R):
    """A step's gap [n], whether the row was still in the softmax, and the step's share of the gradient.

    The share is 1 where the step came nearer than all before it, 1/2 where it tied with them, else 0.
    """
    at = gaps_ptr + first + rows
    saved = tl.load(at + step * R, mask=inside, other=0.0)
    before = tl.load(at + (step - 1) * R, mask=inside & (step > 0), other=float("inf"))
    tied = saved.to(tl.int32, bitcast=True) < 0
    gap = tl.abs(saved)
    share = tl.where(tied, 0.5, tl.where(gap < tl.abs(before), 1.0, 0.0))
    return gap, saved > -3.0, share


@triton.jit
def softmax_of(
    logits, rows, inside, open_to, step, set_id, first, R, noise_ptr, seed, normalizer, tau, SEEDED: tl.constexpr
):  # fmt: skip
    """A step's softmax [n], from its logits without noise.

    The normalizer carries the rounding of logits / tau, which a small tau makes large: rounding must not take the
    exponent above 0, and the sum is 1 only within eps |logits| / tau, see ``along_pick``.
    """
    noisy = perturb(logits, rows, inside, step, set_id, first, R, noise_ptr, seed, SEEDED)
    return tl.where(open_to, tl.exp(tl.minimum(noisy / tau - normalizer, 0.0)), 0.0)


@triton.jit
def along_pick(arriving, rows_ptr, indices_ptr, at, there, stride_row, cols, C):
    """The product of the arriving gradient with its pick's row.

    A softmax that summed to 1 would make y (along - sum y along) the same whatever is taken off along. Taking this
    off leaves sum y along as small as the gradient itself where y is all but one-hot, and the error of its sum too.
    """
    row = tl.load(indices_ptr + at).to(tl.int32)
    return tl.sum(arriving * load_row(rows_ptr, row, there, stride_row, cols, C).to(tl.float32), axis=0)


@triton.jit
def settle_chain(
    chain_ptr, soft_ptr, dcos_ptr, norms_ptr, quality_ptr, gaps_ptr, first, low, high, step, R, mean, scale, gamma,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Once the softmax mean of ``step`` is known: take it off the chain, and divide the chain between the distances."""
    dcos_ptr += (step - 1) * R + first
    for begin in range(low, high, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        inside = rows < high
        _, _, quality = load_marks(norms_ptr, quality_ptr, first, rows, inside)
        _, _, share = load_gap(gaps_ptr, first, rows, inside, step - 1, R)
        chain = tl.load(chain_ptr + first + rows, mask=inside, other=0.0)
        chain -= mean * tl.load(soft_ptr + first + rows, mask=inside, other=0.0)
        tl.store(dcos_ptr + rows, -scale * power(quality, gamma) * share * chain, mask=inside)
        tl.store(chain_ptr + first + rows, chain - share * chain, mask=inside)


@triton.jit
def settle_quality(dquality_ptr, soft_ptr, first, low, high, mean, BLOCK: tl.constexpr):
    """Once the first pick's softmax mean is known: take it off the quality's gradient."""
    for begin in range(low, high, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        inside = rows < high
        dquality = tl.load(dquality_ptr + first + rows, mask=inside, other=0.0)
        dquality -= mean * tl.load(soft_ptr + first + rows, mask=inside, other=0.0)
        tl.store(dquality_ptr + first + rows, dquality, mask=inside)


@triton.jit
def project(pull, rows_ptr, norms_ptr, indices_ptr, base, first, stride_row, step, cols, C, NORMALIZED: tl.constexpr):
    """From the gradient at the unit vector of pick ``step`` to that at its row: (I - u u^T) / |x|."""
    if not NORMALIZED:
        row = tl.load(indices_ptr + base + step).to(tl.int32)
        length = tl.load(norms_ptr + first + row)
        u = load_row(rows_ptr, row, True, stride_row, cols, C).to(tl.float32) / length
        pull = (pull - tl.sum(pull * u, axis=0) * u) / length
    return pull


@triton.jit
def total_of(means_ptr, slot, parts, BLOCK_P: tl.constexpr):
    """The sum of one number of each part, in their order."""
    part = tl.arange(0, BLOCK_P)
    return tl.sum(tl.load(means_ptr + slot + part, mask=part < parts, other=0.0, cache_modifier=".cg"), axis=0)


@triton.jit
def share_mean(
    mean,
    means_ptr,
    barrier_ptr,
    slot,
    slots,
    set_id,
    part,
    parts,
    met,
    mine,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The first pick's softmax mean over all parts; `mine`: this launch is the one that has this part's own."""
    if SPLIT != WHOLE:
        if SPLIT == COOPERATIVE:
            mine = True
        if mine:
            tl.store(means_ptr + 2 * slots + slot + part, mean)
        if SPLIT == COOPERATIVE:
            met += 1
            grid_barrier(barrier_ptr + set_id, parts * met)
        mean = total_of(means_ptr + 2 * slots, slot, parts, BLOCK_P)
    return mean, met


@triton.jit
def sum_parts(sums_ptr, totals_ptr, slot, set_id, part, parts, C, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr):
    """Add the parts' vectors [2 C], each part a share of the columns, in the order of the parts."""
    source = tl.arange(0, BLOCK_P)
    for begin in range(part * BLOCK_S, 2 * C, parts * BLOCK_S):
        cols = begin + tl.arange(0, BLOCK_S)
        at = (slot + source).to(tl.int64)[:, None] * (2 * C) + cols[None, :]
        there = (source < parts)[:, None] & (cols < 2 * C)[None, :]
        values = tl.load(sums_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
        tl.store(totals_ptr + set_id.to(tl.int64) * (2 * C) + cols, tl.sum(values, axis=0), mask=cols < 2 * C)


@triton.jit
def load_pull(totals_ptr, set_id, mean, cols, C):
    """sum_n dcos(n) u_n of a split set, from its two parts."""
    at = totals_ptr + set_id.to(tl.int64) * (2 * C) + cols
    fixed = tl.load(at, mask=cols < C, other=0.0, cache_modifier=".cg")
    return fixed - mean * tl.load(at + C, mask=cols < C, other=0.0, cache_modifier=".cg")


@triton.jit
def assemble(
    rows, inside, open_to, norm, rows_ptr, gaps_ptr, norms_ptr, indices_ptr, pulls_ptr, dcos_ptr,
    base, first, stride_row, cols, C, R, picks, NORMALIZED: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The rows' gradient [n, c] but for the part along the row itself, d log w [n] and sum_j dcos_j [n]."""
    gradient = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    dlogweight = tl.zeros_like(norm)
    total = tl.zeros_like(norm)
    for step in range(picks):
        row = tl.load(indices_ptr + base + step).to(tl.int32)
        pull = tl.load(pulls_ptr + (base + step) * C + cols, mask=cols < C, other=0.0)
        gradient += tl.where(rows == row, 1.0, 0.0)[:, None] * pull[None, :]
        if step + 1 < picks:
            at = step * R + first + rows
            dcos = tl.load(dcos_ptr + at, mask=inside & open_to, other=0.0)
            gap = tl.abs(tl.load(gaps_ptr + at, mask=inside & open_to, other=0.0))
            dlogweight -= gap * dcos
            total += dcos
            direction = load_row(rows_ptr, row, True, stride_row, cols, C).to(tl.float32)
            if not NORMALIZED:
                direction = direction / tl.load(norms_ptr + first + row)
                dcos = dcos / norm
            gradient += dcos[:, None] * direction[None, :]
    return gradient, dlogweight, total


@triton.jit
def backward_set(
    rows_ptr, quality_ptr, gamma, noise_ptr, seed, grad_ptr, indices_ptr, counts_ptr, normalizers_ptr, gaps_ptr,
    norms_ptr, drows_ptr, dquality_ptr, dgamma_ptr, pulls_ptr, dcos_ptr, chain_ptr, soft_ptr, means_ptr, sums_ptr,
    totals_ptr, barrier_ptr, set_id, part, parts, turn, first, count, extent, stride_row, C, K, R, tau, scale,
    SEEDED: tl.constexpr, NORMALIZED: tl.constexpr, CHOSEN: tl.constexpr, RESIDENT: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One part of one set: rows [low, high) of [0, count); what is beyond, to extent, is padding and gets zeros.

    A split set goes through turns: two a step (its pass over the rows; the sum over the parts), then the softmax mean
    of the first pick where that has to come first, the rows' gradient, and what of it waited for that mean. Launches
    take one turn each; in a cooperative launch there is a barrier between them.
    """
    cols = tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_N)
    picks = tl.load(counts_ptr + set_id).to(tl.int32)
    base = set_id.to(tl.int64) * K
    slot = set_id * parts
    low, high, write_to = 0, count, extent
    begin_back, end_back, pass_to = 0, picks - 1, count
    slots = tl.num_programs(0)
    met = 0
    if SPLIT != WHOLE:
        low, high = divide(count, part, parts, BLOCK_N)
        write_to = high
        if part == parts - 1:
            write_to = extent
        pass_to = high
        if SPLIT == LAUNCHES:
            begin_back = turn // 2
            end_back = tl.minimum(begin_back + 1, end_back)
            if turn % 2 == 1:
                pass_to = low

    if RESIDENT:
        inside = lane < count
        open_to, norm, quality = load_marks(norms_ptr, quality_ptr, first, lane, inside)
        # 0 * NaN is NaN: rows that cannot be picked must not meet the sums below
        held = load_rows(rows_ptr, lane, open_to, stride_row, cols, C)
        weight = scale * power(quality, gamma)
        chain = tl.zeros_like(norm)

    pull = tl.zeros((BLOCK_C,), tl.float32)  # what the later picks give to the next one down
    for back in range(begin_back, end_back):
        step = picks - 1 - back
        if SPLIT == LAUNCHES:
            if back > 0:
                mean = total_of(means_ptr + (step + 1) % 2 * slots, slot, parts, BLOCK_P)
                settle_chain(
                    chain_ptr, soft_ptr, dcos_ptr, norms_ptr, quality_ptr, gaps_ptr, first, low, pass_to, step + 1, R,
                    mean, scale, gamma, BLOCK_R,
                )  # fmt: skip
                pull = load_pull(totals_ptr, set_id, mean, cols, C)
                pull = project(
                    pull, rows_ptr, norms_ptr, indices_ptr, base, first, stride_row, step, cols, C, NORMALIZED
                )
                tl.debug_barrier()
        arriving = tl.load(grad_ptr + (base + step) * C + cols, mask=cols < C, other=0.0).to(tl.float32) + pull
        # parts that add up a step's sums must not mistake them for the step's before
        known = cols < C
        if SPLIT == LAUNCHES:
            known &= turn % 2 == 0
        tl.store(pulls_ptr + (base + step) * C + cols, arriving, mask=known)
        normalizer = tl.load(normalizers_ptr + base + step)
        centre = along_pick(arriving, rows_ptr, indices_ptr, base + step, True, stride_row, cols, C)
        if RESIDENT:
            gap, in_softmax, share = load_gap(gaps_ptr, first, lane, inside, step - 1, R)
            soft = softmax_of(
                gap * weight, lane, inside, open_to & in_softmax, step, set_id, first, R, noise_ptr, seed,
                normalizer, tau, SEEDED,
            )  # fmt: skip
            tile = held.to(tl.float32)
            along = products(tile, arriving) - centre
            chain += soft * (along - tl.sum(soft * along, axis=0)) / tau
            dcos = -weight * share * chain
            chain -= share * chain
            tl.store(dcos_ptr + (step - 1) * R + first + lane, dcos, mask=inside)
            if not NORMALIZED:
                dcos = dcos / norm
            pull = tl.sum(tile * dcos[:, None], axis=0)
        else:
            mean = 0.0
            fixed = tl.zeros((BLOCK_C,), tl.float32)
            by_mean = tl.zeros((BLOCK_C,), tl.float32)
            for begin in range(low, pass_to, BLOCK_N):
                rows = begin + lane
                inside = rows < high
                open_to, norm, quality = load_marks(norms_ptr, quality_ptr, first, rows, inside)
                tile = load_rows(rows_ptr, rows, open_to, stride_row, cols, C).to(tl.float32)
                gap, in_softmax, share = load_gap(gaps_ptr, first, rows, inside, step - 1, R)
                weight = scale * power(quality, gamma)
                soft = softmax_of(
                    gap * weight, rows, inside, open_to & in_softmax, step, set_id, first, R, noise_ptr, seed,
                    normalizer, tau, SEEDED,
                )  # fmt: skip
                along = products(tile, arriving) - centre
                mean += tl.sum(soft * along, axis=0)
                chain = tl.load(chain_ptr + first + rows, mask=inside & (back > 0), other=0.0)
                chain += soft * along / tau
                soft = soft / tau
                # The compiler loads the chain once for the store and once for the sums: all before any is replaced.
                tl.debug_barrier()
                tl.store(chain_ptr + first + rows, chain, mask=inside)
                tl.store(soft_ptr + first + rows, soft, mask=inside)
                to_cos = -weight * share
                if not NORMALIZED:
                    to_cos = to_cos / norm
                fixed += tl.sum(tile * (to_cos * chain)[:, None], axis=0)
                by_mean += tl.sum(tile * (to_cos * soft)[:, None], axis=0)
            if SPLIT != WHOLE:
                if SPLIT == COOPERATIVE or turn % 2 == 0:
                    at = sums_ptr + (slot + part).to(tl.int64) * (2 * C) + cols
                    tl.store(means_ptr + step % 2 * slots + slot + part, mean)
                    tl.store(at, fixed, mask=cols < C)
                    tl.store(at + C, by_mean, mask=cols < C)
                if SPLIT == COOPERATIVE:
                    met += 1
                    grid_barrier(barrier_ptr + set_id, parts * met)
                if SPLIT == COOPERATIVE or turn % 2 == 1:
                    sum_parts(sums_ptr, totals_ptr, slot, set_id, part, parts, C, BLOCK_P, BLOCK_S)
                if SPLIT == COOPERATIVE:
                    met += 1
                    grid_barrier(barrier_ptr + set_id, parts * met)
                    mean = total_of(means_ptr + step % 2 * slots, slot, parts, BLOCK_P)
                    pull = load_pull(totals_ptr, set_id, mean, cols, C)
            else:
                pull = fixed - mean * by_mean
                tl.debug_barrier()  # rows change hands between threads
            if SPLIT != LAUNCHES:
                settle_chain(
                    chain_ptr, soft_ptr, dcos_ptr, norms_ptr, quality_ptr, gaps_ptr, first, low, high, step, R, mean,
                    scale, gamma, BLOCK_R,
                )  # fmt: skip
                tl.debug_barrier()
        if SPLIT != LAUNCHES:
            pull = project(
                pull, rows_ptr, norms_ptr, indices_ptr, base, first, stride_row, step - 1, cols, C, NORMALIZED
            )

    mean_to, tail_to = high, high
    known = cols < C
    ending = 1
    if SPLIT == LAUNCHES:
        ending = turn - 2 * (K - 1)  # 0: the mean, 1: the rows' gradient, 2: what waited for the mean
        known &= ending >= 0
        if ending != 0:
            mean_to = low
        if ending != 1:
            write_to = low
        if ending != 2:
            tail_to = low
        if (ending >= 0) & (picks > 1):
            mean_before = total_of(means_ptr + slots, slot, parts, BLOCK_P)
            settle_chain(
                chain_ptr, soft_ptr, dcos_ptr, norms_ptr, quality_ptr, gaps_ptr, first, low, mean_to, 1, R, mean_before,
                scale, gamma, BLOCK_R,
            )  # fmt: skip
            pull = load_pull(totals_ptr, set_id, mean_before, cols, C)
            pull = project(pull, rows_ptr, norms_ptr, indices_ptr, base, first, stride_row, 0, cols, C, NORMALIZED)
    there = picks > 0
    arriving = tl.load(grad_ptr + base * C + cols, mask=(cols < C) & there, other=0.0).to(tl.float32) + pull
    tl.store(pulls_ptr + base * C + cols, arriving, mask=known)
    normalizer = tl.load(normalizers_ptr + base)
    centre = along_pick(arriving, rows_ptr, indices_ptr, base, there, stride_row, cols, C)
    tl.debug_barrier()  # pulls and dcos are read by other threads than wrote them

    # Where the quality is the norm, its gradient is part of the rows', so the mean has to come first.
    mean = 0.0
    if CHOSEN and quality_ptr is None:
        if RESIDENT:
            along = products(held.to(tl.float32), arriving) - centre
            soft = softmax_of(
                quality, lane, inside, open_to & there, 0, set_id, first, R, noise_ptr, seed, normalizer, tau, SEEDED
            )
            mean += tl.sum(soft * along, axis=0)
        else:
            for begin in range(low, mean_to, BLOCK_N):
                rows = begin + lane
                inside = rows < high
                open_to, norm, quality = load_marks(norms_ptr, quality_ptr, first, rows, inside)
                tile = load_rows(rows_ptr, rows, open_to, stride_row, cols, C).to(tl.float32)
                along = products(tile, arriving) - centre
                soft = softmax_of(
                    quality, rows, inside, open_to & there, 0, set_id, first, R, noise_ptr, seed, normalizer, tau,
                    SEEDED,
                )  # fmt: skip
                mean += tl.sum(soft * along, axis=0)
        mean, met = share_mean(
            mean, means_ptr, barrier_ptr, slot, slots, set_id, part, parts, met, ending == 0, SPLIT, BLOCK_P
        )

    # The rows' gradient, in tiles small enough to stand beside the rows; a resident set's come from L1 or L2 again.
    dgamma = 0.0
    tail = 0.0  # the mean, where it comes last
    for begin in range(low, write_to, BLOCK_W):
        at = begin + tl.arange(0, BLOCK_W)
        member = at < high
        can, length, q = load_marks(norms_ptr, quality_ptr, first, at, member)
        rows_tile = load_rows(rows_ptr, at, can, stride_row, cols, C).to(tl.float32)
        gradient, dlogweight, total = assemble(
            at, member, can, length, rows_ptr, gaps_ptr, norms_ptr, indices_ptr, pulls_ptr, dcos_ptr,
            base, first, stride_row, cols, C, R, picks, NORMALIZED, BLOCK_W, BLOCK_C,
        )  # fmt: skip
        dgamma += tl.sum(dlogweight * tl.log(q), axis=0)
        dquality = gamma * dlogweight / q
        if CHOSEN:
            product = products(rows_tile, arriving) - centre
            chosen = softmax_of(
                q, at, member, can & there, 0, set_id, first, R, noise_ptr, seed, normalizer, tau, SEEDED
            )
            dquality += chosen * (product - mean) / tau
            if quality_ptr is not None:
                tail += tl.sum(chosen * product, axis=0)
                tl.store(soft_ptr + first + at, chosen / tau, mask=member)
        radial = tl.zeros_like(length)
        if not NORMALIZED:
            radial = -(total + dlogweight) / (length * length)
        if quality_ptr is None:
            radial += dquality / length
        gradient += radial[:, None] * rows_tile
        place = first + at
        written = at < write_to
        tl.store(
            drows_ptr + place[:, None] * C + cols[None, :],
            gradient.to(drows_ptr.dtype.element_ty),
            mask=written[:, None] & (cols < C)[None, :],
        )
        tl.store(dquality_ptr + place, dquality, mask=written)
    if ending == 1:
        tl.store(dgamma_ptr + slot + part, dgamma)
    if CHOSEN and quality_ptr is not None:
        tail, met = share_mean(
            tail, means_ptr, barrier_ptr, slot, slots, set_id, part, parts, met, ending == 1, SPLIT, BLOCK_P
        )
        tl.debug_barrier()
        settle_quality(dquality_ptr, soft_ptr, first, low, tail_to, tail, BLOCK_R)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_backward(
    rows_ptr,  # features: [B, N, C] by strides, or [T, C]
    quality_ptr,  # [R] float32, or None for the norms
    gamma_ptr,  # [1], or None for gamma_value
    gamma_value,
    noise_ptr,  # [K, R] float32, or None
    seed_ptr,  # [1] int64, or None
    seed_value: "i64",  # or negative: seed_ptr has it
    lengths_ptr,  # [B], or None
    cu_seqlens_ptr,  # [B + 1], or None
    order_ptr,  # [B], the sets in the order to start them in, or None
    grad_ptr,  # [B, K, C]
    indices_ptr,  # [B, K] int64
    counts_ptr,  # [B] int64
    normalizers_ptr,  # [B, K] float32
    gaps_ptr,  # [K - 1, R] float32
    norms_ptr,  # [R] float32
    drows_ptr,  # out [B, N, C] or [T, C]
    dquality_ptr,  # out [R] float32
    dgamma_ptr,  # out [B, parts] float32
    pulls_ptr,  # scratch [B, K, C] float32, the complete gradients at the picks
    dcos_ptr,  # scratch [K - 1, R] float32
    chain_ptr,  # scratch [R] float32 (streaming)
    soft_ptr,  # scratch [R] float32
    means_ptr,  # scratch [3, B, parts] float32: of even steps, odd steps, and step 0 (split)
    sums_ptr,  # scratch [B, parts, 2, C] float32, a step's row sums, without and by the mean (split)
    totals_ptr,  # scratch [B, 2, C] float32, their sums over the parts (split)
    barrier_ptr,  # [B] int32, zero: parts that arrived (split, cooperative)
    parts,
    turn,
    stride_set,
    stride_row,
    N,
    C,
    K,
    R: "i64",
    tau,
    scale,
    SEEDED: tl.constexpr,
    NORMALIZED: tl.constexpr,
    CHOSEN: tl.constexpr,  # the first pick was chosen by quality, not given
    TIER: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows of a tile
    BLOCK_W: tl.constexpr,  # rows of a tile whose gradient is being written
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows at a time where only their scalars are read
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,  # columns at a time where the parts' sums are added
):
    part = 0
    set_id = tl.program_id(0)
    if SPLIT != WHOLE:
        part = set_id % parts
        set_id = set_id // parts
    if order_ptr is not None:
        set_id = tl.load(order_ptr + set_id).to(tl.int32)
    first, count, offset = locate(set_id, lengths_ptr, cu_seqlens_ptr, stride_set, stride_row, N, R)
    extent = count if cu_seqlens_ptr is not None else N
    gamma = tl.cast(scalar(gamma_ptr, gamma_value), tl.float32)
    seed = (seed_ptr, seed_value)
    if TIER == RAGGED:
        resident = count <= BLOCK_N
    else:
        resident: tl.constexpr = TIER == RESIDENT_TIER
    if resident:
        backward_set(
            rows_ptr + offset, quality_ptr, gamma, noise_ptr, seed, grad_ptr, indices_ptr, counts_ptr, normalizers_ptr,
            gaps_ptr, norms_ptr, drows_ptr, dquality_ptr, dgamma_ptr, pulls_ptr, dcos_ptr, chain_ptr, soft_ptr,
            means_ptr, sums_ptr, totals_ptr, barrier_ptr, set_id, part, parts, turn, first, count, extent, stride_row,
            C, K, R, tau, scale,
            SEEDED, NORMALIZED, CHOSEN, True, SPLIT, BLOCK_N, BLOCK_W, BLOCK_C, BLOCK_R,
            BLOCK_P, BLOCK_S,
        )  # fmt: skip
    else:
        backward_set(
            rows_ptr + offset, quality_ptr, gamma, noise_ptr, seed, grad_ptr, indices_ptr, counts_ptr, normalizers_ptr,
            gaps_ptr, norms_ptr, drows_ptr, dquality_ptr, dgamma_ptr, pulls_ptr, dcos_ptr, chain_ptr, soft_ptr,
            means_ptr, sums_ptr, totals_ptr, barrier_ptr, set_id, part, parts, turn, first, count, extent, stride_row,
            C, K, R, tau, scale,
            SEEDED, NORMALIZED, CHOSEN, False, SPLIT, BLOCK_N, BLOCK_W, BLOCK_C, BLOCK_R,
            BLOCK_P, BLOCK_S,
        )  # fmt: skip
