"""The arrangement of the workers."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from raydist.core.dist import Workers

SHARD = "shard"


def make_mesh(workers: Workers) -> DeviceMesh:
    """A one-dimensional mesh over all workers, along which parameters are sharded by rows.

    The process group must exist. Any number of workers goes: where it does not divide a parameter's rows, FSDP2 pads,
    and workers beyond the last row hold an empty shard.
    """
    return init_device_mesh(workers.device.type, (workers.world_size,), mesh_dim_names=(SHARD,))
