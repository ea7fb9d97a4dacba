"""Heads in several processes: two train as one does, also where one of them has no set; states add up to the bit."""

import socket
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fcn_kernels import ClusterAggregate, ClusterState, CoresetAggregator

STEPS, SETS, ROWS, DIM, RANKS = 4, 4, 10, 16, 4


# The sets of each rank, and in the second case one without any.
SHARES = {"halves": (slice(0, 2), slice(2, 4)), "one rank empty": (slice(0, 4), slice(4, 4))}


def _train(
    share: slice, world: int, group: dist.ProcessGroup | None = None
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Losses of this rank's share of the batches, and the parameters at the end."""
    torch.manual_seed(0)
    head = CoresetAggregator(DIM, num_heads=4, dropout=0.0).double()
    model = DistributedDataParallel(head, process_group=group) if world > 1 else head
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        features = F.normalize(torch.randn(SETS, ROWS, DIM, generator=generator, dtype=torch.float64), dim=-1)
        quality = torch.rand(SETS, ROWS, generator=generator, dtype=torch.float64) * 5 + 1
        noise = -torch.empty(3, SETS, ROWS, dtype=torch.float64).exponential_(generator=generator).log()
        if step % 2:
            output = model(features[share], quality[share], noise=noise[:, share])
        else:  # packed: a rank without sets has no offset but 0
            sets = features[share].shape[0]
            output = model(
                features[share].flatten(0, 1),
                quality[share].flatten(),
                noise=noise[:, share].flatten(1),
                cu_seqlens=torch.arange(sets + 1) * ROWS,
            )
        loss = (output.descriptor.cumsum(-1).mean(-1) + output.norm.log()).sum() * world / SETS
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in head.parameters())
        optimizer.step()
        losses.append(loss.detach())
    return losses, head.state_dict()


def _state(rank: int, world: int) -> ClusterState:
    """Of this rank's chunks of the rows of four sets."""
    torch.manual_seed(0)
    head = ClusterAggregate(DIM, style_dim=0, norm_dim=16, num_heads=4).eval()
    rows = 3 * torch.randn(SETS, 64, DIM)
    chunks = rows.split(8, 1)[rank::world]
    with torch.no_grad():
        states = [head.update(chunk) for chunk in chunks]
    return reduce(ClusterState.__add__, states)


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    try:
        pair = dist.new_group([0, 1])
        torch.save(_state(rank, RANKS).all_reduce(), Path(folder) / f"state {RANKS} {rank}.pt")
        if rank > 1:
            return
        torch.save(_state(rank, 2).all_reduce(pair), Path(folder) / f"state 2 {rank}.pt")
        for name, shares in SHARES.items():
            losses, parameters = _train(shares[rank], 2, pair)
            for loss in losses:
                dist.all_reduce(loss, group=pair)
                loss /= 2
            torch.save((torch.stack(losses), parameters), Path(folder) / f"{name} {rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes, and two of them, wrote."""
    path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, args=(port, str(path)), nprocs=RANKS)
    return path


@pytest.mark.xdist_group("ranks")
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_states_of_1_2_and_4_ranks_add_up_to_the_same_bits(folder):
    expected = _state(0, 1)
    for name in [f"state {world} {rank}" for world in (2, 4) for rank in range(world)]:
        found = torch.load(folder / f"{name}.pt", weights_only=True)
        assert all(torch.equal(value, getattr(found, key)) for key, value in vars(expected).items()), name


@pytest.mark.xdist_group("ranks")
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_train_as_one(folder):
    expected_losses, expected = _train(slice(0, SETS), 1)
    for name in SHARES:
        for rank in range(2):
            losses, parameters = torch.load(folder / f"{name} {rank}.pt", weights_only=True)
            # float64, and only the order of sums differs
            assert torch.allclose(losses, torch.stack(expected_losses), rtol=0, atol=1e-10), name
            for parameter, value in expected.items():
                assert torch.allclose(parameters[parameter], value, rtol=0, atol=1e-10), (name, parameter)
