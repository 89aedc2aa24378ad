"""The partition of a model over servers, and the configs of its shards: of a new session, or of one that moves."""

from __future__ import annotations

from typing import Final

from stepwire.errors import InvalidRequestError
from stepwire.layout import place
from stepwire.sharding.partition import Partition
from stepwire.sharding.refusals import check_ids
from stepwire.v1 import optimizer_pb2, session_pb2
from stepwire.wire.messages import spec_to_wire, specs_from_wire

__all__ = ["configs_of", "partition_of"]

_LAYERWISE: Final = (optimizer_pb2.RULE_LAMB, optimizer_pb2.RULE_LARS)


def partition_of(config: session_pb2.SessionConfig, most: int) -> Partition:
    """Partition a model for at most `most` servers.

    Raises:
        InvalidRequestError: an option cannot be had from several servers.
        UnsupportedFeatureError: as `check_ids`.
    """
    layout = place(specs_from_wire(config), len(config.groups))
    partition = Partition.make(layout, most, within_tensors=config.optimizer.rule not in _LAYERWISE)
    if len(partition.shards) > 1:
        check_ids(config)
    keeps = config.gradient.missing_gradient == optimizer_pb2.MISSING_GRADIENT_POLICY_KEEP
    if len(partition.shards) > 1 and keeps and any(group.HasField("schedule") for group in config.groups):
        raise InvalidRequestError.of(
            "schedule",
            "it counts the updates of a whole group, and with missing_gradient 'keep' a server sees only those of its "
            "shard; send the learning rate with each step",
        )
    return partition


def configs_of(config: session_pb2.SessionConfig, partition: Partition) -> list[session_pb2.SessionConfig]:
    """Return the config of each shard's session: the whole's, with other tensors, and two phases if need be."""
    gradient = config.gradient
    decides = (
        gradient.HasField("clip_grad_norm")
        or any(group.HasField("clip_grad_norm") for group in config.groups)
        or gradient.non_finite != optimizer_pb2.NON_FINITE_POLICY_ALLOW
        or gradient.HasField("loss_scaling")
        or any(tensor.table.hashed for tensor in config.tensors)
    )
    together = config.aggregation
    if decides and 0 < together.required_workers < together.workers and len(partition.shards) > 1:
        raise InvalidRequestError.of(
            "aggregation.required_workers",
            "clipping by norm, and policies for NaN, are decided for all shards at once, and with fewer than all "
            "workers shards may differ in theirs; leave it out, or use non_finite='allow' without clipping",
        )
    configs = []
    for rank in range(len(partition.shards)):
        own = session_pb2.SessionConfig()
        own.CopyFrom(config)
        del own.tensors[:]
        own.tensors.extend(map(spec_to_wire, partition.specs(rank)))
        own.gradient.two_phase = decides and len(partition.shards) > 1
        configs.append(own)
    return configs
