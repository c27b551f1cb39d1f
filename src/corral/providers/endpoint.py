"""The comm endpoint of a participant of a native cluster."""

from corral.base.world import World
from corral.comm.actions import Limits
from corral.providers.ipc_wire import Attached
from corral.providers.native_comm import NativeComm


def native_endpoint(world: World, identity: Attached, ticket: bytes) -> NativeComm:
    """`identity` is what corrald said at `Attach`; `ticket` is what the ordered join announces."""
    return NativeComm(
        world,
        identity.me,
        cluster=identity.cluster,
        cluster_uuid=identity.cluster_uuid,
        limits=Limits.for_detect(identity.detect_ns, identity.recover_ns),
        ticket=ticket,
    )
